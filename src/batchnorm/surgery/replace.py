"""Put another normalization, none, or another policy of statistics where a model has batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchnorm.layers import channels_of
from batchnorm.statistics import Policy, bind
from batchnorm.surgery import norms
from batchnorm.surgery.adopt import obstacle, settle, take_over
from batchnorm.surgery.fused import fused_layers
from batchnorm.surgery.inspect.affine import handed_over, share_of
from batchnorm.surgery.inspect.find import (
    NO_FORWARD,
    OURS,
    TORCHS,
    is_frozen,
    is_known,
    is_uninitialized,
    served,
    settle_lazy,
)
from batchnorm.surgery.inspect.neighbours import Source, Sources
from batchnorm.surgery.inspect.watched import missed
from batchnorm.surgery.report import Report

__all__ = ["Replaced", "replace"]

_WAYS = ("group", "layer", "instance", "rms")
_USUAL_GROUPS = 32
_FEWEST = 4  # values to normalize with each other: of two, nothing but their order would be left
# Which attributes of a layer there still are afterwards, with the same meaning.
_REMAINING: dict[str | None, tuple[str, ...]] = {
    "group": ("weight", "bias", "eps"),
    "layer": ("weight", "bias", "eps"),
    "rms": ("weight", "eps"),
}
_REMAINING["instance"] = ("num_features", *_REMAINING["group"])
_DROPPED = (
    "num_features", "eps", "momentum", "affine", "track_running_stats",
    "process_group", "inplace",
)  # fmt: skip


@dataclass(frozen=True)
class Replaced(Report):
    """What was done to a model.

    Attributes:
        model: the model that was given, changed in place.
        replaced: the qualified name of every layer that was replaced, and what it has become. A layer with several
            names is listed under the first.
        skipped: the name of every batch normalization layer that was skipped, and why.
        new_parameters: the names of the parameters that the model did not have: an optimizer must be told of them.
    """

    model: nn.Module
    replaced: dict[str, str]
    skipped: dict[str, str]
    new_parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        new = [f"new parameters, for the optimizer: {', '.join(self.new_parameters)}"] if self.new_parameters else []
        return self._text([f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"], self.replaced, new)


def replace(model: nn.Module, by: str | Policy | None, example_inputs: Any = None) -> Replaced:
    """Make every batch normalization layer of a model something else, in place.

    The objects stay the same and change their class, as with ``batchnorm.convert``: weight and bias stay the same
    parameters, so that optimizers keep working; eps, dtype, device, mode, hooks and sharing stay. Running statistics
    go. A layer of ours keeps adding its residual and applying its activation.

    * "group": ``GroupNorm``, in 32 groups where that divides the channels; otherwise in the number of groups nearest to
      it that leaves at least 4 channels a group (Wu & He 2018, arXiv 1803.08494).
    * "layer": ``GroupNorm(1, C)``, which is layer normalization over channels and space, for input of any dimensions.
    * "instance": ``InstanceNorm``; of ``(N, C)`` it would be 0, so there it raises when it is called.
    * "rms": the root mean square over the channels at each position. It has no bias, which goes.
    * None: nothing. The convolution or linear layer before gets a bias, and takes scale, shift and running statistics
      over, so that the model computes what it computed in evaluation. Where a forward cannot be traced, only
      ``example_inputs`` can show that it is right to do so; otherwise the layer registered before, if it has no
      bias, gets one that starts as batch normalization's.
    * A policy, such as ``batchnorm.Ghost(16)``: our layer with these ``statistics``.

    Args:
        model: any module; it may be a batch normalization layer itself, which then becomes the other one.
        by: which one.
        example_inputs: for None: the argument of the model, a tuple of its arguments, or a dict of its keyword
            arguments; more than one sample.

    Returns:
        What was replaced and by what, and what was skipped, and why: layers that have seen no input, frozen and
        fused ones (``unfreeze`` and ``revert`` first), subclasses and other packages'.

    Raises:
        ValueError: for a name that is none of these.
        TypeError: for anything else, a class among them.

    Example:
        >>> print(batchnorm.replace(torchvision.models.resnet50(), "group"))
    """
    if isinstance(by, str) and by not in _WAYS:
        raise ValueError(f"unknown normalization {by!r}: choose from {', '.join(_WAYS)}, None, or give a policy")
    if by is not None and not isinstance(by, (str, Policy)):
        raise TypeError(f"cannot replace batch normalization by {by!r}: give a name, None, or a policy's instance")
    settle_lazy(model)
    fused = fused_layers(model)
    layers, skipped = served(model, lambda layer: _obstacle(layer, by, layer in fused))
    if isinstance(by, Policy):
        return Replaced(model, {name: _changed(name, layer, by) for name, layer in layers.items()}, skipped)
    search = Sources(model, example_inputs) if layers else None
    for name, layer in list(layers.items()):
        reason = None if search is None else missed(search.attributes_read.get(layer, ()), _REMAINING.get(by, ()))
        if reason is not None:
            skipped[name] = reason
            del layers[name]
    if by is None:
        replaced, new = _removed(layers, search)
        return Replaced(model, replaced, skipped, new)
    return Replaced(model, {name: _changed(name, layer, by) for name, layer in layers.items()}, skipped)


def _obstacle(layer: Any, by: str | Policy | None, fused: bool) -> str | None:
    if isinstance(by, Policy) and type(layer) in TORCHS:
        return None
    if isinstance(by, Policy):
        return obstacle(layer)
    reason = obstacle(layer) if is_frozen(layer) or not is_known(type(layer)) else None
    if reason is not None:
        return reason
    if "forward" in vars(layer):
        return NO_FORWARD
    if fused:
        return "it is fused: call batchnorm.revert(model) before"
    if is_uninitialized(layer):
        return "it has seen no input, and does not know its channels: run the model once"
    channels = channels_of(layer)
    few = channels < _FEWEST
    if few and (by == "rms" or (by in ("group", "layer") and _flat(layer))):
        return f"normalizing {channels} {'value' if channels == 1 else 'values'} of a sample would leave little of them"
    if by == "instance" and isinstance(layer, nn.SyncBatchNorm):
        return "SyncBatchNorm takes input of any dimensions, and InstanceNorm of one: replace it by 'group'"
    return None


def _flat(layer: nn.Module) -> bool:
    """Whether its input may be (N, C), where a sample has one value a channel."""
    return isinstance(layer, (nn.BatchNorm1d, nn.SyncBatchNorm))


def _changed(name: str, layer: Any, by: str | Policy) -> str:
    """Make one layer something else, and say what."""
    if isinstance(by, Policy):
        if type(layer) not in TORCHS:
            take_over(layer)
        layer.statistics = bind(by, name)
        return f"{type(layer).__name__} with {by!r}"
    _settle(layer)
    ours, channels = type(layer) in TORCHS, channels_of(layer)
    common: dict[str, Any] = {"eps": layer.eps, "device": "meta"}
    affine = layer.weight is not None
    if by == "rms":
        lost = "" if layer.bias is None else "; its bias is gone"
        _become(layer, norms.RMSNorm(channels, elementwise_affine=affine, **common))
        return f"RMSNorm({channels}), over the channels at each position{lost}"
    if by == "instance":
        dimensions = next(d for d in (1, 2, 3) if isinstance(layer, getattr(nn, f"BatchNorm{d}d")))
        kind: Any = getattr(norms if ours or dimensions == 1 else nn, f"InstanceNorm{dimensions}d")
        _become(layer, kind(channels, affine=affine, **common))
        return f"InstanceNorm{dimensions}d({channels})"
    groups, why = (1, "layer normalization over channels and space") if by == "layer" else _groups(layer)
    _become(layer, (norms if ours else nn).GroupNorm(groups, channels, affine=affine, **common))
    return f"GroupNorm({groups}, {channels}): {why}"


def _settle(layer: nn.Module) -> None:
    """Make another package's class plainly ours, which has the activation of that class."""
    if type(layer) not in OURS and type(layer) is not nn.SyncBatchNorm:
        settle(layer)


