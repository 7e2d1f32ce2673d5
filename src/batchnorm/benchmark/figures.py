"""Figures: what calls took in turns, and how they compare."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchnorm import kernels
from batchnorm.benchmark.contenders import OURS, TORCH
from batchnorm.benchmark.timing import Call, Ratio, interleaved, measured, ratio

NOISE = 0.97  # a ratio whose interval reaches this is not called slower
_LONGER = 4


@dataclass(frozen=True)
class Figures:
    """What contenders took.

    Attributes:
        seconds, spread: for each contender, the median over rounds and the relative distance of its quartiles.
        ratios: how many times as fast one contender is as another, paired by rounds; see who made it.
    """

    seconds: dict[str, float] = field(default_factory=dict, hash=False)
    spread: dict[str, float] = field(default_factory=dict, hash=False)
    ratios: dict[str, Ratio] = field(default_factory=dict, hash=False)
    rounds: int = 0


def by_ours(calls: dict[str, Call], seconds: float, kernel: str) -> Figures:
    """Time calls in turns; ratios are the others' times by ours. What looks slower than torch.nn gets a longer look.

    Raises:
        RuntimeError: if ours goes through another kernel than the one that was checked.
    """
    calls[OURS]()
    if kernels.ran().forward != kernel:
        raise RuntimeError(f"kernel {kernel!r} was checked, and {kernels.ran().forward!r} would be timed")
    samples = interleaved(calls, seconds)
    if ratio(samples[TORCH], samples[OURS]).median < NOISE:
        samples = interleaved(calls, _LONGER * seconds)
    ours = samples[OURS]
    return _figures(samples, {name: ratio(values, ours) for name, values in samples.items() if name != OURS})


def by_first(calls: dict[str, Call], seconds: float) -> Figures:
    """Time calls in turns; ratios are the first one's time by each other's."""
    samples = interleaved(calls, seconds)
    (_, first), *others = samples.items()
    return _figures(samples, {name: ratio(first, values) for name, values in others})


def _figures(samples: dict[str, list[float]], ratios: dict[str, Ratio]) -> Figures:
    found = {name: measured(values) for name, values in samples.items()}
    return Figures(
        seconds={name: one.seconds for name, one in found.items()},
        spread={name: one.spread for name, one in found.items()},
        ratios=ratios,
        rounds=len(next(iter(samples.values()))),
    )
