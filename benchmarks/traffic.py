"""The floor: the fewest bytes that an operation must move between memory and a cache, whoever computes it.

Training goes over a channel twice: once for its sums, once to apply them. The second pass finds in the cache what the
first one has read, if that much fits; then everything is read once (*resident*), otherwise twice (*streaming*). What
has to fit is the smallest part that can be finished by itself: a channel of contiguous memory, and where channels are
neighbours in memory, those that share a cache line. In sizes of the input, read and written:

    ==================  =========  ========
    operation           streaming  resident
    ==================  =========  ========
    forward, training       3          2      x (twice), y
    backward                5          3      x and the gradient of y (twice), the gradient of x
    evaluation              2          2      x, y
    ==================  =========  ========

An added residual is read once by the forward, and its gradient written once by the backward (whose second pass can read
it in place of the gradient of y). An activation after a residual leaves one bit an element for the backward, written
and read once; without a residual, it follows from x. Vectors of C, and the lines that ordinary stores read before they
overwrite them, are not counted.

How long the floor takes is told by the copy of the same input in the same run, which moves two sizes.
"""

from __future__ import annotations

import math

from batchnorm.benchmark.cells import Cell, Operation

_LINE = 64  # bytes
COPIED = 2  # sizes of the input that a copy moves


def floor(cell: Cell, operation: Operation, cache: int) -> int:
    """Give the bytes that an operation of a layer must move.

    Args:
        cell: the layer's input, and what is fused.
        operation: what it does.
        cache: bytes of the last-level cache.
    """
    added = cell.residual
    if operation == "evaluation":
        return (2 + added) * cell.bytes
    bits = math.prod(cell.shape) // 8 if added and operation == "forward+backward" else 0
    resident = part(cell) <= cache
    forward = (2 if resident else 3) * cell.bytes + added * cell.bytes + bits
    if operation == "forward":
        return forward
    both_resident = 2 * part(cell) <= cache  # x and the gradient of y
    return forward + (3 if both_resident else 5) * cell.bytes + added * cell.bytes + bits


def part(cell: Cell) -> int:
    """Give the bytes of the smallest part of an input that holds whole channels."""
    values = math.prod(cell.shape) // cell.shape[1]
    neighbours = cell.layout == "channels_last" or len(cell.shape) == 2
    line = min(_LINE, cell.shape[1] * cell.torch_dtype.itemsize)
    return values * (line if neighbours else cell.torch_dtype.itemsize)
