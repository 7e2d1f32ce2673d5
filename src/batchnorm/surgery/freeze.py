"""Hold batch normalization layers at their running statistics, for good or for a few passes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.activations import Activation, applied
from batchnorm.functional import batch_norm
from batchnorm.kernels.choice import record, which
from batchnorm.surgery.inspect.find import (
    NO_STATISTICS,
    TORCHS,
    UNINITIALIZED,
    is_batch_norm,
    is_frozen,
    is_known,
    is_uninitialized,
    served,
    settle_lazy,
)
from batchnorm.surgery.inspect.restoring import Restoring
from batchnorm.surgery.report import Report
from batchnorm.takeover import Guarded

__all__ = ["Frozen", "freeze", "frozen_statistics", "unfreeze"]

_NARROW = (torch.float16, torch.bfloat16)
# The subclasses that frozen layers are instances of, by the class that they were.
_made: dict[type[nn.Module], type[nn.Module]] = {}

_Self = TypeVar("_Self", bound="_Held")


@dataclass(frozen=True)
class Frozen(Report):
    """Which layers of a model are frozen.

    Attributes:
        frozen: for every frozen layer, by its qualified name, its class and what of it still learns. A layer with
            several names is listed under the first.
        skipped: the name of every batch normalization layer that was skipped, and why.
    """

    frozen: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return self._text([f"{len(self.frozen)} frozen, {len(self.skipped)} skipped"], self.frozen)


@dataclass
class _Before:
    """What a layer was before it was frozen.

    Attributes:
        kind: its class.
        training: the mode that its model has asked for last.
        learned: the names of the parameters that learned.
    """

    kind: type[nn.Module]
    training: bool
    learned: set[str]


class _Held(Guarded, nn.Module):
    """Mixed into the class of a frozen layer: it stays in evaluation mode, whatever its model is told."""

    _frozen: _Before

    def _obstacle_to_takeover(self, by: str) -> str:
        return (
            "which would not be frozen any more: call batchnorm.unfreeze before, and batchnorm.freeze afterwards, "
            "which holds SyncBatchNorm too"
        )

    def train(self: _Self, mode: bool = True) -> _Self:
        """Remember the mode for ``unfreeze``; children, such as a dropout inside, follow it."""
        super().train(mode)
        self._frozen.training, self.training = mode, False
        return self

    def reset_running_stats(self) -> None:
        """Refuse: nothing would ever fill them again."""
        raise RuntimeError(
            f"this {self._frozen.kind.__name__} is frozen, and its running statistics are all that it normalizes with: "
            "call batchnorm.unfreeze before resetting them"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(2)
        return _rebuilt, (self._frozen.kind,), *made[2:]


class _Lean(_Held):
    """A held layer whose input is not kept for the backward unless its weight learns."""

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize with the running statistics, add the residual, apply the activation."""
        layer: Any = self
        parent: Any = super()
        if isinstance(input, Proxy) or mask is not None:
            given = {"residual": residual, "mask": mask}
            result: Tensor = parent.forward(input, **{name: t for name, t in given.items() if t is not None})
            return result
        layer._check_input_dim(input)
        mean, var, weight, bias = layer.running_mean, layer.running_var, layer.weight, layer.bias
        activation, inplace = getattr(layer, "activation", None), getattr(layer, "inplace", False)
        lean = _worth_it(input, weight, bias, residual) and not inplace and _fits(input, mean, weight, residual)
        if lean and not _numba_serves(input, activation, weight, bias, mean, var, residual):
            y = _scaled(input, mean, var, weight, bias, layer.eps)
            return applied(activation, y if residual is None else y + residual)
        return batch_norm(
            input, mean, var, weight, bias, False, 0.0, layer.eps,
            activation=activation, residual=residual, inplace=inplace,
        )  # fmt: skip

    def __prepare_scriptable__(self) -> nn.Module:
        """Give TorchScript the layer that it was, in evaluation."""
        twin: Any = copy.copy(self)
        twin.__class__ = self._frozen.kind
        del twin.__dict__["_frozen"]
        # TorchScript remembers by id which layers it has seen: an id must not come back while it works.
        twin.__dict__["_stands_for"] = (self,)
        prepared: nn.Module = twin.__prepare_scriptable__() if self._frozen.kind in TORCHS else twin
        return prepared


