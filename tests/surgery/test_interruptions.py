"""Whole or not at all: whatever is raised, by any signal, at any line, a model is afterwards what it was."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from injection import InjectedError, Injection, Place, alarmed, chosen, raising, signalled
from snapshot import Snapshot
from torch import Tensor, nn

import batchnorm
from batchnorm.kernels import ran
from batchnorm.surgery.inspect.preserve import preserved
from batchnorm.surgery.inspect.restoring import Restoring

RESTORING = ("restoring.py", "preserve.py")
EVERYTHING = ("",)
# Python itself ends what a handler raises while a callback of a weak reference or of the garbage collector runs.
ENDED_IN_CALLBACKS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "preserved": within_preserved,
    "frozen_statistics": within_frozen,
    "recalibrate": lambda model: batchnorm.recalibrate(model, [data()], metric=lambda m: float(m(data()).sum())),
    "recalibrate layerwise": lambda model: batchnorm.recalibrate(model, [data()], method="layerwise"),
    "adapt": lambda model: batchnorm.adapt(model, data(), prior=16),
    "adapt by tent": lambda model: batchnorm.adapt(model, data(), method="tent"),
}

pytestmark = pytest.mark.filterwarnings("ignore:adapted to")


def tried(call: Callable[[Any], Any], injection: Injection) -> bool:
    """Whether a call was interrupted by an injection and left the model as it was."""
    model = network()
    before, recording = Snapshot(model), torch.is_grad_enabled()
    with pytest.raises(InjectedError), injection.armed():
        call(model)
    assert torch.is_grad_enabled() is recording
    return before.unchanged()


def all_places(call: Callable[[Any], Any], files: tuple[str, ...], opcodes: bool = False) -> list[Place]:
    call(network())
    injection = Injection(files, None, opcodes=opcodes)
    with injection.armed():
        call(network())
    return injection.places


# The others' code is the same, and takes longer.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if " " in name else name for name in CALLS]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_at_any_line_leaves_the_model_as_it_was(name: str) -> None:
    call = CALLS[name]
    places = all_places(call, EVERYTHING)
    assert len(places) > 20
    with alarmed():
        for k in chosen(places):
            assert tried(call, Injection(EVERYTHING, k, signalled)), places[k]


@pytest.mark.parametrize("name", ["preserved", "frozen_statistics", "recalibrate"])
def test_a_signal_at_any_instruction_of_the_restoring_code(name: str) -> None:
    call = CALLS[name]
    places = all_places(call, RESTORING, opcodes=True)
    with alarmed():
        for k in chosen(places):
            assert tried(call, Injection(RESTORING, k, signalled, opcodes=True)), places[k]


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_at_any_line_leaves_the_model_as_it_was(name: str) -> None:
    """Raised by another thread, say, and by no signal: nothing can protect the first line of the way back alone."""
    call = CALLS[name]
    places = all_places(call, EVERYTHING)
    first = Restoring.__exit__.__code__.co_firstlineno + 1
    with alarmed(stays=False):
        for k in chosen(places):
            assert tried(call, Injection(EVERYTHING, k, raising)) or places[k] == ("__exit__", first), places[k]


@pytest.mark.parametrize("act", [raising, signalled])
@pytest.mark.parametrize("way", ["undo", "block"])
def test_an_adapted_model_is_taken_back_whole_or_stays_whole(way: str, act: Callable[[], None]) -> None:
    """It stays if the exception comes before the way back begins: before the block, or in the line that asks for it."""

    def back(adapted: Any) -> None:
        if way == "undo":
            adapted.undo()
        else:
            with adapted:
                pass

    files = ("restoring.py", "adaptation")
    counted = Injection(files, None)
    adapted = batchnorm.adapt(network(), data(), prior=16)
    with alarmed(), counted.armed():
        back(adapted)
    for k, (function, _) in enumerate(counted.places):
        with alarmed(stays=act is signalled and function != "completely"):
            model = network()
            before = Snapshot(model)
            adapted = batchnorm.adapt(model, data(), prior=16)
            after = Snapshot(model)
            with pytest.raises(InjectedError), Injection(files, k, act).armed():
                back(adapted)
            not_yet = ("undo", "completely", "__init__", "__enter__", "note", "take", "change")
            unprotected = (*not_yet, "__exit__") if act is raising else not_yet
            assert before.unchanged() or (function in unprotected and after.unchanged()), (function, k)


def same_values(model: nn.Module, other: nn.Module) -> bool:
    values = model.state_dict()
    return all(torch.equal(t, values[name]) for name, t in other.state_dict().items())


class Alarms:
    """Alarms after random times, whose handler raises TimeoutError wherever the program is."""

    def __init__(self) -> None:
        seed = int.from_bytes(os.urandom(2), "big")
        print("seed", seed)
        self._chance = random.Random(seed)

    def within(self, longest: float, work: Callable[[], Any]) -> bool:
        """Work until an alarm comes, or the work is done: which of both."""
        try:
            signal.setitimer(signal.ITIMER_REAL, self._chance.uniform(1e-6, longest))
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeoutError:
            return True
        return False


@pytest.fixture
def alarms() -> Iterator[Alarms]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, handler)
    yield Alarms()
    assert signal.getsignal(signal.SIGALRM) is handler
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@ENDED_IN_CALLBACKS
@pytest.mark.parametrize("name", ["preserved", "recalibrate", "adapt", "frozen_statistics"])
def test_alarms_at_random_times(name: str, alarms: Alarms) -> None:
    """The model is what it was; or, where the alarm came after the call's last line, what the call makes of it."""
    call = CALLS[name]
    done = network()
    call(done)
    begun = time.perf_counter()
    call(network())
    longest = 1.5 * (time.perf_counter() - begun)
    interrupted = 0
    for _ in range(300):
        model = network()
        before = Snapshot(model)
        if alarms.within(longest, partial(call, model)):
            interrupted += 1
            assert before.unchanged() or same_values(model, done)
    assert interrupted > 30


@ENDED_IN_CALLBACKS
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}])
def test_both_counters_of_renormalization_count_a_batch_or_none(options: dict[str, Any], alarms: Alarms) -> None:
    layer, x = batchnorm.BatchNorm1d(2, statistics=batchnorm.Renorm(), **options), data()

    def work() -> None:
        for _ in range(200):
            layer(x)

    work()
    assert ran().forward == "numba"
    interrupted = 0
    for _ in range(300):
        interrupted += alarms.within(0.005, work)
        assert layer.renorm_batches == layer.num_batches_tracked
    assert interrupted > 30
