"""Sums of normalized branches, in any association and however they are written, fuse and stay what they were."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomized
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels

ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": operator.add,
    "+=": operator.iadd,
    "torch.add": torch.add,
    "add": lambda a, b: a.add(b),
    "add_": lambda a, b: a.add_(b),
    "sum": lambda a, b: sum([a, b]),
}
ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.relu": lambda m, y: F.relu(y),
    "relu_": lambda m, y: y.relu_(),
    "module": lambda m, y: m.act(y),
    "made on the way": lambda m, y: nn.LeakyReLU(0.2)(y),
    "by hand": lambda m, y: y * y.sigmoid(),
}


class Node(NamedTuple):
    """A sum of two nodes, an activation of one, or, without any, a layer of its own or the input."""

    how: str
    of: tuple[Node, ...] = ()


LAYER, INPUT = Node("layer"), Node("input")


def sums(parts: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.builds(lambda how, a, b: Node(how, (a, b)), st.sampled_from(list(ADDITIONS)), parts, parts)


TREES = st.recursive(
    st.sampled_from([LAYER, LAYER, INPUT]),
    lambda parts: sums(parts) | st.builds(lambda how, a: Node(how, (a,)), st.sampled_from(list(ACTIVATIONS)), parts),
    max_leaves=7,
)


def writes_where_autograd_allows(node: Node) -> bool:
    """What is written into is a layer's output or a sum, whose backward does not need it."""
    if node.how in ("+=", "add_", "relu_") and not (node.of[0].how == "layer" or node.of[0].how in ADDITIONS):
        return False
    return all(map(writes_where_autograd_allows, node.of))


def layers_in(node: Node) -> int:
    return (node.how == "layer") + sum(map(layers_in, node.of))


def fusable(node: Node) -> int:
    """A sum takes one layer that it adds directly; an activation the layer that it follows."""
    return (LAYER in node.of) + sum(map(fusable, node.of))


class Sum(nn.Module):
    def __init__(self, tree: Node) -> None:
        super().__init__()
        self.conv, self.act, self.tree = nn.Conv2d(2, 3, 1), nn.ReLU(), tree
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(layers_in(tree)))

    def forward(self, x: Tensor) -> Tensor:
        norms, x = iter(self.norms), self.conv(x)

        def value(node: Node) -> Tensor:
            if node == INPUT:
                return x
            if node == LAYER:
                return next(norms)(x)
            of = [value(one) for one in node.of]
            return ADDITIONS[node.how](*of) if node.how in ADDITIONS else ACTIVATIONS[node.how](self, *of)

        return value(self.tree)


