"""Only what nobody else reads is folded, whether a graph or a run shows who reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folded import fresh, image, same
from networks import Undecided, randomized
from torch import Tensor, nn

import batchnorm


class Wired(nn.Module):
    """Two convolutions and two layers, connected as a test says."""

    def __init__(self, wiring: Callable[[Any, Tensor], Tensor], traceable: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.first, self.second = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.wiring, self.traceable = wiring, traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.wiring(self, x)


def through(y: Tensor, m: Any) -> Tensor:
    return m.first(F.dropout(y, 0.5, m.training))


WIRED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, str]]] = {
    "plain": (lambda m, x: m.second(m.b(m.first(m.a(x)).relu())), {"first": "into a", "second": "into b"}),
    "two readers": (lambda m, x: m.second(m.b((y := m.a(x)) + m.first(y))), {"second": "into b"}),
    "one for two": (lambda m, x: m.first(m.a(x)).relu() + m.second(m.a(x)).relu(), {}),
    "two for one": (
        lambda m, x: m.first(m.a(x)).relu() + m.first(m.b(x)).relu() + m.second(x).relu(),
        {"first": "into a and b"},
    ),
    "a pair twice": (lambda m, x: m.first(m.a(m.first(m.a(x)).relu())).relu(), {"first": "into a"}),
    "functional": (lambda m, x: F.conv2d(m.first(m.a(x)).relu(), m.a.weight), {}),
    "only its dtype": (lambda m, x: m.first(m.a(x.to(m.a.weight.dtype))).relu(), {"first": "into a"}),
    "its own weight": (lambda m, x: m.first(m.a(x)).relu() * m.first.weight.sum(), {}),
    "dropout": (lambda m, x: through(m.a(x), m).relu(), {"first": "into a"}),
    "in place": (lambda m, x: m.first(m.a(x).relu_()).relu(), {}),
    "form": (lambda m, x: m.first(y := m.a(x)).relu().reshape(y.shape), {"first": "into a"}),
    "behind, and a skip": (lambda m, x: (h := x.relu()) + m.b(m.first(h)), {"first": "into b, which follows"}),
    "behind twice": (lambda m, x: m.a(y := m.first(x.relu())) + m.b(y), {}),
    "behind, others too": (lambda m, x: m.b(m.first(x.relu())) + m.b(x), {}),
}


@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "observed"])
@pytest.mark.parametrize(("wiring", "folded"), WIRED.values(), ids=WIRED)
def test_wirings(wiring: Any, folded: dict[str, str], traceable: bool) -> None:
    torch.manual_seed(0)
    model = randomized(Wired(wiring, traceable))
    result = batchnorm.fold(model, image(2))
    assert result.folded == folded
    assert set(result.folded) | set(result.skipped) == {"first", "second"}
    assert result.max_error_float64 < 1e-12
    same(result, model, image(2))
    without = batchnorm.fold(model)
    if traceable:
        assert without.folded == folded
    else:
        assert without.folded == {}
        assert "example_inputs" in without.skipped["first"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Shared(nn.Module):
    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.one = Pair()
        self.two = self.one
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.one(x) + self.two(x + 1)


@pytest.mark.parametrize("traceable", [True, False])
def test_shared_pairs_are_folded_once(traceable: bool) -> None:
    model = randomized(Shared(traceable))
    result = batchnorm.fold(model, image(2))
    assert result.folded == {"one.norm": "into one.conv"}
    assert result.model.one is result.model.two
    same(result, model, image(2))
    if not traceable:
        assert "shared" in batchnorm.fold(model).skipped["one.norm"]


def test_tied_weights_are_untied() -> None:
    model: Any = fresh(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    model[3].weight = model[0].weight
    result = batchnorm.fold(model, torch.randn(4, 3))
    assert result.folded == {"1": "into 0, which has a weight of its own now"}
    assert result.model[3].weight is not result.model[0].weight
    same(result, model, torch.randn(4, 3))


def test_features_that_are_flattened() -> None:
    class Tokens(nn.Module):
        def __init__(self, end: int) -> None:
            super().__init__()
            self.linear, self.norm, self.end = nn.Linear(4, 6), nn.BatchNorm1d(6), end

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return self.norm(y.flatten(0, self.end)).reshape_as(y)

    for end in (1, -2):
        model = randomized(Tokens(end))
        result = batchnorm.fold(model, torch.randn(2, 5, 4))
        assert result.folded == {"norm": "into linear"}
        same(result, model, torch.randn(2, 5, 4))
    model = fresh(nn.Linear(4, 6), nn.BatchNorm1d(6))  # of (N, 6, 4), whose channels are another dimension
    result = batchnorm.fold(model, torch.randn(2, 6, 4))
    assert "dimension 1" in result.skipped["1"]


def test_a_sequential_says_what_follows_and_a_run_corrects_it() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> list[Tensor]:
            taps = []
            for part in self.parts:
                x = part(x)
                taps.append(x)
            return taps[-1:] if x.sum() > 1e9 else taps

    model = randomized(Tapped())
    assert batchnorm.fold(model).folded == {"parts.1": "into parts.0, beside it in a Sequential"}
    result = batchnorm.fold(model, image(2))
    assert result.folded == {}
    assert "parts.0 feeds others, too" in result.skipped["parts.1"]
    assert result.max_error == 0
    model = randomized(Undecided(nn.ReLU()))
    assert batchnorm.fold(model).folded == {}
    assert batchnorm.fold(model, image(2)).folded == {"norm": "into conv"}


class Outcome:
    """No tensor, and no tree that torch knows."""

    def __init__(self, y: Tensor, features: Tensor) -> None:
        self.y, self.features = y, features


HIDDEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "a scripted part": lambda m, x: m.first(y := m.a(x)).relu() + m.scripted(y),
    "hooks": lambda m, x: m.first(m.watched(m.a(x))).relu(),
    "an attribute": lambda m, x: m.first(m.keep(m.a(x))).relu(),
    "an object": lambda m, x: Outcome(m.first(y := m.a(x)).relu(), y),
    "a view that is written to": lambda m, x: m.first(write(m.a(x))).relu(),
}


def write(y: Tensor) -> Tensor:
    y.view(-1)[:3].zero_()
    return y


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wiring", HIDDEN.values(), ids=HIDDEN)
def test_readers_that_no_function_call_shows(wiring: Any) -> None:
    class Kept(Wired):
        def keep(self, y: Tensor) -> Tensor:
            self.kept = y
            return y

    torch.manual_seed(0)
    model: Any = randomized(Kept(wiring))
    model.scripted = torch.jit.script(nn.Sequential(nn.Tanh()))
    model.watched = nn.Identity()
    model.watched.register_forward_hook(lambda *_: None)
    result = batchnorm.fold(model, image(2))
    assert "first" in result.skipped
    assert result.skipped["first"].startswith(("a feeds others, too", "it follows"))
