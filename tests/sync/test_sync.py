"""Batch normalization over two real processes is that of one process with the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import CASES, PATIENCE

import batchnorm
from batchnorm import Ghost, Sync
from waiting import HANGS_AFTER

HERE = Path(__file__).parent


def started(arguments: list[str], folder: Path) -> str:
    """Run a script in two processes; what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=HANGS_AFTER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sync")
    started([str(HERE / "ranks.py"), "compute", str(folder / "found.json")], folder)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sync")
    started([str(HERE / "ranks.py"), "fail", str(folder / "found.json")], folder)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_as_one(computed: dict[str, Any], name: str) -> None:
    limits = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}
    for what, error in computed[name].items():
        limit = limits[CASES[name].dtype] if what in ("y", "x", "residual", "weight", "bias") else 1e-6
        assert error <= limit, f"{what}: {error}"


def test_renormalization_over_two_processes(computed: dict[str, Any]) -> None:
    assert all(error <= 1e-6 for error in computed["renorm"].values()), computed["renorm"]


def test_data_parallel_training_is_that_of_the_whole_batch(computed: dict[str, Any]) -> None:
    assert len(computed["training"]) == 14
    assert all(error <= 1e-6 for error in computed["training"].values()), computed["training"]


def test_one_short_message_each_way(computed: dict[str, Any]) -> None:
    for dtype, size in (("torch.float32", 4), ("torch.float64", 8)):
        assert computed["bytes"][dtype] == {"forward": size * (2 * 64 + 1), "backward": size * 2 * 64}


@pytest.mark.parametrize("step", ["uneven", "backward_missing"])
def test_a_process_that_waits_in_vain_says_for_which_layer(failed: dict[str, Any], step: str) -> None:
    (message, seconds), (other, _) = failed[step]
    direction = "backward" if step == "backward_missing" else "forward"
    assert message.startswith(f"head.norm (5 channels): its {direction} pass did not hear from all 2 processes")
    assert "Join(…, throw_on_early_termination=True)" in message
    assert seconds < 20 * PATIENCE  # and not the whole group's patience, 8 minutes
    assert other == ""


def test_other_channels_in_another_process(failed: dict[str, Any]) -> None:
    for rank, (message, seconds) in enumerate(failed["channels"]):
        assert message.startswith(f"head.norm ({5 + rank} channels): all processes must have the same number")
        assert "(5, 4), (6, 4)" in message
        assert seconds < PATIENCE  # nobody waited


@pytest.mark.parametrize(
    ("step", "told"),
    [("doubled", "(5, 4), (5, 8)"), ("floated", "(5, 4), (5, 8)"), ("other_channels", "(5, 4), (6, 4)")],
)
def test_a_layer_that_has_changed_in_one_process_alone(failed: dict[str, Any], step: str, told: str) -> None:
    for message, seconds in failed[step]:
        assert message.startswith("head.norm (")
        assert "all processes must have the same number of channels, and float64 in all or none" in message
        assert message.endswith(told)
        assert seconds < 20 * PATIENCE


def test_a_layer_that_has_changed_in_all_processes(failed: dict[str, Any]) -> None:
    assert [message for message, _ in failed["changed_by_all"]] == ["", ""]


def test_a_process_outside_the_group(failed: dict[str, Any]) -> None:
    (member, _), (outsider, _) = failed["outside"]
    assert member == ""
    assert outsider.startswith("head.norm (5 channels): this process (rank 1) is not in the process group")


def test_evaluation_waits_for_nobody(failed: dict[str, Any]) -> None:
    assert [message for message, _ in failed["evaluates_alone"]] == ["", ""]


def test_join_ends_all_processes_together(failed: dict[str, Any]) -> None:
    for message, _ in failed["joined"]:
        assert "exhausted" in message


def test_no_process_group() -> None:
    layer = batchnorm.BatchNorm1d(3, statistics=Sync())
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"process group has not been initialized.*torchrun"):
        layer(torch.randn(4, 3))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    layer.eval()(torch.randn(4, 3))


def test_ghosts_within_sync_are_refused() -> None:
    with pytest.raises(ValueError, match="Ghost cannot be over Sync"):
        Ghost(4, over=Sync())


def test_the_example(tmp_path: Path) -> None:
    example = HERE.parents[1] / "examples" / "sync_batchnorm.py"
    printed = started([str(example), "--epochs", "2"], tmp_path)
    assert "2 converted, 0 skipped" in printed
    accuracy = float(printed.rsplit("accuracy ", 1)[1].split("%")[0])
    assert accuracy > 50, printed
