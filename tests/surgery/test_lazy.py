"""Lazy layers whose state was loaded before their first input do what others do, though they say 0 channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded import image
from networks import randomized
from torch import Tensor, nn

import batchnorm

CHANNELS = 8


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return randomized(nn.Sequential(nn.Conv2d(2, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())).double()


def loaded(lazy: Any, run: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """A model with a lazy layer that got its state before its first input, and the same model without."""
    model = plain()
    made = nn.Sequential(nn.Conv2d(2, CHANNELS, 1), lazy(), nn.ReLU()).double()
    made.load_state_dict(model.state_dict())
    if run:
        made.eval()(image(2).double())
    return made, model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, 7 * 6, dtype=torch.float64).view(7, 6)
    return torch.autograd.grad(
        (model(x) * weights).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )


def in_place(function: Callable[..., Any], *args: Any) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        function(model, *args)
        return model

    return change


X = image(2).double()
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "convert": in_place(batchnorm.convert),
    "a policy": in_place(batchnorm.convert, batchnorm.Ghost(2)),
    "accumulated": in_place(batchnorm.convert, batchnorm.Accumulated(2)),
    "replace by groups": in_place(batchnorm.replace, "group"),
    "replace by a layer": in_place(batchnorm.replace, "layer"),
    "replace by instances": in_place(batchnorm.replace, "instance"),
    "replace by rms": in_place(batchnorm.replace, "rms"),
    "replace by nothing": in_place(batchnorm.replace, None),
    "freeze": in_place(batchnorm.freeze),
    "domains": in_place(batchnorm.split_domains, ("a", "b")),
    "recalibrate": in_place(batchnorm.recalibrate, [X]),
    "fold": lambda model: batchnorm.fold(model, X).model,
    "fold, without inputs": lambda model: batchnorm.fold(model).model,
    "fuse": lambda model: batchnorm.fuse(model, X).model,
}


@pytest.mark.parametrize("run", [True, False], ids=["after an input", "before any"])
@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm2d, batchnorm.LazyBatchNorm2d], ids=["torch", "ours"])
@pytest.mark.parametrize("way", WAYS)
def test_whole_model_functions_take_the_number_of_channels_from_the_tensors(way: str, lazy: Any, run: bool) -> None:
    made, model = loaded(lazy, run)
    made, model = WAYS[way](made), WAYS[way](model)
    for training in (False, True):
        made.train(training and "fold" not in way)
        model.train(training and "fold" not in way)
        with batchnorm.domain("a"):  # which nobody else asks for
            torch.testing.assert_close(made(X), model(X), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradients(made, X), gradients(model, X), rtol=1e-10, atol=1e-12)
    for (name, t), (same, right) in zip(made.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == same
        torch.testing.assert_close(t, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm2d, batchnorm.LazyBatchNorm2d], ids=["torch", "ours"])
def test_groups_are_those_of_the_channels(lazy: Any) -> None:
    made, _ = loaded(lazy, run=True)
    result = batchnorm.replace(made, "group")
    assert result.replaced["1"].startswith(f"GroupNorm(2, {CHANNELS})")
    assert made[1].num_channels == CHANNELS


def test_our_lazy_layer_knows_its_channels_after_its_first_input() -> None:
    made, _ = loaded(batchnorm.LazyBatchNorm2d, run=True)
    assert type(made[1]) is batchnorm.BatchNorm2d
    assert made[1].num_features == CHANNELS
    assert f"BatchNorm2d({CHANNELS}, " in repr(made[1])
    twin = copy.deepcopy(made)
    assert torch.equal(twin(X), made(X))
