"""What processes tell each other: the moments of their batches, and the sums that their backward needs.

One message each way and step, of 2C + 1 and of 2C numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.moments import Moments

__all__ = ["Group"]


class Group:
    """The processes that share their moments.

    Args:
        process_group: of ``torch.distributed``; None for the default one.
        name: the layer's, for errors.

    Raises:
        RuntimeError: if there is no process group.
    """

    def __init__(self, process_group: Any, name: str) -> None:
        if not dist.is_available() or (process_group is None and not dist.is_initialized()):
            raise RuntimeError(
                f"Default process group has not been initialized, and {name} takes its moments over all processes: "
                "call torch.distributed.init_process_group(), start with torchrun, or use another policy than Sync"
            )
        self._group, self._name = process_group, name
        self.size = dist.get_world_size(process_group)

    def agree(self, channels: int, bytes_a_number: int, device: torch.device) -> None:
        """Raise in all processes unless they have layers alike: messages of different lengths would end the program.

        Raises:
            RuntimeError: with the channels that each has.
        """
        if self.size == 1:
            return
        heard = self.gathered(torch.tensor([channels, bytes_a_number], device=device)).tolist()
        if any(one != heard[0] for one in heard):
            raise RuntimeError(
                f"{self._name}: all processes must have the same number of channels, and float64 in all or none, "
                f"but (channels, bytes of a number) are {', '.join(str(tuple(one)) for one in heard)}"
            )

    def merged(self, own: Moments, dtype: torch.dtype) -> Moments:
        """Merge the moments ``(C,)`` of all processes, in float64; the messages are in `dtype`. Differentiable."""
        told = torch.cat((own.count[:1], own.mean, own.biased_variance)).to(dtype)
        if self.size > 1:
            told = _Gather.apply(told, self)
        heard = told.double().view(self.size, -1)
        C = own.mean.shape[0]
        counts = heard[:, :1].expand(-1, C)
        return Moments(counts, heard[:, 1 : 1 + C], heard[:, 1 + C :] * counts).merged(0)

    def summed(self, own: Tensor, dtype: torch.dtype) -> Tensor:
        """Add the tensors of all processes up; the messages are in `dtype`."""
        if self.size == 1:
            return own
        told = own.to(dtype, copy=True)
        self.tell("backward", lambda: dist.all_reduce(told, group=self._group))
        return told.to(own.dtype)

    def gathered(self, own: Tensor) -> Tensor:
        """Stack the vectors of all processes."""
        heard = own.new_empty(self.size * own.numel())
        self.tell("forward", lambda: dist.all_gather_single(heard, own, group=self._group))
        return heard.view(self.size, -1)

    def rank(self) -> int:
        return dist.get_rank(self._group)

    def tell(self, direction: str, message: Callable[[], object]) -> None:
        """Send and receive; an error says whose message it was."""
        if torch.compiler.is_compiling():
            message()
            return
        try:
            message()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._name}: its {direction} pass did not hear from all {self.size} processes. Either one ran fewer "
                "steps than the others (see torch.distributed.algorithms.Join), or failed. torch.distributed says: "
                f"{error}"
            ) from error


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.gathered(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        group = ctx.group
        return group.summed(grad.contiguous(), grad.dtype)[group.rank()], None