def _groups(layer: Any) -> tuple[int, str]:
    """In how many groups to normalize, and why."""
    channels = channels_of(layer)
    size = channels // _USUAL_GROUPS
    if channels % _USUAL_GROUPS == 0 and size >= (_FEWEST if _flat(layer) else 2):
        return _USUAL_GROUPS, f"the usual number of groups, {size} channels each"
    possible = [g for g in range(1, channels + 1) if channels % g == 0 and channels // g >= _FEWEST] or [1]
    groups = min(possible, key=lambda g: (abs(g - _USUAL_GROUPS), g))
    return groups, f"{channels // groups} channels a group, the nearest to 32 groups that {channels} channels allow"


def _become(layer: Any, made: nn.Module) -> None:
    """Turn a layer into another one that was made for it, with its own tensors, hooks, mode and attributes."""
    if type(layer) in TORCHS:
        layer.statistics = None  # and with it what the layer remembers for it
        vars(layer).pop("_statistics", None)
    for name in _DROPPED:
        vars(layer).pop(name, None)
    if not hasattr(made, "activation"):
        vars(layer).pop("activation", None)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        layer._buffers.pop(name, None)
    layer._buffers.update(made._buffers)  # which hold None
    for name in ("weight", "bias"):
        if name not in made._parameters:
            layer._parameters.pop(name, None)
    vars(layer).update({k: v for k, v in vars(made).items() if not k.startswith("_") and k != "training"})
    layer.__class__ = type(made)


# --- none ---


def _removed(layers: dict[str, Any], search: Sources | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Remove layers; what has been done about each, and the names of new biases."""
    found = {} if search is None else {name: search.of(layer) for name, layer in layers.items()}
    done: dict[str, str] = {}
    new: list[str] = []
    for name, layer in layers.items():
        sources = found[name]
        if isinstance(sources, str):
            done[name] = f"removed, and with it its scale, shift and statistics: {sources}"
        else:
            new += [f"{source.name}.bias" for source in sources if source.module.bias is None]
            done[name] = _given_away(layer, sources)
        _settle(layer)
        _become(layer, norms.Identity() if type(layer) in TORCHS else nn.Identity())
    return done, tuple(new)


def _given_away(layer: Any, sources: Sequence[Source]) -> str:
    """Let the modules before do what a layer did in evaluation."""
    if not sources[0].certain:
        return _guessed(layer, sources[0])
    fresh = [source.name for source in sources if source.module.bias is None]
    for source in sources:
        module: Any = source.module
        weight, bias = handed_over(module, module.weight, module.bias, share_of(layer, source.channels), before=True)
        assert bias is not None
        with torch.no_grad():
            module.weight.copy_(weight)
            if module.bias is None:
                module.bias = nn.Parameter(bias.to(module.weight), requires_grad=module.weight.requires_grad)
            else:
                module.bias.copy_(bias)
    does = "does" if len(sources) == 1 else "do"
    said = f"removed; {' and '.join(source.name for source in sources)} {does} now what it did in evaluation"
    return said + (f", and {'has' if len(fresh) == 1 else 'have'} a bias now" if fresh else "")


def _guessed(layer: Any, source: Source) -> str:
    """Let a module that is registered before a layer at least have a bias."""
    before: Any = source.module
    fresh = before.bias is None
    if fresh:
        bias = before.weight.new_zeros(channels_of(layer))
        if layer.bias is not None:
            bias.copy_(layer.bias.detach())
        before.bias = nn.Parameter(bias, requires_grad=before.weight.requires_grad)
    return (
        f"removed, and with it its scale and statistics; {source.name}, registered before it, has a bias "
        f"{'now' if fresh else 'already'} (example_inputs would show whether it can take them over)"
    )
