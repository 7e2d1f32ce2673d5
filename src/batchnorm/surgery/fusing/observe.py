"""Fuse what a run shows where no graph can be had: an activation's module that is fed by one layer and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.activations import Activation, activation_of
from batchnorm.kernels import using
from batchnorm.surgery.fusing.ahead import is_transparent
from batchnorm.surgery.fusing.formulas import Y, clamps, in_place, step
from batchnorm.surgery.fusing.patterns import has_zero_channels
from batchnorm.surgery.inspect.elementwise import activation_in
from batchnorm.surgery.inspect.example import forward, in_mode, seeded
from batchnorm.surgery.inspect.find import hooks_of, names_of
from batchnorm.surgery.inspect.tensors import copy_sharing_parameters, tensors_in

__all__ = ["observed"]

Found = tuple[nn.Module | None, Activation]


class _Applies(str):
    """The name of the function that completes an activation."""

    activation: Activation


@dataclass
class _Value:
    """A layer's output, or something computed from it that may become an activation.

    Attributes:
        tensor: kept alive, so that no other gets its id.
        layer: whose output it is.
        readers: what read the layer's output, or what was computed from it.
        formula: what it is.
        name: of the function that computed it from the output.
        steps: what was computed from the output on the way to it.
        kept: whether something else reads it than what makes an activation of it.
    """

    tensor: Tensor
    layer: nn.Module
    readers: list[nn.Module | str]
    formula: str = Y
    name: str = ""
    steps: tuple[_Value, ...] = ()
    kept: bool = False

    def read(self, reader: nn.Module | str) -> None:
        """Note a reader; what is computed from an output counts as what was computed first."""
        if self.formula != Y:
            self.kept, reader = True, self.name
        if self.formula == Y or reader not in self.readers:
            self.readers.append(reader)


class _Witness(TorchFunctionMode):
    """Watches who reads the outputs of layers.

    Attributes:
        readers: for every layer, what read each of its outputs: activation modules, or anything else's name.
        fed: for every activation module, the layers whose outputs it read; None stands for anything else.
    """

    def __init__(self, layers: Iterable[nn.Module], activations: Iterable[nn.Module]) -> None:
        super().__init__()
        self.readers: dict[nn.Module, list[list[nn.Module | str]]] = {layer: [] for layer in layers}
        self.fed: dict[nn.Module, set[nn.Module | None]] = {activation: set() for activation in activations}
        self._values: dict[int, _Value] = {}
        self._within: list[nn.Module] = []  # the activation that is running

    def attach(self) -> None:
        """Put the hooks in place."""
        for layer in self.readers:
            layer.register_forward_hook(self._left)
        for activation in self.fed:
            activation.register_forward_pre_hook(self._entered)
            activation.register_forward_hook(self._finished, always_call=True)

    def _left(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.readers[layer].append([])
        self._values[id(output)] = _Value(output, layer, self.readers[layer][-1])

    def _entered(self, activation: nn.Module, args: tuple[Any, ...]) -> None:
        self._within.append(activation)
        found = self._values.get(id(args[0])) if args else None
        self.fed[activation].add(found.layer if found is not None and found.formula == Y else None)
        if found is not None:
            found.read(activation)

    def _finished(self, activation: nn.Module, args: Any, output: Any) -> None:
        self._within.pop()
        if args and output is args[0]:  # in place: who reads it now reads the activation's
            self._values.pop(id(output), None)

    def returned(self, results: Any) -> None:
        """Note that the model gives some outputs of layers away."""
        for tensor in tensors_in(results):
            if id(tensor) in self._values:
                self._values[id(tensor)].read("who called the model")

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._within and not is_transparent(func, args, result):
            values = [self._values[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self._values]
            if values and not self._followed(values, func, args, kwargs, result):
                for value in values:
                    value.read(getattr(func, "__name__", str(func)))
        return result

    def _followed(self, values: list[_Value], func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Whether a call computes an activation of a layer's output, or a part of one."""
        first, name = values[0], getattr(func, "__name__", str(func))
        if any(value.readers is not first.readers for value in values):
            return False
        if clamps(func) and has_zero_channels(first.layer):
            return False
        found = step(func, *tree_map(self._formula, (tuple(args), dict(kwargs))))
        steps = {id(part): part for value in values for part in (*value.steps, value) if part.formula != Y}
        if isinstance(found, str):
            first.readers.append(name)
            made = _Value(result, first.layer, first.readers, found, name, tuple(steps.values()))
            self._values[id(result)] = made
        elif found is not None:
            for part in steps.values():
                if not part.kept and part.name in first.readers:
                    first.readers.remove(part.name)
            first.readers.append(_Applies(name))
            first.readers[-1].activation = found  # type: ignore[union-attr]
            if in_place(func, args, kwargs):  # who reads it now reads the activation's
                self._values.pop(id(result), None)
        return found is not None

    def _formula(self, value: Any) -> Any:
        known = self._values.get(id(value))
        return value if known is None else known.formula

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
        For each layer, what is all that is ever computed from its output; and the module that computes it and nothing
        else, if there is one.
    """
    names = names_of(model)
    found = {module: activation_in(module) or _activation(module) for module in names}
    known = {module: activation for module, activation in found.items() if activation is not None}
    witness, original = _seen(model, inputs, layers, known)
    return {original[layer]: _found(witness, layer, original, known, names) for layer in witness.readers}


def _found(
    witness: _Witness,
    layer: nn.Module,
    original: dict[nn.Module, nn.Module],
    known: dict[nn.Module, Activation],
    names: dict[nn.Module, list[str]],
) -> Found | str:
    alone = witness.verdict(layer)
    if isinstance(alone, nn.Module) and len(names[original[alone]]) == 1 and not hooks_of(original[alone]):
        return original[alone], known[original[alone]]
    activations = set()
    for readers in witness.readers[layer]:
        reader = readers[0] if len(readers) == 1 else ""
        if isinstance(reader, nn.Module) and hooks_of(original[reader]):
            return "its activation's module has hooks"
        activations.add(_activation(reader))
    activation = activations.pop() if len(activations) == 1 else None
    return str(alone) if activation is None else (None, activation)


def _activation(reader: nn.Module | str) -> Activation | None:
    """What a reader computes, as far as it does so in steps that are known."""
    if isinstance(reader, str):
        return getattr(reader, "activation", None)
    try:
        return activation_of(reader)
    except TypeError:
        return None


def _seen(
    model: nn.Module, inputs: Any, layers: Iterable[nn.Module], readers: Iterable[nn.Module]
) -> tuple[_Witness, dict[nn.Module, nn.Module]]:
    """Watch a copy of the model run; the original of each of its modules."""
    twin, original = copy_sharing_parameters(model)
    twins = {module: part for part, module in original.items()}
    witness = _Witness([twins[layer] for layer in layers], [twins[reader] for reader in readers])
    witness.attach()
    for training in (True, False):
        with seeded(twin), using("aten"), witness:
            witness.returned(forward(in_mode(twin, training), inputs))
    return witness, original


def _told(reader: nn.Module | str) -> str:
    return reader if isinstance(reader, str) else type(reader).__name__
