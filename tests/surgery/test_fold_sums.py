"""A layer whose output is added to that of a convolution with the same input goes into the middle of its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded import same
from networks import randomized
from torch import Tensor, nn

import batchnorm
from batchnorm.surgery.norms import Zero


class Sum(nn.Module):
    """A convolution and a layer beside it, connected as a test says."""

    def __init__(self, wiring: Callable[[Any, Tensor], Tensor], conv: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.other = nn.Conv2d(4, 4, 1)
        dimensions = self.conv.weight.dim() - 2
        self.bn, self.own = (getattr(nn, f"BatchNorm{dimensions}d")(4) for _ in range(2))
        self.wiring = wiring
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wiring(self, x.relu()))


def image(dimensions: int = 2) -> Tensor:
    return torch.randn(2, 4, *(7, 6, 5)[:dimensions], generator=torch.Generator().manual_seed(1))


def augmented(m: Any, x: Tensor) -> Tensor:
    y = m.own(m.conv(x))
    y += m.bn(x)
    return y


def handed_out(m: Any, x: Tensor) -> Tensor:
    partial = m.own(m.conv(x)) + m.bn(x)
    return partial * torch.sigmoid(partial + m.other(x))


def overwritten(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    y += m.own(m.conv(x))
    return y


def changed_between(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    x.mul_(2)
    return y + m.own(m.conv(x))


FOLDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sum": lambda m, x: m.own(m.conv(x)) + m.bn(x),
    "the other way round": lambda m, x: m.bn(x) + m.own(m.conv(x)),
    "augmented": augmented,
    "three": lambda m, x: (m.bn(x) + m.other(x)) + m.own(m.conv(x)),
    "three, nested": lambda m, x: m.other(x) + (m.own(m.conv(x)) + m.bn(x)),
    "of the sum of others": lambda m, x: m.bn(x) + (m.other(2 * x) + m.own(m.conv(x))),
    "torch's": lambda m, x: torch.add(m.own(m.conv(x)), m.bn(x)),
    "a sum that others read": handed_out,
}
LEFT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "overwritten": overwritten,
    "changed between": changed_between,
    "another input": lambda m, x: m.own(m.conv(x * 2)) + m.bn(x),
    "the convolution is read twice": lambda m, x: (y := m.own(m.conv(x))) + m.bn(x) + y.sigmoid(),
    "the layer is read twice": lambda m, x: m.own(m.conv(x)) + (y := m.bn(x)) + y.sigmoid(),
    "an activation between": lambda m, x: m.own(m.conv(x)) + m.bn(x).relu(),
    "an activation behind the convolution": lambda m, x: m.own(m.conv(x)).relu() + m.bn(x),
    "weighted": lambda m, x: torch.add(m.own(m.conv(x)), m.bn(x), alpha=2),
    "moved": lambda m, x: m.own(m.conv(x)) + m.bn(x).flip(3),
    "turned": lambda m, x: m.own(m.conv(x)).transpose(2, 3) + m.bn(x).transpose(2, 3),
    "called twice": lambda m, x: m.own(m.conv(x)) + m.bn(x) + m.bn(x * 2),
    "the convolution is called twice": lambda m, x: m.conv(x) + m.bn(x) + m.conv(x * 2),
}


@pytest.mark.parametrize("wiring", FOLDED.values(), ids=FOLDED.keys())
def test_a_layer_in_a_sum_with_a_convolution_is_folded(wiring: Callable[[Any, Tensor], Tensor]) -> None:
    model = Sum(wiring)
    result = batchnorm.fold(model, image())
    assert result.skipped == {}
    assert result.folded["bn"] in ("into conv, which is added to it", "into other, which is added to it")
    assert type(result.model.bn) is Zero
    assert result.max_error_float64 < 1e-12
    same(result, model, image())
    assert torch.export.export(result.model, (image(),)).module()(image()).shape == image().shape


@pytest.mark.parametrize("wiring", LEFT.values(), ids=LEFT.keys())
def test_what_is_no_such_sum_is_left(wiring: Callable[[Any, Tensor], Tensor]) -> None:
    model = Sum(wiring)
    result = batchnorm.fold(model, image())
    assert "bn" in result.skipped
    same(result, model, image())


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "1 × 1": (lambda: nn.Conv2d(4, 4, 1), True),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), True),
    "groups": (lambda: nn.Conv2d(4, 4, (5, 3), padding=(2, 1), groups=2), True),
    "dilated": (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2), True),
    "reflecting": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), True),
    "same": (lambda: nn.Conv2d(4, 4, 3, padding="same"), True),
    "one dimension": (lambda: nn.Conv1d(4, 4, 3, padding=1), True),
    "three dimensions": (lambda: nn.Conv3d(4, 4, 3, padding=1), True),
    "even": (lambda: nn.Conv2d(4, 4, 2, padding="same"), False),
    "too much padding": (lambda: nn.Conv2d(4, 4, 1, padding=1, stride=1), False),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), False),
}


@pytest.mark.parametrize(("make", "folded"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_the_middle_of_a_kernel(make: Callable[[], nn.Module], folded: bool) -> None:
    conv = make()

    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.own(m.conv(x))
        return m.bn(x) + y[(..., *(slice(0, side) for side in x.shape[2:]))] if y.shape != x.shape else m.bn(x) + y

    x = image(conv.weight.dim() - 2)
    model = Sum(wiring, conv)
    result = batchnorm.fold(model, x)
    assert ("bn" in result.folded) == folded
    same(result, model, x)


def test_without_inputs_nobody_knows_what_is_overwritten_between_the_calls() -> None:
    assert "bn" in batchnorm.fold(Sum(FOLDED["sum"])).skipped
