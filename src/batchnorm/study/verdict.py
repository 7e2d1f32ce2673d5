"""The verdict: a paired difference with its interval, and what may honestly be said about it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from batchnorm.study.results import Comparison

LEVEL = 0.95
RESAMPLES = 10_000
# The chance that n differences share one sign though there is no effect is 2^(1-n): with fewer seeds than this, more
# than one comparison in ten would claim an effect from luck alone.
FEWEST_SEEDS = 5


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What the test accuracies say: the second arm's minus the first's, as a share of all images."""

    word: Literal["helps", "hurts", "inconclusive"]
    difference: Interval
    sentence: str


def judge(comparison: Comparison) -> Verdict:
    """Judge a comparison by its final runs, paired by seed."""
    control, treatment = comparison.arms
    pairs = zip(comparison.final(control), comparison.final(treatment), strict=True)
    difference = bootstrap([after.accuracy - before.accuracy for before, after in pairs])
    measured = points(difference, "points of test accuracy")
    doubt = _doubt(comparison, difference)
    if doubt is not None:
        return Verdict("inconclusive", difference, f"Inconclusive: {measured}; {doubt}.")
    word: Literal["helps", "hurts"] = "helps" if difference.low > 0 else "hurts"
    return Verdict(word, difference, f"{treatment.capitalize()} {word}: {measured}.")


def bootstrap(differences: list[float]) -> Interval:
    """Return the mean of paired differences with its percentile bootstrap interval (Efron 1979); repeatable."""
    values = np.asarray(differences)
    resampled = np.random.default_rng(0).choice(values, size=(RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def points(interval: Interval, unit: str = "points") -> str:
    """Say a difference of accuracies in percentage points."""
    low, high = (f"{100 * value:+.1f}" for value in (interval.low, interval.high))
    return f"{100 * interval.estimate:+.1f} {unit} (95% CI {low} to {high})".replace("-", "−")


def _doubt(comparison: Comparison, difference: Interval) -> str | None:
    """Say why no effect may be claimed, if so."""
    if comparison.settings.seeds < FEWEST_SEEDS:
        return f"a verdict needs at least {FEWEST_SEEDS} seeds"
    for arm in comparison.arms:
        summary = comparison.summary(arm)
        if summary.at_edge:
            return f"the best learning rate of {arm}, {summary.rate:g}, is at the edge of those tried"
    if difference.low <= 0 <= difference.high:
        return "the interval includes zero"
    return None
