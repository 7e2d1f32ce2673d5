"""What a graph's nodes do with values: hand them on, move them, add them; and where each channel goes on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm.surgery.inspect.find import hooks_of

__all__ = [
    "DROPOUTS", "SUMS", "asks", "before_identities", "channel_axis", "channels_between", "data_of", "flattens",
    "is_identity", "is_identity_module", "is_movement", "is_sum", "joins_channels", "name_of", "replayed", "summands",
    "tagged",
]  # fmt: skip

# What hands on in evaluation what it is given.
_IDENTITIES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_SAME = frozenset(("contiguous", "clone", "detach", "alias"))
# What hands on where the dtype is that already, which a run tells.
_CASTS = frozenset(("to", "type_as", "float", "double", "half", "bfloat16"))
_JOINED = frozenset(("cat", "concat", "concatenate"))
_MOVED = frozenset(
    ("flatten", "unflatten", "view", "reshape", "view_as", "reshape_as", "transpose", "swapaxes", "swapdims", "permute",
     "movedim", "moveaxis", "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "narrow", "getitem",
     "__getitem__", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
)  # fmt: skip
SUMS = frozenset(("add", "add_", "iadd", "__add__", "__radd__", "__iadd__"))
_IN_PLACE = frozenset(("add_", "iadd", "__iadd__"))
# What asks a tensor for its form alone.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_METHODS = ("size", "dim", "numel", "is_floating_point")
_LIKE = ("reshape_as", "view_as", "expand_as", "type_as")


def is_identity_module(module: nn.Module, training: bool = False) -> bool:
    """Whether a module gives what it is given, in evaluation, or in training, too."""
    kinds = (nn.Identity,) if training else _IDENTITIES
    return type(module) in kinds and not hooks_of(module)


def joins_channels(node: fx.Node) -> bool:
    """Whether a node concatenates along dimension 1."""
    if node.op != "call_function" or name_of(node) not in _JOINED:
        return False
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return bool(dim == 1)


def flattens(node: fx.Node) -> bool:
    """Whether a node makes (N, L, C) into (N · L, C)."""
    given = (*node.args[1:], *node.kwargs.values())
    return node.target in ("flatten", torch.flatten) and given in ((0, 1), (0, -2))


def name_of(node: fx.Node) -> str:
    """The name of a function or a method that a node calls."""
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def is_identity(node: fx.Node) -> bool:
    """Whether a call of a function or a method gives in evaluation what it is given."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in DROPOUTS:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is False
    name = name_of(node)
    if name in _CASTS:
        given = node.args[0].meta if node.args and isinstance(node.args[0], fx.Node) else {}
        return "shape" in node.meta and all(given.get(key) == node.meta[key] for key in ("shape", "dtype"))
    return name in _SAME


def is_movement(node: fx.Node) -> bool:
    """Whether a call gives the values of its arguments, each at other places; or a choice of them."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if name in _JOINED:
        return True
    if (
        name not in _MOVED or not node.args or any(isinstance(a, torch.dtype) for a in node.args)
    ):  # bits as other numbers
        return False
    others: list[fx.Node] = []  # an index that was computed
    fx.node.map_arg((node.args[1:], node.kwargs), others.append)
    return name in _LIKE or all("shape" not in other.meta for other in others)


def data_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an identity or a movement gives on."""
    if node.op != "call_module" and name_of(node) in _JOINED:
        return list(node.all_input_nodes)
    return [node.all_input_nodes[0]]


