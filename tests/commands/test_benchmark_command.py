"""`batchnorm benchmark`: a model named on the command line, what is said of it, and one line for what cannot work."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchnorm.cli import main

SOURCE = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())


def parallel():
    return nn.DataParallel(net())


def batch():
    return torch.randn(8, 3)


def plain():
    return nn.Linear(3, 4)


def nothing():
    pass


def bare():
    return nn.BatchNorm1d(4)


class Broken(nn.Linear):
    def forward(self, x):
        raise RuntimeError("no such luck")


def broken():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Broken(4, 4))


number = 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "users.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("users", None)


def benchmark(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["benchmark", "--seconds", "0.002", *arguments])


@pytest.mark.parametrize(
    ("arguments", "inputs", "shape"),
    [
        (("--model", "users:net", "--shape", "8x3"), "8x3", [8, 4]),
        (("--model", "users.py:parallel", "--input", "users:batch"), "users:batch", [8, 4]),
        (("--model", "users:net"), "a guessed input of 64×3", [64, 4]),
    ],
)
def test_a_model_is_measured(here: Path, arguments: tuple[str, ...], inputs: str, shape: list[int]) -> None:
    ran = benchmark(*arguments, "--json", "gain.json")
    assert ran.exit_code == 0, ran.output
    for text in ("Batch normalization in a training step", f"BN+ReLU, {shape[0]}×4 float32", "The whole model"):
        assert text in ran.output
    said = " ".join(ran.output.split())
    data = json.loads((here / "gain.json").read_text(encoding="utf-8"))
    assert f"{data['sentence']} Measured on {inputs}, with " in said
    assert (data["schema"], data["version"], data["model"]) == ("batchnorm.benchmark", 3, arguments[1])
    assert data["inputs"] == inputs
    assert data["layers"][0]["cell"]["shape"] == shape
    assert data["whole"]["training step"]["ratios"]["fused"]["median"] > 0


def test_without_a_model_a_few_layers_are_measured(here: Path) -> None:
    ran = benchmark("--quick", "--json", "layers.json")
    assert ran.exit_code == 0, ran.output
    assert "BN+ReLU, 8×64×14×14 float32 contiguous" in ran.output
    assert "quick run" in ran.output
    data = json.loads((here / "layers.json").read_text(encoding="utf-8"))
    assert (data["schema"], data["quick"], len(data["layers"])) == ("batchnorm.benchmark", True, 3)
    assert data["layers"][0]["figures"]["forward"]["ratios"]["torch.nn"]["low"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["users"], "'users' names no object: write package.module:name or path/file.py:name"),
        (["missing:net"], "there is no module 'missing', here or installed"),
        (["users:missing"], "users has no 'missing'"),
        (["users:nothing"], "users:nothing gives None, not a torch.nn.Module"),
        (["users:number"], "users:number gives a int, not a torch.nn.Module"),
        (["users:plain"], "Linear has no batch normalization layer"),
        (["users:bare"], "what users:bare takes cannot be guessed: say --shape, as in 8x3x224x224, or --input"),
        (["users:net", "--shape", "8,3"], "'8,3' is no shape: write it as 8x3x224x224"),
        (["users:net", "--shape", "8x5"], r"RuntimeError: mat1 and mat2 shapes cannot be multiplied.*"),
        (["users:net", "--input", "users:missing"], "users has no 'missing'"),
        (
            ["users:broken"],
            "users:broken does not take a guessed input of 64×3, say --shape or --input: RuntimeError: no such luck",
        ),
        (["users:broken", "--shape", "8x3"], r"users\.py:\d+: RuntimeError: no such luck"),
        (["users:net", "--json", "folder"], "folder is a directory"),
        (["users:net", "--json", "users.py/gain.json"], r".*users\.py.*"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: list[str], said: str) -> None:
    ran = benchmark("--model", *arguments)
    assert ran.exit_code == 1
    assert re.fullmatch(rf"Error: {said}\n", ran.output), ran.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "8x3"], "'--input' and '--shape' say what a '--model' is called with."),
        (["--model", "users:net", "--shape", "8x3", "--input", "users:batch"], "exclude each other"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], said: str) -> None:
    ran = benchmark(*arguments)
    assert ran.exit_code == 2
    assert said in ran.output
