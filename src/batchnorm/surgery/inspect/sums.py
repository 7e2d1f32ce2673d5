"""A convolution beside a batch normalization layer: both read the same input, and their outputs are added.

The layer's scale goes into the middle of the convolution's kernel, its shift into the bias, and 0 is added in its place
(Ding et al. 2021, arXiv 2101.03697, section 3.3: the identity branch of RepVGG).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.surgery.inspect import paths
from batchnorm.surgery.inspect.affine import is_plain, wide

__all__ = ["has_middle", "in_the_middle", "summands"]

_Readers = Callable[[fx.Node], list[fx.Node]]
_SUMS = frozenset(("add", "add_", "iadd", "__add__", "__radd__", "__iadd__"))
_IN_PLACE = frozenset(("add_", "iadd", "__iadd__"))
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def summands(call: fx.Node, readers: _Readers, hands_on: Callable[[fx.Node], bool]) -> list[fx.Node] | str:
    """Find what is added to a node's value and to nothing else.

    Args:
        call: whose value it is.
        readers: which nodes compute with a node's value, whatever hands it on.
        hands_on: which nodes hand on what they are given.

    Returns:
        The other values whose sum with this one is all that reads them; or why there is no such sum.
    """
    total = _sum_of(call, readers)
    if total is None:
        return "it is not added to anything"
    while (outer := _sum_of(total, readers)) is not None:
        total = outer
    found = list(_addends(total, readers, hands_on))
    if call not in found:
        return "its values are moved before they are added"
    if _overwrites(call, total, hands_on):
        return "the sum overwrites its output"
    return [node for node in found if node is not call]


def _sum_of(node: fx.Node, readers: _Readers) -> fx.Node | None:
    """The addition that is all that reads a node's value."""
    found = readers(node)
    return found[0] if len(found) == 1 and _adds(found[0]) else None


def _adds(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or paths.name_of(node) not in _SUMS or node.kwargs:
        return False
    return len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and node.args[0] is not node.args[1]


def _addends(total: fx.Node, readers: _Readers, hands_on: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    for given in total.all_input_nodes:
        node = _handed(given, hands_on)
        if len(readers(node)) != 1:
            continue
        if _adds(node):
            yield from _addends(node, readers, hands_on)
        else:
            yield node


def _overwrites(call: fx.Node, total: fx.Node, hands_on: Callable[[fx.Node], bool]) -> bool:
    """Whether an addition in place writes into the node's value, where a single 0 would not hold the sum."""
    parts = [(given, _handed(given, hands_on)) for given in total.all_input_nodes]
    if paths.name_of(total) in _IN_PLACE and any(given is total.args[0] and node is call for given, node in parts):
        return True
    return any(_adds(node) and _overwrites(call, node, hands_on) for _, node in parts)


def _handed(node: fx.Node, hands_on: Callable[[fx.Node], bool]) -> fx.Node:
    while hands_on(node):
        node = paths.data_of(node)[0]
    return node


def has_middle(module: Any) -> bool:
    """Whether a convolution's kernel has a place that reads, for each output, the input at the same place."""
    if not isinstance(module, _PLAIN) or not is_plain(module) or module.in_channels != module.out_channels:
        return False
    sizes, strides, dilations = module.kernel_size, module.stride, module.dilation
    if any(stride != 1 for stride in strides) or any(size % 2 == 0 for size in sizes):
        return False
    padding: Any = module.padding
    wanted = tuple(dilation * (size - 1) // 2 for size, dilation in zip(sizes, dilations, strict=True))
    return padding == "same" or tuple(wanted) == ((0,) * len(sizes) if padding == "valid" else tuple(padding))


def in_the_middle(
    module: Any, weight: Tensor, bias: Tensor | None, line: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Give the weight and bias with which a convolution adds scale · input + shift to what it computes.

    Args:
        module: a convolution that has a middle.
        weight, bias: its own.
        line: scale and shift, ``(channels,)``, in float64 on the CPU.

    Returns:
        Both in float64 on the CPU.
    """
    scale, shift = line
    made = wide(weight).clone()
    outputs = torch.arange(len(scale))
    middle = tuple(size // 2 for size in module.kernel_size)
    made[(outputs, outputs % made.shape[1], *middle)] += scale
    return made, shift if bias is None else wide(bias) + shift
