"""`batchnorm diagnose` and `batchnorm rule`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from batchnorm.cli import main
from diagnosis.subjects import trained

FACTORY = """
import torch
from torch import nn
def factory():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
def moved():
    model = factory()
    model[1].momentum = 0.99
    return model
def loader():
    return [30 * torch.randn(8, 3, 6, 6) for _ in range(4)]
def metric(model):
    return float(model(loader()[0]).mean())
def broken():
    raise OSError("no such thing")
"""


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / f"subject_{tmp_path.name}.py"  # a module is imported once
    path.write_text(FACTORY)
    return path


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    state = trained().state_dict()
    state["4.running_var"][1] = torch.inf
    torch.save({"model": state, "epoch": 3}, tmp_path / "poisoned.pt")
    safetensors.torch.save_file(state, tmp_path / "poisoned.safetensors")
    torch.save(trained().state_dict(), tmp_path / "right.pt")
    return tmp_path


@pytest.mark.parametrize("file", ["poisoned.pt", "poisoned.safetensors"])
def test_a_checkpoint_needs_no_code_of_the_users(poisoned: Path, file: str) -> None:
    done = command("diagnose", poisoned / file)
    assert done.exit_code == 1
    assert "3 batch-norm layers   1 error" in done.output
    assert "running statistics are nan or infinite in 1 channel (4)  BN102" in done.output
    assert "not run: 3 rules need data; 8 rules need the model, not its weights alone" in done.output


def test_formats_and_exit_codes(poisoned: Path) -> None:
    assert command("diagnose", poisoned / "right.pt").exit_code == 0
    done = command("diagnose", poisoned / "poisoned.pt", "--format", "json", "--fail-on", "never")
    assert done.exit_code == 0
    found = json.loads(done.output)
    assert found["schema"] == "batchnorm.diagnosis/1"
    assert [finding["code"] for finding in found["findings"]] == ["BN102"]
    github = command("diagnose", poisoned / "poisoned.pt", "--format", "github").output
    assert github.startswith("::error title=BN102 non-finite-statistics::running statistics are nan")
    assert command("diagnose", poisoned / "poisoned.pt", "--ignore", "BN102").exit_code == 0
    assert command("diagnose", poisoned / "poisoned.pt", "--select", "BN2").exit_code == 0
    assert command("diagnose", poisoned / "poisoned.pt", "--select", "BN1,BN2").exit_code == 1


def test_a_model_with_weights_and_data(model_file: Path) -> None:
    done = command("diagnose", f"{model_file}:moved")
    assert done.exit_code == 1
    assert "momentum is 0.99 in 1 layer" in done.output
    done = command("diagnose", f"{model_file}:factory")
    assert done.exit_code == 0
    done = command(
        "diagnose", f"{model_file}:factory", "--data", f"{model_file}:loader", "--metric", f"{model_file}:metric"
    )
    assert done.exit_code == 1
    assert "evaluation uses statistics that are not those of these weights and data" in done.output
    assert "metric: running" in done.output


class Hostile:
    def __reduce__(self) -> object:
        return (print, ("code was run",))


def test_what_cannot_be_looked_at_is_one_line_and_exit_code_2(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    for arguments, said in (
        (["nowhere.pt"], "nowhere.pt"),
        ([tmp_path / "cut.pt"], "is not a file of torch.save, or is damaged"),
        ([tmp_path / "hostile.pt"], "which is refused"),
        (["no.such.module:factory"], "there is no module"),
        ([f"{model_file}:nothing"], "has no 'nothing'"),
        ([f"{model_file}:broken"], "no such thing"),
        ([model_file, "--data", f"{model_file}:loader"], "go with a model that can be run"),
        ([f"{model_file}:factory", "--select", "XY"], "no rule's code begins with 'XY'"),
    ):
        done = command("diagnose", *arguments)
        assert done.exit_code == 2, done.output
        assert said in done.output
        assert len(done.output.splitlines()) == 1
        assert "code was run" not in done.output


def test_a_rule_is_explained_by_its_code_or_name() -> None:
    for name in ("BN102", "non-finite-statistics"):
        done = command("rule", name)
        assert done.exit_code == 0
        for part in ("BN102", "Why:", "Measured:", "Remedy:", "False alarms:"):
            assert part in done.output
    done = command("rule", "BN999")
    assert done.exit_code == 2
    assert "there is no rule 'BN999'" in done.output
