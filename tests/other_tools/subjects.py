"""A network in which every way of fusing occurs, and what it becomes here before other tools get it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.activations import activation_of

IMAGE = (4, 3, 6, 6)


class Residual(nn.Module):
    """Functions and a sum, for which ``fuse`` rewrites the forward; SiLU twice is not SiLU once."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.conv1(x)))
        return F.silu(x + self.bn2(self.conv2(y)))


class Sums(nn.Module):
    """A sum of which two layers can be fused, and an activation outside the module that has the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


class Network(nn.Module):
    """Conv-BN-SiLU as modules, functions with a residual, a sum with its activation outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU())
        self.block, self.sums, self.act = Residual(4), Sums(4), nn.SiLU()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.sums(self.block(self.stem(x)))))


def image(seed: int = 1) -> Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    """torch.nn's, with weights and statistics at which nothing cancels by luck."""
    torch.manual_seed(0)
    model = Network()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.2)
            nn.init.normal_(layer.bias, 0, 0.2)
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
    return model


def converted() -> nn.Module:
    model = network()
    batchnorm.convert(model)
    return model


def fused() -> nn.Module:
    result = batchnorm.fuse(network(), image())
    assert result.fused == {
        "stem.1": "silu", "block.bn1": "silu", "block.bn2": "add + silu", "sums.bn": "add + silu",
    }, result  # fmt: skip
    assert set(result.method.values()) == {"module replaced", "forward rewritten"}
    return result.model


def frozen() -> nn.Module:
    model = network()
    batchnorm.freeze(model)
    return model


def frozen_and_fused() -> nn.Module:
    model = fused()
    batchnorm.freeze(model)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "converted": converted,
    "fused": fused,
    "frozen": frozen,
    "frozen and fused": frozen_and_fused,
}


def by_hand() -> nn.Module:
    """An activation within a layer that nobody but its author knows of."""
    model: Any = converted()
    model.stem[1].activation, model.stem[2] = activation_of(nn.SiLU()), nn.Identity()
    return model


def right(x: Tensor, training: bool = False) -> Tensor:
    """What the network gives, in float64 by torch.nn."""
    model = network().double().train(training)
    y: Tensor = model(x.double())
    return y


def assert_right(model: nn.Module, training: bool = False, x: Tensor | None = None) -> None:
    """The output, and in training the gradients of all parameters and the running statistics, are the network's."""
    x = image() if x is None else x
    model, exact = copy.deepcopy(model).train(training), network().double().train(training)
    y, expected = model(x), exact(x.double())
    assert_close(y, expected)
    if not training:
        return
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, parameter in exact.named_parameters():
        assert_close(parameters[name].grad, parameter.grad, name)
    for name, buffer in exact.named_buffers():
        assert_close(buffers[name], buffer, name)


def assert_close(found: Any, expected: Any, name: str = "output") -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")
