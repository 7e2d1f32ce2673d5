"""One graph, seen from the batch normalization layers that it calls: a module's as traced, or a model's as run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from batchnorm.surgery.inspect import paths
from batchnorm.surgery.inspect.affine import has_middle, is_linear_map, outputs_of
from batchnorm.surgery.inspect.ranks import rank_of, rank_taken

__all__ = ["Around", "Share", "Unclear", "View"]

_TELLS = "example_inputs would tell"


class Share(NamedTuple):
    """A convolution or linear layer, and which of a batch normalization layer's channels are its.

    Attributes:
        module: the convolution or linear layer.
        channels: for each of its channels on the layer's side, which channel of the layer it is, -1 for none; None if
            they are the same.
    """

    module: nn.Module
    channels: Tensor | None = None


@dataclass
class Around:
    """What is next to a layer.

    Attributes:
        before: the convolutions or linear layers that feed the layer and nothing else, with their shares of its
            channels; or why there are none.
        after: the one that reads the layer's output, which nothing else reads, and nothing else; or why there is none.
        beside: the convolution that reads what the layer reads, and whose output is added to the layer's; or why there
            is none.
        guessed: whether these are only next to it in a ``Sequential``, which is taken to be called as a whole.
        everywhere: whether all calls in the model were seen, so that shared modules are no danger.
        extras: what else the layer is called with: a residual, a mask.
    """

    before: tuple[Share, ...] | str
    after: tuple[Share, ...] | str
    beside: tuple[Share, ...] | str
    guessed: bool = False
    everywhere: bool = False
    extras: set[str] = field(default_factory=set)


class Unclear(str):
    """A reason that example inputs would settle."""

    __slots__ = ()


class View:
    """A graph, seen from the layers that it calls.

    Attributes:
        module: whose graph it is.
        whole: whether that is the model, so that nothing is around it.
        identities: layers that are folded, and hand on what they are given; it may grow.
        run: whether the graph was recorded in a run, and knows sizes.
        calls: the nodes that call each module.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        whole: bool,
        identities: set[nn.Module],
        run: bool = False,
        training: bool = False,
    ) -> None:
        self.module, self.whole, self.identities, self.run = module, whole, identities, run
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        self._graph, self._training = graph, training  # in which dropout is more than nothing
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(self._called(node), []).append(node)

    def before(self, layer: nn.Module) -> tuple[Share, ...] | str | None:
        """What feeds a layer alone, or why nothing does, or None if the graph begins there."""
        origins = dict.fromkeys(origin for call in self.calls[layer] for origin in self._origins(_input(call)))
        if any(node.op == "placeholder" for node in origins) and not self.whole:
            return None
        if not all(map(self._is_map, origins)):
            told = " and ".join(sorted({self._told(node) for node in origins}))
            return f"it follows {told}, not a plain convolution or linear layer"
        modules = list(dict.fromkeys(map(self._called, origins)))
        for module in modules:
            if not self._feeds_only(module, layer):
                return f"{self._name(module)} feeds others, too"
        return self._shares_before(layer, modules)

    def after(self, layer: nn.Module) -> tuple[Share, ...] | str | None:
        """What alone reads a layer, or why nothing does, or None if its output leaves the graph."""
        readers = dict.fromkeys(reader for call in self.calls[layer] for reader, _ in self._readers(call))
        if any(node.op == "output" for node in readers) and not self.whole:
            return None
        if not readers:
            return "nothing reads its output"
        told = " and ".join(sorted({self._told(node) for node in readers}))
        if not all(map(self._is_map, readers)):
            return f"followed by {told}"
        modules = list(dict.fromkeys(map(self._called, readers)))
        if len(modules) > 1:
            return f"it is read by {told}"
        origins = {origin for call in self.calls[modules[0]] for origin in self._origins(_input(call))}
        if not self._feeds_only(layer, modules[0]) or not origins <= set(self.calls[layer]):
            return f"{self._name(modules[0])} reads others, too"
        return self._share_after(layer, modules[0])

    def beside(self, layer: nn.Module) -> tuple[Share, ...] | str:
        """The convolution that reads what a layer reads, and whose output is added to the layer's; or why none does."""
        if not self.run:  # which alone shows what is overwritten between the two calls
            return f"whether something is beside it, {_TELLS}"
        if len(self.calls[layer]) > 1:
            return "it is called several times"
        call = self.calls[layer][0]
        found = paths.summands(call, lambda node: [reader for reader, _ in self._readers(node)], self._is_identity)
        if isinstance(found, str):
            return found
        for node in found:
            module = self._map(node)
            if module is None or len(self.calls[module]) > 1 or not has_middle(module):
                continue
            if self._source(node) is self._source(call):
                return (Share(module),)
        return "no convolution that could do its work is beside it in the sum"

    def extras(self, layer: nn.Module) -> set[str]:
        """What else a layer is called with."""
        calls = self.calls[layer]
        named = {name for call in calls for name, value in call.kwargs.items() if value is not None}
        placed = {
            name
            for call in calls
            for name, value in zip(("residual", "mask"), call.args[1:], strict=False)
            if value is not None
        }
        return (named & {"residual", "mask"}) | placed

    def parameters_read(self) -> set[nn.Module]:
        """The modules with parameters that a traced graph computes with, besides calling them."""
        reads = [node for node in self._graph.nodes if node.op == "get_attr"]
        used = [node for node in reads if any(not paths.asks(user, node) for user in node.users)]
        parameters = {id(_attribute(self.module, str(node.target))) for node in used}
        if not parameters:
            return set()
        return {m for m in self.module.modules() if any(id(p) in parameters for p in m.parameters(recurse=False))}

    # --- who reads whom ---

    def _feeds_only(self, first: nn.Module, other: nn.Module) -> bool:
        """Whether all that a module gives goes into another one, as its input."""
        reads = [(reader, given) for call in self.calls[first] for reader, given in self._readers(call)]
        return all(
            reader in self.calls[other] and _input(reader) is given and list(reader.all_input_nodes).count(given) == 1
            for reader, given in reads
        )

    def _origins(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that gave a value, before all that handed it on or moved it."""
        if self._passes(node):
            for given in paths.data_of(node):
                yield from self._origins(given)
        else:
            yield node

    def _readers(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What computes with a node's value, and the node from which it gets it."""
        for user in node.users:
            if paths.asks(user, node):
                continue
            if self._passes(user):
                yield from self._readers(user)
            else:
                yield user, node

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node gives the values that it is given, perhaps at other places."""
        return self._is_identity(node) or (paths.is_movement(node) and self._understood(node))

    def _is_identity(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            called = self._called(node)
            return called in self.identities or paths.is_identity_module(called, self._training)
        return paths.is_identity(node)

    def _understood(self, node: fx.Node) -> bool:
        """Whether it is known where a movement brings channels: always in a run, which knows sizes."""
        if self.run or paths.joins_channels(node):
            return True
        return paths.flattens(node) and all(isinstance(self._map(o), nn.Linear) for o in self._origins(_input(node)))

    # --- which channel is where ---

    def _shares_before(self, layer: nn.Module, modules: Sequence[nn.Module]) -> tuple[Share, ...] | str:
        if not self.run:
            return self._believed_before(layer)
        shares: dict[nn.Module, list[Tensor | None]] = {module: [] for module in modules}
        for call in self.calls[layer]:
            if self._directly(call):
                (origin,) = self._origins(_input(call))
                module = self._called(origin)
                if paths.channel_axis(origin.meta["shape"], module) != 1:
                    return self._other_axis(module)
                shares[module].append(None)
                continue
            origins = list(dict.fromkeys(self._origins(_input(call))))
            starts, tags = {}, 0
            for origin in origins:
                axis = paths.channel_axis(origin.meta["shape"], self._called(origin))
                starts[origin] = tags, axis
                tags += origin.meta["shape"][axis]
            values = {o: paths.tagged(o.meta["shape"], axis, first) for o, (first, axis) in starts.items()}
            end = paths.replayed(_input(call), values, self._is_identity)
            _, channels = paths.channels_between(end, 1, tags)
            for origin, (first, axis) in starts.items():
                own = channels[first : first + origin.meta["shape"][axis]]
                if (own == -2).any():
                    return self._other_axis(self._called(origin))
                shares[self._called(origin)].append(own)
        return self._shares(shares)

    def _share_after(self, layer: nn.Module, module: nn.Module) -> tuple[Share, ...] | str:
        if not self.run:
            return self._believed(layer, self.calls[layer][0], [module])
        found: list[Tensor | None] = []
        for call in self.calls[module]:
            given = _input(call)
            shape = given.meta["shape"]
            axis = paths.channel_axis(shape, module)
            if self._directly(call):
                if axis != 1:
                    return self._other_axis(module)
                found.append(None)
                continue
            origins = dict.fromkeys(self._origins(given))
            values = {origin: paths.tagged(origin.meta["shape"], 1, 0) for origin in origins}
            end = paths.replayed(given, values, self._is_identity)
            channels, _ = paths.channels_between(end, axis, next(iter(origins)).meta["shape"][1])
            if (channels < 0).any():
                return self._other_axis(module)
            found.append(channels)
        return self._shares({module: found})

    def _source(self, call: fx.Node) -> fx.Node:
        """What a call gets, before all that handed it on."""
        return paths.before_identities(_input(call), self._is_identity)

    def _directly(self, call: fx.Node) -> bool:
        """Whether nothing moves values on the way to a call."""
        return not paths.is_movement(self._source(call))

    def _shares(self, found: dict[nn.Module, list[Tensor | None]]) -> tuple[Share, ...] | str:
        """What all calls agree on; a channel that one of them does not use may be any there."""
        shares = []
        for module, (channels, *others) in found.items():
            for other in others:
                if channels is None or other is None:
                    agreed = channels is other
                else:
                    agreed = bool(((channels == other) | (channels < 0) | (other < 0)).all())
                    channels = torch.maximum(channels, other)
                if not agreed:
                    return f"its channels are others of {self._name(module)} in each call"
            shares.append(Share(module, channels))
        return tuple(shares)

    def _other_axis(self, module: nn.Module) -> str:
        what = "those of {}, which is linear, the last one" if isinstance(module, nn.Linear) else "those of {} are not"
        return f"its channels are dimension 1, and {what.format(self._name(module))}"

    def _believed_before(self, layer: nn.Module) -> tuple[Share, ...] | str:
        shares: dict[nn.Module, list[Tensor | None]] = {}
        for call in self.calls[layer]:
            found = self._believed(layer, call, list(dict.fromkeys(map(self._called, self._origins(_input(call))))))
            if isinstance(found, str):
                return found
            for module, channels in found:
                shares.setdefault(module, []).append(channels)
        return self._shares(shares)

    def _believed(self, layer: nn.Module, call: fx.Node, modules: Sequence[Any]) -> tuple[Share, ...] | str:
        """What a graph without sizes tells: convolutions are taken to have a batch, linear layers need (N, C)."""
        given = _input(call)
        rank = 2 if any(map(paths.flattens, self._way(given))) else rank_of(self.module, given)
        ranks = {rank, rank_taken(layer)} - {None}
        for module in modules:
            if not ranks and isinstance(module, nn.Linear):
                return self._unknown_rank(module)
            if ranks and ranks != {module.weight.dim()}:
                return self._other_axis(module)
        return (Share(modules[0]),) if len(modules) == 1 else self._joined(call, modules)

    def _joined(self, call: fx.Node, modules: Sequence[Any]) -> tuple[Share, ...] | str:
        if len(list(self._origins(_input(call)))) > len(modules):
            return Unclear(f"where the channels of {' and '.join(map(self._name, modules))} go, {_TELLS}")
        shares, first = [], 0
        for module in modules:
            shares.append(Share(module, torch.arange(first, first + outputs_of(module))))
            first += outputs_of(module)
        return tuple(shares)

    def _way(self, node: fx.Node) -> Iterator[fx.Node]:
        yield node
        if self._passes(node):
            for given in paths.data_of(node):
                yield from self._way(given)

    def _unknown_rank(self, linear: nn.Module) -> str:
        return Unclear(
            f"its input may be (N, C) or (N, C, L), whose channels are not the features of {self._name(linear)}, which "
            f"is linear: {_TELLS}"
        )

    # --- nodes ---

    def _is_map(self, node: fx.Node) -> bool:
        return self._map(node) is not None

    def _map(self, node: fx.Node) -> nn.Module | None:
        """The convolution or linear layer that a node calls, if it is one."""
        called = self._called(node) if node.op == "call_module" else None
        return called if called is not None and is_linear_map(called) else None

    def _called(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _name(self, module: nn.Module) -> str:
        return str(self.calls[module][0].target)

    def _told(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return "the model's input"
        if node.op == "output":
            return "the model's output"
        return type(self._called(node)).__name__ if node.op == "call_module" else paths.name_of(node)


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module, by its qualified name."""
    owner, _, key = name.rpartition(".")
    return getattr(module.get_submodule(owner), key)


def _input(node: fx.Node) -> fx.Node:
    """The node whose value is a call's first argument."""
    return node.all_input_nodes[0]
