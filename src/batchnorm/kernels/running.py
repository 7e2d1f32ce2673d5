"""Running statistics: the buffers that training moves, and the one rule by which they move.

The Numba kernel has the same rule in its loops, so that a step is one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import reference


class Running(NamedTuple):
    """The buffers that a training step moves."""

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | Tensor | None = None  # the weight of the new value; None for the plain average over batches

    def has_buffers(self) -> bool:
        """Whether there is anything to move."""
        return self.mean is not None or self.batches is not None

    def frozen(self) -> Running:
        """The same statistics, for who looks at them and must not move them: renormalization."""
        return Running(self.mean, self.var, None, 0.0)


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing, which must not count a batch twice."""
    if torch.compiler.is_compiling():
        return False  # the graph is the same for both
    return bool(torch._C._current_graph_task_id() != -1)


@torch.no_grad()
def update_running(
    running: Running,
    count: Tensor | float | None,
    mean: Tensor,
    var: Tensor,
    when: Tensor | None = None,
    renorm_eps: float | None = None,
) -> None:
    """Count a set of values and move the running statistics by it, in place, without ever looking at a value.

    So no device is waited for, and no graph breaks.

    Args:
        count, mean, var, renorm_eps: as for ``reference.running_update``.
        when: whether to at all; besides, the set must have a variance, and nothing but finite values to store.
    """
    good = can_update(running, count, mean, var)
    good = good if when is None else good & when
    if running.batches is not None:
        running.batches.add_(good)
    if running.mean is None or running.var is None:
        return
    factor = running.momentum
    if factor is None:
        assert running.batches is not None, "which the check of arguments asks for"
        factor = 1.0 / running.batches.clamp(min=1).to(mean.dtype)
    moved = reference.running_update(running.mean, running.var, mean, var, count, factor, good, renorm_eps)
    running.mean.copy_(moved[0])
    running.var.copy_(moved[1])


def can_update(running: Running, count: Tensor | float | None, mean: Tensor, var: Tensor) -> Tensor:
    """Whether running statistics can be moved by all these sets of values."""
    stored = [mean.dtype if t is None else t.dtype for t in (running.mean, running.var)]
    return reference.can_update(mean, reference.unbiased(var, count), count, *stored).all()


def put_back(buffer: Tensor | None, moved: Tensor | None) -> None:
    """Put statistics that were moved in the kernel's precision back; those that did not move are not rounded by it."""
    if buffer is not None and moved is not None and moved is not buffer:
        buffer.copy_(torch.where(moved == buffer.to(moved.dtype), buffer, moved.to(buffer.dtype)))
