"""Statistics for every time step: which of them normalize a step, and what a batch leaves in them.

At the first steps the hidden state is only beginning to fill, so its moments are not those of later steps: one set of
running statistics for all steps would fit none of them. γ and β are shared by all steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.functional import batch_norm
from batchnorm.kernels.running import Running, update_running
from batchnorm.moments import Moments, accumulate_dtype

__all__ = ["Norm", "rows_of", "update_steps"]


@dataclass(eq=False)
class Norm:
    """One normalization of a layer during one forward: its weight, bias, and statistics ``(T, C)``, a row a step.

    The statistics begin as copies of the running ones. In training a step's row becomes the batch's moments (a momentum
    of 1 writes them); a step with fewer than two values a channel, which have no variance, uses the row that it finds.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor | None
    training: bool
    eps: float

    def __post_init__(self) -> None:
        self.calls = 0  # in training; `good` counts those with finite moments, and none of a recomputation
        self.good = torch.zeros((), dtype=torch.int64, device=self.mean.device)

    def at(self, step: int, x: Tensor) -> Tensor:
        """Normalize the ``(N, C)`` of one step."""
        return self._normalize(x, self.mean[step], self.var[step], self.weight, self.bias)

    def throughout(self, x: Tensor) -> Tensor:
        """Normalize all steps of ``(N, T, C)`` at once: each step's C are channels of their own."""
        N, T, C = x.shape
        bias = None if self.bias is None else self.bias.repeat(T)
        y = self._normalize(x.reshape(N, T * C), self.mean.view(-1), self.var.view(-1), self.weight.repeat(T), bias)
        return y.view(N, T, C)

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.training or len(x) < 2:
            return batch_norm(x, mean, var, weight, bias, False, eps=self.eps)
        self.calls += 1
        return batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps, num_batches_tracked=self.good)


def rows_of(batches: Tensor, steps: int) -> Tensor:
    """Give the rows of the running statistics that serve steps 0, 1, …: a step's own, or the last that was trained.

    Args:
        batches: ``(max_steps,)``, how many batches each row has seen.
        steps: how many steps there are.
    """
    every = torch.arange(len(batches), device=batches.device)
    trained = batches > 0
    last = torch.where(trained.any(), (every * trained).amax(), len(batches) - 1)
    return torch.minimum(torch.arange(steps, device=batches.device), last)


@torch.no_grad()
def update_steps(
    norms: list[Norm], running: list[tuple[Tensor, Tensor]], batches: Tensor, sizes: list[int], momentum: float | None
) -> None:
    """Move the running statistics, in place, by a batch whose steps had ``sizes`` sequences, two or more each.

    All or nothing: a batch that was not finite at some step in some normalization changes none of them.

    Args:
        norms: what the forward saw.
        running: the mean and the variance that belong to each, ``(max_steps, C)``.
        batches: ``(max_steps,)``, counts them.
        sizes: how many sequences reached each step.
        momentum: the weight of the new value; None for the plain average.
    """
    rows = min(len(sizes), len(batches))
    good = torch.stack([norm.good == norm.calls for norm in norms]).all()
    batches = batches[:rows]
    batches.add_(good)
    for norm, (mean, var) in zip(norms, running, strict=True):
        factor = momentum if momentum is not None else 1 / batches.clamp(min=1).to(mean.dtype).unsqueeze(1)
        seen = _last_shared(norm.mean[: len(sizes)], norm.var[: len(sizes)], sizes, rows)
        update_running(Running(mean[:rows], var[:rows], None, factor), None, *seen, when=good)


def _last_shared(mean: Tensor, var: Tensor, sizes: list[int], rows: int) -> tuple[Tensor, Tensor]:
    """Merge the moments of all steps from the last row's on, which share it."""
    if len(sizes) == rows:
        return mean, var
    last, wide = rows - 1, accumulate_dtype(mean)
    count = torch.tensor(sizes[last:], dtype=wide, device=mean.device).unsqueeze(1).expand_as(mean[last:])
    tail = Moments(count, mean[last:].to(wide), var[last:].to(wide) * (count - 1)).merged()
    return (
        torch.cat((mean[:last], tail.mean.to(mean.dtype).unsqueeze(0))),
        torch.cat((var[:last], tail.unbiased_variance.to(var.dtype).unsqueeze(0))),
    )
