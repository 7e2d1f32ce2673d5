"""The steps of a fold: layers that go into their neighbours, and what is left in their places."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.surgery.inspect.affine import handed_over, in_the_middle, put, share_of
from batchnorm.surgery.inspect.find import names_of
from batchnorm.surgery.inspect.reading import following
from batchnorm.surgery.norms import Identity, Zero

__all__ = ["Step", "apply", "leaves_nothing"]


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


def apply(model: nn.Module, steps: Iterable[Step]) -> None:
    """Take steps in a model in evaluation mode, in place; all in float64, and rounded once at the end."""
    names = names_of(model)
    changed: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    for step in steps:
        layer: Any = model.get_submodule(step.layer)
        for name, channels in step.modules:
            module: Any = model.get_submodule(name)
            weight, bias = changed.get(module) or (module.weight, module.bias)
            affine = share_of(layer, channels)
            if step.beside:
                changed[module] = in_the_middle(module, weight, bias, affine)
            else:
                changed[module] = handed_over(module, weight, bias, affine, step.before)
        left = Zero() if step.beside else _rest(layer, step.residual)
        for name in names[layer]:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = left
    for module, (weight, bias) in changed.items():
        put(module, weight, bias)


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
