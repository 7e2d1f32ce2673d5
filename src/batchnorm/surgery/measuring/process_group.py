"""The processes of a group that take statistics over their data together, each over its own."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ProcessGroup"]

_GOES_ON, _IS_DONE, _HAS_FAILED = range(3)


class ProcessGroup:
    """The processes of a group, in a ``with`` block that all of them enter; one alone hears only itself.

    An error in one process's block ends the others' at their next message, rather than let them wait for it.

    Args:
        process_group: of ``torch.distributed``; None for the default one, if there is any.
        device: where messages are made, which NCCL wants to be a GPU.
    """

    def __init__(self, process_group: Any, device: torch.device) -> None:
        there = dist.is_available() and dist.is_initialized()
        self._group, self._device = process_group, device
        self.size = dist.get_world_size(process_group) if there else 1
        self._over = False

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and self.size > 1 and not self._over:
            self._states(_HAS_FAILED, 0)

    def all_done(self, done: bool, numbers: int = 0) -> bool:
        """Whether all processes are done; they must be about to gather equally many numbers.

        Raises:
            RuntimeError: in all others, if one has failed; in all, if their numbers differ.
        """
        if self.size == 1:
            return done
        states = self._states(_IS_DONE if done else _GOES_ON, numbers)
        failed = [str(rank) for rank, (state, _) in enumerate(states) if state == _HAS_FAILED]
        if failed:
            self._over = True
            raise RuntimeError(f"process {', '.join(failed)} of the group has failed: see its own error")
        if len({count for _, count in states}) > 1:
            raise RuntimeError(
                "the processes have different models, or statistics of different sizes: their numbers are "
                + ", ".join(str(count) for _, count in states)
            )
        return all(state == _IS_DONE for state, _ in states)

    def barrier(self) -> None:
        """Wait for all processes, which must have come as far.

        Raises:
            RuntimeError: if one has failed.
        """
        self.all_done(True)

    def gathered(self, own: Tensor) -> Tensor:
        """Stack everybody's vectors, of one length, in the order of the ranks."""
        if self.size == 1:
            return own.unsqueeze(0)
        own = own.to(self._device)
        heard = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(heard, own, group=self._group)
        return torch.stack(heard)

    def agreed(self, own: list[str]) -> list[str]:
        """Join everybody's lists of names: in the order of the first process, then what only others have."""
        if self.size == 1:
            return own
        self.barrier()
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, own, group=self._group)
        return list(dict.fromkeys(name for names in heard for name in names))

    def _states(self, state: int, numbers: int) -> list[tuple[int, int]]:
        told = self.gathered(torch.tensor([state, numbers], dtype=torch.int64, device="cpu"))
        return [(int(state), int(numbers)) for state, numbers in told.tolist()]
