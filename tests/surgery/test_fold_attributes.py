"""A layer of which a forward reads more than its output stays where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folded import image
from networks import randomized
from torch import Tensor, nn

import batchnorm


class Read(nn.Module):
    """A convolution and a layer, of which a forward reads what a test says."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], traceable: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.conv2, self.norm2 = nn.Conv2d(2, 3, 1), None, nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
        self.norm = nn.BatchNorm2d(3)
        self.bare = nn.Conv2d(2, 3, 1, bias=False)
        self.how, self.traceable = forward, traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.norm2(self.conv2(self.how(self, x).relu()))


def functional(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(m.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


READ: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "held for its tensors": (functional, "bias, eps, running_mean, running_var, weight"),
    "its weight": (lambda m, x: m.norm(m.conv(x)) * m.norm.weight.view(1, -1, 1, 1), "weight"),
    "the size of its weight": (lambda m, x: m.norm(m.conv(x)) * m.norm.weight.numel(), "weight"),
    "its number of channels": (lambda m, x: m.norm(m.conv(x)) / m.norm.num_features, "num_features"),
    "its eps": (lambda m, x: m.norm(m.conv(x)) + m.norm.eps, "eps"),
    "its statistics": (lambda m, x: m.norm(m.conv(x)) - m.norm.running_mean.mean(), "running_mean"),
    "its momentum, by getattr": (lambda m, x: m.norm(m.conv(x)) + getattr(m.norm, "momentum", 0), "momentum"),
}


@pytest.mark.parametrize("inputs", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("traceable", [True, False], ids=["traceable", "untraceable"])
@pytest.mark.parametrize(("forward", "names"), READ.values(), ids=READ)
def test_a_layer_whose_attributes_are_read_is_left(forward: Any, names: str, traceable: bool, inputs: bool) -> None:
    torch.manual_seed(0)
    model = randomized(Read(forward, traceable)).double().eval()
    x = image(2).double()
    given = x if inputs else None
    traceable = traceable and names != "running_mean"  # of which a number is made that is no function of the input
    result = batchnorm.fold(model, given)
    assert "norm" in result.skipped
    assert ("norm2" in result.folded) is (inputs or traceable)  # one layer does not lose the others
    if inputs or traceable:
        assert f"a forward reads its {names}, which" in result.skipped["norm"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    for by in (None, "group", "rms"):
        made = copy.deepcopy(model)
        replaced = batchnorm.replace(made, by, given)
        if inputs or traceable:
            kept = by is not None and names in ("weight", "eps")
            if by != "rms":  # of three channels nothing would be left
                assert ("norm" in replaced.skipped) is not kept
                assert "norm2" in replaced.replaced
            made(x)


def test_the_outer_forward_reads_the_weight_of_a_layer_in_a_part_that_cannot_be_traced() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() < 1e9 else x

    class Slimming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner.norm.weight.abs().sum()

    model, x = randomized(Slimming()), image(2)
    for given in (None, x):
        result = batchnorm.fold(model, given)
        assert result.folded == {}
        assert "a forward reads its weight, which" in result.skipped["inner.norm"]
        made = copy.deepcopy(model)
        assert "inner.norm" in batchnorm.replace(made, None, given).skipped
        assert made(x)[1] == model(x)[1]


def test_what_every_module_has_may_be_read() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        assert isinstance(m.norm, nn.Module)
        return m.norm(m.conv(x)) * (1.0 if m.norm.training else 2.0)

    model = randomized(Read(forward)).eval()
    assert "norm" in batchnorm.fold(model).folded
    assert "norm" in batchnorm.fold(model, image(2)).folded


def test_what_a_convolution_keeps_may_be_read_and_a_missing_bias_not() -> None:
    def kept(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.bare(x.to(m.bare.weight.dtype))) * m.bare.out_channels

    def missing(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.bare(x))
        return y if m.bare.bias is None else y + 1

    for given in (None, image(2)):
        assert batchnorm.fold(randomized(Read(kept)), given).folded["norm"] == "into bare"
        result = batchnorm.fold(randomized(Read(missing)), given)
        assert "looks whether bare has a bias" in result.skipped["norm"]


class Sly(nn.Module):
    """What it computes depends on a class, which nothing but the results shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.others = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.others(y if isinstance(self.norm, nn.BatchNorm2d) else y + 1)


class Failing(Sly):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.others[2][1], nn.BatchNorm2d)
        return super().forward(x)


def test_a_layer_without_which_the_model_computes_something_else_is_left_alone() -> None:
    for kind, names in ((Sly, {"norm"}), (Failing, {"norm", "others.2.1"})):
        model, x = randomized(kind()).eval(), image(2)
        state = copy.deepcopy(model.state_dict())
        result = batchnorm.fold(model, x)
        assert result.skipped.keys() == names
        assert len(result.folded) == 5 - len(names)
        assert "without it outputs differ" in result.skipped["norm"]
        assert result.max_error_float64 < 1e-12
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert "AssertionError" in result.skipped["others.2.1"]


def test_a_model_that_does_not_repeat_itself_cannot_be_verified() -> None:
    class Counting(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return self.norm(self.conv(x)) + Counting.calls

    with pytest.raises(RuntimeError, match="does not repeat its outputs"):
        batchnorm.fold(Counting(), image(2))