def image() -> Tensor:
    return torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, training: bool) -> dict[str, Tensor]:
    model, x = copy.deepcopy(model).train(training), image().requires_grad_()
    with kernels.using("aten"):
        y = model(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return found | {"y": y.detach(), "x": x.grad}


def assert_computes_the_same(fused: nn.Module, model: nn.Module) -> None:
    for training in (True, False):
        found, right = step(fused, training), step(model, training)
        assert found.keys() == right.keys()
        for name, t in right.items():
            torch.testing.assert_close(found[name], t, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@given(tree=TREES.filter(writes_where_autograd_allows).filter(lambda tree: layers_in(tree) > 0))
@settings(max_examples=40, deadline=None)
def test_any_sum_of_layers_and_activations(tree: Node) -> None:
    torch.manual_seed(0)
    model = randomized(Sum(tree)).double()
    result = batchnorm.fuse(model, image())
    assert len(result.fused) == fusable(tree)
    assert len(result.fused) + len(result.skipped) == layers_in(tree)
    assert_computes_the_same(result.model, model)
    batchnorm.revert(result.model)
    assert_computes_the_same(result.model, model)


class Written(nn.Module):
    """Layers and a forward that a test writes."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(2, 3, 1), nn.ReLU()
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, self.conv(x))


def repvgg(m: Any, x: Tensor) -> Tensor:
    identity = m.a(x)
    return torch.relu(m.b(x) + m.c(x) + identity)


def loop(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    for layer in (m.a, m.b, m.c):
        y += layer(x)
    return m.act(y)


def shared_activation(m: Any, x: Tensor) -> Tensor:
    return m.act(m.a(x) + m.act(m.b(x) + m.c(x)))


WRITTEN: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, str], dict[str, str]]] = {
    "repvgg": (repvgg, {"a": "add + relu", "c": "add"}, {"b": "it is the residual of c"}),
    "right": (
        lambda m, x: m.a(x) + (m.b(x) + m.c(x)), {"a": "add", "c": "add"}, {"b": "it is the residual of c"},
    ),
    "of an activation": (
        lambda m, x: m.a(x) + torch.relu(m.b(m.c(x))), {"a": "add", "b": "relu"}, {"c": "followed by b (BatchNorm2d)"},
    ),
    "shared activation": (
        shared_activation, {"a": "add + relu", "c": "add + relu"}, {"b": "it is the residual of c"},
    ),
    "loop": (loop, {"a": "add", "b": "add", "c": "add + relu"}, {}),
    "sum": (lambda m, x: sum([x, m.a(x), m.b(x), m.c(x)]), {"a": "add", "b": "add", "c": "add"}, {}),
    "twice": (
        lambda m, x: torch.relu(m.a(x) + m.a(x * 2)) + m.b(m.c(x)),
        {"b": "add"},
        {
            "a": "it is called several times, with different things behind it",
            "c": "followed by b (BatchNorm2d)",
        },
    ),
    "twice, in order": (
        lambda m, x: m.a(x) + x + (m.a(x * 2) + x) + m.b(m.c(x)),
        {"a": "add", "b": "add"}, {"c": "followed by b (BatchNorm2d)"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "fused", "skipped"), WRITTEN.values(), ids=WRITTEN.keys())
def test_sums_as_people_write_them(
    forward: Callable[[Any, Tensor], Any], fused: dict[str, str], skipped: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model = randomized(Written(forward)).double()
    result = batchnorm.fuse(model, image())
    assert result.fused == fused
    assert result.skipped == skipped
    assert_computes_the_same(result.model, model)


# --- what must not be fused ---


def read_later(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(-1)
    y += m.a(x)
    return y * z.sum()


def read_before(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y.mean()
    y += m.a(x)
    return y * z


def overwritten(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = m.a(x.clone().view(x.shape))
    x.mul_(2)
    return y + x


def input_overwritten(m: Any, x: Tensor) -> Tensor:
    x = x.detach() * 1
    y = m.a(x)
    x.zero_()
    return y + x


def changing_places(m: Any, x: Tensor) -> Tensor:
    first, second = m.a(x), m.a(x * 2)
    second = second + x
    return (first + x) * second


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str | None]] = {
    "read later": (read_later, "it is added in place into a tensor that others read"),
    "read before": (read_before, None),
    "another overwritten": (overwritten, None),
    "input overwritten": (input_overwritten, "its input is overwritten between it and the addition"),
    "changing places": (changing_places, "it is called several times, and its calls would change places"),
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_memory_that_others_read_and_the_order_of_calls_stay(
    forward: Callable[[Any, Tensor], Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchnorm.surgery.fusing.fuse.verify", lambda *_: None)  # the reason must come before
    torch.manual_seed(0)
    result = batchnorm.fuse(randomized(Written(forward)).double(), image())
    assert result.skipped.get("a") == reason


def test_an_addition_into_the_callers_tensor_is_left() -> None:
    class Into(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y += self.norm(x)
            return y

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = Into()

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return self.into(x, y) * y

    model = randomized(Around()).double()
    result = batchnorm.fuse(model, image())
    assert result.skipped == {"into.norm": "it is added in place into a tensor that others read"}
    assert_computes_the_same(result.model, model)
