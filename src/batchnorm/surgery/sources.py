"""The convolution or linear layer whose output a batch normalization layer reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import fx, nn

from batchnorm.surgery.find import hooked_between, hooks_of, names_of
from batchnorm.surgery.fusing.observe import witnessed
from batchnorm.surgery.fusing.traced import Tracing
from batchnorm.surgery.line import LINEAR_MAPS

__all__ = ["Source", "sources"]


class Source(NamedTuple):
    """What a layer reads.

    Attributes:
        name: the qualified name of the convolution or linear layer.
        module: that layer.
        certain: whether a graph or a run has shown that the layer is all that reads its output; otherwise it is only
            registered before the layer, with as many channels.
    """

    name: str
    module: nn.Module
    certain: bool


def sources(model: nn.Module, layers: Collection[nn.Module], inputs: Any = None) -> dict[nn.Module, Source | str]:
    """Find what feeds batch normalization layers and nothing else.

    Args:
        model: it is left as it was.
        layers: those of its batch normalization layers that are asked for.
        inputs: example inputs, as for ``fuse``, with which to observe what no graph shows.

    Returns:
        For each layer its source, or why it has none.
    """
    search = _Search(model, layers)
    search.trace()
    if inputs is not None and len(search.found) < len(layers):
        search.observe(inputs)
    return {layer: search.found.get(layer) or search.neighbour(layer) for layer in layers}


class _Search:
    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        self.found: dict[nn.Module, Source | str] = {}
        self._model, self._layers, self._names = model, layers, names_of(model)
        self._owners = Counter(id(p) for m in self._names for p in m._parameters.values() if p is not None)

    def trace(self) -> None:
        """Look at the graphs of all modules; an outer one, which sees more, comes after an inner one."""
        for module, graph in Tracing(self._model, None).graphs():
            calls: dict[nn.Module, list[fx.Node]] = {}
            for node in graph.nodes:
                if node.op == "call_module":
                    calls.setdefault(module.get_submodule(str(node.target)), []).append(node)
            for layer in self._layers:
                if layer in calls:
                    self._note(layer, calls, module)

    def _note(self, layer: nn.Module, calls: dict[nn.Module, list[fx.Node]], module: nn.Module) -> None:
        if len(calls[layer]) > 1:
            self.found[layer] = "it is called several times"
            return
        call = calls[layer][0]
        given = call.all_input_nodes[0]
        if given.op == "placeholder" and module is not self._model:  # an outer graph may tell
            return
        before = module.get_submodule(str(given.target)) if given.op == "call_module" else None
        if before is None or type(before) not in LINEAR_MAPS:
            what = given.target if before is None else type(before).__name__
            self.found[layer] = f"it follows {getattr(what, '__name__', what)}, not a convolution or linear layer"
        elif len(calls[before]) > 1 or set(given.users) != {call}:
            self.found[layer] = f"{self._names[before][0]} feeds others, too"
        else:
            self._accept(layer, before)

    def observe(self, inputs: Any) -> None:
        """Look at a run for the layers that no graph shows."""
        unseen = [layer for layer in self._layers if layer not in self.found]
        verdicts = witnessed(self._model, inputs, [m for m in self._names if type(m) in LINEAR_MAPS], unseen)
        for before, reader in verdicts.items():
            if isinstance(reader, nn.Module):
                self._accept(reader, before)
        for layer in unseen:
            self.found.setdefault(layer, "no convolution or linear layer was seen to feed it alone")

    def neighbour(self, layer: nn.Module) -> Source | str:
        """Guess from the order in which modules are registered."""
        parent, _, key = self._names[layer][0].rpartition(".")
        siblings = list(self._model.get_submodule(parent)._modules.items()) if key else []
        place = next((i for i, (name, _) in enumerate(siblings) if name == key), 0)
        before = siblings[place - 1][1] if place else None
        if before is None or type(before) not in LINEAR_MAPS or self._obstacle(layer, before) is not None:
            return "no convolution or linear layer before it was found"
        return Source(self._names[before][0], before, False)

    def _accept(self, layer: nn.Module, before: nn.Module) -> None:
        reason = self._obstacle(layer, before)
        self.found[layer] = reason or Source(self._names[before][0], before, True)

    def _obstacle(self, layer: Any, before: Any) -> str | None:
        """Why a module must not be changed, although it feeds the layer."""
        name = self._names[before][0]
        channels = before.out_features if isinstance(before, nn.Linear) else before.out_channels
        if channels != layer.num_features:
            return f"{name} has {channels} channels, not {layer.num_features}"
        if len(self._names[before]) > 1 or len(self._names[layer]) > 1:
            return f"{name} or the layer is shared"
        if any(self._owners[id(p)] > 1 for p in before._parameters.values() if p is not None):
            return f"{name} shares a parameter"
        hooked = hooks_of(before) or hooks_of(layer) or hooked_between(self._model, name, self._names[layer][0])
        return f"{name}, or something between it and the layer, has hooks" if hooked else None
