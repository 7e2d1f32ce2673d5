"""Turn the batch normalization of a model into ours, and back, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchnorm.layers import widen_statistics
from batchnorm.statistics import Policy, check_policy, own
from batchnorm.surgery.find import FROZEN, OURS, TORCHS, is_batch_norm, is_frozen, obstacle
from batchnorm.surgery.fusing.rewrite import Absorbed
from batchnorm.surgery.fusing.undo import undo

__all__ = ["Converted", "convert", "revert"]


@dataclass(frozen=True)
class Converted:
    """What was done to a model.

    Attributes:
        converted: the qualified name of every module that changed, and the class that it has now. A layer with several
            names is listed under the first.
        skipped: the name of every batch normalization layer that was left as it was, and why.
    """

    converted: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} left"]
        lines += [f"  {name or '(the model)'}: {kind}" for name, kind in self.converted.items()]
        lines += [f"  {name or '(the model)'}: left, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert(model: nn.Module, statistics: Policy | None = None) -> Converted:
    """Make every ``torch.nn.BatchNorm1d/2d/3d`` of a model, lazy ones too, a layer of ours, in place.

    The objects stay the same and only change their class, so that parameters, optimizers, buffers, hooks, flags,
    attributes and sharing stay as they are. Running statistics in half precision become float32, with the same values.
    Subclasses, ``SyncBatchNorm`` and layers of other packages are left.

    Args:
        model: any module; it may be a batch normalization layer itself.
        statistics: a policy for all of the layers, those that are already ours included; None to leave theirs.

    Returns:
        What was converted, and what was left, with the reason.

    Raises:
        TypeError: if ``statistics`` is not a policy.

    Example:
        >>> model = torchvision.models.resnet50()
        >>> print(batchnorm.convert(model, statistics=batchnorm.Ghost(16)))
    """
    check_policy(statistics)  # before the first layer changes
    converted, skipped = {}, {}
    for name, module in model.named_modules():
        if not is_batch_norm(module) or (type(module) in TORCHS and statistics is None):
            continue
        reason = None if type(module) in TORCHS else obstacle(module)
        if reason is not None:
            skipped[name] = reason
            continue
        if type(module) not in TORCHS:
            take_over(module)
        if statistics is not None:
            module.statistics = own(statistics, name)
        converted[name] = type(module).__name__ + ("" if statistics is None else f", {statistics}")
    return Converted(converted, skipped)


def take_over(layer: nn.Module) -> None:
    """Make one of torch.nn's layers ours."""
    layer.__class__ = OURS[type(layer)]
    widen_statistics(layer)


def revert(model: nn.Module) -> Converted:
    """Make every layer of ours in a model ``torch.nn``'s again, in place; the opposite of ``convert`` and of ``fuse``.

    Fused activations and forwards go back to the modules that had them. A model of which nothing was left can be
    pickled and loaded without this package. torch.nn runs half-precision parameters only with statistics of their
    dtype: such statistics are rounded to it. ``inplace``, which changes memory and not results, is dropped, and so are
    policies, which torch.nn does not have.

    Args:
        model: any module; it may be a layer of ours itself.

    Returns:
        What was reverted, and what was left: a layer that was made with an activation has no equal in torch.nn, and
        a part of a fused model may be fused with another part.

    Example:
        >>> fused = batchnorm.fuse(model).model
        >>> batchnorm.revert(fused)
    """
    converted, staying = undo(model)
    skipped = {}
    for name, module in model.named_modules():
        reason = staying.get(module) or _nothing_like(module)
        if reason is not None:
            skipped[name] = reason
        elif type(module) in TORCHS:
            _give_back(module)
            converted[name] = type(module).__name__
    return Converted(converted, skipped)


def _nothing_like(module: Any) -> str | None:
    """Why torch.nn cannot do what a module of ours does; None if it can, or if the module is not ours."""
    if isinstance(module, Absorbed):
        return "it stands for an activation of a layer outside: revert the whole model"
    if type(module) in TORCHS:
        return None if module.activation is None else _has_activation(module)
    if isinstance(module, tuple(TORCHS)):
        kind = type(module).__name__
        return FROZEN if is_frozen(module) else f"{kind} is a subclass, which may compute something else"
    return None


def _has_activation(layer: Any) -> str:
    name = layer.activation.name
    return (
        f"it has the activation {name}, which no layer of torch.nn has: set its activation to None "
        "and put the activation's module behind it"
    )


def _give_back(layer: Any) -> None:
    layer.statistics = None
    layer.__class__ = TORCHS[type(layer)]
    for ours in ("activation", "inplace", "_statistics"):
        vars(layer).pop(ours, None)
    if layer.weight is None or layer.weight.dtype not in (torch.float16, torch.bfloat16):
        return
    dtype = layer.weight.dtype
    for name in ("running_mean", "running_var"):
        buffer = layer._buffers[name]
        if isinstance(buffer, nn.parameter.UninitializedBuffer):
            layer._buffers[name] = nn.parameter.UninitializedBuffer(device=buffer.device, dtype=dtype)  # type: ignore[call-arg]
        elif buffer is not None:
            layer._buffers[name] = buffer.to(dtype)
