"""The convolutions and linear layers whose outputs batch normalization layers read, in training and in evaluation."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.layers import channels_of
from batchnorm.surgery.inspect.affine import is_linear_map, outputs_of
from batchnorm.surgery.inspect.find import hooks_of, is_batch_norm, names_of
from batchnorm.surgery.inspect.neighbours import Neighbours, untouched
from batchnorm.surgery.inspect.obstacles import Borders
from batchnorm.surgery.inspect.recorded import Run, recorded
from batchnorm.surgery.inspect.trace import Graphs
from batchnorm.surgery.inspect.view import Unclear, View
from batchnorm.surgery.inspect.watched import read_besides_calls

__all__ = ["Search", "Source"]


class Source(NamedTuple):
    """What a layer reads.

    Attributes:
        name: the qualified name of the convolution or linear layer.
        module: that layer.
        channels: which of the layer's channels its outputs are, see ``Share``.
        certain: whether a graph or a run has shown that the layer is all that reads its output, and that their channels
            are the same; otherwise it is only registered before the layer, with as many channels.
    """

    name: str
    module: nn.Module
    channels: Tensor | None = None
    certain: bool = True


class Search:
    """What feeds batch normalization layers and nothing else, and what else is read of them.

    Attributes:
        asked: for each layer, which of its attributes forwards read besides calling it.
    """

    def __init__(self, model: nn.Module, inputs: Any = None) -> None:
        """Trace a model, or run it on example inputs, in training and in evaluation.

        Args:
            model: it is left as it was.
            inputs: as for ``fuse``.
        """
        self._model, self._names = model, names_of(model)
        self._views: dict[nn.Module, list[View]] = {}  # from the innermost module's outwards
        self._owners = Counter(id(p) for m in self._names for p in m._parameters.values() if p is not None)
        runs = [] if inputs is None else [recorded(model, inputs, training) for training in (True, False)]
        self.asked = self._run(runs) if runs else self._traced()
        self._borders = Borders(model, runs[0].called_with if runs else None)

    def of(self, layer: nn.Module) -> tuple[Source, ...] | str:
        """Find the sources of a layer, or why it has none."""
        found = self._seen(layer)
        if found is None:
            return self._neighbour(layer)
        if isinstance(found, str):
            return found
        reason = self._borders.before(layer, Neighbours(found, "", "", everywhere=True))
        reason = reason or next((why for why in (self._obstacle(layer, share.module) for share in found) if why), None)
        if reason is not None:
            return reason
        return tuple(Source(self._names[module][0], module, channels) for module, channels in found)

    def _run(self, runs: list[Run]) -> dict[nn.Module, set[str]]:
        asked: dict[nn.Module, set[str]] = {}
        self._touched: set[nn.Module] = set()
        for run in runs:
            view = View(self._model, run.graph, whole=True, gone=set(), run=True)
            for part in view.calls:
                self._views.setdefault(part, []).append(view)
            self._touched |= run.touched
            for part, names in run.asked.items():
                asked.setdefault(part, set()).update(names)
        return asked

    def _traced(self) -> dict[nn.Module, set[str]]:
        parts = [m for m in self._names if is_batch_norm(m) or is_linear_map(m)]
        with read_besides_calls(parts) as asked:
            graphs = Graphs(self._model).all()
        views = [View(module, graph, module is self._model, set(), training=True) for module, graph in graphs]
        self._touched = {module for view in views for module in view.touched()}
        for view in views:
            for part in view.calls:
                self._views.setdefault(part, []).append(view)
        return asked

    def _seen(self, layer: nn.Module) -> Any:
        """The shares of what feeds a layer, or why nothing does, or None if no graph and no run shows it."""
        found: Any = None
        for view in self._views.get(layer, ()):
            if len(view.calls[layer]) > 1:
                return "it is called several times"
            here = view.before(layer)
            if view.run and found is not None and _differ(found, here):
                return "it follows something else in training than in evaluation"
            found = None if isinstance(here, Unclear) else here
            repeated = (
                [] if found is None or isinstance(found, str) else [m for m, _ in found if len(view.calls[m]) > 1]
            )
            if repeated:
                return f"{self._names[repeated[0]][0]} feeds others, too"
        return found if found is None else untouched(found, self._touched, self.asked, self._names)

    def _neighbour(self, layer: nn.Module) -> tuple[Source, ...] | str:
        """Guess from the order in which modules are registered."""
        parent, _, key = self._names[layer][0].rpartition(".")
        siblings = list(self._model.get_submodule(parent)._modules.items()) if key else []
        place = next((i for i, (name, _) in enumerate(siblings) if name == key), 0)
        before = siblings[place - 1][1] if place else None
        fits = before is not None and is_linear_map(before) and outputs_of(before) == channels_of(layer)
        if before is None or not fits or hooks_of(before) or self._obstacle(layer, before) is not None:
            return "no convolution or linear layer before it was found"
        return (Source(self._names[before][0], before, certain=False),)

    def _obstacle(self, layer: Any, before: Any) -> str | None:
        """Why a module must not be changed in a model that goes on learning, although it feeds the layer."""
        name = self._names[before][0]
        if len(self._names[before]) > 1 or len(self._names[layer]) > 1:
            return f"{name} or the layer is shared"
        if any(self._owners[id(p)] > 1 for p in before._parameters.values() if p is not None):
            return f"{name} shares a parameter"
        if hooks_of(layer):
            return f"{name}, or something between it and the layer, has hooks"
        return None


def _differ(one: Any, other: Any) -> bool:
    """Whether two modes show different sources."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) != isinstance(other, str)
    return [share.module for share in one] != [share.module for share in other]
