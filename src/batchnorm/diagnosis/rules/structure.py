"""BN2xx: layers whose settings, modes or kind are probably not meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from batchnorm.diagnosis.evidence import Evidence, Layer, Structure
from batchnorm.diagnosis.rules.rule import Found, Rule

__all__ = ["RULES"]

_LARGE_MOMENTUM = 0.5


def _where(
    evidence: Evidence, condition: Callable[[Layer, Structure], bool], message: Callable[[list[Layer]], str]
) -> Iterator[Found]:
    """One finding for all layers that a condition holds for."""
    found = [layer for layer in evidence.layers if layer.structure is not None and condition(layer, layer.structure)]
    if found:
        yield Found(tuple(layer.path for layer in found), message(found))


def _some(layers: list[Layer]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"


def _untracked(evidence: Evidence) -> Iterator[Found]:
    return _where(
        evidence,
        lambda layer, structure: layer.mean is None and not structure.frozen,
        lambda layers: f"{_some(layers)} without running statistics: evaluation depends on what else is in the batch",
    )


def _large_momentum(evidence: Evidence) -> Iterator[Found]:
    return _where(
        evidence,
        lambda layer, structure: structure.tracks and (structure.momentum or 0) >= _LARGE_MOMENTUM,
        lambda layers: (
            f"momentum is {max(layer.momentum or 0 for layer in layers):g} in {_some(layers)}: running "
            "statistics are little more than the last batch's"
        ),
    )


def _no_momentum(evidence: Evidence) -> Iterator[Found]:
    return _where(
        evidence,
        lambda layer, structure: structure.tracks and structure.momentum == 0,
        lambda layers: f"momentum is 0 in {_some(layers)}: running statistics never move",
    )


def _mixed_eps(evidence: Evidence) -> Iterator[Found]:
    known = [layer for layer in evidence.layers if layer.structure is not None]
    if len({layer.eps for layer in known}) < 2:
        return
    usual, often = Counter(layer.eps for layer in known).most_common(1)[0]
    rest = [layer for layer in known if layer.eps != usual]
    if often * 2 > len(known):
        other = ", ".join(f"{eps:g}" for eps in sorted({layer.eps for layer in rest}))
        yield Found(
            tuple(layer.path for layer in rest), f"eps is {other} in {_some(rest)}, and {usual:g} in the others"
        )


def _training_in_evaluation(evidence: Evidence) -> Iterator[Found]:
    if evidence.training is False:
        yield from _where(
            evidence,
            lambda layer, structure: structure.training,
            lambda layers: (
                f"{_some(layers)} in training mode in a model in evaluation: outputs depend on what else is "
                "in the batch, and every pass moves the statistics"
            ),
        )


def _moves_though_fixed(evidence: Evidence) -> Iterator[Found]:
    if evidence.training:
        yield from _where(
            evidence,
            lambda layer, structure: structure.training and structure.tracks and layer.weight is not None
            and not structure.learns,
            lambda layers: f"{_some(layers)} learn nothing, and yet training moves their running statistics",
        )  # fmt: skip


def _half_frozen(evidence: Evidence) -> Iterator[Found]:
    if evidence.training:
        yield from _where(
            evidence,
            lambda layer, structure: not structure.training and not structure.frozen and structure.learns,
            lambda layers: (
                f"{_some(layers)} in evaluation mode while the model trains, until the next train(); weight "
                "and bias go on learning"
            ),
        )


def _sync_on_cpu(evidence: Evidence) -> Iterator[Found]:
    return _where(
        evidence,
        lambda layer, structure: structure.kind == "SyncBatchNorm" and structure.on_cpu,
        lambda layers: f"{_some(layers)} of torch's SyncBatchNorm on the CPU, which it refuses in training",
    )


RULES = (
    Rule(
        "BN201", "no-running-statistics", "warning", "structure",
        "A prediction depends on its companions in the batch; batches of one fail",
        "Without running statistics (track_running_stats=False) a layer normalizes with the batch's moments in "
        "evaluation, too.",
        "Layers without running_mean.",
        "Build the layer with running statistics and call batchnorm.recalibrate(model, data); for samples that must "
        "not see each other, batchnorm.replace(model, 'group').",
        "Meta-learning and some generators mean it so.",
        (5, 21, 27), _untracked,
    ),
    Rule(
        "BN202", "large-momentum", "warning", "structure",
        "A port from TensorFlow or Keras evaluates badly",
        "PyTorch's momentum is the weight of the new value; TensorFlow's is that of the old one. Its 0.99 is 0.01 "
        "here.",
        f"momentum of {_LARGE_MOMENTUM:g} or more.",
        "Set momentum to 1 − momentum, then batchnorm.recalibrate(model, data).",
        "A momentum of 1, set on purpose to keep the last batch's moments.",
        (6,), _large_momentum,
    ),
    Rule(
        "BN203", "no-momentum", "warning", "structure",
        "Running statistics never move",
        "With a momentum of 0 the new value has no weight.",
        "momentum of 0.",
        "Set momentum (0.1 is usual), or say what is meant: batchnorm.freeze(model).",
        "A way to hold statistics, which batchnorm.frozen_statistics(model) says more plainly.",
        (6,), _no_momentum,
    ),
    Rule(
        "BN204", "mixed-eps", "advice", "structure",
        "A converted network differs slightly from its original",
        "TensorFlow's eps is 1e-3, PyTorch's 1e-5; a state_dict does not hold it, so that a port may miss it in "
        "places.",
        "eps of each layer against the one that more than half of them have.",
        "Set eps to what the original has.",
        "Networks that are made of two, one of them ported.",
        (7,), _mixed_eps,
    ),
    Rule(
        "BN205", "training-mode-in-evaluation", "error", "structure",
        "A prediction depends on its companions, and changes from call to call, though eval() was called",
        "A train() of the layer or of a part after the model's eval(), or a train() of the model's own that skips "
        "parts.",
        "Layers in training mode in a model in evaluation mode. A fact, without a threshold.",
        "Call model.eval() right before evaluation, and look for who calls train().",
        "Monte-Carlo evaluation with batch statistics.",
        (21,), _training_in_evaluation,
    ),
    Rule(
        "BN206", "fixed-but-moving", "warning", "structure",
        "The backbone is frozen, but its batch normalization changes",
        "requires_grad = False stops weight and bias. Running statistics move in every pass in training mode, whatever "
        "requires_grad says, and under no_grad, too.",
        "Layers in training mode with running statistics, of which neither weight nor bias learns.",
        "batchnorm.freeze(model.backbone), which also outlasts model.train().",
        "Statistics that are to follow new data while weights stay.",
        (3, 18), _moves_though_fixed,
    ),
    Rule(
        "BN207", "half-frozen", "advice", "structure",
        "Freezing is undone by the next train(), or holds the statistics alone",
        "eval() on a layer holds until somebody calls train() on the model, as most training loops do at every epoch; "
        "it does not stop weight and bias.",
        "Layers in evaluation mode with weights that learn, in a model in training mode.",
        "batchnorm.freeze(model), or freeze(model, affine=False) where weight and bias shall learn.",
        "Loops that call eval() on the layers after each train(), and let weight and bias learn.",
        (4,), _half_frozen,
    ),
    Rule(
        "BN208", "sync-on-cpu", "warning", "structure",
        "SyncBatchNorm expected input tensor to be on GPU",
        "torch's SyncBatchNorm has no training on CPUs.",
        "Layers of the class SyncBatchNorm whose tensors are on the CPU.",
        "batchnorm.convert(model, statistics=batchnorm.Sync()), or batchnorm.revert(model) for one process.",
        "A model that will be moved to GPUs.",
        (9,), _sync_on_cpu,
    ),
)  # fmt: skip
