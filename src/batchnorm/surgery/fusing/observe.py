"""Fuse what a run shows where no graph can be had: an activation that is fed by one layer and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from batchnorm.activations import Activation, activation_of
from batchnorm.surgery.fusing.formulas import clamps
from batchnorm.surgery.fusing.patterns import Parts, activation_behind, has_zero_channels
from batchnorm.surgery.inspect.elementwise import activation_in
from batchnorm.surgery.inspect.find import hooks_of, names_of
from batchnorm.surgery.inspect.paths import DROPOUTS, is_identity, name_of
from batchnorm.surgery.inspect.recorded import Hooks, Run, recorded

__all__ = ["observed"]


class _Applies(str):
    """The name of the function that completes an activation."""

    activation: Activation


Reader = nn.Module | str  # an activation's module, or anything else's name


def observed(
    model: nn.Module, inputs: Any, layers: Iterable[nn.Module]
) -> dict[nn.Module, tuple[nn.Module | None, Activation] | str]:
    """Run a copy of the model in training and in evaluation, and find the activation of each layer, or a reason.

    Args:
        model: it is left as it was.
        inputs: as for ``forward``.
        layers: to be observed.

    Returns:
        For each layer, what is all that is ever computed from its output; and the module that computes it and nothing
        else, if there is one.
    """
    layers, names = list(layers), names_of(model)
    found = {module: activation_in(module) or _activation(module) for module in names}
    known = {module: activation for module, activation in found.items() if activation is not None}
    runs = [recorded(model, inputs, training, {*layers, *known}) for training in (True, False)]
    seen = _Seen(model, runs, known)
    verdicts: dict[nn.Module, tuple[nn.Module | None, Activation] | str] = {}
    for layer in layers:
        alone = seen.verdict(layer)
        if isinstance(alone, nn.Module) and len(names[alone]) == 1 and not hooks_of(alone):
            verdicts[layer] = alone, known[alone]
        else:
            verdicts[layer] = _without_module(seen.readers[layer], str(alone))
    return verdicts


def _without_module(calls: list[list[Reader]], why: str) -> tuple[None, Activation] | str:
    """The activation that a forward computes at each call of a layer, though by no module of the layer's own."""
    alone = [readers[0] if len(readers) == 1 else "" for readers in calls]
    if any(isinstance(reader, nn.Module) and hooks_of(reader) for reader in alone):
        return "its activation's module has hooks"
    activations = {_activation(reader) for reader in alone}
    activation = activations.pop() if len(activations) == 1 else None
    return why if activation is None else (None, activation)


def _activation(reader: Reader) -> Activation | None:
    """What a reader computes, as far as it does so in steps that are known."""
    if isinstance(reader, str):
        return getattr(reader, "activation", None)
    try:
        return activation_of(reader)
    except TypeError:
        return None


class _Seen:
    """Who reads the outputs of layers in some runs.

    Attributes:
        readers: for every layer, what reads each of its outputs.
    """

    def __init__(self, model: nn.Module, runs: Iterable[Run], known: Mapping[nn.Module, Activation]) -> None:
        self._parts, self._known = Parts(model, ""), known
        self.readers: dict[nn.Module, list[list[Reader]]] = {}
        self._fed: dict[nn.Module, set[nn.Module | None]] = {}  # for every activation's module, the layers it reads
        for node in (node for run in runs for node in run.graph.nodes if node.op == "call_module"):
            called = self._parts.called(node)
            if called in known:
                self._fed.setdefault(called, set()).add(self._layer_before(node))
            else:
                self.readers.setdefault(called, []).append(self._readers(node))

    def verdict(self, layer: nn.Module) -> nn.Module | str:
        """The module that is all that ever reads a layer's output, and reads nothing else; or why there is none."""
        readers = self.readers.setdefault(layer, [])
        if not readers:
            return "the example_inputs do not reach it"
        several = next((each for each in readers if len(each) != 1), None)
        if several is not None:
            return "its output is read by " + (" and ".join(map(_told, several)) or "nothing that a run can show")
        found = {each[0] for each in readers}
        activation = next(iter(found))
        if len(found) > 1 or isinstance(activation, str):
            return "followed by " + " or ".join(sorted(map(_told, found)))
        return activation if self._fed[activation] == {layer} else "its activation's module serves others too"

    def _readers(self, call: fx.Node) -> list[Reader]:
        """What reads a layer's output at one call."""
        end = call
        while len(end.users) == 1 and _is_dropout(next(iter(end.users))):
            end = next(iter(end.users))
        for user in list(end.users):
            if _is_around(user, str(call.target)):
                user.args = tuple(given for given in user.args if given is not end)
        readers = [self._reader(user) for user in end.users]
        if all(isinstance(reader, str) for reader in readers):
            activation, steps = activation_behind(end, self._parts)
            clamped = any(clamps(step.target) for step in steps) and has_zero_channels(self._parts.called(call))
            if activation is not None and not clamped:
                readers = [_Applies(name_of(steps[-1]))]
                readers[0].activation = activation  # type: ignore[union-attr]
        return readers

    def _reader(self, node: fx.Node) -> Reader:
        if node.op == "output":
            return "who called the model"
        if node.op != "call_module":
            return name_of(node)
        called: nn.Module = self._parts.called(node)
        return called if called in self._known else type(called).__name__

    def _layer_before(self, node: fx.Node) -> nn.Module | None:
        """The layer whose output an activation's module reads."""
        given = node.args[0] if node.args else None
        while isinstance(given, fx.Node) and _is_dropout(given):
            given = given.args[0]
        if not isinstance(given, fx.Node) or given.op != "call_module" or self._parts.called(given) in self._known:
            return None
        layer: nn.Module = self._parts.called(given)
        return layer


def _is_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout that hands on what it is given."""
    return node.target in DROPOUTS and is_identity(node)


def _is_around(node: fx.Node, layer: str) -> bool:
    """Whether a node stands for hooks of a module that has the layer inside, which `hooked_between` looks for."""
    return isinstance(node.target, Hooks) and layer.startswith(f"{node.target.module}.".removeprefix("."))


def _told(reader: Reader) -> str:
    return reader if isinstance(reader, str) else type(reader).__name__