def asks(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user only asks a node's value for its form."""
    if user.op == "call_function" and user.target is getattr:
        return user.args[1] in _ATTRIBUTES
    if user.op not in ("call_function", "call_method"):
        return False
    name = name_of(user)
    return name in _METHODS or (name in _LIKE and len(user.args) > 1 and user.args[0] is not node)


def channel_axis(shape: Collection[int], module: Any) -> int:
    """In which dimension a convolution or linear layer has its channels; the first of an input without a batch."""
    return len(shape) + 1 - int(module.weight.dim())


def tagged(shape: tuple[int, ...], axis: int, first: int) -> Tensor:
    """Numbers instead of values: at every place the number of its channel, counted from ``first``."""
    tags = torch.arange(first, first + shape[axis], dtype=torch.float32).view(-1, *(1,) * (len(shape) - axis - 1))
    return tags.expand(shape)


def replayed(node: fx.Node, values: dict[fx.Node, Tensor], same: Callable[[fx.Node], bool]) -> Any:
    """What a node would give for other values of some nodes before it.

    Args:
        node: a node of a recorded run, between which and those nodes are identities and movements alone.
        values: those nodes' values.
        same: which nodes are identities.
    """
    if node in values:
        return values[node]
    if same(node):
        return replayed(data_of(node)[0], values, same)
    given = {n: replayed(n, values, same) for n in data_of(node)}

    def known(one: fx.Node) -> Any:  # of `like`'s second argument the form is all that counts
        return given[one] if one in given else torch.empty(one.meta["shape"], device="meta")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
    function: Any = node.target
    return function(*args, **kwargs)


def channels_between(end: Tensor, axis: int, tags: int) -> tuple[Tensor, Tensor]:
    """Find which tags a tensor has in each of its channels, and in which channels each tag is.

    Args:
        end: numbers from 0, moved there by ``replayed``.
        axis: the dimension of the channels there.
        tags: how many numbers there may be.

    Returns:
        For each channel its only tag, or -1; for each tag its only channel, -1 if it is nowhere, -2 if in several.
    """
    rows = end.long().movedim(axis, 0).flatten(1)
    lowest, highest = rows.amin(1), rows.amax(1)
    of_channel = torch.where(lowest == highest, lowest, -1)
    places = torch.arange(len(rows)).view(-1, 1).expand(rows.shape).reshape(-1)
    first = torch.full((tags,), len(rows)).scatter_reduce(0, rows.reshape(-1), places, "amin")
    last = torch.full((tags,), -1).scatter_reduce(0, rows.reshape(-1), places, "amax")
    return of_channel, torch.where(last < 0, -1, torch.where(first == last, first, -2))


# --- sums ---

_Readers = Callable[[fx.Node], list[fx.Node]]


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two nodes' values."""
    if node.op not in ("call_function", "call_method") or name_of(node) not in SUMS or node.kwargs:
        return False
    return len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)


def summands(call: fx.Node, readers: _Readers, same: Callable[[fx.Node], bool]) -> list[fx.Node] | str:
    """Find what is added to a node's value and to nothing else.

    Args:
        call: whose value it is.
        readers: which nodes compute with a node's value, whatever hands it on.
        same: which nodes hand on what they are given.

    Returns:
        The other values whose sum with this one is all that reads them; or why there is no such sum.
    """
    total = _sum_of(call, readers)
    if total is None:
        return "it is not added to anything"
    while (outer := _sum_of(total, readers)) is not None:
        total = outer
    found = list(_addends(total, readers, same))
    if call not in found:
        return "its values are moved before they are added"
    if _overwrites(call, total, same):
        return "the sum overwrites its output"
    return [node for node in found if node is not call]


def _sum_of(node: fx.Node, readers: _Readers) -> fx.Node | None:
    """The addition that is all that reads a node's value."""
    found = readers(node)
    return found[0] if len(found) == 1 and _adds(found[0]) else None


def _adds(node: fx.Node) -> bool:
    return is_sum(node) and node.args[0] is not node.args[1]


def _addends(total: fx.Node, readers: _Readers, same: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    for given in total.all_input_nodes:
        node = before_identities(given, same)
        if len(readers(node)) != 1:
            continue
        if _adds(node):
            yield from _addends(node, readers, same)
        else:
            yield node


def _overwrites(call: fx.Node, total: fx.Node, same: Callable[[fx.Node], bool]) -> bool:
    """Whether an addition in place writes into the node's value, where a single 0 would not hold the sum."""
    parts = [(given, before_identities(given, same)) for given in total.all_input_nodes]
    if name_of(total) in _IN_PLACE and any(given is total.args[0] and node is call for given, node in parts):
        return True
    return any(_adds(node) and _overwrites(call, node, same) for _, node in parts)


def before_identities(node: fx.Node, same: Callable[[fx.Node], bool]) -> fx.Node:
    """The node that gave a value, before all that handed it on."""
    while same(node):
        node = data_of(node)[0]
    return node
