"""What follows a normalization, a residual and an activation: who does it, whatever became of the layer meanwhile.

A fused layer is an ``nn.BatchNorm2d``, and much that works on models makes a plain one of it. Whoever relies on a layer
for the activation therefore asks at every call whether what stands in its place still applies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.activations import Activation, activation_of, applied

__all__ = ["WithEpilogue", "applies", "call", "recorded"]

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


def applies(module: nn.Module, activation: Activation | None) -> bool:
    """Whether a module adds a residual that it is given, and applies the activation, by itself.

    Besides our layers these are what wraps one (FSDP, ``torch.compile``), and torch's own activation, which is what
    ``fold`` and TorchScript leave in a layer's place.
    """
    if isinstance(module, WithEpilogue):
        return module.activation == activation
    return any(_is_it(part, activation) for part in module.modules())


def _is_it(part: nn.Module, activation: Activation | None) -> bool:
    if isinstance(part, WithEpilogue):
        return part.activation == activation
    try:
        return activation is not None and activation_of(part) == activation
    except TypeError:  # any other module
        return False


def call(
    layer: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Call a layer that was fused; what has taken its place only normalizes, and torch's operators do the rest.

    Args:
        layer: what stands in the fused layer's place now.
        input: of the layer.
        residual: added before the activation.
        mask: of the layer. It has no meaning for any but ours.
        activation: what was fused into the layer.
    """
    if isinstance(input, Proxy) and not _knows(input.tracer):
        return recorded(layer, input, residual, mask, activation)
    masked = {} if mask is None else {"mask": mask}
    if applies(layer, activation):
        y: Tensor = layer(input, **masked) if residual is None else layer(input, residual, **masked)
        return y
    y = layer(input, **masked)
    return applied(activation, y if residual is None else y + residual)


def recorded(layer: Any, input: Any, residual: Any, mask: Any, activation: Activation | None) -> Any:
    """Let torch.fx record one call of a layer: as torch.nn's, or, if it does more than these, as a call of ``call``.

    So the activation is part of the graph, and stays there if the traced module's layers are exchanged.
    """
    tracer: Any = input.tracer
    more = {name: t for name, t in {"residual": residual, "mask": mask}.items() if t is not None}
    if (activation is None and residual is None) or _knows(tracer):
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), more)
    if isinstance(layer, nn.Module):
        layer = tracer.create_proxy("get_attr", tracer.path_of_module(layer), (), {})
    return tracer.create_proxy("call_function", call, (layer, input), {**more, "activation": activation})


def _knows(tracer: Any) -> bool:
    """Whether it is our own tracer, which records a fused layer as a layer."""
    return getattr(tracer, "knows_epilogues", False)
