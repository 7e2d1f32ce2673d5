"""The convolutions and linear layers right before and right behind batch normalization layers, in evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm.kernels import using
from batchnorm.surgery.example import calls_of, forward, seeded
from batchnorm.surgery.find import hooks_of, names_of, shadow
from batchnorm.surgery.line import is_linear_map
from batchnorm.surgery.observe import Witness
from batchnorm.surgery.traced import Tracing

__all__ = ["Neighbours", "neighbours"]

# What hands on in evaluation what it is given.
_IDENTITIES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
# What asks a tensor for its form alone.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_METHODS = ("size", "dim")
_LIKE = ("reshape_as", "view_as", "expand_as", "type_as")


@dataclass
class Neighbours:
    """What is next to a layer.

    Attributes:
        before: the convolution or linear layer that feeds the layer and nothing else, or why there is none.
        after: the one that reads the layer's output, which nothing else reads, and nothing else; or why there is none.
        everywhere: whether all calls in the model were seen, so that shared modules are no danger.
        flat: whether what ``before`` gives is flattened to ``(N, C)`` on the way.
        dimensions: of the inputs that the layer was seen to get.
        given: what else the layer is called with: a residual, a mask.
    """

    before: nn.Module | str | None = None
    after: nn.Module | str | None = None
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
            view = _View(module, graph, module is self._model)
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

    def _note(self, layer: nn.Module, view: _View) -> None:
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
            if found.after is None:
                found.after = self._in_line(layer, 1) or unseen

    def _in_line(self, layer: nn.Module, step: int) -> nn.Module | None:
        """The module before or behind, if layer and module have their places in one Sequential and nowhere else."""
        parent, _, key = self._names[layer][0].rpartition(".")
        around = self._model.get_submodule(parent) if key else None
        if not isinstance(around, nn.Sequential) or type(around).forward is not nn.Sequential.forward:
            return None
        line = list(around)
        place = line.index(layer) + step
        while 0 <= place < len(line) and type(line[place]) in _IDENTITIES and not hooks_of(line[place]):
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
            forward(twin.eval(), inputs)
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


class _View:
    """One module's graph, seen from the layers that it calls."""

    def __init__(self, module: nn.Module, graph: fx.Graph, whole: bool) -> None:
        self.whole = whole
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        self._module, self._graph = module, graph
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(self._called(node), []).append(node)

    def before(self, layer: nn.Module) -> tuple[nn.Module | str | None, bool]:
        """What feeds a layer alone, or why nothing does, or None if the graph begins there; whether it is flattened."""
        origins = {self._origin(call) for call in self.calls[layer]}
        if any(node.op == "placeholder" for node in origins) and not self.whole:
            return None, False
        first = next(iter(origins))
        if len({node.target for node in origins}) > 1:
            return f"it follows {' and '.join(sorted(self._told(node) for node in origins))}", False
        if first.op != "call_module" or not is_linear_map(self._called(first)):
            return f"it follows {self._told(first)}, not a plain convolution or linear layer", False
        before = self._called(first)
        if not self._alone(before, layer):
            return f"{first.target} feeds others, too", False
        return before, any(_flattens(self._handed(_input(call))) for call in self.calls[layer])

    def after(self, layer: nn.Module) -> nn.Module | str | None:
        """What alone reads a layer, or why nothing does, or None if its output leaves the graph."""
        readers = {reader for call in self.calls[layer] for reader, _ in self._readers(call)}
        if any(node.op == "output" for node in readers) and not self.whole:
            return None
        if not readers:
            return "nothing reads its output"
        first = next(iter(readers))
        if len({node.target for node in readers}) > 1:
            return f"it is read by {' and '.join(sorted({self._told(node) for node in readers}))}"
        if first.op != "call_module" or not is_linear_map(self._called(first)):
            return f"followed by {self._told(first)}"
        after = self._called(first)
        return after if self._alone(layer, after) else f"{first.target} reads others, too"

    def given(self, layer: nn.Module) -> set[str]:
        """What else a layer is called with."""
        calls = self.calls[layer]
        named = {name for call in calls for name, value in call.kwargs.items() if value is not None}
        placed = {name for call in calls for name, _ in zip(("residual", "mask"), call.args[1:], strict=False)}
        return (named & {"residual", "mask"}) | placed

    def touched(self) -> set[nn.Module]:
        """The modules whose parameters the graph computes with, besides calling them."""
        parameters = {
            id(_attribute(self._module, str(node.target)))
            for node in self._graph.nodes
            if node.op == "get_attr" and any(not _silent(user, node) for user in node.users)
        }
        return {m for m in self._module.modules() if any(id(p) in parameters for p in m.parameters(recurse=False))}

    def _alone(self, first: nn.Module, second: nn.Module) -> bool:
        """Whether all that one module gives goes into another one, as its input, which gets nothing else."""
        reads = [(reader, given) for call in self.calls[first] for reader, given in self._readers(call)]
        within = all(
            reader in self.calls[second] and _input(reader) is given and list(reader.all_input_nodes).count(given) == 1
            for reader, given in reads
        )
        return within and all(self._origin(call) in self.calls[first] for call in self.calls[second])

    def _origin(self, call: fx.Node) -> fx.Node:
        """The node that gave what a call gets, before anything that hands it on."""
        node = self._handed(_input(call))
        if _flattens(node):
            before = self._handed(_input(node))
            return before if self._is_linear(before) else node
        return node

    def _handed(self, node: fx.Node) -> fx.Node:
        while self._hands_on(node):
            node = _input(node)
        return node

    def _readers(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What computes with a node's value, and the node from which it gets it."""
        for user in node.users:
            if _silent(user, node):
                continue
            if self._hands_on(user) or (_flattens(user) and self._is_linear(self._handed(node))):
                yield from self._readers(user)
            else:
                yield user, node

    def _hands_on(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._called(node)
            return type(module) in _IDENTITIES and not hooks_of(module)
        if node.op != "call_function" or node.target not in _DROPOUTS:
            return False
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is False

    def _is_linear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._called(node), nn.Linear)

    def _called(self, node: fx.Node) -> nn.Module:
        return self._module.get_submodule(str(node.target))

    def _told(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return "the model's input"
        if node.op == "output":
            return "the model's output"
        if node.op == "call_module":
            return type(self._called(node)).__name__
        return str(getattr(node.target, "__name__", node.target))


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module, by its qualified name."""
    owner, _, key = name.rpartition(".")
    return getattr(module.get_submodule(owner), key)


def _input(node: fx.Node) -> fx.Node:
    """The node whose value is a call's first argument."""
    return node.all_input_nodes[0]


def _flattens(node: fx.Node) -> bool:
    """Whether a node makes (N, L, C) into (N · L, C)."""
    if node.target not in ("flatten", torch.flatten):
        return False
    given = (*node.args[1:], *node.kwargs.values())
    return given in ((0, 1), (0, -2))


def _silent(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is only asked for its form."""
    if user.op == "call_method":
        like = user.target in _LIKE and len(user.args) > 1 and user.args[0] is not node
        return like or user.target in _METHODS
    return user.op == "call_function" and user.target is getattr and user.args[1] in _ATTRIBUTES
