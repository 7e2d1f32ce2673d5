"""Undo what `fuse` did, for the whole of it or for a part that can stand alone."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

from batchnorm.epilogue import WithEpilogue
from batchnorm.surgery.fusing.rewrite import Absorbed, Rewritten, let_go, restore
from batchnorm.surgery.inspect.example import in_mode
from batchnorm.surgery.inspect.find import TORCHS

__all__ = ["undo"]


def undo(model: nn.Module) -> tuple[dict[str, str], dict[nn.Module, str]]:
    """Give activations and forwards back to the modules that had them.

    Args:
        model: changed in place. What was fused across its border stays.

    Returns:
        For each module that is what it was, its name and its class; for each layer that must stay, the reason.
    """
    names = {module: name for name, module in model.named_modules()}
    rewritten = [module for module in names if isinstance(module, Rewritten)]
    owned = {module.layer for module in names if isinstance(module, Absorbed) and module.layer in names}
    owned |= {part for module in rewritten for part in _parts(module, module._activated)}
    undone: dict[str, str] = {}
    staying: dict[nn.Module, str] = {}
    for module in rewritten:
        if any(_activation(layer) is not None and layer not in owned for layer in _parts(module, module._layers)):
            reason = "it is fused with an activation outside: revert the whole model"
            staying.update(dict.fromkeys(_parts(module, module._layers), reason))
            continue
        for layer in _parts(module, module._activated):
            let_go(layer)
        restore(module)
        undone[names[module]] = type(module).__name__
    for layer in names:
        if isinstance(layer, WithEpilogue):
            vars(layer).pop("_ahead", None)
    for parent in names:
        for key, child in parent._modules.items():
            if isinstance(child, Absorbed) and _free(child, names, staying):
                let_go(child.layer)
                parent._modules[key] = in_mode(child.original[0], child.training)
                undone[names[child]] = type(child.original[0]).__name__
    return undone, staying


def _free(place: Absorbed, names: Container[nn.Module], staying: Container[nn.Module]) -> bool:
    """Whether an activation can be given back: the layer lets go of it, or does not apply it any more."""
    return not place.is_spared() or (place.layer in names and place.layer not in staying)


def _parts(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [module.get_submodule(name) for name in names]


def _activation(layer: Any) -> Any:
    return getattr(layer, "activation", None) if isinstance(layer, tuple(TORCHS)) else None
