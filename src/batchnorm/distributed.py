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
        if self.size < 1:
            raise RuntimeError(
                f"{name}: this process (rank {dist.get_rank()}) is not in the process group that the layer takes its "
                "moments over: give it a layer of another policy, or Sync with a group that it is in"
            )

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
        """Merge the moments ``(C,)`` of all processes, in float64; the messages are in `dtype`. Differentiable.

        Raises:
            RuntimeError: in all processes, if some have become float64 since they agreed.
        """
        told = torch.cat((own.count[:1], own.mean, own.biased_variance)).to(dtype)
        if self.size > 1:
            if dtype == torch.float64 and not torch.compiler.is_compiling():
                # A message as long as float32's comes first: others may still be that, and different lengths would end
                # the program. Its first number, the count, says by its sign which they are.
                self._check_dtypes(self.gathered(torch.full_like(told, -1, dtype=torch.float32)), dtype)
            told = _Gather.apply(told, self)
        heard = told.double().view(self.size, -1)
        if self.size > 1 and dtype != torch.float64:
            self._check_dtypes(heard, dtype)
        C = own.mean.shape[0]
        counts = heard[:, :1].expand(-1, C)
        return Moments(counts, heard[:, 1 : 1 + C], heard[:, 1 + C :] * counts).merged(0)

    def _check_dtypes(self, heard: Tensor, dtype: torch.dtype) -> None:
        if heard.is_cuda or torch.compiler.is_compiling():  # a GPU would have to be waited for
            return
        wide = (heard[:, 0] < 0).tolist()
        if any(one != (dtype == torch.float64) for one in wide):
            raise RuntimeError(
                f"{self._name}: all processes must have float64 layers or none, but ranks "
                f"{', '.join(str(rank) for rank, is_wide in enumerate(wide) if is_wide)} have: call .double() in all"
            )

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
                f"{self._name}: its {direction} pass did not hear from all {self.size} processes. Either one failed, "
                "or ran fewer steps than the others: give all as many batches, or train DistributedDataParallel in "
                "torch.distributed.algorithms.Join(…, throw_on_early_termination=True), which ends all at the first "
                f"that has no more. torch.distributed says: {error}"
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
