"""A layer goes only where it is known that its channels are the channels there, whatever the input's dimensions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folded import fresh, image
from networks import randomized
from torch import Tensor, fx, nn

import batchnorm

C = 6
INPUTS = {"(N, C)": (5, 4), "(N, L, C), L = C": (5, C, 4), "(N, L, C)": (5, 3, 4)}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Wired(nn.Module):
    """A linear layer, a normalization and another linear layer, connected as a test says."""

    def __init__(self, wiring: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, C), nn.BatchNorm1d(C), nn.Linear(C, 2)
        self.conv, self.norms, self.wide = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, C)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,))


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "model": lambda model, x: batchnorm.fold(model),
    "model, inputs": batchnorm.fold,
    "trace": lambda model, x: batchnorm.fold(fx.symbolic_trace(model)),
    "trace, inputs": lambda model, x: batchnorm.fold(fx.symbolic_trace(model), x),
    "program": lambda model, x: batchnorm.fold(exported(model, x)),
    "program, inputs": lambda model, x: batchnorm.fold(exported(model, x), x),
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
def test_linear_and_batch_norm_1d(shape: tuple[int, ...], way: str) -> None:
    length = shape[1] if len(shape) == 3 else C  # over which the layer normalizes
    model = fresh(nn.Linear(4, C), nn.BatchNorm1d(length)).double().eval()
    x = numbers(*shape)
    result = WAYS[way](model, x)
    known = "inputs" in way or "program" in way
    assert list(result.folded) == (["1"] if known and len(shape) == 2 else [])
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    if not known and length == C:
        assert "may " in result.skipped["1"]
        assert "example_inputs" in result.skipped["1"]
    elif not result.folded:
        assert "1" in result.skipped


@pytest.mark.parametrize("inputs", [False, True], ids=["alone", "inputs"])
@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
def test_replaced_by_nothing(shape: tuple[int, ...], inputs: bool) -> None:
    length = shape[1] if len(shape) == 3 else C
    for bias in (True, False):
        model: Any = fresh(nn.Linear(4, C, bias=bias), nn.BatchNorm1d(length)).double().eval()
        x = numbers(*shape)
        right, weight = model(x), model[0].weight.detach().clone()
        said = batchnorm.replace(model, None, x if inputs else None).replaced["1"]
        if inputs and len(shape) == 2:
            assert said.startswith("removed; 0 does now what it did in evaluation")
            torch.testing.assert_close(model(x), right, rtol=1e-12, atol=1e-12)
        else:
            assert said.startswith("removed, and with it its scale")
            assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("length", [C, C + 3])
def test_convolution_without_a_batch(length: int) -> None:
    model = fresh(nn.Conv1d(4, C, 3, padding=1), nn.BatchNorm1d(length)).double().eval()
    x = numbers(4, length)  # of which the convolution makes (C, length), which the layer takes for (N, C)
    result = batchnorm.fold(model, x)
    assert result.folded == {}
    assert "dimension 1" in result.skipped["1"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


def test_convolutions_of_other_dimensions_than_the_layer() -> None:
    model = fresh(nn.Conv3d(2, C, 1), nn.BatchNorm2d(C)).double()  # (C, D, H, W), taken for (N, C, H, W)
    x = numbers(2, C, 3, 3)
    for result in (batchnorm.fold(model), batchnorm.fold(model, x)):
        assert result.folded == {}
        torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-12, atol=1e-12)


SAID: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "flattened": (lambda m, x: m.norm(m.linear(x.flatten(1))), (5, 2, 2)),
    "viewed": (lambda m, x: m.norm(m.linear(x.view(x.size(0), -1))), (5, 2, 2)),
    "reshaped": (lambda m, x: m.norm(m.linear(x.reshape(x.shape[0] * 2, 4))).relu(), (5, 2, 4)),
    "pooled": (lambda m, x: m.norm(m.wide(F.relu(m.norms(m.conv(x))).mean((2, 3)))), (5, 2, 4, 4)),
    "dropout, behind": (lambda m, x: m.head(F.dropout(m.norm(x.flatten(1).relu()), 0.5, False)), (5, 2, 3)),
}


@pytest.mark.parametrize(("wiring", "shape"), SAID.values(), ids=SAID)
def test_a_graph_may_say_how_many_dimensions_there_are(wiring: Any, shape: tuple[int, ...]) -> None:
    model = randomized(Wired(wiring)).double().eval()
    x = numbers(*shape)
    for result in (batchnorm.fold(model), batchnorm.fold(model, x)):
        assert "norm" in result.folded
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


MOVED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transposed": lambda m, x: m.norm(m.linear(x).transpose(1, 2)).transpose(1, 2),
    "permuted": lambda m, x: m.norm(m.linear(x).permute(0, 2, 1)),
    "rows": lambda m, x: m.norm(m.linear(x).reshape(-1, C)),
    "flattened": lambda m, x: m.norm(m.linear(x).flatten(0, 1)).view(x.shape[0], -1, C),
    "a part": lambda m, x: m.norm(m.linear(x)[:, 1]),
    "to a linear layer": lambda m, x: m.head(m.norm(torch.tanh(x.new_ones(len(x), C) * x[:, 0, :1]))),
}


@pytest.mark.parametrize("wiring", MOVED.values(), ids=MOVED)
def test_values_that_are_moved_are_followed_in_a_run(wiring: Any) -> None:
    model, x = randomized(Wired(wiring)).double().eval(), numbers(5, C, 4)
    result = batchnorm.fold(model, x)
    assert "norm" in result.folded
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    alone = batchnorm.fold(model)
    torch.testing.assert_close(alone.model(x), model(x), rtol=1e-12, atol=1e-12)


MIXED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "other rows": lambda m, x: m.norm(m.linear(x).reshape(-1, C * C)[:, :C]),
    "swapped": lambda m, x: m.norm(m.linear(x).reshape(-1, C, C).transpose(1, 2).reshape(-1, C)),
    "along L": lambda m, x: m.norm(m.linear(x)),
    "as other numbers": lambda m, x: m.norm(m.linear(x).flatten(0, 1).view(torch.int64).view(torch.float64)),
}


@pytest.mark.parametrize("wiring", MIXED.values(), ids=MIXED)
def test_values_that_end_in_other_channels_are_left_or_right(wiring: Any) -> None:
    model, x = randomized(Wired(wiring)).double().eval(), numbers(5, C, 4)
    for result in (batchnorm.fold(model, x), batchnorm.fold(model)):
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    if wiring is not MIXED["other rows"]:
        assert "norm" in batchnorm.fold(model, x).skipped


def test_a_layer_before_a_flattening_goes_into_the_linear_layer_behind() -> None:
    model = fresh(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 2 * 5, 4)).double().eval()
    x = numbers(4, 3, 2, 5)
    result = batchnorm.fold(model, x)
    assert result.folded == {"1": "into 3, which follows"}
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    assert batchnorm.fold(model).folded == {}
    kept = copy.deepcopy(model)
    assert torch.equal(kept(x), model(x))


def test_images_are_flattened_to_more_channels_than_the_convolution_has() -> None:
    model = fresh(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.BatchNorm1d(3 * 7 * 6)).eval()
    result = batchnorm.fold(model, image(2))
    assert result.folded == {}
    assert "dimension 1" in result.skipped["2"]
    model = fresh(nn.Conv2d(2, 3, 1), nn.Flatten(2), nn.BatchNorm1d(3)).eval()
    result = batchnorm.fold(model, image(2))
    assert result.folded == {"2": "into 0"}
    torch.testing.assert_close(result.model(image(2)), model(image(2)), rtol=1e-5, atol=1e-5)
