"""The clock: contenders take turns, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], object]

_SAMPLE = 200e-6  # seconds of a sample: shorter calls are timed in batches, far above the clock's own cost
_FEWEST, _MOST = 7, 300  # rounds
_LAST_RESORT = 3  # rounds, where they take ten times as long as planned: the machine is busy, or the call is slow


@dataclass(frozen=True)
class Measured:
    """Median seconds of a call, and how far apart the middle half of the rounds lay, relative to it."""

    seconds: float
    spread: float


def interleaved(calls: dict[str, Call], budget: float) -> tuple[dict[str, Measured], int]:
    """Time the calls in rounds, once each a round in rotating order; returns what each took, and the number of rounds.

    Args:
        calls: contender's name to call. The first calls are not timed: they may compile and allocate.
        budget: seconds after which no further round begins, once there are enough for a median.
    """
    batches = {name: _batch(call) for name, call in calls.items()}
    names, samples = list(calls), {name: [] for name in calls}  # type: tuple[list[str], dict[str, list[float]]]
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        rounds = 0
        while rounds < _FEWEST or (rounds < _MOST and time.perf_counter() < end):
            if rounds >= _LAST_RESORT and time.perf_counter() > end + max(1.0, 9 * budget):
                break
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_sample(calls[name], batches[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: _measured(values) for name, values in samples.items()}, rounds


def _batch(call: Call) -> int:
    """Warm a call up and say how often to repeat it for one sample."""
    call()
    call()
    return max(1, min(500, math.ceil(_SAMPLE / max(min(_sample(call, 1) for _ in range(3)), 1e-9))))


def _sample(call: Call, batch: int) -> float:
    start = time.perf_counter()
    for _ in range(batch):
        call()
    return (time.perf_counter() - start) / batch


def _measured(values: list[float]) -> Measured:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Measured(middle, (high - low) / middle)
