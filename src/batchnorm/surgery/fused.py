"""What ``fuse`` puts into a model, and how it is taken out again: placeholders of activations, forwards of graphs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Container, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from batchnorm.activations import Activation, applied
from batchnorm.epilogue import WithEpilogue, applies
from batchnorm.surgery.inspect.example import in_mode
from batchnorm.surgery.inspect.find import TORCHS

__all__ = ["Absorbed", "Rewritten", "fused_layers", "let_go", "rewritten", "undo"]


class Absorbed(nn.Identity):
    """Stands where an activation was that a batch normalization layer now applies.

    At every call it looks whether the layer still does: tools of other packages put another layer in its place, which
    only normalizes. Then the activation is applied here.

    Attributes:
        original: the activation's module, in a tuple, so that it does not count as a submodule.
        activation: what it computes.
    """

    def __init__(self, original: nn.Module, activation: Activation, owner: nn.Module, path: Sequence[str]) -> None:
        """Make room for an activation.

        Args:
            original: the activation's module.
            activation: what it computes.
            owner: a module that contains both.
            path: where in it the layer is. All of this is held weakly: a model owns its parts, not the reverse.
        """
        super().__init__()
        self.original, self.activation = (original,), activation
        self.training = original.training
        self._path = tuple(path)
        self._owner = weakref.ref(owner)
        self._layer = weakref.ref(owner.get_submodule(".".join(path)))

    @property
    def layer(self) -> nn.Module | None:
        """The batch normalization layer; None if it is gone."""
        return self._layer()

    def is_spared(self) -> bool:
        """Whether the layer still applies the activation."""
        owner = self._owner()
        place = None if owner is None else _at(owner, self._path)
        if isinstance(place, WithEpilogue):
            return place.activation == self.activation
        return self._is_elsewhere() or (place is not None and applies(place, self.activation))

    def _is_elsewhere(self) -> bool:
        """Whether the layer is in the model under another name, such as that of a wrapper around it."""
        owner, layer = self._owner(), self._layer()
        if layer is None or owner is None:  # the model was taken apart: who uses the layer keeps it alive
            return layer is not None
        return applies(layer, self.activation) and any(m is layer for m in owner.modules())

    # A compiler would guard the layer, which may be gone when the guards are written. This mark is all that
    # torch.compiler.assume_constant_result sets; that imports torch._dynamo, for seconds.
    _is_elsewhere._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """Say what it stands for."""
        return f"{self.original[0]}"

    def forward(self, input: Tensor) -> Tensor:
        """Nothing is left to do, as long as the layer does it."""
        return input if self.is_spared() else applied(self.activation, input)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript needs no memory of the activation, or the activation itself."""
        return nn.Identity() if self.is_spared() else self.original[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": self._owner(), "_layer": self._layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._owner, self._layer = _reference(self._owner), _reference(self._layer)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self._owner()) not in memo:  # copied alone, it serves the same model
            memo.update({id(t): t for t in (self._owner(), self._layer()) if t is not None})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _at(owner: nn.Module, path: Sequence[str]) -> nn.Module | None:
    place: nn.Module | None = owner
    for key in path:
        place = None if place is None else place._modules.get(key)
    return place


def _reference(module: nn.Module | None) -> Any:
    return _gone if module is None else weakref.ref(module)


def _gone() -> None:
    """Stand for a reference to what is no longer there."""


def let_go(layer: nn.Module | None) -> None:
    """Let a layer only normalize again, if it is there, and one of ours."""
    for attribute in ("activation", "_watched"):
        if isinstance(layer, WithEpilogue):
            vars(layer).pop(attribute, None)


class Rewritten(nn.Module):
    """Mixed into the class of a module whose forward is now a graph's; everything else is its own class's."""

    _graph: ClassVar[fx.Graph]
    _layers: ClassVar[tuple[str, ...]]  # the batch normalization layers with more to do, by their names in the module
    _activated: ClassVar[tuple[str, ...]]  # those among them that apply an activation

    def __reduce__(self) -> Any:
        # A graph does not pickle; a GraphModule does, as its source, which is traced again.
        carrier = fx.GraphModule(_placeholders(self, self._graph), copy.deepcopy(self._graph))
        return _blank, (type(self).__mro__[2],), {**self.__dict__, "_pickled": (carrier, self._layers, self._activated)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        carrier, layers, activated = state.pop("_pickled")
        super().__setstate__(state)
        made: Any = rewritten(type(self).__mro__[2], carrier, layers, activated)
        self.__class__ = made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse: TorchScript's layer takes no residual, and would apply the activation before the addition."""
        raise RuntimeError(
            f"TorchScript cannot express the fused forward of {type(self).__name__}: call batchnorm.revert before "
            "torch.jit.script, or use torch.export"
        )


def rewritten(
    kind: type[nn.Module], traced: fx.GraphModule, layers: tuple[str, ...], activated: tuple[str, ...]
) -> type[nn.Module]:
    """Make the class of a module of this kind whose forward is a graph's."""
    body = {
        "forward": type(traced).forward,
        "_graph": copy.deepcopy(traced.graph),  # one that does not keep the module alive
        "_layers": layers,
        "_activated": activated,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Rewritten, kind), body)


def _placeholders(module: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """Something of the same kind for all that a graph of a module names."""
    named = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    parts = {name: attrgetter(name)(module) for name in named}
    return {
        name: nn.Identity() if isinstance(part, nn.Module) else nn.Parameter(torch.empty(0))
        for name, part in parts.items()
    }


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Begin to unpickle a module, whose class depends on its state."""
    made: Any = type(kind.__name__, (Rewritten, kind), {})
    blank: nn.Module = made.__new__(made)
    return blank


def fused_layers(model: nn.Module) -> set[nn.Module]:
    """The layers that ``fuse`` has given more to do."""
    found = {m.layer for m in model.modules() if isinstance(m, Absorbed) and m.layer is not None}
    for module in model.modules():
        if isinstance(module, Rewritten):
            found |= {module.get_submodule(name) for name in module._layers}
    return found


def undo(model: nn.Module) -> tuple[dict[str, str], dict[nn.Module, str]]:
    """Give activations and forwards back to the modules that had them.

    Args:
        model: changed in place. What was fused across its border stays.

    Returns:
        For each module that is what it was, its name and its class; for each layer that must stay, the reason.
    """
    names = {module: name for name, module in model.named_modules()}
    forwards = [module for module in names if isinstance(module, Rewritten)]
    owned = {module.layer for module in names if isinstance(module, Absorbed) and module.layer in names}
    owned |= {part for module in forwards for part in _parts(module, module._activated)}
    undone: dict[str, str] = {}
    staying: dict[nn.Module, str] = {}
    for module in forwards:
        if any(_activation(layer) is not None and layer not in owned for layer in _parts(module, module._layers)):
            reason = "it is fused with an activation outside: revert the whole model"
            staying.update(dict.fromkeys(_parts(module, module._layers), reason))
            continue
        for layer in _parts(module, module._activated):
            let_go(layer)
        module.__class__ = type(module).__mro__[2]
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
