"""The verdict: a paired difference with its interval and p, and what may honestly be said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from batchnorm.study.results import Comparison

LEVEL = 0.95
# The exact sign-flip p of n differences is at least 2^(1-n): with fewer seeds than this, differences that all have one
# sign would still have p > 0.05.
FEWEST_SEEDS = 6
_FLIPS = 2**14  # so many seeds' sign flips are all tried, up to 14; of more, that many at random


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences.

    Attributes:
        estimate: The mean.
        low: Lower end of its 95 % confidence interval, by Student's t.
        high: Upper end.
        p: Of the two-sided sign-flip test: the share of all choices of signs whose mean is at least as far from zero.
            It assumes only that without an effect a difference is as likely as its negative.
    """

    estimate: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """What the test accuracies say: the second arm's minus the first's, as a share of all images."""

    word: Literal["helps", "hurts", "inconclusive"]
    difference: Paired
    sentence: str


def judge(comparison: Comparison) -> Verdict:
    """Judge a comparison by its final runs, paired by seed."""
    control, treatment = comparison.arms
    pairs = zip(comparison.final(control), comparison.final(treatment), strict=True)
    difference = paired([after.accuracy - before.accuracy for before, after in pairs])
    measured = points(difference, "points of test accuracy")
    doubt = _doubt(comparison, difference)
    if doubt is not None:
        return Verdict("inconclusive", difference, f"Inconclusive: {measured}; {doubt}.")
    word: Literal["helps", "hurts"] = "helps" if difference.low > 0 else "hurts"
    return Verdict(word, difference, f"{treatment.capitalize()} {word}: {measured}.")


def paired(differences: Sequence[float]) -> Paired:
    """Return the mean of paired differences, its interval by the paired t test, and the sign-flip p.

    A percentile bootstrap of so few differences is too narrow; docs/comparing.md has how often each claims an effect
    where there is none. One difference has no interval: it reaches everywhere.
    """
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Paired(mean, -np.inf, np.inf, 1.0)
    error = float(stats.sem(values)) if np.ptp(values) > 0 else 0.0
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    test = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=_FLIPS, rng=np.random.default_rng(0)
    )
    return Paired(mean, mean - half, mean + half, float(test.pvalue))


def points(difference: Paired, unit: str = "points") -> str:
    """Say a difference of accuracies in percentage points."""
    estimate, low, high = (
        f"{100 * value:+.1f}".replace("-", "−") for value in (difference.estimate, difference.low, difference.high)
    )
    interval = f"95% CI {low} to {high}" if np.isfinite(difference.low) else "one seed has no interval"
    return f"{estimate} {unit} ({interval}; sign-flip p = {difference.p:.2g})"


def _doubt(comparison: Comparison, difference: Paired) -> str | None:
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
