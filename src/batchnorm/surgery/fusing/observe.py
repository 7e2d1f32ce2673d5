"""Fuse what a run shows where no graph can be had: an activation's module that is fed by one layer and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm.activations import Activation, activation_of
from batchnorm.kernels import using
from batchnorm.surgery.example import forward, in_mode, seeded
from batchnorm.surgery.find import hooks_of, names_of, shadow
from batchnorm.surgery.tensors import tensors_in

__all__ = ["Witness", "observed", "witnessed"]

# Properties that hand out the tensor's values; the others (shape, dtype, …) only tell about it.
_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")
_GETTERS = {getattr(Tensor, name).__get__ for name in _VALUES}
# In evaluation they hand on what they are given.
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


Found = tuple[nn.Module, Activation]


class Witness(TorchFunctionMode):
    """Watches who reads the outputs of layers.

    Attributes:
        readers: for every layer, what read each of its outputs: activation modules, or anything else's name.
        fed: for every activation module, the layers whose outputs it read; None stands for anything else.
        touched: the ids of those of the ``parameters`` that something else than an activation module read.
    """

    def __init__(
        self, layers: Iterable[nn.Module], activations: Iterable[nn.Module], parameters: Iterable[nn.Parameter] = ()
    ) -> None:
        super().__init__()
        self.touched: set[int] = set()
        self._parameters = {id(p) for p in parameters}
        self.readers: dict[nn.Module, list[list[nn.Module | str]]] = {layer: [] for layer in layers}
        self.fed: dict[nn.Module, set[nn.Module | None]] = {activation: set() for activation in activations}
        self._outputs: dict[int, tuple[Tensor, nn.Module, list[nn.Module | str]]] = {}
        self._within: list[nn.Module] = []  # the activation that is running

    def attach(self) -> None:
        """Put the hooks in place."""
        for layer in self.readers:
            layer.register_forward_hook(self._left)
        for activation in self.fed:
            activation.register_forward_pre_hook(self._entered)
            activation.register_forward_hook(self._finished, always_call=True)

    def _left(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        readers: list[nn.Module | str] = []
        self.readers[layer].append(readers)
        self._outputs[id(output)] = output, layer, readers  # kept alive, so that no other tensor gets its id

    def _entered(self, activation: nn.Module, args: tuple[Any, ...]) -> None:
        self._within.append(activation)
        found = self._outputs.get(id(args[0])) if args else None
        self.fed[activation].add(None if found is None else found[1])
        if found is not None:
            found[2].append(activation)

    def _finished(self, activation: nn.Module, args: Any, output: Any) -> None:
        self._within.pop()
        if args and output is args[0]:  # in place: who reads it now reads the activation's
            self._outputs.pop(id(output), None)

    def returned(self, results: Any) -> None:
        """Note that the model gives some outputs of layers away."""
        for tensor in tensors_in(results):
            if id(tensor) in self._outputs:
                self._outputs[id(tensor)][2].append("who called the model")

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        silent = getattr(func, "__name__", "") == "__get__" and func not in _GETTERS
        result = func(*args, **(kwargs or {}))
        silent = silent or (func in _DROPOUTS and bool(args) and result is args[0])
        if not self._within and not silent:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if id(tensor) in self._outputs:
                    self._outputs[id(tensor)][2].append(getattr(func, "__name__", str(func)))
                if id(tensor) in self._parameters:
                    self.touched.add(id(tensor))
        return result

    def verdict(self, layer: nn.Module) -> nn.Module | str:
        """The activation that is all that ever reads a layer's output, and reads nothing else; or why there is none."""
        readers = self.readers[layer]
        if not readers:
            return "the example_inputs do not reach it"
        several = next((each for each in readers if len(each) != 1), None)
        if several is not None:
            return "its output is read by " + (" and ".join(map(_told, several)) or "nothing that a run can show")
        found = {each[0] for each in readers}
        activation = next(iter(found))
        if len(found) > 1 or isinstance(activation, str):
            return "followed by " + " or ".join(sorted(map(_told, found)))
        return activation if self.fed[activation] == {layer} else "its activation's module serves others too"


def observed(model: nn.Module, inputs: Any, layers: Iterable[nn.Module]) -> dict[nn.Module, Found | str]:
    """Run a copy of the model in training and in evaluation, and find the activation of each layer, or a reason.

    Args:
        model: it is left as it was.
        inputs: as for ``forward``.
        layers: to be observed.

    Returns:
        For each layer, the module of the activation that is all that ever reads it and reads nothing else, and what
        it computes.
    """
    names = names_of(model)
    verdicts: dict[nn.Module, Found | str] = {}
    for layer, verdict in witnessed(model, inputs, layers, [m for m in names if _known(m)]).items():
        verdicts[layer] = verdict if isinstance(verdict, str) else _usable(verdict, names)
    return verdicts


def witnessed(
    model: nn.Module, inputs: Any, layers: Iterable[nn.Module], readers: Iterable[nn.Module]
) -> dict[nn.Module, nn.Module | str]:
    """Run a copy of the model in training and in evaluation, and find which reader each layer feeds, or a reason.

    Args:
        model: it is left as it was.
        inputs: as for ``forward``.
        layers: to be observed.
        readers: modules that may be all that reads a layer's output.

    Returns:
        For each layer, the reader that is all that ever reads it and reads nothing else.
    """
    twin, original = shadow(model)
    twins = {module: part for part, module in original.items()}
    witness = Witness([twins[layer] for layer in layers], [twins[reader] for reader in readers])
    witness.attach()
    for training in (True, False):
        with seeded(twin), using("aten"), witness:
            witness.returned(forward(in_mode(twin, training), inputs))
    verdicts = {original[layer]: witness.verdict(layer) for layer in witness.readers}
    return {layer: found if isinstance(found, str) else original[found] for layer, found in verdicts.items()}


def _usable(module: nn.Module, names: dict[nn.Module, list[str]]) -> Found | str:
    activation = _known(module)
    if len(names[module]) > 1 or activation is None:
        return "its activation's module is shared"
    return "its activation's module has hooks" if hooks_of(module) else (module, activation)


def _known(module: nn.Module) -> Activation | None:
    try:
        return activation_of(module)
    except TypeError:
        return None


def _told(reader: nn.Module | str) -> str:
    return reader if isinstance(reader, str) else type(reader).__name__
