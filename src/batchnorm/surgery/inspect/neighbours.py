"""The convolutions and linear layers next to batch normalization layers: in runs on example inputs, or in graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.layers import channels_of
from batchnorm.surgery.inspect.affine import is_linear_map, outputs_of
from batchnorm.surgery.inspect.find import hooks_of, is_batch_norm, names_of
from batchnorm.surgery.inspect.obstacles import Obstacles
from batchnorm.surgery.inspect.paths import is_identity_module
from batchnorm.surgery.inspect.recorded import Run, recorded
from batchnorm.surgery.inspect.trace import Graphs
from batchnorm.surgery.inspect.view import Around, Share, Unclear, View
from batchnorm.surgery.inspect.watched import missed, read_besides_calls

__all__ = ["Neighbours", "Source", "Sources"]


class Neighbours:
    """What is next to the layers of a model, and what else is read of them.

    Attributes:
        views: the graphs that call a module, from the innermost module's outwards.
        attributes_read: for each layer, which of its attributes forwards read besides calling it.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run] = (), modes: Sequence[bool] = (True, False)) -> None:
        """Look at runs of a model; without any, at the graphs of all modules that can be traced.

        Args:
            model: it is left as it was.
            runs: recorded on example inputs.
            modes: in which a graph must hold, training (True) or evaluation.
        """
        self._model, self._names = model, names_of(model)
        self._identities: set[nn.Module] = set()
        self._graphs = None if runs else Graphs(model, modes=modes)
        self.attributes_read: dict[nn.Module, set[str]] = {}
        if self._graphs is None:
            views = [View(model, run.graph, whole=True, identities=self._identities, run=True) for run in runs]
            self._parameters_read = {module for run in runs for module in run.parameters_read}
            for run in runs:
                for part, attributes in run.attributes_read.items():
                    self.attributes_read.setdefault(part, set()).update(attributes)
        else:
            parts = [m for m in self._names if is_batch_norm(m) or is_linear_map(m)]
            with read_besides_calls(parts) as self.attributes_read:
                graphs = self._graphs.all()
            views = [
                View(module, graph, module is model, self._identities, training=True in modes)
                for module, graph in graphs
            ]
            self._parameters_read = {module for view in views for module in view.parameters_read()}
        self.views: dict[nn.Module, list[View]] = {}
        for view in views:
            for part in view.calls:
                self.views.setdefault(part, []).append(view)

    def of(self, layer: nn.Module) -> Around:
        """What is next to a layer: an outer graph, which sees more, overrules an inner one."""
        views = self.views.get(layer, [])
        why = missed(self.attributes_read.get(layer, ()))
        if layer in self._parameters_read:
            why = why or "its parameters are read by others, too"
        if self._graphs is None and not views:
            why = why or "the example_inputs do not reach it"
        if why is not None:
            return Around(why, why, why)
        before = after = None
        for view in views:
            before, after = view.before(layer), view.after(layer)
        unseen = self._unseen(views[-1].module if views else layer)
        beside = views[-1].beside(layer) if views else unseen
        guesses = [
            None if found is not None else self._in_sequence(layer, step) for found, step in ((before, -1), (after, 1))
        ]
        before, after = before or guesses[0] or unseen, after or guesses[1] or unseen
        return Around(
            self.untouched(before),
            self.untouched(after),
            self.untouched(beside),
            guessed=guesses[0] is not None or (isinstance(before, str) and guesses[1] is not None),
            everywhere=bool(views) and views[-1].whole,
            extras=views[-1].extras(layer) if views else set(),
        )

    def mark_identities(self, layers: Collection[nn.Module]) -> None:
        """Take it from now on that layers give what they are given."""
        self._identities |= set(layers)

    def untouched(self, shares: tuple[Share, ...] | str) -> tuple[Share, ...] | str:
        """Give the same shares, or which of their modules a forward looks at besides calling it."""
        if isinstance(shares, str):
            return shares
        for module, _ in shares:
            name = self._names[module][0]
            if module in self._parameters_read:
                return f"{name}'s parameters are read by others, too"
            if "bias" in self.attributes_read.get(module, ()) and getattr(module, "bias", None) is None:
                return f"a forward looks whether {name} has a bias, which it would get"
        return shares

    def _unseen(self, module: nn.Module) -> str:
        """Why no graph shows what is around a module; a run shows everything."""
        if self._graphs is None:
            return ""
        return self._graphs.blind_spot(module) + "; example_inputs would allow to observe it"

    def _in_sequence(self, layer: nn.Module, step: int) -> tuple[Share, ...] | None:
        """The module before or behind, if layer and module have their places in one Sequential and nowhere else."""
        parent, _, key = self._names[layer][0].rpartition(".")
        around = self._model.get_submodule(parent) if key else None
        if not isinstance(around, nn.Sequential) or type(around).forward is not nn.Sequential.forward:
            return None
        modules = list(around)
        place = modules.index(layer) + step
        while 0 <= place < len(modules) and (is_identity_module(modules[place]) or modules[place] in self._identities):
            place += step
        if not 0 <= place < len(modules):
            return None
        found = modules[place]
        alone = len(self._names[layer]) == 1 and len(self._names[found]) == 1
        # A linear layer may give (N, L, C), which the layer would normalize along L.
        return (Share(found),) if alone and is_linear_map(found) and not isinstance(found, nn.Linear) else None


