import pytest

from batchnorm.study.verdict import bootstrap, judge


def test_a_difference_beyond_doubt_is_claimed(make_comparison) -> None:
    verdict = judge(make_comparison([0.90, 0.91, 0.89, 0.92, 0.90], [0.97, 0.96, 0.98, 0.97, 0.97]))
    assert verdict.word == "helps"
    assert verdict.difference.estimate == pytest.approx(0.066)
    assert verdict.sentence == "Batch norm helps: +6.6 points of test accuracy (95% CI +5.4 to +7.8)."


def test_harm_is_said_as_plainly(make_comparison) -> None:
    verdict = judge(make_comparison([0.97] * 5, [0.90, 0.91, 0.89, 0.92, 0.90]))
    assert verdict.word == "hurts"
    assert verdict.sentence.startswith("Batch norm hurts: −6.6 points")


def test_differences_are_paired_by_seed(make_comparison) -> None:
    before = [0.5, 0.6, 0.7, 0.8, 0.9]
    verdict = judge(make_comparison(before, [accuracy + 0.01 for accuracy in before]))
    assert verdict.word == "helps"
    assert verdict.difference.low == pytest.approx(verdict.difference.high)


@pytest.mark.parametrize(
    ("before", "after", "best", "reason"),
    [
        ([0.9] * 5, [0.88, 0.92, 0.91, 0.89, 0.90], (0.1, 0.1), "the interval includes zero"),
        ([0.9] * 5, [0.9] * 5, (0.1, 0.1), "the interval includes zero"),
        ([0.8] * 4, [0.9] * 4, (0.1, 0.1), "a verdict needs at least 5 seeds"),
        ([0.8] * 5, [0.9] * 5, (0.1, 1.0), "the best learning rate of batch norm, 1, is at the edge of those tried"),
        ([0.8] * 5, [0.9] * 5, (0.01, 0.1), "the best learning rate of no norm, 0.01, is at the edge of those tried"),
    ],
)
def test_doubt_is_named(make_comparison, before, after, best, reason) -> None:
    verdict = judge(make_comparison(before, after, best))
    assert verdict.word == "inconclusive"
    assert verdict.sentence.startswith("Inconclusive: ")
    assert verdict.sentence.endswith(f"; {reason}.")


def test_the_interval_repeats_and_holds_the_mean() -> None:
    interval = bootstrap([0.01, 0.03, -0.02, 0.05, 0.04])
    assert interval == bootstrap([0.01, 0.03, -0.02, 0.05, 0.04])
    assert interval.low < interval.estimate < interval.high
    assert interval.estimate == pytest.approx(0.022)
