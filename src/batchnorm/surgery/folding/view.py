"""One module's graph, seen from the batch normalization layers that it calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from batchnorm.surgery.find import hooks_of
from batchnorm.surgery.line import is_linear_map

__all__ = ["View", "hands_on"]

# What hands on in evaluation what it is given.
_IDENTITIES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
# What asks a tensor for its form alone.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_METHODS = ("size", "dim")
_LIKE = ("reshape_as", "view_as", "expand_as", "type_as")


def hands_on(module: nn.Module) -> bool:
    """Whether a module gives in evaluation what it is given."""
    return type(module) in _IDENTITIES and not hooks_of(module)


class View:
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
            return hands_on(self._called(node))
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
