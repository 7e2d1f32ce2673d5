"""Change what a module computes without changing what it holds, so that it can be undone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from batchnorm.surgery.fusing.patterns import Chain

__all__ = ["Absorbed", "Rewritten", "absorb", "rewrite"]


class Absorbed(nn.Identity):
    """Stands where an activation was that a batch normalization layer now applies.

    Attributes:
        original: the activation's module.
        layer: the batch normalization layer. Both are in tuples, so that they do not count as submodules.
    """

    def __init__(self, original: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.original, self.layer = (original,), (layer,)
        self.training = original.training

    def extra_repr(self) -> str:
        """Say what it stands for."""
        return f"{self.original[0]}"

    def forward(self, input: Tensor) -> Tensor:
        """Nothing is left to do."""
        return input

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript needs no memory of the activation."""
        return nn.Identity()


def absorb(model: nn.Module, layer: Any, activation: nn.Module, name: str, known: Any) -> None:
    """Let a layer apply an activation, whose module (with this one name in the model) makes room."""
    layer.activation = known
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, Absorbed(activation, layer))


class Rewritten(nn.Module):
    """Mixed into the class of a module whose forward is now a graph's; everything else is its own class's."""

    _graph: ClassVar[fx.Graph]
    _layers: ClassVar[tuple[str, ...]]  # the batch normalization layers with more to do, by their names in the module
    _activated: ClassVar[tuple[str, ...]]  # those among them that apply an activation

    def __reduce__(self) -> Any:
        # A graph does not pickle; a GraphModule does, as its source.
        carrier = fx.GraphModule(self, copy.deepcopy(self._graph))
        return _unpickled, (type(self).__mro__[2], carrier, self._layers, self._activated), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse: TorchScript's layer takes no residual, and would apply the activation before the addition."""
        raise RuntimeError(
            f"TorchScript cannot express the fused forward of {type(self).__name__}: call batchnorm.revert before "
            "torch.jit.script, or use torch.export"
        )


def rewrite(module: nn.Module, graph: fx.Graph, chains: Sequence[Chain]) -> None:
    """Fuse the chains of a module's graph and make the graph its forward; if that fails, nothing has changed.

    The module keeps its identity, submodules, attributes, hooks and methods: it becomes a subclass of its class.
    """
    layers = {str(chain.call.target) for chain in chains}
    activated = {str(chain.call.target) for chain in chains if chain.activation is not None}
    kind = type(module)
    if isinstance(module, Rewritten):
        layers, activated = layers | set(module._layers), activated | set(module._activated)
        kind = kind.__mro__[2]
    for chain in chains:
        _fuse(graph, chain)
    traced = fx.GraphModule(module, _plain(graph))
    made = _rewritten(kind, traced, tuple(sorted(layers)), tuple(sorted(activated)))
    for chain in chains:
        layer: Any = module.get_submodule(str(chain.call.target))
        layer.activation = chain.activation
    module.__class__ = made


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph without what does not pickle: its tracer, and annotations, which may be mere text."""
    plain = fx.Graph()
    plain.output(plain.graph_copy(graph, {}))
    for node in plain.nodes:
        node.type = None
    plain.lint()
    return plain


def restore(module: nn.Module) -> None:
    """Give a rewritten module its own class and forward again."""
    module.__class__ = type(module).__mro__[2]


def _fuse(graph: fx.Graph, chain: Chain) -> None:
    """Put one call in the place of a chain's nodes: where the residual is known, or else where the layer was called."""
    residual = {} if chain.add is None else {"residual": chain.residual}
    with graph.inserting_before(chain.place):
        fused = graph.call_module(str(chain.call.target), chain.call.args, {**chain.call.kwargs, **residual})
    fused.meta = dict(chain.call.meta)
    chain.last.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _rewritten(
    kind: type[nn.Module], traced: fx.GraphModule, layers: tuple[str, ...], activated: tuple[str, ...]
) -> type[nn.Module]:
    body = {
        "forward": type(traced).forward,
        "_graph": copy.deepcopy(traced.graph),  # one that does not keep the module alive
        "_layers": layers,
        "_activated": activated,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Rewritten, kind), body)


def _unpickled(
    kind: type[nn.Module], carrier: fx.GraphModule, layers: tuple[str, ...], activated: tuple[str, ...]
) -> nn.Module:
    made = _rewritten(kind, carrier, layers, activated)
    return made.__new__(made)