# --- what feeds a layer, in a model that goes on learning ---


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


class Sources:
    """What feeds batch normalization layers and nothing else, in training and in evaluation.

    Attributes:
        attributes_read: for each layer, which of its attributes forwards read besides calling it.
    """

    def __init__(self, model: nn.Module, inputs: Any = None) -> None:
        """Trace a model, or run it on example inputs.

        Args:
            model: it is left as it was.
            inputs: as for ``fuse``.
        """
        self._model, self._names = model, names_of(model)
        self._owners = Counter(id(p) for m in self._names for p in m._parameters.values() if p is not None)
        runs = [] if inputs is None else [recorded(model, inputs, training) for training in (True, False)]
        self._neighbours = Neighbours(model, runs)
        self.attributes_read = self._neighbours.attributes_read
        self._obstacles = Obstacles(model, runs[0].called_with if runs else None)

    def of(self, layer: nn.Module) -> tuple[Source, ...] | str:
        """Find the sources of a layer, or why it has none."""
        found = self._seen(layer)
        if found is None:
            return self._registered_before(layer)
        if isinstance(found, str):
            return found
        reason = self._obstacles.between(layer, Around(found, "", "", everywhere=True), "before")
        reason = reason or next((why for why in (self._obstacle(layer, share.module) for share in found) if why), None)
        if reason is not None:
            return reason
        return tuple(Source(self._names[module][0], module, channels) for module, channels in found)

    def _seen(self, layer: nn.Module) -> tuple[Share, ...] | str | None:
        """The shares of what feeds a layer, or why nothing does, or None if no graph and no run shows it."""
        found: Any = None
        for view in self._neighbours.views.get(layer, ()):
            if len(view.calls[layer]) > 1:
                return "it is called several times"
            here = view.before(layer)
            if view.run and found is not None and _differ(found, here):
                return "it follows something else in training than in evaluation"
            found = None if isinstance(here, Unclear) else here
            modules = [] if found is None or isinstance(found, str) else [share.module for share in found]
            repeated = next((module for module in modules if len(view.calls[module]) > 1), None)
            if repeated is not None:
                return f"{self._names[repeated][0]} feeds others, too"
        return None if found is None else self._neighbours.untouched(found)

    def _registered_before(self, layer: nn.Module) -> tuple[Source, ...] | str:
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
        if any(self._owners[id(p)] > 1 for p in before._parameters.values()):
            return f"{name} shares a parameter"
        if hooks_of(layer):
            return f"{name}, or something between it and the layer, has hooks"
        return None


def _differ(one: Any, other: Any) -> bool:
    """Whether two modes show different sources."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) != isinstance(other, str)
    return [share.module for share in one] != [share.module for share in other]
