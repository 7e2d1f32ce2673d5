"""Turn the batch normalization of a model into ours, and back, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchnorm.statistics import Policy, bind, check_policy, over_group, resolve
from batchnorm.surgery.adopt import SYNCED, adopted_activation, give_back, obstacle, take_over
from batchnorm.surgery.fused import Absorbed, undo
from batchnorm.surgery.inspect.find import FROZEN, TORCHS, is_batch_norm, is_frozen
from batchnorm.surgery.report import Report

__all__ = ["Converted", "convert", "revert"]


@dataclass(frozen=True)
class Converted(Report):
    """What was done to a model.

    Attributes:
        converted: the qualified name of every module that changed, and the class that it has now. A layer with several
            names is listed under the first.
        skipped: the name of every batch normalization layer that was skipped, and why.
    """

    converted: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return self._text([f"{len(self.converted)} converted, {len(self.skipped)} skipped"], self.converted)


def convert(model: nn.Module, statistics: Policy | None = None) -> Converted:
    """Make every ``torch.nn.BatchNorm1d/2d/3d`` of a model, lazy ones too, a layer of ours, in place.

    The objects stay the same and only change their class, so that parameters, optimizers, buffers, hooks, flags,
    attributes and sharing stay as they are. Running statistics in half precision become float32, with the same values.

    Subclasses of other packages, such as timm's ``BatchNormAct2d``, are read by what their forwards do: normalization,
    and perhaps an activation that is known here. They become subclasses of ours and of their own class, with its
    other methods and attributes; plain Python values that a forward reads are what they were when this function ran.
    What else a subclass may do, and layers that are not torch.nn's, are skipped.

    ``nn.SyncBatchNorm`` is converted where ``statistics`` has ``Sync``, which then takes the layer's process group if
    it names none; otherwise it is skipped, since its moments are those of all processes.

    Args:
        model: any module; it may be a batch normalization layer itself.
        statistics: a policy for all of the layers, those that are already ours included; None to leave theirs.

    Returns:
        What was converted, and what was skipped, and why.

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
        if reason == SYNCED:
            reason = None if resolve(statistics).sync else f"{SYNCED}, which convert(model, statistics=Sync()) keeps"
        if reason is not None:
            skipped[name] = reason
            continue
        if type(module) not in TORCHS:
            take_over(module)
        if statistics is not None:
            group = getattr(module, "process_group", None)  # of what was SyncBatchNorm
            module.statistics = bind(over_group(statistics, group), name)
        activation = adopted_activation(module)
        told = (type(module).__name__, activation and f"with {activation.name}", statistics)
        converted[name] = ", ".join(str(each) for each in told if each is not None)
    return Converted(converted, skipped)


def revert(model: nn.Module) -> Converted:
    """Make every layer of ours in a model ``torch.nn``'s again, in place; the opposite of ``convert`` and of ``fuse``.

    Fused activations and forwards go back to the modules that had them, also where another package has put its own
    layers into a fused model. A model of which nothing was left can be pickled and loaded without this package. Call it
    before tools that know torch.nn's classes by their exact type: ``torch.ao.quantization`` ("did not find fuser
    method"), Opacus' validator, ``type(m) is nn.BatchNorm2d``.

    torch.nn runs half-precision parameters only with statistics of their dtype: such statistics are rounded to it.
    ``inplace``, which changes memory and not results, is dropped, and so are policies, which torch.nn does not have.

    Args:
        model: any module; it may be a layer of ours itself.

    Returns:
        What was reverted, and what was skipped: a layer that was made with an activation has no equal in torch.nn, and
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
        return None if module.activation == adopted_activation(module) else _has_activation(module)
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
    give_back(layer)
    if layer.weight is None or layer.weight.dtype not in (torch.float16, torch.bfloat16):
        return
    dtype = layer.weight.dtype
    for name in ("running_mean", "running_var"):
        buffer = layer._buffers[name]
        if isinstance(buffer, nn.parameter.UninitializedBuffer):
            layer._buffers[name] = nn.parameter.UninitializedBuffer(device=buffer.device, dtype=dtype)  # type: ignore[call-arg]
        elif buffer is not None:
            layer._buffers[name] = buffer.to(dtype)
