import numpy as np
import pytest
from scipy import stats

from batchnorm.study.results import Settings, judge, paired, points


def test_a_difference_beyond_doubt_is_claimed(make_comparison) -> None:
    before, after = [0.90, 0.91, 0.89, 0.92, 0.90, 0.90], [0.97, 0.96, 0.98, 0.97, 0.97, 0.97]
    verdict = judge(make_comparison(before, after))
    assert verdict.word == "helps"
    assert verdict.difference.estimate == pytest.approx(0.4 / 6)
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (verdict.difference.low, verdict.difference.high) == pytest.approx(tuple(expected))
    assert verdict.difference.p == pytest.approx(2 / 2**6)
    assert verdict.sentence == (
        "Batch norm helps: +6.7 points of test accuracy (95% CI +5.1 to +8.2; sign-flip p = 0.031)."
    )


def test_harm_is_said_as_plainly(make_comparison) -> None:
    verdict = judge(make_comparison([0.97] * 6, [0.90, 0.91, 0.89, 0.92, 0.90, 0.9]))
    assert verdict.word == "hurts"
    assert verdict.sentence.startswith("Batch norm hurts: −6.7 points")


def test_differences_are_paired_by_seed(make_comparison) -> None:
    before = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    verdict = judge(make_comparison(before, [accuracy + 0.01 for accuracy in before]))
    assert verdict.word == "helps"
    assert verdict.difference.low == pytest.approx(verdict.difference.high)


@pytest.mark.parametrize(
    ("before", "after", "best", "reason"),
    [
        ([0.9] * 6, [0.88, 0.92, 0.91, 0.89, 0.90, 0.90], (0.1, 0.1), "the interval includes zero"),
        ([0.9] * 6, [0.9] * 6, (0.1, 0.1), "the interval includes zero"),
        ([0.8] * 5, [0.9] * 5, (0.1, 0.1), "a verdict needs at least 6 seeds"),
        ([0.8] * 6, [0.9] * 6, (0.1, 1.0), "the best learning rate of batch norm, 1, is at the edge of those tried"),
        ([0.8] * 6, [0.9] * 6, (0.01, 0.1), "the best learning rate of no norm, 0.01, is at the edge of those tried"),
    ],
)
def test_doubt_is_named(make_comparison, before, after, best, reason) -> None:
    verdict = judge(make_comparison(before, after, best))
    assert verdict.word == "inconclusive"
    assert verdict.sentence.startswith("Inconclusive: ")
    assert verdict.sentence.endswith(f"; {reason}.")


@pytest.mark.parametrize("n", [2, 6, 8, 20])
def test_the_interval_repeats_and_holds_the_mean(n) -> None:
    differences = np.random.default_rng(n).normal(0.02, 0.01, n).tolist()
    found = paired(differences)
    assert found == paired(differences)
    assert found.low < found.estimate < found.high
    assert found.estimate == pytest.approx(np.mean(differences))
    assert 0 < found.p <= 1


def test_one_difference_says_nothing() -> None:
    found = paired([0.1])
    assert (found.low, found.high, found.p) == (-np.inf, np.inf, 1)
    assert points(found) == "+10.0 points (one seed has no interval; sign-flip p = 1)"


@pytest.mark.parametrize("n", [6, 8])
def test_an_effect_is_rarely_claimed_where_there_is_none(make_comparison, n) -> None:
    # Of accuracies on 400 images: in steps of 1/400, with ties.
    rng = np.random.default_rng(0)
    words = []
    for _ in range(1000):
        before, after = rng.binomial(400, 0.95, (2, n)) / 400
        words.append(judge(make_comparison(before.tolist(), after.tolist())).word)
    claims = 1000 - words.count("inconclusive")
    assert claims <= stats.binom.ppf(1 - 1e-6, 1000, 0.05)
    assert 0 < words.count("helps") < claims


def test_a_verdict_is_possible_with_the_default_seeds(make_comparison) -> None:
    seeds = Settings().seeds
    verdict = judge(make_comparison([0.9] * seeds, [0.95] * seeds))
    assert verdict.word == "helps"
    assert verdict.difference.p < 0.05
