"""The convolutions and linear layers right before and right behind batch normalization layers, in evaluation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.kernels import using
from batchnorm.surgery.example import calls_of, forward, in_mode, seeded
from batchnorm.surgery.find import names_of, shadow
from batchnorm.surgery.folding.view import View, hands_on
from batchnorm.surgery.fusing.observe import Witness
from batchnorm.surgery.fusing.traced import Tracing
from batchnorm.surgery.line import is_linear_map

__all__ = ["Neighbours", "neighbours"]


@dataclass
class Neighbours:
    """What is next to a layer.

    Attributes:
        before: the convolution or linear layer that feeds the layer and nothing else, or why there is none.
        after: the one that reads the layer's output, which nothing else reads, and nothing else; or why there is none.
        guessed: whether these are only next to it in a ``Sequential``, which is taken to be called as a whole.
        everywhere: whether all calls in the model were seen, so that shared modules are no danger.
        flat: whether what ``before`` gives is flattened to ``(N, C)`` on the way.
        dimensions: of the inputs that the layer was seen to get.
        given: what else the layer is called with: a residual, a mask.
    """

    before: nn.Module | str | None = None
    after: nn.Module | str | None = None
    guessed: bool = False
    everywhere: bool = False
    flat: bool = False
    dimensions: set[int] = field(default_factory=set)
    given: set[str] = field(default_factory=set)


def neighbours(model: nn.Module, layers: Collection[nn.Module], inputs: Any = None) -> dict[nn.Module, Neighbours]:
    """Find what feeds batch normalization layers alone, and what alone reads them.

    Graphs of all modules that can be traced tell; a run on the example inputs confirms it, and tells where there is no
    graph. Without one, the order in a ``Sequential`` does.

    Args:
        model: it is left as it was.
        layers: those of its batch normalization layers that are asked for.
        inputs: example inputs, as for ``fuse``.
    """
    search = _Search(model, layers, inputs)
    search.trace()
    if inputs is None:
        search.guess()
    else:
        search.observe(inputs)
    return search.found


class _Search:
    def __init__(self, model: nn.Module, layers: Collection[nn.Module], inputs: Any) -> None:
        self.found = {layer: Neighbours() for layer in layers}
        self._model, self._names = model, names_of(model)
        self._tracing = Tracing(model, None if inputs is None else calls_of(model, inputs), (False, False))
        self._seen_in: dict[nn.Module, nn.Module] = {}
        self._touched: set[nn.Module] = set()  # whose parameters others compute with

    def trace(self) -> None:
        """Look at the graphs of all modules; an outer one, which sees more, comes after an inner one."""
        for module, graph in self._tracing.graphs():
            view = View(module, graph, module is self._model)
            self._touched |= view.touched()
            for layer in self.found:
                if layer in view.calls:
                    self._seen_in[layer] = module
                    self._note(layer, view)
        for layer, found in self.found.items():
            if layer in self._touched:
                found.before = found.after = "its parameters are read by others, too"
            found.before, found.after = self._untouched(found.before), self._untouched(found.after)
            if found.before is None and found.after is None and layer not in self._seen_in:
                self._seen_in[layer] = layer

    def _note(self, layer: nn.Module, view: View) -> None:
        found = self.found[layer]
        found.before, found.flat = view.before(layer)
        found.after = view.after(layer)
        found.everywhere = view.whole
        found.given = view.given(layer)

    def _untouched(self, module: nn.Module | str | None) -> nn.Module | str | None:
        if module in self._touched:
            return f"{self._names[module][0]}'s parameters are read by others, too"
        return module

    def guess(self) -> None:
        """Fill in what no graph shows: from the order in a Sequential, or the reason why there is none."""
        for layer, found in self.found.items():
            unseen = self._tracing.blind_spot(self._seen_in[layer]) + "; example_inputs would allow to observe it"
            if found.before is None:
                found.before = self._in_line(layer, -1) or unseen
                found.guessed = found.before is not unseen
            if found.after is None:
                found.after = self._in_line(layer, 1) or unseen
                found.guessed |= isinstance(found.before, str) and found.after is not unseen

    def _in_line(self, layer: nn.Module, step: int) -> nn.Module | None:
        """The module before or behind, if layer and module have their places in one Sequential and nowhere else."""
        parent, _, key = self._names[layer][0].rpartition(".")
        around = self._model.get_submodule(parent) if key else None
        if not isinstance(around, nn.Sequential) or type(around).forward is not nn.Sequential.forward:
            return None
        line = list(around)
        place = line.index(layer) + step
        while 0 <= place < len(line) and hands_on(line[place]):
            place += step
        beside = line[place] if 0 <= place < len(line) else None
        alone = all(len(self._names[m]) == 1 for m in (layer, beside) if m is not None)
        return beside if beside is not None and is_linear_map(beside) and alone else None

    def observe(self, inputs: Any) -> None:
        """Look at a run, which has the last word on what it reaches."""
        twin, original = shadow(self._model)
        twins = {module: part for part, module in original.items()}
        layers = [twins[layer] for layer in self.found]
        rest = [part for part, module in original.items() if is_linear_map(module)]
        both = [*rest, *layers]
        witness = Witness(both, both, [p for m in both for p in m.parameters(recurse=False)])
        witness.attach()
        for layer in layers:
            layer.register_forward_pre_hook(_Arguments(self.found[original[layer]]), with_kwargs=True)
        with torch.no_grad(), seeded(twin), using("aten"), witness:
            witness.returned(forward(in_mode(twin, False), inputs))
        for layer in layers:
            self._confirm(original[layer], layer, original, witness)

    def _confirm(self, layer: nn.Module, twin: nn.Module, original: dict[nn.Module, nn.Module], seen: Witness) -> None:
        found = self.found[layer]
        if not found.dimensions:
            why = "the example_inputs do not reach it"
            found.before, found.after = found.before or why, found.after or why
            return
        if _read(twin, seen):
            found.before = found.after = "its parameters are read by others, too"
            return
        before = self._run_before(twin, original, seen)
        if not found.flat:
            found.before = _agreed(found.before, before)
        after = seen.verdict(twin)
        if not isinstance(after, str):
            after = self._usable(after, original, seen)
        found.after = _agreed(found.after, after)
        found.everywhere = True

    def _run_before(self, layer: nn.Module, original: dict[nn.Module, nn.Module], seen: Witness) -> nn.Module | str:
        fed = seen.fed[layer]
        before = next(iter(fed)) if len(fed) == 1 else None
        if before is None or not is_linear_map(before):
            told = sorted(self._names[original[m]][0] for m in fed if m is not None)
            if None in fed or not told:
                return "no plain convolution or linear layer feeds it alone"
            return f"it follows {' and '.join(told)}, not one plain convolution or linear layer"
        verdict = seen.verdict(before)
        if verdict is not layer:
            why = verdict if isinstance(verdict, str) else f"it feeds {self._names[original[verdict]][0]}, too"
            return f"{self._names[original[before]][0]} feeds others, too: {why}"
        return self._usable(before, original, seen)

    def _usable(self, part: nn.Module, original: dict[nn.Module, nn.Module], seen: Witness) -> nn.Module | str:
        module = original[part]
        if not is_linear_map(module):
            return f"it feeds {self._names[module][0]}, not a plain convolution or linear layer"
        if _read(part, seen):
            return f"{self._names[module][0]}'s parameters are read by others, too"
        return module


def _read(part: nn.Module, seen: Witness) -> bool:
    """Whether something else than a module computed with its parameters."""
    return any(id(p) in seen.touched for p in part.parameters(recurse=False))


class _Arguments:
    """Notes what a layer is called with."""

    def __init__(self, found: Neighbours) -> None:
        self._found = found

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input", "residual", "mask"), args, strict=False)) | kwargs
        first = next(iter(given.values()))
        self._found.dimensions |= {first.dim()} if isinstance(first, Tensor) else set()
        self._found.given |= {name for name in ("residual", "mask") if given.get(name) is not None}


def _agreed(graph: nn.Module | str | None, run: nn.Module | str) -> nn.Module | str:
    """What both say; a reason against it counts for more."""
    if isinstance(graph, str):
        return graph
    return run if graph is None or graph is run or isinstance(run, str) else "a trace and the run show different things"
