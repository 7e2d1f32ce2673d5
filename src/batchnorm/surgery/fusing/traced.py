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
from batchnorm.surgery.inspect.find import TORCHS, hooks_of
from batchnorm.surgery.inspect.trace import Graphs, UntraceableError, paths_of, refusing

__all__ = ["Fusion"]

Chains = dict[nn.Module, list[Chain]]


class Fusion:
    """One pass over a model, from its innermost modules outwards.

    Attributes:
        fused: what was fused into each layer.
        methods: how.
        reasons: for the other layers that were seen, why not.
        unseen: the layers whose output goes where no graph could follow, and why. Observation may still help.
        rewritten: the modules whose forward was replaced.
    """

    def __init__(self, model: nn.Module, calls: Calls | None) -> None:
        self.fused: dict[nn.Module, str] = {}
        self.methods: dict[nn.Module, str] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.unseen: dict[nn.Module, str] = {}
        self.rewritten: list[nn.Module] = []
        self._model, self._calls, self._graphs = model, calls, Graphs(model, calls)
        self._closed: set[nn.Module] = set()  # layers of which all readers have been seen
        self._seen_in: dict[nn.Module, nn.Module] = {}  # the outermost module whose graph has the layer

    def run(self) -> None:
        """Fuse all that can be."""
        if self._calls is None:  # only the graphs tell what is called
            for module, _ in self._graphs.all():
                self._visit(module)
        else:
            for module in self._graphs.outwards:
                if module in self._calls and not self._settled(module):
                    self._graphs.look_into_parts(module)
                    self._visit(module)
        for layer in self._graphs.names:
            if type(layer) in TORCHS and layer not in self.fused:
                self._explain(layer)

    def name(self, module: nn.Module) -> str:
        """The module's first name in the model."""
        return self._graphs.names[module][0]

    def obstacle(self, layer: Any) -> str | None:
        """Why nothing may be fused into a layer, whatever follows it."""
        if type(layer) not in TORCHS:
            return "it is not a layer of ours"
        if len(self._graphs.names[layer]) > 1:
            return f"it is shared, by {' and '.join(self._graphs.names[layer])}"
        if hooks_of(layer):
            return "it has hooks, which would see the fused output"
        known = layer.activation or (layer._ahead and layer._ahead.activation)
        if known is not None:
            return f"it has the activation {known.name} already"
        return "it works in place" if layer.inplace else None

    def note(self, layer: nn.Module, what: object, method: str) -> None:
        """Remember what was fused into a layer, perhaps on top of something else."""
        self.fused[layer] = f"{self.fused[layer]} + {what}" if layer in self.fused else str(what)
        self.methods[layer] = method
        self.reasons.pop(layer, None)

    # --- one module ---

    def _visit(self, module: nn.Module) -> None:
        """Fuse in one module what its graph shows; whatever goes wrong there is a reason to leave it, and no more."""
        if module not in self._graphs or self._settled(module):
            return
        try:
            with refusing():
                self._fuse_within(module)
        except UntraceableError as error:
            self._graphs.opaque[module] = str(error)
            self._graphs.changed(module)
            for layer in [layer for layer, seen in self._seen_in.items() if seen is module]:
                del self._seen_in[layer]
                self.reasons.pop(layer, None)

    def _settled(self, module: nn.Module) -> bool:
        """Whether it shows no more of its layers than its parts do."""
        return self._closed.issuperset(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def _fuse_within(self, module: nn.Module) -> None:
        graph = self._graphs.of(module)
        found = self._chains(module, graph)
        for layer in list(found):
            if self._absorbed(module, graph, layer, found[layer]):
                del found[layer]
        if found:
            self._rewrite(module, found)

    def _chains(self, module: nn.Module, graph: fx.Graph) -> Chains:
        parts = Parts(module, self.name(module))
        calls = calls_of_layers(graph, parts)
        values = None
        if self._calls is not None:
            values = Values(module, graph, self._calls.get(module, []), additions_of(calls, parts))
        found: Chains = {}
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
        names = self._graphs.names[activation]
        inside = {node for node in graph.nodes if path in paths_of(node) or _is_around(node, path)}
        if len(names) > 1 or inside != acts or activation.state_dict() or not _takes_one_argument(activation):
            return False
        absorb(self._model, self.name(layer), names[0], known)
        self._graphs.changed(activation)
        self.note(layer, chains[0], "module replaced")
        return True

    def _rewrite(self, module: nn.Module, found: Chains) -> None:
        """Replace the module's forward by its graph, in which the calls of other parts stay calls."""
        within = {part for chains in found.values() for chain in chains for part in _inside(module, chain)}
        writing = set() if self._calls is None else self._calls.writing
        called = {part for part in module.modules() if any(True for _ in part.parameters())} - within - writing
        graph = self._graphs.to_run(module, called)
        again = self._chains(module, graph)
        chains = [chain for layer in found for chain in again.get(layer, [])]
        if not chains:
            return
        rewrite(module, graph, chains)
        self.rewritten.append(module)
        self._graphs.changed(module)
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
                self.unseen[layer] = self._graphs.blind_spot(layer if seen is None else seen)


def _inside(module: nn.Module, chain: Chain) -> set[nn.Module]:
    """The submodules whose forwards the chain runs through."""
    return {module.get_submodule(path) for node in chain.nodes for path in paths_of(node)}


def _leaves(chain: Chain) -> bool:
    """Whether an activation may follow where the graph ends."""
    return not chain.acts and any(user.op == "output" for user in chain.last.users)


def _is_around(node: fx.Node, path: str) -> bool:
    """Whether a node calls a module that has the one at the path inside, and may use it."""
    return node.op == "call_module" and path.startswith(f"{node.target}.")


def _innermost(node: fx.Node) -> str:
    return (paths_of(node) or [""])[-1]


def _takes_one_argument(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1
