"""Measures how often a verdict of `compare` is wrong, and how often it finds an effect that is there.

    python docs/comparing.py

prints the tables of docs/comparing.md, in about three minutes. It needs the extra "tools".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.progress import track
from scipy import stats
from torch import nn

from batchnorm.study.arms import Arm
from batchnorm.study.compare import compare
from batchnorm.study.results import FEWEST_SEEDS, LEVEL, Settings, judge, paired

DRAWS, REPETITIONS = 10_000, 200
EFFECT = 1.5  # in standard deviations of a difference
SMALL = Settings(rates=(0.003, 0.1, 3.0), sweep_seeds=2, steps=40, every=40)


def main() -> None:
    """Print both tables."""
    drawn()
    trained()


def drawn() -> None:
    """Print how often each way to judge claims an effect, of differences drawn from a normal distribution."""
    print("| seeds | bootstrap | paired t | sign-flip p ≤ 0.05 | paired t, effect of 1.5 σ | power by theory |")
    print("|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for n in (5, FEWEST_SEEDS, 8, 10, 20):
        without = rng.normal(0, 1, (DRAWS, n))
        with_effect = without + EFFECT
        flips = np.mean([paired(row).p <= 0.05 for row in without[:1000]]) if n <= 10 else None
        cells = [
            f"{_bootstrap_excludes_zero(without, rng):.1%}",
            f"{_t_excludes_zero(without):.1%}",
            "–" if flips is None else f"{flips:.1%}",
            f"{_t_excludes_zero(with_effect):.0%}",
            f"{_power(n):.0%}",
        ]
        print("|", " | ".join([str(n), *cells]), "|", flush=True)


def _bootstrap_excludes_zero(rows: np.ndarray, rng: np.random.Generator) -> float:
    """The share of rows whose percentile bootstrap interval (Efron 1979) excludes zero; of the first 1000."""
    claims = 0
    for row in rows[:1000]:
        means = rng.choice(row, size=(2000, len(row))).mean(axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        claims += not low <= 0 <= high
    return claims / 1000


def _t_excludes_zero(rows: np.ndarray) -> float:
    return float((stats.ttest_1samp(rows, 0, axis=1).pvalue < 1 - LEVEL).mean())


def _power(n: int) -> float:
    """How often the paired t test finds the effect: by the noncentral t distribution."""
    edge = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    shifted = stats.nct(n - 1, EFFECT * n**0.5)
    return float(shifted.sf(edge) + shifted.cdf(-edge))


def trained() -> None:
    """Print how often `compare` claims an effect between an arm and itself, and finds one that was planted."""
    same = _claims(lambda repetition: (_arm("one", 2 * repetition), _arm("other", 2 * repetition + 1)))
    narrow = _claims(lambda repetition: (_arm("narrow", 2 * repetition, 8), _arm("wide", 2 * repetition + 1, 32)))
    print(f"\n| {REPETITIONS} comparisons of | helps | hurts | inconclusive |\n|---|---|---|---|")
    print("| an arm with itself |", " | ".join(map(str, same)), "|")
    print("| 8 hidden units with 32 |", " | ".join(map(str, narrow)), "|")


def _claims(arms: Callable[[int], tuple[Arm, Arm]]) -> Sequence[int]:
    words = [
        judge(compare(arms(repetition), settings=SMALL, processes=1)).word
        for repetition in track(range(REPETITIONS), description="comparing", transient=True)
    ]
    return [words.count(word) for word in ("helps", "hurts", "inconclusive")]


def _arm(name: str, number: int, width: int = 16) -> Arm:
    """A small network whose initial weights no arm of another number has, at any seed."""

    def build() -> nn.Module:
        torch.manual_seed(1000 * number + torch.initial_seed())
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    return Arm(name, build)


if __name__ == "__main__":
    main()
