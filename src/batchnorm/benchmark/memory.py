"""Memory: what a training step keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.kernels.cpu import Sets
from batchnorm.surgery.inspect.example import forward, in_mode
from batchnorm.surgery.inspect.tensors import tensors_in


@dataclass(frozen=True)
class Saved:
    """Bytes kept for the backward: the input, the layer's own parameters and buffers, and what is extra."""

    input: int
    layer: int
    extra: int


def saved(built: nn.Module, inputs: Any) -> Saved:
    """Count the bytes that a training forward keeps for its backward, each storage once.

    Args:
        built: it is left in training mode.
        inputs: its argument, a tuple of its arguments, or a dict of its keyword arguments.
    """
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _y = forward(in_mode(built, True), inputs)  # named, so that no storage is freed and its address counted again
    for t in _beside(tensors_in(_y)):
        pack(t)
    own = {t.untyped_storage().data_ptr() for t in (*built.parameters(), *built.buffers())}
    given = {t.untyped_storage().data_ptr() for t in tensors_in(inputs)}
    return Saved(
        input=sum(size for address, size in kept.items() if address in given),
        layer=sum(size for address, size in kept.items() if address in own),
        extra=sum(size for address, size in kept.items() if address not in own | given),
    )


def _beside(outputs: list[Tensor]) -> Iterator[Tensor]:
    """What our functions keep for themselves, which hooks on saved tensors are not shown: moments, and a set's."""
    nodes, seen = [y.grad_fn for y in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for part in getattr(node, "rest", ()):
            yield from (t for t in (part if isinstance(part, Sets) else (part,)) if isinstance(t, Tensor))
