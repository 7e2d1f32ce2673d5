"""Results: what a comparison measured, as plain values that go to JSON and back, and what may be said of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

SCHEMA = "batchnorm.compare"
VERSION = 2

Stage = Literal["sweep", "final"]
Outcome = Literal["learned", "stuck", "diverged"]

LEVEL = 0.95
# The exact sign-flip p of n differences is at least 2^(1-n): with fewer seeds than this, differences that all have one
# sign would still have p > 0.05.
FEWEST_SEEDS = 6
_FLIPS = 2**14  # so many seeds' sign flips are all tried, up to 14; of more, that many at random


@dataclass(frozen=True)
class Settings:
    """How to train and measure; every arm gets the same.

    Attributes:
        rates: Learning rates of the sweep, rising; each is where a run's training starts.
        sweep_seeds: Runs for each arm and rate of the sweep, which chooses each arm's rate.
        seeds: Runs for each arm at its best rate, on other seeds; the verdict is about these.
        steps: Training steps of a run.
        batch: Images in a step.
        momentum: Of SGD.
        every: Steps between two records.
        target: Validation accuracy whose first reaching is noted.
    """

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    sweep_seeds: int = 5
    seeds: int = 8
    steps: int = 250
    batch: int = 32
    momentum: float = 0.9
    every: int = 10
    target: float = 0.9

    def __post_init__(self) -> None:
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise ValueError(f"rates must be positive and rising, got {self.rates}")
        for name in ("sweep_seeds", "seeds", "steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


QUICK = Settings(rates=(0.01, 0.1, 1.0), sweep_seeds=2, seeds=2, steps=30)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        outcome: "learned" if the loss ended clearly below that of guessing. If not, "diverged" if it was not finite or
            had exploded, else "stuck".
        steps: Where the curves have their values.
        loss: Mean training loss since the record before; `None` where not finite.
        validation: Validation accuracy.
        validation_batch: The same with batch in place of running statistics; empty without batch normalization, and
            in the sweep.
        steps_to_target: The first recorded step at the target; `None` if there was none.
        accuracy: Of the trained network: on the validation images in the sweep, on the test images in the end.
        batch_accuracy: The same with batch in place of running statistics; `None` without batch normalization.
        seconds: Of training alone, without the measurements.
    """

    arm: str
    rate: float
    seed: int
    stage: Stage
    outcome: Outcome
    steps: tuple[int, ...]
    loss: tuple[float | None, ...]
    validation: tuple[float, ...]
    validation_batch: tuple[float, ...]
    steps_to_target: int | None
    accuracy: float
    batch_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class Summary:
    """One arm in a few numbers: at its best rate on the final runs' seeds, and over the whole sweep."""

    arm: str
    rate: float
    at_edge: bool
    accuracy: float
    lowest: float
    highest: float
    batch_accuracy: float | None
    steps_to_target: float
    reached_target: int
    usable_rates: tuple[float, ...]
    seconds_per_step: float
    failed: int


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison of two arms, the control first, and everything that follows from them.

    ``to_json`` gives it as text, and ``batchnorm.study.report.save`` writes that and a page.
    """

    data: str
    classes: int
    arms: tuple[str, str]
    settings: Settings
    environment: dict[str, str]
    runs: tuple[Run, ...]

    def __repr__(self) -> str:
        control, treatment = self.arms
        sentence = judge(self).sentence
        return f"<Comparison of {treatment!r} with {control!r} on {self.data}, {len(self.runs)} runs. {sentence}>"

    def sweep(self, arm: str, rate: float) -> tuple[Run, ...]:
        """Return the sweep's runs of an arm at a rate, by seed."""
        return tuple(run for run in self.runs if (run.arm, run.rate, run.stage) == (arm, rate, "sweep"))

    def final(self, arm: str) -> tuple[Run, ...]:
        """Return an arm's runs at its best rate, on seeds that did not choose that rate."""
        return tuple(run for run in self.runs if (run.arm, run.stage) == (arm, "final"))

    def summary(self, arm: str) -> Summary:
        """Return an arm's summary."""
        rates, target = self.settings.rates, self.settings.target
        final = self.final(arm)
        rate = final[0].rate
        accuracies = [run.accuracy for run in final]
        # A run that never reached the target counts as infinitely long: censored, not dropped.
        to_target = [math.inf if run.steps_to_target is None else run.steps_to_target for run in final]
        sweep = {rate: self.sweep(arm, rate) for rate in rates}
        return Summary(
            arm=arm,
            rate=rate,
            at_edge=rate in (rates[0], rates[-1]),
            accuracy=mean_accuracy(final),
            lowest=min(accuracies),
            highest=max(accuracies),
            batch_accuracy=mean_batch_accuracy(final),
            steps_to_target=statistics.median(to_target),
            reached_target=sum(math.isfinite(steps) for steps in to_target),
            usable_rates=tuple(
                rate for rate in rates if statistics.median(run.accuracy for run in sweep[rate]) >= target
            ),
            seconds_per_step=statistics.median(run.seconds / run.steps[-1] for run in final),
            failed=sum(run.outcome != "learned" for runs in sweep.values() for run in runs),
        )

    def to_json(self) -> str:
        """Return the comparison as JSON of one schema version; it holds no NaN and no infinity."""
        return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Return the comparison that `to_json` wrote.

        Raises ValueError if the text is of another schema or version.
        """
        values = json.loads(text)
        found = (values.pop("schema", None), values.pop("version", None)) if isinstance(values, dict) else None
        if found != (SCHEMA, VERSION):
            raise ValueError(f"expected {SCHEMA} version {VERSION}, got {found}")
        values["settings"] = Settings(**_tuples(values["settings"]))
        values["runs"] = tuple(Run(**_tuples(run)) for run in values["runs"])
        return cls(**_tuples(values))


def mean_accuracy(runs: Sequence[Run]) -> float:
    """Return the mean accuracy of runs."""
    return statistics.mean(run.accuracy for run in runs)


def mean_batch_accuracy(runs: Sequence[Run]) -> float | None:
    """Return the mean accuracy of runs with batch statistics; `None` without batch normalization."""
    accuracies = [run.batch_accuracy for run in runs if run.batch_accuracy is not None]
    return statistics.mean(accuracies) if accuracies else None


def best_rate(runs: Sequence[Run]) -> float:
    """Return the rate with the highest mean accuracy over seeds; the smallest of equals."""
    rates = sorted({run.rate for run in runs})
    return max(rates, key=lambda rate: mean_accuracy([run for run in runs if run.rate == rate]))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return JSON's values with tuples for its lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# --- the verdict ---


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
