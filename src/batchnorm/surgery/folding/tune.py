"""Training with frozen batch normalization folded into the convolution before it, anew at every forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.activations import applied
from batchnorm.surgery.find import is_batch_norm, is_frozen
from batchnorm.surgery.freeze import _frozen_class, _Lean
from batchnorm.surgery.sources import Source, sources

__all__ = ["FoldedFrozen", "fold_frozen", "unfold_frozen"]

_CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The subclasses that modules are instances of meanwhile, by the class that they were.
_made: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True)
class FoldedFrozen:
    """Which frozen layers are computed by the convolution or linear layer before them.

    Attributes:
        folded: for every such layer, by its qualified name, into what.
        skipped: for every other frozen layer, why not.
    """

    folded: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} folded, {len(self.skipped)} left"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.folded.items()]
        lines += [f"  {name or '(the model)'}: left, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


class _Changed(nn.Module):
    """Mixed into the classes of both modules."""

    @property
    def _was(self) -> type[nn.Module]:
        before: type[nn.Module] = type(self).__bases__[1]
        return before

    def __reduce_ex__(self, protocol: Any) -> Any:
        frozen = is_frozen(self)
        kind = vars(self)["_frozen"].kind if frozen else self._was
        made: Any = super(nn.Module, self).__reduce_ex__(2)
        return _rebuilt, (kind, frozen), *made[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse: TorchScript knows no module that uses another one's parameters."""
        raise RuntimeError("TorchScript cannot express what fold_frozen does: call batchnorm.unfold_frozen before")


class _Folding(_Changed):
    """A convolution or linear layer that does what the frozen layer behind it did; that one is in a tuple of one."""

    _layer: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        """Apply weight and bias times the layer's scale, and add its shift."""
        module: Any = self
        weight, bias = module.weight, module.bias
        if input.dim() != weight.dim():
            raise RuntimeError(
                f"expected {weight.dim()}D input (got {input.dim()}D input): this {self._was.__name__} does the batch "
                "normalization behind it, whose channels are in dimension 1; call batchnorm.unfold_frozen before"
            )
        scale, shift = _line(self._layer[0], weight.dtype)
        weight = (weight * scale.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)
        bias = (shift if bias is None else torch.addcmul(shift, bias, scale)).to(weight.dtype)
        if isinstance(self, nn.Linear):
            return F.linear(input, weight, bias)
        result: Tensor = module._conv_forward(input, weight, bias)
        return result


class _Done(_Changed):
    """A frozen layer that is left with its residual and its activation."""

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Add the residual, apply the activation."""
        if mask is not None:
            raise RuntimeError("a layer that is folded takes no mask: call batchnorm.unfold_frozen before")
        return applied(getattr(self, "activation", None), input if residual is None else input + residual)


def _line(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift of evaluation, as functions of weight and bias that autograd can follow."""
    wide = torch.promote_types(torch.promote_types(dtype, layer.running_mean.dtype), torch.float32)
    scale = (layer.running_var.to(wide) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -layer.running_mean * scale
    return scale, shift if layer.bias is None else shift + layer.bias


def fold_frozen(model: nn.Module, example_inputs: Any = None) -> FoldedFrozen:
    """Let convolutions and linear layers do the frozen batch normalization behind them, while everything can learn.

    With scale = weight / √(running_var + eps) of the frozen layer, the convolution uses its own weight times scale at
    every forward. Outputs and gradients, also those of the frozen layer's weight and bias where they learn, are the
    same but for rounding, and one pass over the activations less is made in each direction. Where that weight learns,
    the convolution's result is not kept for the backward.

    It changes the model in place. Parameters, buffers, the ``state_dict``, hooks and the modules themselves stay;
    their classes are subclasses of what they were. Call neither of the two modules without the other.

    Args:
        model: a model in which ``batchnorm.freeze`` holds some layers.
        example_inputs: its argument, a tuple of its arguments, or a dict of its keyword arguments, to find pairs in
            forwards that cannot be traced.

    Returns:
        Which frozen layers are folded, and which are not, with the reason.

    Raises:
        ValueError: if nothing is frozen.

    Source: You et al. 2023, arXiv 2305.11624, mode "Tune".

    Example:
        >>> batchnorm.freeze(model, affine=False)
        >>> print(batchnorm.fold_frozen(model))
        >>> train(model)
        >>> batchnorm.unfold_frozen(model)
    """
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if is_batch_norm(m) and is_frozen(m)}
    if not layers:
        raise ValueError("no layer of this model is frozen: call batchnorm.freeze(model) before")
    fresh = {name: layer for name, layer in layers.items() if not isinstance(layer, _Done)}
    found = sources(model, fresh.values(), example_inputs)
    folded = {name: "folded already" for name in layers if name not in fresh}
    skipped: dict[str, str] = {}
    for name, layer in fresh.items():
        source = found[layer]
        reason = _obstacle(layer, source)
        if reason is not None or isinstance(source, str):
            skipped[name] = str(reason)
            continue
        vars(source.module)["_layer"] = (layer,)
        for module in (source.module, layer):
            module.__class__ = _class(type(module))
        folded[name] = f"into {source.name}"
    return FoldedFrozen(folded, skipped)


def _obstacle(layer: nn.Module, source: Source | str) -> str | None:
    if isinstance(source, str):
        return source
    if not source.certain:
        return "example_inputs would show whether it can be folded"
    if type(source.module) not in _CONVOLUTIONS:
        return f"{source.name} is a {type(source.module).__name__}"
    if "forward" in vars(source.module) or "forward" in vars(layer):
        return f"the forward of {source.name} or of the layer has been replaced"
    if not isinstance(layer, _Lean):
        return f"{type(layer).__name__} may compute something else than batch normalization"
    return None


def unfold_frozen(model: nn.Module) -> tuple[str, ...]:
    """Undo ``fold_frozen``: the layers are frozen ones as before, with what has been learned meanwhile.

    Args:
        model: any module.

    Returns:
        The qualified names of the layers that were folded.

    Example:
        >>> batchnorm.unfold_frozen(model)
        ('bn1', 'layer1.0.bn1')
    """
    changed = {name: module for name, module in model.named_modules() if isinstance(module, _Changed)}
    module: Any
    for module in changed.values():
        vars(module).pop("_layer", None)
        module.__class__ = module._was
    return tuple(name for name, module in changed.items() if is_batch_norm(module))


def _class(was: type[nn.Module]) -> type[nn.Module]:
    if was not in _made:
        how = _Done if issubclass(was, _Lean) else _Folding
        _made[was] = type(f"Folded{was.__name__}", (how, was), {"__module__": was.__module__, "__doc__": was.__doc__})
    return _made[was]


def _rebuilt(kind: type[nn.Module], frozen: bool) -> nn.Module:
    made = _class(_frozen_class(kind) if frozen else kind)
    return made.__new__(made)
