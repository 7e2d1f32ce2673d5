"""Every layer that is left has its reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Tail, Undecided, image
from torch import Tensor, nn

import batchnorm


def tail_two_readers(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.relu(y) * y


def tail_between(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.relu(y * 2)


def tail_unknown(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.sigmoid(y)


def tail_unused(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.relu(x)


def tail_broadcast(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.relu(y + x.mean((2, 3), keepdim=True))


def tail_double(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.relu(y + x.double())


def tail_itself(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.relu(y + y)


def tail_differently(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(m.bn(m.relu(y)))


def tail_two_activations(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.silu(m.bn(m.relu(y)))


def hooked() -> nn.Module:
    model = Tail(lambda m, x, y: m.relu(y))
    model.bn.register_forward_hook(lambda *_: None)
    return model


def shared() -> nn.Module:
    model = Tail(lambda m, x, y: m.relu(y))
    model.alias = model.bn
    return model


def hooked_activation() -> nn.Module:
    model = Tail(lambda m, x, y: m.relu(y))
    model.relu.register_forward_pre_hook(lambda *_: None)
    return model


def hooked_container(make: Callable[..., nn.Module] = nn.Sequential) -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    inner.register_forward_hook(lambda *_: None)
    return make(inner, nn.ReLU())


def unreached() -> nn.Module:
    model = Tail(lambda m, x, y: m.spare(y) if x.sum() > 1e9 else y, spare=nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    model.spare.bn = nn.BatchNorm2d(2)
    return model


def observed_hooks() -> nn.Module:
    model = Undecided(nn.ReLU())
    model.act.register_forward_hook(lambda *_: None)
    return model


class Sub(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Noise(nn.Module):
    """A graph would keep the noise of one run."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn(x)) + torch.rand(1)


class Counts(Noise):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.bn(x))


class Lottery(Noise):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn(x)) * 2 if random.random() < 2 else x


class Frozen(Noise):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.tanh(self.bn(x))
        return y * x


class Moody(Noise):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y.tanh() if self.training else y.sigmoid()


class Optional(Noise):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.bn(x)
        return y if raw else y.tanh()


CONTROL_FLOW = (
    "the model cannot be traced: TraceError: symbolically traced variables cannot be used as inputs to control flow; "
    "observed: "
)
REASONS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "two readers": (lambda: Tail(tail_two_readers), "bn", "its output is read by relu (ReLU) and mul"),
    "between": (lambda: Tail(tail_between), "bn", "followed by mul"),
    "unknown": (lambda: Tail(tail_unknown), "bn", "followed by sigmoid"),
    "unused": (lambda: Tail(tail_unused), "bn", "its output is not used"),
    "broadcast": (
        lambda: Tail(tail_broadcast), "bn",
        "its output and the residual differ: (4, 2, 5, 5) float32 and (4, 2, 1, 1) float32",
    ),
    "dtype": (
        lambda: Tail(tail_double), "bn",
        "its output and the residual differ: (4, 2, 5, 5) float32 and (4, 2, 5, 5) float64",
    ),
    "itself": (lambda: Tail(tail_itself), "bn", "it is added to itself"),
    "differently": (lambda: Tail(tail_differently), "bn", "followed by tanh"),
    "two activations": (
        lambda: Tail(tail_two_activations), "bn", "it is called several times, with different things behind it",
    ),
    "last": (lambda: Tail(lambda m, x, y: y), "bn", "its output is the model's"),
    "hooks": (hooked, "bn", "it has hooks, which would see the fused output"),
    "shared": (shared, "bn", "it is shared, by bn and alias"),
    "hooked activation": (hooked_activation, "bn", "followed by relu (ReLU with hooks)"),
    "hooked container": (hooked_container, "0.1", "0 has hooks, which would see the fused output"),
    "unreached": (unreached, "spare.0", CONTROL_FLOW + "the example_inputs do not reach it"),
    "observed, hooks": (observed_hooks, "norm", CONTROL_FLOW + "its activation's module has hooks"),
    "observed, last": (lambda: Undecided(nn.ReLU()), "second", CONTROL_FLOW + "followed by mean"),
    "subclass": (lambda: nn.Sequential(Sub(2), nn.ReLU()), "0", "Sub is a subclass, which may compute "
                 "something else: it computes add behind normalization"),
    "own activation": (
        lambda: nn.Sequential(batchnorm.BatchNorm2d(2, activation="relu"), nn.ReLU()), "0",
        "it has the activation relu already",
    ),
    "works in place": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), batchnorm.BatchNorm2d(2, inplace=True), nn.ReLU()), "1",
        "it works in place",
    ),
    "noise": (Noise, "bn", "the model cannot be traced: it makes a tensor that is no function of its input; "
              "observed: followed by tanh"),
    "lottery": (Lottery, "bn", "the model cannot be traced: it draws random numbers that are no function of its input; "
                "observed: followed by tanh"),
    "counts": (Counts, "bn", "the model cannot be traced: its forward sets attributes; observed: followed by tanh"),
    "no_grad": (Frozen, "bn", "the model cannot be traced: it computes under no_grad, autocast or the like, which a "
                "graph does not keep; observed: followed by tanh"),
    "mode": (Moody, "bn", "the model cannot be traced: training and evaluation, or two runs, differ in more than its "
             "layers; observed: followed by sigmoid or tanh"),
    "optional": (Optional, "bn", "the model cannot be traced: it takes optional arguments; observed: followed by tanh"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "layer", "reason"), REASONS.values(), ids=REASONS.keys())
def test_reasons(make: Callable[[], nn.Module], layer: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.surgery.fusing.fuse.verify", lambda *_: None)  # noise has nothing to compare
    torch.manual_seed(0)
    result = batchnorm.fuse(make(), image())
    assert layer not in result.fused
    assert result.skipped[layer] == reason
