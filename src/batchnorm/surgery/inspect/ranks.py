"""How many dimensions a tensor of a traced graph has, where the graph says so whatever the input is."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from batchnorm import layers
from batchnorm.surgery.inspect.affine import CONVOLUTIONS
from batchnorm.surgery.inspect.find import is_known, kind_of
from batchnorm.surgery.inspect.paths import asks, is_identity, name_of

__all__ = ["rank_of", "rank_taken"]

# Which raise for other inputs.
_FIXED: dict[type[nn.Module], int] = dict.fromkeys((nn.BatchNorm2d, layers.BatchNorm2d), 4)
_FIXED |= dict.fromkeys((nn.BatchNorm3d, layers.BatchNorm3d), 5)
_KEEPING = frozenset(
    ("relu", "relu_", "relu6", "silu", "gelu", "sigmoid", "tanh", "leaky_relu", "hardswish", "hardtanh", "elu", "mish",
     "softplus", "linear", "batch_norm", "layer_norm", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
     "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
)  # fmt: skip
# A convolution is taken to have a batch.
_CONVOLUTIONS = {f"conv{kind}{d}d": d + 2 for d in (1, 2, 3) for kind in ("", "_transpose")}


def rank_of(module: nn.Module, node: fx.Node) -> int | None:
    """How many dimensions a node's value has in every call of a module; None if that depends on the input.

    Args:
        module: whose graph has the node.
        node: any.
    """
    while True:
        found = _said(module, node)
        if found is not None:
            return found
        if not _keeps(module, node):
            return None
        node = node.all_input_nodes[0]


def rank_taken(layer: nn.Module) -> int | None:
    """How many dimensions a batch normalization layer's input must have, if there is one number of them."""
    return _FIXED.get(kind_of(layer))


def _said(module: nn.Module, node: fx.Node) -> int | None:
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        if isinstance(part, nn.Flatten):
            return 2 if (part.start_dim, part.end_dim) == (1, -1) else None
        if isinstance(part, CONVOLUTIONS):
            return part.weight.dim()
        return rank_taken(part)
    if node.op not in ("call_function", "call_method"):
        return None
    name, given = name_of(node), (*node.args[1:], *node.kwargs.values())
    if name in _CONVOLUTIONS:
        return _CONVOLUTIONS[name]
    if name == "flatten":
        return 2 if given in ((1,), (1, -1)) else None
    if name in ("view", "reshape"):
        sizes: Any = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        return len(sizes) if all(map(_is_number, sizes)) else None
    if name == "mean":
        return _reduced(module, node)
    return None


def _reduced(module: nn.Module, node: fx.Node) -> int | None:
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dims: Any = given.get("dim")
    before = rank_of(module, node.all_input_nodes[0])
    if before is None or dims is None:
        return None
    return before if given.get("keepdim") else before - (1 if isinstance(dims, int) else len(dims))


def _is_number(size: Any) -> bool:
    """Whether a node is computed from single sizes of a tensor, and not all of them."""
    if isinstance(size, int):
        return True
    if not isinstance(size, fx.Node):
        return False
    if name_of(size) in ("mul", "add", "sub", "floordiv"):
        return all(map(_is_number, size.args))
    if name_of(size) == "size":
        return len(size.args) > 1
    return name_of(size) == "getitem" and isinstance(size.args[1], int) and asks(size.args[0], size.args[0])  # type: ignore[arg-type]


def _keeps(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node's value has as many dimensions as its input."""
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        kind = kind_of(part)
        elementwise = kind.__module__ == "torch.nn.modules.activation" and kind is not nn.MultiheadAttention
        pooling = kind.__module__ == "torch.nn.modules.pooling"
        return elementwise or pooling or is_known(kind) or kind in (nn.Linear, nn.Identity, nn.Dropout, nn.LayerNorm)
    return is_identity(node) or (node.op in ("call_function", "call_method") and name_of(node) in _KEEPING)
