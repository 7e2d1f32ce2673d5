"""What a fold changes: the weights of a convolution or linear layer, and what is left in the layer's place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.surgery.find import names_of
from batchnorm.surgery.line import TRANSPOSED, along_inputs, along_outputs, bias_behind, constant_through, line_of, wide
from batchnorm.surgery.norms import Identity
from batchnorm.surgery.reading import following

__all__ = ["Step", "take"]


class Step(NamedTuple):
    """One layer that goes into a neighbour.

    Attributes:
        layer: its qualified name.
        module: that of the convolution or linear layer.
        before: whether that module comes before the layer, or behind it.
        residual: whether the layer is called with a residual, which remains to be added.
        guessed: whether only the order in a ``Sequential`` says that they belong together.
    """

    layer: str
    module: str
    before: bool
    residual: bool
    guessed: bool


def take(model: nn.Module, steps: Iterable[Step]) -> None:
    """Take steps in a model in evaluation mode, in place; all in float64, and rounded once at the end."""
    names = names_of(model)
    changed: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    for step in steps:
        layer: Any = model.get_submodule(step.layer)
        module: Any = model.get_submodule(step.module)
        weight, bias = changed.get(module) or (module.weight, module.bias)
        groups, transposed = getattr(module, "groups", 1), isinstance(module, TRANSPOSED)
        scale, shift = line_of(layer)
        if step.before:
            changed[module] = (
                along_outputs(weight, scale, groups, transposed),
                bias_behind(bias, scale, shift),
            )
        else:
            changed[module] = along_inputs(weight, scale, groups, transposed), _shifted(weight, bias, shift, groups)
        left = _rest(layer, step.residual)
        for name in names[layer]:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = left
    for module, (weight, bias) in changed.items():
        _set(module, weight, bias)


def _shifted(weight: Tensor, bias: Tensor | None, shift: Tensor, groups: int) -> Tensor | None:
    """The bias behind a shift; without a shift none is needed, and a transposed weight not asked."""
    if not shift.any():
        return bias
    more = constant_through(weight, shift, groups)
    return more if bias is None else wide(bias) + more


def _set(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a module parameters of its own: another one may share the old ones."""
    old, learns = module.weight, module.weight.requires_grad
    made = torch.empty_like(old).copy_(weight)  # with its strides, channels-last or not
    bias_learns = learns if module.bias is None else module.bias.requires_grad
    module.weight = nn.Parameter(made, learns)
    module.bias = None if bias is None else nn.Parameter(bias.to(old), bias_learns)


def _rest(layer: Any, residual: bool) -> nn.Module:
    """What a layer does besides normalizing."""
    if residual:
        rest: nn.Module = Identity()
        rest.activation = layer.activation
    else:
        rest = following(layer) or nn.Identity()
    return rest.eval()
