"""Whole or not at all: whatever is raised, by any signal, at any line, a model is afterwards what it was."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from injection import InjectedError, Injection, Place, alarmed, chosen, raising, signalled
from snapshot import Snapshot
from torch import Tensor, nn

import batchnorm
from batchnorm.surgery.preserve import preserved
from batchnorm.surgery.restoring import Restoring, completely

RESTORING = ("restoring.py", "preserve.py")
EVERYTHING = ("",)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), batchnorm.BatchNorm1d(2))
    model[1].register_forward_hook(lambda *given: None)
    model(data()).square().sum().backward()  # gradients, and statistics that have moved
    return model


def data() -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(1))


def within_preserved(model: Any) -> None:
    with preserved(model, [model[0].weight]), torch.no_grad():
        model[0].weight.zero_()
        model[1].eval()
        model[1].register_forward_hook(lambda *given: None)
        model[0].momentum = None
        model(data())


def within_frozen(model: Any) -> None:
    with batchnorm.frozen_statistics(model):
        model(data())


def within_adapt(model: Any) -> None:
    with batchnorm.adapt(model, data(), prior=16):
        model(data())


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "preserved": within_preserved,
    "frozen_statistics": within_frozen,
    "recalibrate": lambda model: batchnorm.recalibrate(model, [data()], metric=lambda m: float(m(data()).sum())),
    "recalibrate layerwise": lambda model: batchnorm.recalibrate(model, [data()], method="layerwise"),
    "adapt": lambda model: batchnorm.adapt(model, data(), prior=16),
    "adapt by tent": lambda model: batchnorm.adapt(model, data(), method="tent"),
    "adapt and undo": lambda model: batchnorm.adapt(model, data(), prior=16).undo(),
    "adapt in a block": within_adapt,
}
CHANGES = ("recalibrate", "recalibrate layerwise", "adapt", "adapt by tent")  # something for good

pytestmark = pytest.mark.filterwarnings("ignore:adapted to")


def tried(call: Callable[[Any], Any], injection: Injection) -> str:
    """What has become of a model after an injection: "as before", "changed", or "ended" if nothing was raised."""
    model = network()
    before, recording = Snapshot(model), torch.is_grad_enabled()
    try:
        with injection.armed():
            call(model)
    except InjectedError:
        ended = False
    else:
        ended = True
    assert torch.is_grad_enabled() is recording
    if ended:
        return "ended"
    try:
        before.assert_unchanged()
    except AssertionError:
        return "changed"
    return "as before"


def all_places(call: Callable[[Any], Any], files: tuple[str, ...], opcodes: bool = False) -> list[Place]:
    call(network())
    injection = Injection(files, None, opcodes=opcodes)
    with injection.armed():
        call(network())
    return injection.places


@pytest.mark.parametrize("name", CALLS)
def test_a_signal_at_any_line_leaves_the_model_as_it_was(name: str) -> None:
    call = CALLS[name]
    places = all_places(call, EVERYTHING)
    assert len(places) > 20
    with alarmed():
        for k in chosen(places):
            injection = Injection(EVERYTHING, k, signalled)
            assert tried(call, injection) == "as before", places[k]
            assert injection.done


@pytest.mark.parametrize("name", ["preserved", "frozen_statistics", "adapt and undo"])
def test_a_signal_at_any_instruction_of_the_restoring_code(name: str) -> None:
    call = CALLS[name]
    places = all_places(call, RESTORING, opcodes=True)
    with alarmed():
        for k in chosen(places):
            assert tried(call, Injection(RESTORING, k, signalled, opcodes=True)) == "as before", places[k]


@pytest.mark.parametrize("name", CALLS)
def test_an_exception_at_any_line_leaves_the_model_as_it_was(name: str) -> None:
    """Raised by no signal, but by another thread, say: the one line that nothing can protect is the first at the end."""
    call = CALLS[name]
    places = all_places(call, EVERYTHING)
    first = Restoring.__exit__.__code__.co_firstlineno + 1
    for k in chosen(places):
        found = tried(call, Injection(EVERYTHING, k, raising))
        assert found == "as before" or places[k] == ("__exit__", first), places[k]
