"""The convolutions and linear layers right before and right behind batch normalization layers, in evaluation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from batchnorm.surgery.inspect.affine import is_linear_map
from batchnorm.surgery.inspect.find import is_batch_norm, names_of
from batchnorm.surgery.inspect.paths import hands_on_module
from batchnorm.surgery.inspect.recorded import Run
from batchnorm.surgery.inspect.trace import Graphs
from batchnorm.surgery.inspect.view import Share, View
from batchnorm.surgery.inspect.watched import missed, read_besides_calls

__all__ = ["Neighbours", "Observed", "Traced", "untouched"]

_READ = "its parameters are read by others, too"


@dataclass
class Neighbours:
    """What is next to a layer.

    Attributes:
        before: the convolutions or linear layers that feed the layer and nothing else, with their shares of its
            channels; or why there are none.
        after: the one that reads the layer's output, which nothing else reads, and nothing else; or why there is none.
        beside: the convolution that reads what the layer reads, and whose output is added to the layer's; or why there
            is none.
        guessed: whether these are only next to it in a ``Sequential``, which is taken to be called as a whole.
        everywhere: whether all calls in the model were seen, so that shared modules are no danger.
        given: what else the layer is called with: a residual, a mask.
    """

    before: tuple[Share, ...] | str
    after: tuple[Share, ...] | str
    beside: tuple[Share, ...] | str
    guessed: bool = False
    everywhere: bool = False
    given: set[str] = field(default_factory=set)


class Observed:
    """What a run on example inputs shows."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self._view = View(model, run.graph, whole=True, gone=set(), run=True)
        self._asked, self._touched, self._names = run.asked, run.touched, names_of(model)

    def of(self, layer: nn.Module) -> Neighbours:
        """What is next to a layer."""
        why = missed(self._asked.get(layer, ())) or (_READ if layer in self._touched else None)
        why = why or (None if layer in self._view.calls else "the example_inputs do not reach it")
        if why is not None:
            return Neighbours(why, why, why, everywhere=True)
        before, after = self._view.before(layer), self._view.after(layer)
        assert before is not None
        assert after is not None
        return Neighbours(
            untouched(before, self._touched, self._asked, self._names),
            untouched(after, self._touched, self._asked, self._names),
            untouched(self._view.beside(layer), self._touched, self._asked, self._names),
            everywhere=True,
            given=self._view.given(layer),
        )

    def hand_on(self, layers: Collection[nn.Module]) -> None:
        """Take it from now on that layers give what they are given."""
        self._view.gone |= set(layers)


class Traced:
    """What the graphs of all modules tell that can be traced; where none does, the order in a ``Sequential``."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._names = model, names_of(model)
        self._gone: set[nn.Module] = set()
        self._tracing = Graphs(model, modes=(False, False))
        parts = [m for m in self._names if is_batch_norm(m) or is_linear_map(m)]
        with read_besides_calls(parts) as asked:
            graphs = self._tracing.all()
        views = [View(module, graph, module is model, self._gone) for module, graph in graphs]
        self._asked = asked
        self._touched = {module for view in views for module in view.touched()}
        self._views: dict[nn.Module, list[tuple[nn.Module, View]]] = {}  # from the innermost outwards
        for (module, _), view in zip(graphs, views, strict=True):
            for part in view.calls:
                self._views.setdefault(part, []).append((module, view))

    def of(self, layer: nn.Module) -> Neighbours:
        """What is next to a layer: an outer graph, which sees more, overrules an inner one."""
        views = self._views.get(layer, [])
        why = missed(self._asked.get(layer, ())) or (_READ if layer in self._touched else None)
        if why is not None:
            return Neighbours(why, why, why)
        before, after = None, None
        for _, view in views:
            before, after = view.before(layer), view.after(layer)
        everywhere = bool(views) and views[-1][1].whole
        given = views[-1][1].given(layer) if views else set()
        around = views[-1][0] if views else layer
        unseen = self._tracing.blind_spot(around) + "; example_inputs would allow to observe it"
        beside = views[-1][1].beside(layer) if views else unseen
        guesses = [
            None if found is not None else self._in_line(layer, step) for found, step in ((before, -1), (after, 1))
        ]
        before, after = before or guesses[0] or unseen, after or guesses[1] or unseen
        return Neighbours(
            untouched(before, self._touched, self._asked, self._names),
            untouched(after, self._touched, self._asked, self._names),
            untouched(beside, self._touched, self._asked, self._names),
            guesses[0] is not None or (isinstance(before, str) and guesses[1] is not None),
            everywhere,
            given,
        )

    def hand_on(self, layers: Collection[nn.Module]) -> None:
        """Take it from now on that layers give what they are given."""
        self._gone |= set(layers)

    def _in_line(self, layer: nn.Module, step: int) -> tuple[Share, ...] | None:
        """The module before or behind, if layer and module have their places in one Sequential and nowhere else."""
        parent, _, key = self._names[layer][0].rpartition(".")
        around = self._model.get_submodule(parent) if key else None
        if not isinstance(around, nn.Sequential) or type(around).forward is not nn.Sequential.forward:
            return None
        line = list(around)
        place = line.index(layer) + step
        while 0 <= place < len(line) and (hands_on_module(line[place]) or line[place] in self._gone):
            place += step
        beside = line[place] if 0 <= place < len(line) else None
        alone = all(len(self._names[m]) == 1 for m in (layer, beside) if m is not None)
        # A linear layer may give (N, L, C), which the layer would normalize along L.
        usable = beside is not None and is_linear_map(beside) and not isinstance(beside, nn.Linear)
        return (Share(beside),) if usable and beside is not None and alone else None


def untouched(
    shares: tuple[Share, ...] | str,
    touched: set[nn.Module],
    asked: dict[nn.Module, set[str]],
    names: dict[nn.Module, list[str]],
) -> tuple[Share, ...] | str:
    """Give the same shares, or which of the modules a forward looks at besides calling it.

    Args:
        shares: or the reason why there are none.
        touched: the modules with parameters that others compute with.
        asked: which attributes others read.
        names: of all modules.
    """
    if isinstance(shares, str):
        return shares
    for module, _ in shares:
        if module in touched:
            return f"{names[module][0]}'s parameters are read by others, too"
        if "bias" in asked.get(module, ()) and getattr(module, "bias", None) is None:
            return f"a forward looks whether {names[module][0]} has a bias, which it would get"
    return shares
