"""The comparison of two models runs both as their users do, judges by rounding, and still sees what is wrong."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Tail, image, randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.surgery.inspect.tensors import copied, tensors_in
from batchnorm.surgery.inspect.verify import largest_difference, verify


@dataclasses.dataclass
class Result:
    y: Tensor
    more: Any = None


class Output(OrderedDict):
    pass


class Plain:
    def __init__(self, y: Tensor) -> None:
        self.inner, self.itself = {"y": [y]}, self


Pair = namedtuple("Pair", "y number")

RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, 1),
    "dict": lambda y: {"y": y},
    "named tuple": lambda y: Pair(y, 2),
    "dataclass": lambda y: Result(y),
    "dataclass within": lambda y: [Result(y.argmax(), more=(Result(y),))],
    "subclass of OrderedDict": lambda y: Output(y=y),
    "UserDict": lambda y: UserDict(y=y),
    "object": Plain,
}


@pytest.mark.parametrize("wrap", RESULTS.values(), ids=RESULTS.keys())
def test_tensors_are_found_in_whatever_a_forward_returns(wrap: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = randomized(Tail(lambda m, x, y: wrap(m.relu(y))))
    assert batchnorm.fuse(model, image()).fused == {"bn": "relu"}
    wrong = copy.deepcopy(model)
    wrong.relu = nn.LeakyReLU(0.1)
    with pytest.raises(RuntimeError, match="outputs differ"):
        verify(model, wrong, image())


def test_each_tensor_is_found_once() -> None:
    y = torch.zeros(1)
    assert [id(t) for t in tensors_in((y, [Plain(y)], "y", Tensor, abs, {"y": y}))] == [id(y)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_batches_count_once(reentrant: bool) -> None:
    """torch's layers count them twice, and whatever reads the statistics next to them."""
    torch.manual_seed(0)

    def tail(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(lambda z: m.relu(m.second(z)), y, use_reentrant=reentrant)

    model, x = randomized(Tail(tail, second=nn.BatchNorm2d(2))), image()
    result = batchnorm.fuse(model, x)
    assert result.fused["second"] == "relu"
    twice, once = copy.deepcopy(model), copy.deepcopy(result.model)
    for each in (twice, once):
        each(x).sum().backward()
    assert (twice.second.num_batches_tracked, once.second.num_batches_tracked) == (2, 1)
    with torch.no_grad():
        z = model.bn(model.conv(x))
    right = 0.9 * result.model.second.running_mean + 0.1 * z.mean((0, 2, 3))
    torch.testing.assert_close(once.second.running_mean, right, rtol=1e-5, atol=1e-6)
    wrong = copy.deepcopy(result.model)
    wrong.second.momentum = 0.19  # two steps of 0.1
    with pytest.raises(RuntimeError, match="outputs differ"):
        verify(model, wrong, x)


class AsksForGradients(nn.Module):
    """As Wav2Vec2: in training the input itself is to have a gradient, which only a leaf allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None]
        if self.training:
            h.requires_grad = True
        return self.act(self.bn(self.conv(h)))


def test_inputs_are_handed_in_as_they_are() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert batchnorm.fuse(AsksForGradients(), x).fused == {"bn": "gelu"}
    assert not x.requires_grad
    seen = set()

    def look(m: Any, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            seen.add((x.requires_grad, x.is_leaf))
        return m.relu(y)

    model = Tail(look)
    batchnorm.fuse(model, image())
    assert seen == {(False, True)}
    seen.clear()
    batchnorm.fuse(model, image().requires_grad_())
    assert (True, True) in seen


def test_gradients_of_the_input_count_where_nothing_learns() -> None:
    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    model = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.ReLU())
    wrong = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.ReLU(), Rounds())
    assert verify(model, copy.deepcopy(model), image()).gradients == 0
    with pytest.raises(RuntimeError, match="gradients differ"):
        verify(model, wrong, image())


class Written(nn.Module):
    """Its dtype is written into it, and the gradient of its bias is 0 but for rounding."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.dtype = dtype
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x.to(self.dtype))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_told_from_mistakes_where_float64_is_no_choice(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Written(dtype), torch.randn(8, 2, 12, 12).to(dtype)
    assert batchnorm.fuse(model, x).fused == {"bn": "relu"}
    for act in (nn.LeakyReLU(0.2), nn.GELU(), nn.ReLU6()):
        wrong = copy.deepcopy(model)
        wrong.relu = act
        with pytest.raises(RuntimeError, match="differ"):
            verify(model, wrong, 10 * x)


def test_a_model_that_gives_nothing_to_compare_says_what_to_do() -> None:
    model = Tail(lambda m, x, y: m.relu(y).argmax())
    with pytest.raises(ValueError, match=r"no floating-point tensor .* or call without example_inputs"):
        batchnorm.fuse(model, image())
    assert batchnorm.fuse(model).fused == {"bn": "relu"}


def test_differences_are_relative_to_the_tensor_or_to_rounding() -> None:
    right = [torch.tensor([100.0, 1.0]), torch.tensor([0.02])]
    assert largest_difference([torch.tensor([100.0, 2.0]), right[1]], right) == pytest.approx(0.01)
    assert largest_difference([right[0], torch.tensor([0.03])], right) == pytest.approx(0.1)  # of 100 / 1000
    nan = [torch.tensor([float("nan"), 1.0])]
    assert largest_difference(nan, nan) == 0
    assert largest_difference([torch.ones(2)], nan) == float("inf")
    assert largest_difference([torch.ones(3)], nan) == float("inf")
    near = [torch.tensor([100.0, 1.0]), torch.tensor([0.021])]
    assert 0 < largest_difference([right[0], torch.tensor([0.029])], right, near) < 1e-5  # the limit
    assert largest_difference([right[0], torch.tensor([0.04])], right, near) == pytest.approx(2e-5, rel=1e-3)


def test_copies_hold_what_a_forward_has_kept_without_its_graph() -> None:
    layer = nn.Linear(2, 2)
    layer.kept = {"y": [layer(torch.ones(1, 2))]}
    layer.again = layer.kept["y"][0]
    twin = copied(layer)
    assert twin.again is twin.kept["y"][0]
    assert twin.again.grad_fn is None
    assert torch.equal(twin.again, layer.again.detach())
    layer.lock = F.relu(layer.again).grad_fn  # which cannot be copied at all
    with pytest.raises(Exception, match=r"copy|pickle"):
        copied(layer)


def test_a_layer_of_torchs_own_whose_buffer_belongs_to_a_graph_is_copied() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[1].running_mean = model[1].weight * 2  # type: ignore[operator]
    twin = copied(model)
    assert torch.equal(twin[1].running_mean, model[1].running_mean)  # type: ignore[arg-type]
    assert twin[1].running_mean is not model[1].running_mean
    assert twin[1].running_mean.grad_fn is None
