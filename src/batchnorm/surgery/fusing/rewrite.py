"""Change what a module computes without changing what it holds, so that it can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from batchnorm.activations import Activation
from batchnorm.epilogue import as_calls
from batchnorm.surgery.fused import Absorbed as Absorbed  # models pickled by earlier versions look for it here
from batchnorm.surgery.fused import Rewritten, let_go, rewritten
from batchnorm.surgery.fused import _blank as _blank
from batchnorm.surgery.fusing.patterns import Chain

__all__ = ["absorb", "rewrite"]


def take_on(layer: Any, activation: Activation) -> None:
    """Let a layer apply an activation that the model asks for behind it."""
    layer.activation, layer._watched = activation, True


def absorb(model: nn.Module, layer_name: str, name: str, known: Activation) -> None:
    """Let a layer apply an activation, whose module makes room; each has this one name in the model."""
    layer: Any = model.get_submodule(layer_name)
    take_on(layer, known)
    around, path, place = model, layer_name.split("."), name.split(".")
    while path[0] == place[0] and len(path) > 1 and len(place) > 1:  # to the smallest module that contains both
        around, path, place = around.get_submodule(path[0]), path[1:], place[1:]
    made = Absorbed(around.get_submodule(".".join(place)), known, around, path)
    setattr(around.get_submodule(".".join(place[:-1])), place[-1], made)


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
    taken: list[nn.Module] = []
    try:
        for chain in chains:
            layer: Any = module.get_submodule(str(chain.call.target))
            if chain.activation is not None and layer.activation is None:
                take_on(layer, chain.activation)
                taken.append(layer)
            _fuse(graph, chain)
        as_calls(graph, module)
        made = rewritten(kind, fx.GraphModule(module, _plain(graph)), tuple(sorted(layers)), tuple(sorted(activated)))
    except BaseException:
        for layer in taken:
            let_go(layer)
        raise
    module.__class__ = made


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph without what does not pickle: its tracer, and annotations, which may be mere text."""
    plain = fx.Graph()
    plain.output(plain.graph_copy(graph, {}))
    for node in plain.nodes:
        node.type = None
    plain.lint()
    return plain


def _fuse(graph: fx.Graph, chain: Chain) -> None:
    """Put one call in the place of a chain's nodes: where the residual is known, or else where the layer was called."""
    residual = {} if chain.add is None else {"residual": chain.residual}
    with graph.inserting_before(chain.place):
        fused = graph.call_module(str(chain.call.target), chain.call.args, {**chain.call.kwargs, **residual})
    fused.meta = dict(chain.call.meta)
    for node in chain.nodes:  # of the last one the value is read, of others only the shape
        node.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
