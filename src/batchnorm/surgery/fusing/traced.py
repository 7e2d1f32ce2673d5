"""Fuse what tracing can see, module by module, so that one forward that cannot be traced hides nothing but itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from batchnorm.surgery.fusing.patterns import LEAVES, Chain, Parts, additions_of, calls_of_layers, chain_of
from batchnorm.surgery.fusing.rewrite import absorb, rewrite
from batchnorm.surgery.fusing.values import Values
from batchnorm.surgery.inspect.example import Calls
from batchnorm.surgery.inspect.find import TORCHS, hooks_of, is_batch_norm, names_of
from batchnorm.surgery.inspect.trace import (
    Leaf,
    Shadows,
    UntraceableError,
    is_container,
    refusing,
    takes_fixed_arguments,
    trace,
)

__all__ = ["Tracing"]

Found = dict[nn.Module, list[Chain]]


class Tracing:
    """One pass over a model, from its innermost modules outwards.

    Attributes:
        fused: what was fused into each layer.
        methods: how.
        reasons: for the other layers that were seen, why not.
        unseen: the layers whose output goes where no graph could follow, and why. Observation may still help.
        rewritten: the modules whose forward was replaced.
    """

    def __init__(self, model: nn.Module, calls: Calls | None, modes: Sequence[bool] = (True, False)) -> None:
        self.fused: dict[nn.Module, str] = {}
        self.methods: dict[nn.Module, str] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.unseen: dict[nn.Module, str] = {}
        self.rewritten: list[nn.Module] = []
        self._model, self._calls, self._names, self._modes = model, calls, names_of(model), modes
        self._opaque: dict[nn.Module, str] = {}  # what cannot be traced, and why
        self._blind: dict[nn.Module, str] = {}  # what can be traced from outside only
        self._stale: set[nn.Module] = set()  # whose graph was recorded before something in it changed
        self._looked: set[nn.Module] = set()  # into which one has looked
        self._closed: set[nn.Module] = set()  # layers of which all readers have been seen
        self._graphs: dict[nn.Module, tuple[fx.Graph, Leaf]] = {}
        self._seen_in: dict[nn.Module, nn.Module] = {}  # the outermost module whose graph has the layer
        self._with_layers = {m for m in self._names if any(is_batch_norm(part) for part in m.modules())}

    def run(self) -> None:
        """Fuse all that can be."""
        if self._calls is None:  # only the graphs tell what is called
            for module, _ in self.graphs():
                self._visit(module)
        else:
            shadows = Shadows(self._model)
            for module in self._outwards():
                if module in self._calls and not self._settled(module):
                    self._look_into_parts(module, shadows)
                    self._visit(module)
        for layer in self._names:
            if type(layer) in TORCHS and layer not in self.fused:
                self._explain(layer)

    def graphs(self) -> list[tuple[nn.Module, fx.Graph]]:
        """Trace all modules with batch normalization inside whose forward runs, from the innermost outwards."""
        outwards = self._outwards()
        self._look_into_parts(self._model, Shadows(self._model))
        called = self._called(outwards[::-1])
        return [(m, self._graphs[m][0]) for m in outwards if m in called and m in self._graphs]

    def _outwards(self) -> list[nn.Module]:
        return [module for module in self._names if module in self._with_layers][::-1]

    def name(self, module: nn.Module) -> str:
        """The module's first name in the model."""
        return self._names[module][0]

    def obstacle(self, layer: Any) -> str | None:
        """Why nothing may be fused into a layer, whatever follows it."""
        if type(layer) not in TORCHS:
            return "it is not a layer of ours"
        if len(self._names[layer]) > 1:
            return f"it is shared, by {' and '.join(self._names[layer])}"
        if hooks_of(layer):
            return "it has hooks, which would see the fused output"
        known = layer.activation or (layer._ahead and layer._ahead.activation)
        if known is not None:
            return f"it has the activation {known.name} already"
        return "it works in place" if layer.inplace else None

    def sole_name(self, module: nn.Module) -> str | None:
        """The module's name, if it has only one."""
        names = self._names[module]
        return names[0] if len(names) == 1 else None

    def note(self, layer: nn.Module, what: object, method: str) -> None:
        """Remember what was fused into a layer, perhaps on top of something else."""
        self.fused[layer] = f"{self.fused[layer]} + {what}" if layer in self.fused else str(what)
        self.methods[layer] = method
        self.reasons.pop(layer, None)

    # --- what can be traced ---

    def _look_into_parts(self, module: nn.Module, shadows: Shadows) -> None:
        """Trace a module, and first all with layers inside it: what cannot be traced there is a call to the others."""
        for part in [*module.modules()][::-1]:
            if part in self._with_layers and part not in self._looked:
                self._looked.add(part)
                self._look_into(part, shadows)

    def _look_into(self, module: nn.Module, shadows: Shadows) -> None:
        if not is_container(module) or type(module).forward is nn.Module.forward:
            return
        if "forward" in vars(module):
            self._opaque[module] = "its forward has been replaced"
            return
        if not takes_fixed_arguments(module):  # its callers decide on them, and it is looked into from there
            self._blind[module] = "it takes optional arguments"
            return
        for leaf in self._leaves():
            try:
                known = None if module in self._stale else shadows
                self._graphs[module] = trace(module, leaf, self._modes, shadows=known), leaf
            except UntraceableError as error:
                self._opaque[module] = str(error)
            else:
                self._opaque.pop(module, None)
                self._stale.discard(module)
                return

    def _leaves(self) -> list[Leaf]:
        """What to look into: as much as possible; if that fails, only parts with layers; or nothing."""

        def closed(part: nn.Module) -> bool:
            return not is_container(part) or part in self._opaque or hooks_of(part) or "forward" in vars(part)

        leaves: list[Leaf] = [closed, lambda part: closed(part) or part not in self._with_layers, lambda part: True]
        return [self._harmless(leaf) for leaf in leaves]

    def _harmless(self, leaf: Leaf) -> Leaf:
        """Refuse a graph that would not see what a call of a part does to a list or dict."""
        writing = set() if self._calls is None else self._calls.writing

        def checked(part: nn.Module) -> bool:
            found = leaf(part)
            if found and part in writing:
                raise UntraceableError(f"{self.name(part)}, which cannot be traced, writes into what it is given")
            return found

        return checked

    def _called(self, inwards: Sequence[nn.Module]) -> set[nn.Module]:
        """Modules whose forward runs: a part of another one may also be used for its parts or its other methods."""
        if self._calls is not None:
            return set(self._calls)
        called = {self._model}
        for module in inwards:
            if module in called and module in self._graphs:
                paths = {path for node in self._graphs[module][0].nodes for path in _paths(node)}
                called |= {module.get_submodule(path) for path in paths}
            elif module in called:  # nothing is known; but who writes a forward lets it be called
                called |= {part for part in module.children() if not isinstance(part, nn.Sequential)}
        return called

    # --- one module ---

    def _visit(self, module: nn.Module) -> None:
        """Fuse in one module what its graph shows; whatever goes wrong there is a reason to leave it, and no more."""
        if module not in self._graphs or self._settled(module):
            return
        try:
            with refusing():
                self._fuse_within(module)
        except UntraceableError as error:
            self._opaque[module] = str(error)
            self._changed(module)
            for layer in [layer for layer, seen in self._seen_in.items() if seen is module]:
                del self._seen_in[layer]
                self.reasons.pop(layer, None)

    def _settled(self, module: nn.Module) -> bool:
        """Whether it shows no more of its layers than its parts do."""
        return self._closed.issuperset(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def _fuse_within(self, module: nn.Module) -> None:
        graph, leaf = self._graphs[module]
        if module in self._stale:
            graph = trace(module, leaf, self._modes[-1:])
        found = self._chains(module, graph)
        for layer in list(found):
            if self._absorbed(module, graph, layer, found[layer]):
                del found[layer]
        if found:
            self._rewrite(module, leaf, found)

    def _changed(self, module: nn.Module) -> None:
        """Note that graphs with this module inside tell no more what it does."""
        for name in self._names[module]:
            while name:
                name = name.rpartition(".")[0]
                self._stale.add(self._model.get_submodule(name))

    def _chains(self, module: nn.Module, graph: fx.Graph) -> Found:
        parts = Parts(module, self.name(module))
        calls = calls_of_layers(graph, parts)
        values = None
        if self._calls is not None:
            values = Values(module, graph, self._calls.get(module, []), additions_of(calls, parts))
        found: Found = {}
        claimed: dict[fx.Node, nn.Module] = {}
        for layer in reversed(calls):  # the last of an addition's operands takes the other one as its residual
            self._seen_in[layer] = module
            chains = self._chains_of(layer, calls[layer], parts, values, claimed)
            if not isinstance(chains, str):
                claimed.update({chain.add: layer for chain in chains if chain.add is not None})
                found[layer] = chains
            elif layer not in self.fused:
                self.reasons[layer] = chains
            leaves = chains == LEAVES or any(_leaves(chain) for chain in chains if isinstance(chain, Chain))
            (self._closed.discard if leaves else self._closed.add)(layer)
        return found

    def _chains_of(
        self,
        layer: nn.Module,
        calls: Sequence[fx.Node],
        parts: Parts,
        values: Values | None,
        claimed: dict[fx.Node, nn.Module],
    ) -> list[Chain] | str:
        """What can be fused into a layer, the same at each of its calls; or why nothing can."""
        reason = self.obstacle(layer)
        if reason is not None:
            return reason
        chains: list[Chain] = []
        for call in calls:
            chain = chain_of(call, parts, values)
            if isinstance(chain, str):
                return chain
            if chain.add in claimed:
                return f"it is the residual of {self.name(claimed[chain.add])}"
            chains.append(chain)
        if len({chain.activation for chain in chains}) > 1 or len({chain.last for chain in chains}) < len(chains):
            return "it is called several times, with different things behind it"
        if chains != sorted(chains, key=lambda chain: chain.place):
            return "it is called several times, and its calls would change places"
        return chains

    # --- two ways to fuse ---

    def _absorbed(self, module: nn.Module, graph: fx.Graph, layer: nn.Module, chains: Sequence[Chain]) -> bool:
        """Replace the activation's module, if nothing else uses it: no forward need change."""
        acts = {node for chain in chains for node in chain.acts}
        path = min(map(_innermost, acts), key=len, default="")
        known = chains[0].activation
        if not path or known is None or any(chain.add is not None for chain in chains):
            return False
        activation = module.get_submodule(path)
        name = self.sole_name(activation)
        inside = {node for node in graph.nodes if path in _paths(node) or _is_around(node, path)}
        if name is None or inside != acts or activation.state_dict() or not _takes_one_argument(activation):
            return False
        absorb(self._model, self.name(layer), name, known)
        self._changed(activation)
        self.note(layer, chains[0], "module replaced")
        return True

    def _rewrite(self, module: nn.Module, leaf: Leaf, found: Found) -> None:
        """Replace the module's forward by its graph, in which the calls of other parts stay calls."""
        within = {part for chains in found.values() for chain in chains for part in _inside(module, chain)}
        writing = set() if self._calls is None else self._calls.writing
        called = {part for part in module.modules() if any(True for _ in part.parameters())} - within - writing
        graph = trace(module, lambda part: leaf(part) or part in called, self._modes[-1:], to_run=True)
        again = self._chains(module, graph)
        chains = [chain for layer in found for chain in again.get(layer, [])]
        if not chains:
            return
        rewrite(module, graph, chains)
        self.rewritten.append(module)
        self._changed(module)
        for layer in found:
            if layer in again:
                self.note(layer, again[layer][0], "forward rewritten")

    # --- why not ---

    def _explain(self, layer: nn.Module) -> None:
        seen = self._seen_in.get(layer)
        if seen is None or self.reasons.get(layer) in (None, LEAVES):
            self.reasons.pop(layer, None)
            if seen is self._model:
                self.reasons[layer] = "its output is the model's"
            else:
                self.unseen[layer] = self.blind_spot(layer if seen is None else seen)

    def blind_spot(self, module: nn.Module) -> str:
        """Which module around this one could not be traced, and why."""
        name = self.name(module)
        if hooks_of(module) and module is not self._model:
            return f"{name} has hooks, which see its output"
        while name:
            name = name.rpartition(".")[0]
            around = self._model.get_submodule(name)
            why = self._opaque.get(around) or self._blind.get(around)
            if why is not None:
                return f"{name or 'the model'} cannot be traced: {why}"
        return "no forward that could be traced calls it"


def _inside(module: nn.Module, chain: Chain) -> set[nn.Module]:
    """The submodules whose forwards the chain runs through."""
    return {module.get_submodule(path) for node in chain.nodes for path in _paths(node)}


def _leaves(chain: Chain) -> bool:
    """Whether an activation may follow where the graph ends."""
    return not chain.acts and any(user.op == "output" for user in chain.last.users)


def _is_around(node: fx.Node, path: str) -> bool:
    """Whether a node calls a module that has the one at the path inside, and may use it."""
    return node.op == "call_module" and path.startswith(f"{node.target}.")


def _paths(node: fx.Node) -> list[str]:
    """The names of the submodules within which a node was recorded, from the outermost inwards."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return [path for path, _ in stack.values() if path]


def _innermost(node: fx.Node) -> str:
    return (_paths(node) or [""])[-1]


def _takes_one_argument(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1
