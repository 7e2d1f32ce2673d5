"""BN101, BN110 and BN111: what a run on data shows."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.evidence import Evidence
from batchnorm.diagnosis.gap import Arms, Gap
from batchnorm.diagnosis.rules.rule import Found, Rule
from batchnorm.diagnosis.rules.statistics import RESIDUE

__all__ = ["RULES", "cause"]

_FAR = 0.5  # standard deviations
_SURE = 4  # standard errors
_FEW = 8  # values a channel


def _stale(gap: Gap) -> list[str]:
    """The layers whose own statistics are wrong, in the order of calls."""
    return [path for path in gap.order if gap.own[path] > max(_FAR, _SURE * gap.noise[path])]


def _look(evidence: Evidence) -> Iterator[Found]:
    gap = evidence.gap
    if gap is None:
        return
    stale = _stale(gap)
    if not stale:
        return
    followers = [path for path in gap.order if path not in stale and gap.given[path] > _FAR]
    rest = f"; {len(stale) - 1} later layers, too" if len(stale) > 1 else ""
    rest += f"; {len(followers)} only follow" if followers else ""
    lines = [
        "evaluation uses statistics that are not those of these weights and data",
        *([_metric(gap.arms, gap)] if gap.arms is not None else []),
        f"starts at {stale[0] or 'the model'} ({gap.own[stale[0]]:.2g} deviations off, threshold {_FAR:g}){rest}",
        f"likely cause: {cause(evidence, stale)}",
    ]
    yield Found(tuple(stale), "\n        ".join(lines), gap.own[stale[0]])


def _metric(arms: Arms, gap: Gap) -> str:
    closed = "" if arms.closed is None else f": recalibration closes {arms.closed:.0%} of the gap"
    return (
        f"metric: running {arms.running:.4g}   batch {arms.batch:.4g}   recalibrated {arms.recalibrated:.4g}   "
        f"({gap.samples} samples){closed}"
    )


def cause(evidence: Evidence, stale: list[str]) -> str:
    """Say what probably made the statistics of some layers wrong, in the order of calls."""
    gap = evidence.gap
    assert gap is not None
    layers = [layer for layer in evidence.layers if layer.path in stale]
    if any(layer.unfit for layer in layers):
        return "a batch that was not finite (BN102)"
    if layers and all(layer.initial for layer in layers):
        return "statistics that were never loaded, or were reset (BN103)"
    if any(layer.momentum == 0 for layer in layers):
        return "a momentum of 0, with which they never moved (BN203)"
    few = [layer.batches or 0 for layer in layers if layer.residue > RESIDUE]
    if few:
        return f"too few batches ({min(few)}) for the momentum (BN104)"
    if stale == [gap.order[0]]:
        return "the input is not what it was in training (scale, preprocessing, domain), or the first weights are not"
    return "weights that have changed since: averaged (EMA, SWA), pruned, quantized, merged or fine-tuned"


def _few_values(evidence: Evidence) -> Iterator[Found]:
    gap = evidence.gap
    few = sorted((n, path) for path, n in gap.values.items() if n < _FEW) if gap is not None else []
    if few:
        yield Found(
            tuple(path for _, path in few),
            f"a channel has {few[0][0]:.3g} values in a batch: their moments are mostly noise", few[0][0],
        )  # fmt: skip


def _several_calls(evidence: Evidence) -> Iterator[Found]:
    gap = evidence.gap
    several = sorted(((n, path) for path, n in gap.calls.items() if n > 1), reverse=True) if gap is not None else []
    if several:
        yield Found(
            tuple(path for _, path in several),
            f"called {several[0][0]} times for one batch, with one set of running statistics for all", several[0][0],
        )  # fmt: skip


RULES = (
    Rule(
        "BN101", "train-eval-gap", "error", "data",
        "Good in train(), bad in eval()",
        "In training a layer normalizes with its batch, in evaluation with running statistics. Where these are not "
        "those of the weights and data at hand, evaluation computes something else than training did.",
        "The running statistics against the moments that the same data gives in training, dropout off: the root of the "
        f"mean square over channels, of means in deviations and of logarithms of deviations, above {_FAR:g} and above "
        f"{_SURE} standard errors. Half a deviation moves a fifth of a normal channel's values across a ReLU's kink. "
        "The first such layer is the root; layers that are right by themselves, and are given something else in "
        "evaluation, only follow.",
        "batchnorm.recalibrate(model, data). Where the input differs from training's, mend the input first.",
        "Data that is meant to differ from training's, and batches of a few values a channel, whose moments are noise.",
        (1, 6, 14, 15, 34, 42, 52, 58), _look,
    ),
    Rule(
        "BN110", "few-values", "warning", "data",
        "Small batches: training is unstable, or worse than without batch normalization",
        "Moments are taken over batch and positions, N · H · W values a channel. Of few they are noise, and with "
        'one there is no variance: training raises "Expected more than 1 value per channel".',
        f"Values a channel in a batch of the data that was given, below {_FEW}: docs/choosing.md measured a perceptron "
        "at 2, 4 and 8 values, of which two ruined it, four cost some points, and eight none.",
        "Larger batches; batchnorm.convert(model, statistics=batchnorm.Renorm()), or Sync() over devices; "
        "batchnorm.replace(model, 'group').",
        "Data in smaller batches than those of training.",
        (2, 47), _few_values,
    ),
    Rule(
        "BN111", "called-several-times", "advice", "data",
        "A shared head or a siamese network is bad at inference",
        "A layer that is called several times in a forward has one set of running statistics for what may be several "
        "distributions, and moves them by each call.",
        "Calls of each layer for one batch.",
        "A layer for each level or role, with shared weights: batchnorm.split_domains(model, ...), or one layer each.",
        "Calls whose inputs are alike, as of two views of the same images.",
        (20, 23), _several_calls,
    ),
)  # fmt: skip
