"""Subclasses of convolutions and concatenations of several are judged by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folded import fresh, image
from networks import randomized
from torch import Tensor, nn

import batchnorm


def close(result: Any, model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-11, atol=1e-11)


class Same(nn.Conv2d):
    """As TensorFlow pads: outside of the convolution, and by what the input's size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            total = max((-(int(size) // -s) - 1) * s + k - int(size), 0)
            padding = [total // 2, total - total // 2, *padding]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """A gain of its own, which a scale of the weight goes through."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


class Rows(nn.Linear):
    """Written as a product."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


MAPS: dict[str, tuple[Callable[[bool], nn.Module], int, tuple[int, ...]]] = {
    "padded outside": (lambda bias: Same(4, 6, 3, stride=2, bias=bias), 2, (3, 4, 7, 6)),
    "padded outside, grouped": (lambda bias: Same(4, 6, 3, groups=2, bias=bias), 2, (3, 4, 7, 6)),
    "scaled": (lambda bias: Scaled(4, 6, 3, bias=bias), 2, (3, 4, 7, 6)),
    "causal": (lambda bias: Causal(4, 6, 3, bias=bias), 1, (3, 4, 7)),
    "product": (lambda bias: Rows(4, 6, bias=bias), 1, (3, 4)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize(("make", "dimensions", "shape"), MAPS.values(), ids=MAPS)
def test_a_subclass_that_is_linear_in_its_weight_takes_the_layer(
    make: Any, dimensions: int, shape: tuple[int, ...], bias: bool
) -> None:
    model = fresh(make(bias), getattr(nn, f"BatchNorm{dimensions}d")(6), nn.ReLU()).double()
    x = torch.randn(shape, dtype=torch.float64)
    result = batchnorm.fold(model, x)
    assert result.folded == {"1": "into 0"}
    close(result, model, x)
    close(result, model, torch.randn(2, shape[1], *(size + 2 for size in shape[2:]), dtype=torch.float64))
    alone = batchnorm.fold(model)
    assert bool(alone.folded) is not isinstance(model[0], nn.Linear)
    close(alone, model, x)
    replaced = batchnorm.replace(model, None, x).replaced["1"]
    assert "0 does now what it did in evaluation" in replaced
    torch.testing.assert_close(model(x), alone.model(x), rtol=1e-11, atol=1e-11)


class Standardized(nn.Conv2d):
    """Weight standardization, as timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Activated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Adapted(nn.Conv2d):
    """A low-rank addition, as LoRA has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.down, self.up = nn.Parameter(torch.randn(1, 4, 1, 1)), nn.Parameter(torch.randn(6, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(F.conv2d(x, self.down), self.up)


class Biasless(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Quantized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight * 16).round() / 16, self.bias)


class Broken(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise TypeError("no doubles here")
        return super().forward(x)


@pytest.mark.parametrize("kind", [Standardized, Activated, Adapted, Biasless, Quantized, Broken])
def test_a_subclass_that_is_not_is_left_and_others_are_folded(kind: Any) -> None:
    model = fresh(kind(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    for inputs in (image(4), None):
        result = batchnorm.fold(model, inputs)
        assert result.folded == {"4": "into 3"}
        assert f"0 ({kind.__name__}) " in result.skipped["1"]
        said = "no doubles here" if kind is Broken else "does more with its weight"
        assert said in result.skipped["1"]
        torch.testing.assert_close(result.model(image(4)), model.eval()(image(4)), rtol=1e-5, atol=1e-5)


def test_padding_outside_is_padding_for_a_layer_in_front() -> None:
    model = fresh(nn.ReLU(), nn.BatchNorm2d(4), Same(4, 6, 3), nn.ReLU()).double()
    x = image(4).double()
    for result in (batchnorm.fold(model, x), batchnorm.fold(model)):
        assert result.folded == {}
        assert "2 (Same) does more" in result.skipped["1"]
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].bias.zero_()
    result = batchnorm.fold(model, x)
    assert result.folded == {"1": "into 2, which follows"}
    close(result, model, x)


def test_a_subclass_with_layers_of_its_own_is_looked_into() -> None:
    class Unit(nn.Conv2d):  # as detectron2's Conv2d, whose normalization is called in its forward
        def __init__(self) -> None:
            super().__init__(4, 6, 1)
            self.inner, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(super().forward(x).relu()))

    model = randomized(nn.Sequential(Unit(), nn.ReLU())).double()
    result = batchnorm.fold(model, image(4).double())
    assert result.folded == {"0.norm": "into 0.inner"}
    close(result, model, image(4).double())


# --- several convolutions before one layer ---


class Joined(nn.Module):
    def __init__(self, wiring: Callable[[Any, Tensor], Tensor], traceable: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(4, 3, 3, padding=1)
        self.c, self.grouped = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 2, 1, groups=2)
        self.norm, self.wiring, self.traceable = nn.BatchNorm2d(6), wiring, traceable
        self.five, self.eight = nn.BatchNorm2d(5), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.wiring(self, x)


JOINED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str, bool]] = {
    "two": (lambda m, x: m.five(torch.cat([m.a(x), m.b(x)], 1)), "five", "into a and b", True),
    "by keyword": (lambda m, x: m.five(torch.cat((m.b(x), m.a(x)), dim=1)), "five", "into b and a", True),
    "three, nested": (
        lambda m, x: m.norm(torch.cat([torch.cat([m.c(x), m.b(x)], 1), m.a(x)], 1)), "norm", "into c and b and a", True,
    ),
    "grouped, through dropout": (
        lambda m, x: m.five(F.dropout(torch.cat([m.grouped(x), m.b(x)], 1), 0.5, m.training)),
        "five", "into grouped and b", True,
    ),
    "from the end": (lambda m, x: m.five(torch.cat([m.a(x), m.b(x)], -3)), "five", "into a and b", False),
    "cut and shuffled": (
        lambda m, x: m.five(torch.cat([m.b(x), m.a(x)], 1)[:, [4, 0, 2, 1, 3], 1:]), "five", "into b and a", False,
    ),
    "a part of one": (
        lambda m, x: m.five(torch.cat([m.b(x)[:, 1:], m.b(x)[:, :1], m.a(x)], 1)), "five", "into b and a", False,
    ),
    "in two halves": (
        lambda m, x: m.five(torch.cat(torch.cat([m.a(x), m.b(x)], 1).chunk(2, 2), 2)), "five", "into a and b", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("traceable", [True, False], ids=["traceable", "untraceable"])
@pytest.mark.parametrize(("wiring", "name", "told", "alone"), JOINED.values(), ids=JOINED)
def test_each_convolution_of_a_concatenation_takes_its_share(
    wiring: Any, name: str, told: str, alone: bool, traceable: bool
) -> None:
    torch.manual_seed(0)
    model, x = randomized(Joined(wiring, traceable)).double(), image(4).double()
    result = batchnorm.fold(model, x)
    assert result.folded[name] == told
    close(result, model, x)
    without = batchnorm.fold(model)
    assert (name in without.folded) is (alone and traceable)
    close(without, model, x)
    replaced = batchnorm.replace(model, None, x).replaced[name]
    right = result.model(x)
    if wiring is JOINED["grouped, through dropout"][0]:
        assert "something else in training" in replaced
    elif wiring is JOINED["a part of one"][0]:
        assert "b feeds others, too" in replaced  # the model will be trained, and b is called twice
    else:
        assert "do now what it did in evaluation" in replaced
        torch.testing.assert_close(model(x), right, rtol=1e-11, atol=1e-11)


APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "one of them read elsewhere": lambda m, x: m.five(torch.cat([y := m.a(x), m.b(x)], 1)) + y.sum(),
    "something else beside it": lambda m, x: m.norm(torch.cat([m.a(x), x], 1)),
    "the same one twice": lambda m, x: m.norm(torch.cat([m.b(x), m.b(x)], 1)),
    "along the height": lambda m, x: m.five(F.pad(torch.cat([m.a(x), m.a(x)], 2), (0, 0, 0, 0, 0, 3))),
    "added": lambda m, x: m.five(torch.cat([m.a(x) + m.a(x), m.b(x)], 1)),
}


@pytest.mark.parametrize("wiring", APART.values(), ids=APART)
def test_what_is_not_a_concatenation_of_convolutions_alone_is_left(wiring: Any) -> None:
    torch.manual_seed(0)
    model, x = randomized(Joined(wiring)).double(), image(4).double()
    for result in (batchnorm.fold(model, x), batchnorm.fold(model)):
        assert result.folded == {}
        close(result, model, x)


def test_two_branches_of_one_size_in_the_height_are_one_convolution() -> None:
    model = randomized(Joined(lambda m, x: m.five(torch.cat([m.b(x), m.a(x)], 1)))).double()
    x = image(4).double()
    weights = [m.weight.detach().clone() for m in (model.a, model.b)]
    batchnorm.fold(model, x)
    assert all(torch.equal(m.weight, w) for m, w in zip((model.a, model.b), weights, strict=True))
