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
_LAST_RESORT = 6  # rounds, where they take ten times as long as planned; fewer give no interval, see `interval`
_SLOW = 0.05  # seconds of a call that need not be warmed up over and over
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measured:
    """Median seconds of a call, and how far apart the middle half of the rounds lay, relative to it."""

    seconds: float
    spread: float


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of what a call took by what ours took in the same round, and its 95 % interval."""

    median: float
    low: float
    high: float


def interleaved(calls: dict[str, Call], budget: float) -> dict[str, list[float]]:
    """Time the calls in rounds, once each a round in rotating order; returns seconds for each, by round.

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
    return samples


def taking_turns(calls: dict[str, Call], rounds: int, before: Call) -> dict[str, list[float]]:
    """Time the calls, once each a round, after a call that is not timed; where processes must do the same steps."""
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before()
            samples[name].append(_sample(call, 1))
    return samples


def measured(samples: list[float]) -> Measured:
    """Give the median of a call's rounds, and their spread."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Measured(middle, (high - low) / middle)


def ratio(samples: list[float], ours: list[float]) -> Ratio:
    """Compare a call with ours, round by round: what slows a round down slows both."""
    paired = sorted(a / b for a, b in zip(samples, ours, strict=True))
    return Ratio(statistics.median(paired), *interval(paired))


def interval(ordered: list[float]) -> tuple[float, float]:
    """Give the 95 % interval of the median of what some values were drawn from, whatever its distribution.

    Of n values, the number below the true median is binomial with one half. So the median lies between the k-th
    smallest and the k-th largest unless fewer than k values are on one side of it.

    Args:
        ordered: at least six values, sorted; between the extremes of five, it lies in 94 % of cases only.
    """
    n, below, k = len(ordered), 0.5 ** len(ordered), 0
    while 2 * below <= 1 - _CONFIDENCE:
        k += 1
        below += math.comb(n, k) * 0.5**n
    if k == 0:
        raise ValueError(f"six values or more have an interval, got {n}")
    return ordered[k - 1], ordered[n - k]


def _batch(call: Call) -> int:
    """Warm a call up and say how often to repeat it for one sample."""
    call()
    if _sample(call, 1) > _SLOW:
        return 1
    return max(1, min(500, math.ceil(_SAMPLE / max(min(_sample(call, 1) for _ in range(3)), 1e-9))))


def _sample(call: Call, batch: int) -> float:
    start = time.perf_counter()
    for _ in range(batch):
        call()
    return (time.perf_counter() - start) / batch
