"""Recalibration by two real processes is that of one with all their data, and no process waits in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_sync import started

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recalibration")
    started([str(HERE / "recalibration.py"), str(folder / "found.json")], folder)
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


@pytest.mark.parametrize("case", ["", ", one without data", ", SyncBatchNorm", ", Sync", ", DistributedDataParallel"])
@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_two_processes_are_as_one(found: dict[str, Any], method: str, case: str) -> None:
    errors = found[method + case]
    batches, samples = errors.pop("batches"), errors.pop("samples")
    assert (batches, samples) == ((2, 9) if "without" in case else (4, 40))
    assert errors.pop("between") == 0
    assert len(errors) == 6
    assert all(error <= 1e-12 for error in errors.values()), errors


def test_both_stop_together_when_it_is_precise_enough(found: dict[str, Any]) -> None:
    told = found["tolerance"]
    assert told["stopped"] == "tolerance"
    assert told["worst"] <= 0.05
    assert 5 <= told["batches"] < 1000
    assert told["between"] == 0


def test_a_layer_that_one_process_calls_and_a_batch_that_is_not_finite(found: dict[str, Any]) -> None:
    told = found["sometimes"]
    assert told["counts"] == [16, 8, 16, 8]
    assert told["skipped"] == [1, 1]
    assert told["between"] == 0


@pytest.mark.parametrize("where", ["data", "metric 1", "metric 2"])
def test_an_error_in_one_process_ends_both(found: dict[str, Any], where: str) -> None:
    first, second = found[f"failing: {where}"]
    assert first[0] == "RuntimeError: process 1 of the group has failed: see its own error"
    assert second[0] == "OSError: the disk is full"
    for _, seconds, same in (first, second):
        assert seconds < 100  # nobody waited for the end of the group's patience, 2 minutes
        assert same


def test_models_of_other_sizes(found: dict[str, Any]) -> None:
    for told, _, same in found["failing: sizes"]:
        assert told.startswith("RuntimeError: the processes have different models, or statistics of different sizes")
        assert same


def test_no_data_anywhere(found: dict[str, Any]) -> None:
    for told, _, same in found["failing: empty"]:
        assert told.startswith("ValueError: the data is empty")
        assert same
