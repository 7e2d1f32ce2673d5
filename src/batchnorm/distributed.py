"""Collectives of synchronized batch normalization: the moments of batches, and the sums that a backward needs.

One each way and step, of 2C + 1 and of 2C numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.moments import Moments

__all__ = ["Group"]

_MESSAGES = {4: torch.float32, 8: torch.float64}  # by the bytes of a number


class Group:
    """The processes that share their moments.

    Args:
        process_group: of ``torch.distributed``; None for the default one.
        name: the layer's, for errors.
        agreed: what they have agreed on before, (channels, bytes of a number), if anything; it is kept here.

    Raises:
        RuntimeError: if there is no process group, or this process is not in it.
    """

    def __init__(self, process_group: Any, name: str, agreed: list[tuple[int, int]]) -> None:
        if not dist.is_available() or (process_group is None and not dist.is_initialized()):
            raise RuntimeError(
                f"Default process group has not been initialized, and {name} takes its moments over all processes: "
                "call torch.distributed.init_process_group(), start with torchrun, or use another policy than Sync"
            )
        self._group, self._name, self._agreed = process_group, name, agreed
        self.size = dist.get_world_size(process_group)
        if self.size < 1:
            raise RuntimeError(
                f"{name}: this process (rank {dist.get_rank()}) is not in the process group that the layer takes its "
                "moments over: give it a layer of another policy, or Sync with a group that it is in"
            )

    def check_channels(self, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise in all processes unless they have layers alike: messages of different lengths would end the program.

        They agree once, and again when one has other channels or another dtype. The others do not know of that, and
        expect a message of the length that was agreed on. They get one, whose count is negative, and so they know.

        Args:
            channels: of this process' input.
            dtype: of its messages.
            device: where messages are made. Only on CPUs does a change in one process alone find the others
                prepared: elsewhere they would have to wait for the device in each step.

        Raises:
            RuntimeError: with the channels that each has.
        """
        wanted = channels, dtype.itemsize
        if self.size == 1 or torch.compiler.is_compiling() or self._agreed == [wanted]:
            return
        if self._agreed and device.type == "cpu":
            channels, itemsize = self._agreed[0]
            self.all_gather(torch.full((2 * channels + 1,), -1.0, dtype=_MESSAGES[itemsize]))
        self._compare(wanted, device)

    def _compare(self, wanted: tuple[int, int], device: torch.device) -> None:
        received = self.all_gather(torch.tensor(wanted, device=device)).tolist()
        if any(one != received[0] for one in received):
            raise RuntimeError(
                f"{self._name}: all processes must have the same number of channels, and float64 in all or none, "
                f"but (channels, bytes of a number) are {', '.join(str(tuple(one)) for one in received)}"
            )
        self._agreed[:] = [wanted]

    def merged(self, own: Moments, dtype: torch.dtype) -> Moments:
        """Merge the moments ``(C,)`` of all processes, in float64; the messages are in `dtype`. Differentiable.

        Raises:
            RuntimeError: in all processes, if one has changed since they agreed.
        """
        sent = torch.cat((own.count[:1], own.mean, own.biased_variance)).to(dtype)
        C = own.mean.shape[0]
        received = (_Gather.apply(sent, self) if self.size > 1 else sent).double().view(self.size, -1)
        # A negative count says so: see `check_channels`.
        if not torch.compiler.is_compiling() and received.is_cpu and bool((received[:, 0] < 0).any()):
            self._compare((C, dtype.itemsize), sent.device)
            return self.merged(own, dtype)
        counts = received[:, :1].expand(-1, C)
        return Moments(counts, received[:, 1 : 1 + C], received[:, 1 + C :] * counts).merged(0)

    def all_reduce(self, own: Tensor, dtype: torch.dtype) -> Tensor:
        """Add the tensors of all processes up; the messages are in `dtype`."""
        if self.size == 1:
            return own
        sent = own.to(dtype, copy=True)
        self._communicate("backward", lambda: dist.all_reduce(sent, group=self._group))
        return sent.to(own.dtype)

    def all_gather(self, own: Tensor) -> Tensor:
        """Stack the vectors of all processes."""
        received = own.new_empty(self.size * own.numel())
        self._communicate("forward", lambda: dist.all_gather_single(received, own, group=self._group))
        return received.view(self.size, -1)

    def rank(self) -> int:
        return dist.get_rank(self._group)

    def _communicate(self, direction: str, collective: Callable[[], object]) -> None:
        """Call a collective; an error says whose it was."""
        if torch.compiler.is_compiling():
            collective()
            return
        try:
            collective()
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
        return group.all_gather(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        group = ctx.group
        return group.all_reduce(grad.contiguous(), grad.dtype)[group.rank()], None
