"""The benchmark of folding: contenders that are right, none that is wrong, and reports. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import __main__ as entry
from benchmarks import folding, folding_report
from benchmarks.__main__ import main
from benchmarks.models import ConvNorm

SHAPE = (2, 3, 8, 8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in place of the real ones."""
    norm = folding.Apart
    make: Any = lambda: nn.Sequential(  # noqa: E731
        ConvNorm(norm, 3, 8, 3), ConvNorm(norm, 8, 8, 3, groups=8, activation="relu6"),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 100),
    )  # fmt: skip
    for name in ("ResNet-18", "MobileNetV2"):
        monkeypatch.setitem(folding.NETWORKS, name, make)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_way_of_folding_is_timed_and_right(layout: str) -> None:
    row = folding.measure(folding.Job("ResNet-18", SHAPE, layout, compiled=False), 0.01)
    assert row.skipped == {}
    assert list(row.seconds) == [folding.UNFOLDED, folding.FOLDED, folding.FX]
    assert list(row.gains) == [folding.FOLDED, folding.FX]
    assert all(0 <= error < 1e-5 for error in row.errors.values())
    assert row.rounds >= 6


@pytest.mark.slow  # it compiles C++
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # inductor's
def test_inductors_freezing_folds_as_well() -> None:
    row = folding.measure(folding.Job("ResNet-18", SHAPE), 0.01)
    assert row.skipped == {}
    assert {folding.FREEZING, folding.FOLDED_FREEZING} < set(row.seconds)


def test_a_wrong_contender_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = folding.fold

    def wrong(network: nn.Module, x: torch.Tensor) -> Any:
        made = right(network, x)
        with torch.no_grad():
            made.model[0].conv.weight.mul_(1.01)
        return made

    monkeypatch.setattr(folding, "fold", wrong)
    row = folding.measure(folding.Job("ResNet-18", SHAPE, compiled=False), 0.01)
    assert row.skipped[folding.FOLDED].startswith("it is off by")
    assert folding.FOLDED not in row.seconds
    assert folding.FX in row.seconds


def test_the_command_writes_its_own_files(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--folding", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "folding.json").read_text())
    assert (data["schema"], data["quick"], len(data["rows"])) == ("batchnorm.benchmarks.folding", True, 2)
    assert data["rows"][0]["gains"][folding.FOLDED]["median"] > 0
    text = (tmp_path / "folding.md").read_text()
    assert "quick run" in text
    assert "| ResNet-18, 2×3×32×32 contiguous" in text
    assert folding.FX in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folding.json", "folding.md"]


def test_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "benchmarks" / "README.md"
    readme = tmp_path / "README.md"
    readme.write_text(page.read_text())
    monkeypatch.setattr(entry, "HERE", tmp_path)
    command = ["--folding", "--out", str(tmp_path / "out"), "--publish"]
    refused = CliRunner().invoke(main, [*command, "--quick"])
    assert refused.exit_code == 1
    assert "is not published" in str(refused.exception)
    few = folding.jobs(quick=True)
    monkeypatch.setattr(folding_report, "jobs", lambda quick: few)
    monkeypatch.setattr(folding_report, "keep_freed_memory", lambda: True)
    done = CliRunner().invoke(main, [*command, "--seconds", "0.01"])
    assert done.exit_code == 0, done.output
    before, _, after = readme.read_text().partition("## Folding\n")
    assert before == page.read_text().partition("## Folding\n")[0]
    assert "### Evaluation of folded networks" in after
    assert after.endswith(page.read_text().partition("## Changing whole models\n")[2])


def test_the_full_plan_names_networks_that_can_be_built() -> None:
    pytest.importorskip("transformers")
    jobs = folding.jobs(quick=False)
    assert {job.network for job in jobs} == set(folding.NETWORKS)
    for name in set(folding.NETWORKS) - {"MobileNetV2"}:
        with torch.device("meta"), torch.no_grad():
            network, x = folding.network_of(folding.Job(name, (1, 3, 32, 32)))
            assert network(x).shape == (1, 100)
