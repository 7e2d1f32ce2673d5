"""What a fold changes: the weights of a convolution or linear layer, and what is left in the layer's place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.surgery.inspect.affine import (
    TRANSPOSED,
    along_inputs,
    along_outputs,
    bias_behind,
    constant_through,
    line_of,
    wide,
)
from batchnorm.surgery.inspect.find import names_of
from batchnorm.surgery.inspect.reading import following
from batchnorm.surgery.inspect.sums import in_the_middle
from batchnorm.surgery.norms import Identity, Zero

__all__ = ["Step", "handed_over", "leaves_nothing", "put", "share_of", "take"]


class Step(NamedTuple):
    """One layer that goes into its neighbours.

    Attributes:
        layer: its qualified name.
        modules: those of the convolutions or linear layers, and which of the layer's channels theirs are (``Share``).
        before: whether these come before the layer, or behind it.
        residual: whether the layer is called with a residual, which remains to be added.
        guessed: whether only the order in a ``Sequential`` says that they belong together.
        beside: whether the module is neither, but reads the same input, and its output is added to the layer's.
    """

    layer: str
    modules: tuple[tuple[str, Tensor | None], ...]
    before: bool
    residual: bool = False
    guessed: bool = False
    beside: bool = False


def take(model: nn.Module, steps: Iterable[Step]) -> None:
    """Take steps in a model in evaluation mode, in place; all in float64, and rounded once at the end."""
    names = names_of(model)
    changed: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    for step in steps:
        layer: Any = model.get_submodule(step.layer)
        for name, channels in step.modules:
            module: Any = model.get_submodule(name)
            weight, bias = changed.get(module) or (module.weight, module.bias)
            line = share_of(layer, channels)
            if step.beside:
                changed[module] = in_the_middle(module, weight, bias, line)
            else:
                changed[module] = handed_over(module, weight, bias, line, step.before)
        left = Zero() if step.beside else _rest(layer, step.residual)
        for name in names[layer]:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = left
    for module, (weight, bias) in changed.items():
        put(module, weight, bias)


def share_of(layer: Any, channels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scale and shift of some of a layer's channels; 1 and 0 where there is none."""
    scale, shift = line_of(layer)
    if channels is None:
        return scale, shift
    there = channels >= 0
    return torch.where(there, scale[channels], 1.0), torch.where(there, shift[channels], 0.0)


def handed_over(
    module: Any, weight: Tensor, bias: Tensor | None, line: tuple[Tensor, Tensor], before: bool
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias with which a module also computes a line behind it, or in front of it."""
    scale, shift = line
    groups, transposed = getattr(module, "groups", 1), isinstance(module, TRANSPOSED)
    if before:
        return along_outputs(weight, scale, groups, transposed), bias_behind(bias, scale, shift)
    return along_inputs(weight, scale, groups, transposed), _shifted(weight, bias, shift, groups)


def _shifted(weight: Tensor, bias: Tensor | None, shift: Tensor, groups: int) -> Tensor | None:
    """The bias behind a shift; without a shift none is needed, and a transposed weight not asked."""
    if not shift.any():
        return bias
    more = constant_through(weight, shift, groups)
    return more if bias is None else wide(bias) + more


def put(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a module parameters of its own: another one may share the old ones."""
    old, learns = module.weight, module.weight.requires_grad
    made = torch.empty_like(old).copy_(weight)  # with its strides, channels-last or not
    bias_learns = learns if module.bias is None else module.bias.requires_grad
    module.weight = nn.Parameter(made, learns)
    module.bias = None if bias is None else nn.Parameter(bias.to(old), bias_learns)


def leaves_nothing(layer: Any, step: Step) -> bool:
    """Whether nothing remains of a layer that was folded."""
    return not step.beside and not step.residual and following(layer) is None


def _rest(layer: Any, residual: bool) -> nn.Module:
    """What a layer does besides normalizing."""
    if residual:
        rest: nn.Module = Identity()
        rest.activation = layer.activation
    else:
        rest = following(layer) or nn.Identity()
    return rest.eval()
