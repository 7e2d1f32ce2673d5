"""BN1xx: running statistics that cannot be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch

from batchnorm.diagnosis.evidence import Evidence, Layer
from batchnorm.diagnosis.rules.rule import Found, Rule

__all__ = ["RESIDUE", "RULES"]

RESIDUE = 0.01  # of the initial value
_CLOSE = 0.1  # deviations from the moments of the data
_COARSE = 1e3  # mean over deviation


def _layers(evidence: Evidence) -> Iterator[Layer]:
    """Those that have running statistics."""
    return (layer for layer in evidence.layers if layer.mean is not None and layer.var is not None)


def _worst(layers: Iterable[tuple[float, Layer]], message: Callable[[float, Layer, int], str]) -> Iterator[Found]:
    """One finding for all layers with a value, the largest first."""
    found = sorted(layers, key=lambda pair: -pair[0])
    if found:
        value, worst = found[0]
        yield Found(tuple(layer.path for _, layer in found), message(value, worst, len(found)), value)


def _channels(number: float) -> str:
    return f"{number:.0f} channel{'s' if number != 1 else ''}"


def _not_finite(evidence: Evidence) -> Iterator[Found]:
    bad = [(float(layer.unfit), layer) for layer in _layers(evidence)]
    yield from _worst(
        [pair for pair in bad if pair[0]],
        lambda value, layer, n: (
            f"running statistics are nan or infinite in {_channels(value)} of {n} layers"
            if n > 1
            else f"running statistics are nan or infinite in {_channels(value)}"
        ),
    )


def _negative(evidence: Evidence) -> Iterator[Found]:
    bad = [(float((layer.var < 0).sum()), layer) for layer in _layers(evidence) if layer.var is not None]
    yield from _worst(
        [pair for pair in bad if pair[0]],
        lambda value, layer, n: f"running variance is below 0 in {_channels(value)}",
    )


def _initial_beside_trained(evidence: Evidence) -> Iterator[Found]:
    initial = [layer for layer in _layers(evidence) if layer.initial]
    trained = [layer for layer in _layers(evidence) if not layer.initial]
    counted = [layer for layer in initial if layer.batches]
    if counted:
        yield Found(
            tuple(layer.path for layer in counted),
            f"running statistics are those of a new layer, though {max(layer.batches or 0 for layer in counted)} "
            "batches were counted",
        )
    rest = [layer for layer in initial if not layer.batches]
    if rest and trained:
        yield Found(
            tuple(layer.path for layer in rest),
            f"{len(rest)} of {len(rest) + len(trained) + len(counted)} layers have the running statistics of a new "
            "layer",
        )


def _residue(evidence: Evidence) -> Iterator[Found]:
    found = []
    for layer in _layers(evidence):
        if evidence.gap is not None and evidence.gap.own.get(layer.path, 1.0) < _CLOSE:
            continue  # as after recalibration
        if layer.residue > RESIDUE and not layer.initial:
            found.append((layer.residue, layer))
    yield from _worst(
        found,
        lambda value, layer, n: (
            f"after {layer.batches} batches running statistics still hold {value:.0%} of their "
            f"initial values (momentum {layer.momentum:g})"
        ),
    )


def _narrow(evidence: Evidence) -> Iterator[Found]:
    narrow = [layer for layer in _layers(evidence) if layer.dtype in (torch.float16, torch.bfloat16)]
    if narrow:
        kinds = " and ".join(sorted({str(layer.dtype).removeprefix("torch.") for layer in narrow}))
        yield Found(tuple(layer.path for layer in narrow), f"running statistics are stored as {kinds}")


def _constant(evidence: Evidence) -> Iterator[Found]:
    found = []
    for layer in _layers(evidence):
        assert layer.var is not None
        if not layer.initial:
            found.append((float(((layer.var >= 0) & (layer.var < 1e-3 * layer.eps)).sum()), layer))
    yield from _worst(
        [pair for pair in found if pair[0]],
        lambda value, layer, n: f"{_channels(value)} had the same value in every position",
    )


def _large_mean(evidence: Evidence) -> Iterator[Found]:
    found = []
    for layer in _layers(evidence):
        assert layer.mean is not None
        assert layer.var is not None
        ratio = layer.mean.abs() / (layer.var.clamp(min=0) + layer.eps).sqrt()
        found.append((float(ratio[ratio.isfinite()].max()) if bool(ratio.isfinite().any()) else 0.0, layer))
    yield from _worst(
        [pair for pair in found if pair[0] > _COARSE],
        lambda value, layer, n: f"a channel's mean is {value:.2g} times its deviation",
    )


def _counters(evidence: Evidence) -> Iterator[Found]:
    counted = [layer for layer in _layers(evidence) if layer.batches]
    if len(counted) < 3:
        return
    usual, often = Counter(layer.batches for layer in counted).most_common(1)[0]
    assert usual is not None
    if often * 2 <= len(counted):
        return
    multiple = [layer for layer in counted if layer.batches != usual and (layer.batches or 0) % usual == 0]
    other = [layer for layer in counted if layer.batches != usual and layer not in multiple]
    for layers, meaning in (
        (multiple, "counted {} batches for each that the others counted"),
        (other, "counted {} batches where the others counted " + str(usual)),
    ):
        if layers:
            most = max(layers, key=lambda layer: abs((layer.batches or 0) - usual))
            times = (most.batches or 0) // usual if layers is multiple else most.batches
            yield Found(tuple(layer.path for layer in layers), f"{len(layers)} layers {meaning.format(times)}")


RULES = (
    Rule(
        "BN102", "non-finite-statistics", "error", "buffers",
        "Training recovered, but evaluation gives nan forever",
        "One batch with nan or infinity is enough: torch.nn's layers write its moments into the running statistics, "
        "which never get rid of them, while training goes on with each batch's own.",
        "Any running mean or variance that is nan or infinite. A fact, without a threshold.",
        "batchnorm.recalibrate(model, data) takes the statistics anew; batchnorm.convert(model) before training keeps "
        "such batches out.",
        "None.",
        (13, 30), _not_finite,
    ),
    Rule(
        "BN103", "statistics-of-a-new-layer", "error", "buffers",
        "A loaded model evaluates badly, since some layers' statistics were never loaded or were reset",
        "A checkpoint that lacks them, loaded with strict=False or under another prefix; an initialization that runs "
        "over buffers; adapters that store parameters alone.",
        "Mean 0 and variance 1 in every channel of a layer, beside layers with others, or though batches were counted. "
        "A fact, without a threshold.",
        "Load the layer's running_mean and running_var, or batchnorm.recalibrate(model, data).",
        "A new head on a trained network, which no batch has reached yet.",
        (14, 25, 34, 35, 61), _initial_beside_trained,
    ),
    Rule(
        "BN104", "residue-of-initial-values", "advice", "buffers",
        "Good in train(), bad in eval(), after a short training",
        "Running statistics begin with mean 0 and variance 1, and forget them at the pace of momentum: after n batches "
        "the share (1 − momentum)ⁿ is left.",
        f"(1 − momentum)ⁿ above {RESIDUE:.0%}, with n from num_batches_tracked. A checkpoint does not tell momentum: "
        "torch's default of 0.1 is taken, with which that is fewer than 44 batches.",
        "batchnorm.recalibrate(model, data), or train longer, or with a larger momentum.",
        "Statistics that were recalibrated: the counter then has the batches of that, and no initial value is left. "
        "A checkpoint in the middle of training.",
        (1,), _residue,
    ),
    Rule(
        "BN105", "narrow-statistics", "warning", "buffers",
        "Statistics in half precision: zeros, nan, or values that do not move",
        "float16 ends at 65504 and rounds variances below 6e-8 to 0; bfloat16 has three digits, so that an update of "
        "less than a 256th of the value changes nothing.",
        "The dtype of running_mean. A fact, without a threshold.",
        "Keep them in float32: model.half() and model.bfloat16() of batchnorm's layers do (batchnorm.convert).",
        "A file that is only used for inference, whose statistics were rounded at the end.",
        (30, 31, 60), _narrow,
    ),
    Rule(
        "BN106", "negative-variance", "error", "buffers",
        "A running variance below 0",
        "No batch has one. It comes of averaging or extrapolating checkpoints, of E[x²] − E[x]² in low precision, or "
        "of damage to the file.",
        "Any running variance below 0. A fact, without a threshold.",
        "batchnorm.recalibrate(model, data).",
        "None.",
        (32,), _negative,
    ),
    Rule(
        "BN107", "constant-channels", "advice", "buffers",
        "Channels that have one value everywhere",
        "Their input is constant: dead units behind a ReLU, weights that were pruned or decayed to 0. They do nothing "
        "but add their bias, and whatever does vary one day is magnified by 1/√eps.",
        "A running variance below a thousandth of eps.",
        "Prune them, or look at what feeds them.",
        "Common and harmless in networks with ReLU.",
        (32,), _constant,
    ),
    Rule(
        "BN108", "large-mean", "warning", "buffers",
        "A channel whose mean is far larger than its deviation",
        "The input is not centred. In float32 the difference x − mean then loses digits, and E[x²] − E[x]², where a "
        "backend computes it so, loses all.",
        f"The running mean above {_COARSE:g} times √(variance + eps), where float32 has four digits of the deviation "
        "left.",
        "Centre the input, or leave out what adds the constant.",
        "Constant channels with a bias, whose deviation does not matter.",
        (33,), _large_mean,
    ),
    Rule(
        "BN109", "counters-disagree", "warning", "buffers",
        "Some layers have counted other numbers of batches than the rest",
        "A multiple: a layer that is called several times a step, as in a siamese network or a shared head, or a "
        "forward that activation checkpointing ran twice. Another number: layers that were frozen or held in "
        "evaluation for a while, added later, or fed by some tool's dummy input.",
        "num_batches_tracked of each layer against the number that more than half of them have.",
        "One layer for each role or domain (batchnorm.split_domains); batchnorm's layers count a checkpointed batch "
        "once; batchnorm.recalibrate(model, data) mends the statistics.",
        "Layers that were frozen on purpose, and heads that were added later.",
        (19, 20, 55), _counters,
    ),
)  # fmt: skip
