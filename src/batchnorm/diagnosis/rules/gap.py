"""BN101: good in train(), bad in eval()."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.evidence import Evidence, Layer
from batchnorm.diagnosis.gap import Arms, Gap
from batchnorm.diagnosis.rules.rule import Found, Rule

__all__ = ["RULES", "cause"]

_FAR = 0.5  # standard deviations
_SURE = 4  # standard errors


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
    if any(not _finite(layer) for layer in layers):
        return "a batch that was not finite (BN102)"
    if layers and all(layer.initial for layer in layers):
        return "statistics that were never loaded, or were reset (BN103)"
    if any(layer.momentum == 0 for layer in layers):
        return "a momentum of 0, with which they never moved (BN203)"
    few = [layer.batches for layer in layers if layer.batches and (1 - (layer.momentum or 0)) ** layer.batches > 0.01]
    if few:
        return f"too few batches ({min(few)}) for the momentum (BN104)"
    if stale == [gap.order[0]]:
        return "the input is not what it was in training (scale, preprocessing, domain), or the first weights are not"
    return "weights that have changed since: averaged (EMA, SWA), pruned, quantized, merged or fine-tuned"


def _finite(layer: Layer) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in (layer.mean, layer.var))


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
)  # fmt: skip
