"""Comparisons for the tests of the study: a real one that takes seconds, and made-up ones."""

from collections.abc import Callable, Sequence

import pytest

from batchnorm.study.compare import compare
from batchnorm.study.results import Comparison, Run, Settings, Stage

MakeComparison = Callable[..., Comparison]


@pytest.fixture(scope="session")
def trained() -> Comparison:
    """Two seeds at three rates, the last one far past divergence."""
    return compare(settings=Settings(rates=(0.03, 0.1, 1e20), sweep_seeds=2, seeds=2, steps=30), processes=1)


@pytest.fixture
def make_comparison() -> MakeComparison:
    """Make a comparison whose final test accuracies are given."""

    def make(
        before: Sequence[float],
        after: Sequence[float],
        best: tuple[float, float] = (0.1, 0.1),
        arms: tuple[str, str] = ("no norm", "batch norm"),
    ) -> Comparison:
        settings = Settings(rates=(0.01, 0.1, 1.0), sweep_seeds=2, seeds=len(before), steps=20)

        def run(arm: str, rate: float, seed: int, stage: Stage, accuracy: float) -> Run:
            batch = 0.5 if arm == arms[1] else None
            curve = (0.5, accuracy)
            return Run(
                arm,
                rate,
                seed,
                stage,
                "learned",
                (10, 20),
                (2.0, 1.0),
                curve,
                curve if batch else (),
                None,
                accuracy,
                batch,
                0.1,
            )

        sweep = [
            run(arm, rate, seed, "sweep", 0.8 if rate == chosen else 0.7)
            for arm, chosen in zip(arms, best, strict=True)
            for rate in settings.rates
            for seed in range(settings.sweep_seeds)
        ]
        final = [
            run(arm, rate, settings.sweep_seeds + seed, "final", accuracy)
            for arm, rate, accuracies in zip(arms, best, (before, after), strict=True)
            for seed, accuracy in enumerate(accuracies)
        ]
        return Comparison("digits", 10, arms, settings, {"python": "3"}, (*sweep, *final))

    return make
