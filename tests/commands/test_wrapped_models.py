"""Checkpoints of parallel and compiled models, and factories of such models: names keep what they begin with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import batchnorm
from batchnorm.cli import main

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class Several(Net):
    def forward(self, *xs):
        return sum(super(Several, self).forward(x) for x in xs)


def plain():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def parallel():
    return nn.DataParallel(plain())


def compiled():
    return torch.compile(plain(), backend="eager")


def both():
    return nn.DataParallel(compiled())


def several():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Several()


def loader():
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(8, 1, 6, 6, generator=generator) + 1 for _ in range(3)]


def example():
    return loader()[0]


def two():
    return tuple(loader()[:2])
"""
PREFIXES = {"plain": "", "parallel": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod."}


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A user's module in the current directory."""
    (tmp_path / "wrapping.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield __import__("wrapping")
    sys.modules.pop("wrapping", None)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def trained(users: Any) -> nn.Module:
    """A model with other weights and statistics than the factory's."""
    torch.manual_seed(3)
    model: nn.Module = users.Net()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


def saved(model: nn.Module, prefix: str, path: str) -> dict[str, Tensor]:
    state = {prefix + name: value for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path) if path.endswith("safetensors") else torch.save(state, path)
    return state


@pytest.mark.parametrize("path", ["old.pt", "old.safetensors"])
@pytest.mark.parametrize("factory", PREFIXES)
@pytest.mark.parametrize("prefix", PREFIXES.values())
def test_recalibrate_keeps_the_names_of_the_file(users: Any, prefix: str, factory: str, path: str) -> None:
    model = trained(users)
    state = saved(model, prefix, path)
    out = path.replace("old", "new")
    result = command(
        "recalibrate", f"wrapping:{factory}", "--checkpoint", path, "--data", "wrapping:loader", "--out", out
    )
    assert result.exit_code == 0, result.output
    new = safetensors.torch.load_file(out) if path.endswith("safetensors") else torch.load(out, weights_only=True)
    assert sorted(new) == sorted(state)
    with torch.no_grad():
        y = model.conv(torch.cat(users.loader())).double()
    torch.testing.assert_close(new[f"{prefix}bn.running_mean"].double(), y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    for name in ("conv.weight", "bn.weight", "head.bias"):
        assert torch.equal(new[prefix + name], state[prefix + name])


@pytest.mark.parametrize("out", ["new.pt2", "new.pt", "new.safetensors"])
@pytest.mark.parametrize("factory", PREFIXES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_fold_takes_wrapped_models_apart(users: Any, prefix: str, factory: str, out: str) -> None:
    model = trained(users)
    saved(model, prefix, "old.pt")
    arguments = ("--checkpoint", "old.pt", "--example", "wrapping:example", "--out", out)
    result = command("fold", f"wrapping:{factory}", *arguments)
    assert result.exit_code == 0, result.output
    assert "1 folded, 0 skipped" in result.output
    x = users.loader()[2][:5]
    if out.endswith("pt2"):
        found = torch.export.load(out).module()(x)
    else:  # as the documentation says: it fits what fold makes of the factory's model
        made = users.plain() if factory == "compiled" else getattr(users, factory)()
        if factory == "both":
            made = nn.DataParallel(users.plain())
        folded = batchnorm.fold(made, users.example()).model
        state = safetensors.torch.load_file(out) if "safe" in out else torch.load(out, weights_only=True)
        folded.load_state_dict(state)
        found = folded(x)
    torch.testing.assert_close(found, model.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_program_of_any_number_of_inputs(users: Any) -> None:
    saved(trained(users), "", "old.pt")
    result = command(
        "fold", "wrapping:several", "--checkpoint", "old.pt", "--example", "wrapping:two", "--out", "new.pt2"
    )
    assert result.exit_code == 0, result.output
    model: Any = users.several()
    model.load_state_dict(trained(users).state_dict())
    xs = tuple(x[:5] for x in users.loader()[1:])
    torch.testing.assert_close(torch.export.load("new.pt2").module()(*xs), model.eval()(*xs), rtol=1e-5, atol=1e-5)


def test_versions_of_layers_beside_the_weights_are_renamed_too(users: Any) -> None:
    parallel = nn.DataParallel(trained(users))
    state = parallel.state_dict()
    assert "module.bn" in state._metadata
    del state["module.bn.num_batches_tracked"]  # as before version 2, where it is filled in
    state._metadata["module.bn"] = {"version": 1}
    torch.save(state, "old.pt")
    for factory in ("plain", "parallel"):
        result = command("fold", f"wrapping:{factory}", "--checkpoint", "old.pt", "--out", f"{factory}.pt")
        assert result.exit_code == 0, result.output


def test_other_names_are_still_named(users: Any) -> None:
    state = {f"model.{name}": value for name, value in trained(users).state_dict().items()}
    torch.save(state, "old.pt")
    result = command("fold", "wrapping:parallel", "--checkpoint", "old.pt", "--out", "new.pt")
    assert result.exit_code == 1
    assert "unexpected: module.model.conv.weight" in result.output
    assert not Path("new.pt").exists()