def _worth_it(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether a backward may come, and the only reason to keep x would be the formula that torch uses."""
    recorded = (
        torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
    )  # which had better show batch normalization
    if recorded or not torch.is_grad_enabled() or (weight is not None and weight.requires_grad):
        return False
    return any(t is not None and t.requires_grad for t in (x, bias, residual))


def _numba_serves(x: Tensor, activation: Activation | None, *others: Tensor | None) -> bool:
    """Whether the Numba kernel is faster; it keeps no x either."""
    if torch.compiler.is_compiling():
        return False
    record.forward = which(x, False, *others, fused=activation is not None or others[-1] is not None)
    return record.forward == "numba"


def _fits(x: Tensor, mean: Tensor, weight: Tensor | None, residual: Tensor | None) -> bool:
    """Whether sizes and dtypes fit without a closer look, which is `batch_norm`'s."""
    if x.shape[1:2] != mean.shape or not x.is_floating_point():
        return False
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return False
    return weight is None or weight.dtype == x.dtype or (x.dtype in _NARROW and weight.dtype == torch.float32)


def _scaled(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Evaluation as one multiplication and addition a value, whose derivative needs no x."""
    wide = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    scale = (var.to(wide) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    size = (-1, *(1,) * (x.dim() - 2))
    return torch.addcmul(shift.view(size).to(wide), x.to(wide), scale.view(size)).to(x.dtype)


def _frozen_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _made:
        held = _Lean if is_known(kind) else _Held
        body = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _made[kind] = type(f"Frozen{kind.__name__}", (held, kind), body)
    return _made[kind]


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    made = _frozen_class(kind)
    return made.__new__(made)


def freeze(model: nn.Module, affine: bool = True) -> Frozen:
    """Make every batch normalization layer normalize with its running statistics, also after ``model.train()``.

    Nothing is counted and no statistics move. Where the weight does not learn, the layer keeps no input for the
    backward (it keeps what its activation's gradient needs). The objects stay the same: they become instances of a
    subclass of their class, so that parameters, optimizers, checkpoints, hooks, attributes and sharing stay.

    These can be frozen: torch.nn's layers, ``SyncBatchNorm`` (which needs no other process then), ours, with what was
    fused into them, and their subclasses and other packages' layers with running statistics. Of the last two kinds,
    whose evaluation may be anything, nothing but the mode is held. Fuse and convert before freezing.

    Args:
        model: any module, or a part of one, such as ``model.backbone``; it may be a batch normalization layer itself.
        affine: fix weight and bias too. Their gradients are dropped, since an optimizer would apply what was left over.

    Returns:
        What is frozen, and what was skipped, and why. Freezing again releases nothing.

    Example:
        >>> print(batchnorm.freeze(model.backbone))
        >>> model.train()  # the backbone's batch normalization stays in evaluation
        >>> batchnorm.unfreeze(model)
    """
    settle_lazy(model)
    layers, skipped = served(model, _obstacle)
    for layer in layers.values():
        if not is_frozen(layer):
            _hold(layer)
        if affine:
            _fix(layer)
    return Frozen({name: _told(layer) for name, layer in layers.items()}, skipped)


def _obstacle(layer: Any) -> str | None:
    if is_frozen(layer):
        return None
    if is_uninitialized(layer):
        return UNINITIALIZED
    if getattr(layer, "running_mean", None) is None or getattr(layer, "running_var", None) is None:
        return NO_STATISTICS
    if torch.nn.utils.parametrize.is_parametrized(layer):
        return "it is parametrized, which would change its class: remove the parametrizations"
    return None


def _hold(layer: Any) -> None:
    vars(layer)["_frozen"] = _Before(type(layer), layer.training, set())
    layer.__class__ = _frozen_class(type(layer))
    layer.training = False


def _fix(layer: Any) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.requires_grad:
            layer._frozen.learned.add(name)
            parameter.requires_grad_(False)
            parameter.grad = None


def _told(layer: Any) -> str:
    kind: type[nn.Module] = layer._frozen.kind
    names = [name for name, parameter in layer.named_parameters(recurse=False) if parameter.requires_grad]
    said = kind.__name__ if is_known(kind) else f"{kind.__name__}, kept in evaluation mode"
    return f"{said}; {' and '.join(names)} may learn" if names else said


def unfreeze(model: nn.Module) -> tuple[str, ...]:
    """Undo ``freeze``: classes and what learns are as before, and modes as the model has asked for meanwhile.

    Args:
        model: any module; it may be a frozen layer itself, or a part of a model that was frozen as a whole.

    Returns:
        The qualified names of the layers that were frozen.

    Raises:
        RuntimeError: if a layer has become something else while it was frozen; nothing is changed then.

    Example:
        >>> batchnorm.unfreeze(model)
        ('bn1', 'layer1.0.bn1')
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_frozen(module)}
    for name, layer in layers.items():
        if type(layer) is not _frozen_class(layer._frozen.kind):
            raise RuntimeError(
                f"{name or 'the model'} has become a {type(layer).__name__} since it was frozen: undo that (a "
                "parametrization?) before unfreezing"
            )
    for layer in layers.values():
        before: _Before = vars(layer).pop("_frozen")
        layer.__class__ = before.kind
        layer.training = before.training
        for name, parameter in layer.named_parameters(recurse=False):
            if name in before.learned:
                parameter.requires_grad_()
    return tuple(layers)


class frozen_statistics(Restoring):  # noqa: N801 - it is used like a function
    """Let passes within this block leave no trace in the running statistics, and count no batch.

    Layers in training normalize with their batch as always. It is for passes that must not count: a gradient penalty,
    the discriminator's pass in a generator's step, a teacher, the second forward of sharpness-aware minimization.
    Blocks may be nested. With activation checkpointing, the backward belongs into the block too: it runs the forward
    again.

    Args:
        model: any module.

    Raises:
        ValueError: at the beginning, if a lazy layer has seen no input: its first pass would make its statistics.

    Example:
        >>> with batchnorm.frozen_statistics(critic):
        ...     penalty = (critic(mixed) - 1).square().mean()
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def note(self) -> None:
        """Take down which layers move their statistics."""
        layers: dict[str, Any] = {name: m for name, m in self._model.named_modules() if is_batch_norm(m)}
        for name, layer in layers.items():
            if is_uninitialized(layer):
                raise ValueError(
                    f"{name or 'the model'} ({type(layer).__name__}) has seen no input, which would make its "
                    "statistics: run the model once before"
                )
        flagged = [layer for layer in layers.values() if hasattr(layer, "track_running_stats")]
        self._tracked = [(layer, layer.track_running_stats) for layer in flagged]
        # Others may not look at that flag. They get copies of their buffers to play with.
        self._buffers = [(layer, dict(layer._buffers)) for layer in layers.values() if not is_known(type(layer))]

    def change(self) -> None:
        """Let none of them."""
        for layer, _ in self._tracked:
            layer.track_running_stats = False
        for layer, kept in self._buffers:
            layer._buffers.update({name: None if t is None else t.clone() for name, t in kept.items()})

    def restore(self) -> None:
        """Let them again."""
        for layer, flag in self._tracked:
            layer.track_running_stats = flag
        for layer, kept in self._buffers:
            layer._buffers.update(kept)
