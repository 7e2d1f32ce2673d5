"""What follows a normalization, a residual and an activation: who does it, whatever became of the layer meanwhile.

A fused layer is an ``nn.BatchNorm2d``, and much that works on models makes a plain one of it. Whoever relies on a layer
for the activation therefore asks at every call whether what stands in its place still applies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, fx, nn
from torch.fx import Proxy

from batchnorm.activations import Activation, activation_of, applied

__all__ = ["WithEpilogue", "applies", "as_calls", "as_layers", "call", "recorded"]

if TYPE_CHECKING:
    _Base = nn.Module  # what it is mixed into
else:
    _Base = object


class WithEpilogue(_Base):
    """A layer that may be called with a residual, adds it, and applies an activation.

    Attributes:
        activation: the activation; None for none.
    """

    activation: Activation | None = None
    # Whether somebody behind it asks for the activation, as `fuse` has them do, and applies it if the layer is gone.
    _watched: bool = False
    # Applies an activation for the forward around the layer, whose own code asks for it next and then skips it.
    _ahead: Ahead | None = None


class Ahead(Protocol):
    """Tells a forward, by the tensor that it gets, that the activation behind a layer is done."""

    activation: Activation

    def __call__(self, y: Tensor) -> Tensor:
        """Mark the layer's activated output."""


def applies(module: nn.Module, activation: tuple[str, float] | None) -> bool:
    """Whether a module, or what it wraps, adds a residual that it is given, and applies the activation, by itself.

    Besides our layers these are what wraps one (FSDP, ``torch.compile``), and torch's own activation, which is what
    ``fold`` and TorchScript leave in a layer's place. Without an activation nothing is asked about it: another place
    may rely on the layer for one.
    """
    return _is_it(module, activation) or any(_is_it(part, activation) for part in module.modules())


def _is_it(part: nn.Module, activation: tuple[str, float] | None) -> bool:
    if isinstance(part, WithEpilogue):
        return activation is None or part.activation == activation
    try:
        return activation is not None and activation_of(part) == activation
    except TypeError:  # any other module
        return False


def call(
    layer: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: tuple[str, float] | None = None,
) -> Tensor:
    """Call a layer that was fused; what has taken its place only normalizes, and torch's operators do the rest.

    Args:
        layer: what stands in the fused layer's place now.
        input: of the layer.
        residual: added before the activation.
        mask: of the layer. It has no meaning for any but ours.
        activation: what was fused into the layer: a name and a parameter, since torch.fx takes a plain tuple as it is.
    """
    if isinstance(input, Proxy) and not _knows(input.tracer):
        known = layer.activation if isinstance(layer, WithEpilogue) and _is_it(layer, activation) else activation
        return recorded(layer, input, residual, mask, known)
    more = {} if mask is None else {"mask": mask}
    if residual is not None and applies(layer, activation):
        more["residual"] = residual
        return layer(input, **more)  # type: ignore[no-any-return]
    y: Tensor = layer(input, **more)
    if residual is not None:
        return applied(activation_of(activation), y + residual)
    return y if applies(layer, activation) else applied(activation_of(activation), y)


def recorded(layer: Any, input: Any, residual: Any, mask: Any, activation: tuple[str, float] | None) -> Any:
    """Let torch.fx record one call of a layer: as torch.nn's, or, if it does more than these, as a call of ``call``.

    So the activation is part of the graph, and stays there if the traced module's layers are exchanged.
    """
    tracer: Any = input.tracer
    more = {name: t for name, t in {"residual": residual, "mask": mask}.items() if t is not None}
    if (activation is None and residual is None) or _knows(tracer):
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), more)
    if isinstance(layer, nn.Module):
        layer = tracer.create_proxy("get_attr", tracer.path_of_module(layer), (), {})
    return tracer.create_proxy("call_function", call, (layer, input), {**more, "activation": _plain(activation)})


def as_calls(graph: fx.Graph, module: nn.Module) -> None:
    """Let a graph of a module ask, wherever it calls a layer that does more than normalize, whether it still does."""
    for node in list(graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, WithEpilogue) and (layer.activation is not None or _has_residual(node)):
            with graph.inserting_before(node):
                found = graph.get_attr(str(node.target))
                more = {**node.kwargs, "activation": _plain(layer.activation)}
                made = graph.call_function(call, (found, *node.args), more)
            _exchange(graph, node, made)


def as_layers(module: fx.GraphModule) -> None:
    """The opposite: let a graph call its layers, as far as they are what it takes them for, without asking."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not call:
            continue
        (found, *given), more = node.args, dict(node.kwargs)
        if _is_it(module.get_submodule(str(found.target)), more.pop("activation", None)):
            with module.graph.inserting_before(node):
                made = module.graph.call_module(str(found.target), tuple(given), more)
            _exchange(module.graph, node, made)
            if not found.users:
                module.graph.erase_node(found)


def _plain(activation: tuple[str, float] | None) -> tuple[str, float] | None:
    return None if activation is None else (activation[0], activation[1])


def _has_residual(node: fx.Node) -> bool:
    return len(node.args) > 1 or node.kwargs.get("residual") is not None


def _exchange(graph: fx.Graph, node: fx.Node, made: fx.Node) -> None:
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _knows(tracer: Any) -> bool:
    """Whether it is our own tracer, which records a fused layer as a layer."""
    return getattr(tracer, "knows_epilogues", False)
