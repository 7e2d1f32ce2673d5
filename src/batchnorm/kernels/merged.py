"""Batch normalization by the loops where the moments are of more than the tensor: those of all processes.

Between a tensor's own sums and what is done with the sums of all, somebody else merges them: once in the forward, once
in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.activations import PIECEWISE
from batchnorm.kernels import cpu, gate, plans
from batchnorm.kernels.choice import record
from batchnorm.kernels.operators import Extras, again


class Merging(NamedTuple):
    """How sums are merged.

    Attributes:
        forward: gives, for this tensor's mean and biased variance (2, C), those of all, (2, C), or (4, C) with r and d
            of renormalization; and the weight that all values of a channel have together.
        backward: gives, for this tensor's sums (2, C), the sums of all.
    """

    forward: Callable[[Tensor], tuple[Tensor, float]]
    backward: Callable[[Tensor], Tensor]


def merged_cpu(
    x: Tensor,
    plan: plans.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    extras: Extras,
    sets: cpu.Sets,
    merging: Merging,
) -> Tensor:
    """Normalize with merged moments; `plan` is a ``given_plan``, `sets` are one set, this tensor; it may be empty."""
    record.forward = "numba"
    y: Tensor = _Merged.apply(x, plan, weight, bias, extras.residual, eps, extras, sets, merging)
    return y


class _Merged(torch.autograd.Function):
    """Saves x and the moments, and what the activation's gradient needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: plans.Plan,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        extras: Extras,
        sets: cpu.Sets,
        merging: Merging,
    ) -> Tensor:
        assert sets.moments is not None
        activation = extras.activation
        if x.numel() > 0:
            cpu.moments_of(x, plan, sets)
        moments, count = merging.forward(sets.moments[0, :2])
        piecewise = activation is not None and activation.name in PIECEWISE
        bits = plan.bits() if piecewise and residual is not None else None
        fused = cpu.Fused(activation, residual, bits)
        y = cpu.evaluate(x, plan, moments, weight, bias, eps, fused, sets) if x.numel() > 0 else torch.empty_like(x)
        from_z = activation is not None and bits is None
        ctx.save_for_backward(x, weight, bias if from_z else None, residual if from_z else None, bits)
        ctx.rest = plan, moments, eps, activation, sets, merging, count
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, residual, bits = ctx.saved_tensors
        plan, moments, eps, activation, sets, merging, count = ctx.rest
        empty = dy.numel() == 0
        if torch.is_grad_enabled() or not (gate.readable(dy) or empty):
            raise RuntimeError(
                "batch_norm over several processes cannot be differentiated twice by the loops, nor for many gradients "
                'at once: insist on plain PyTorch in the forward, with batchnorm.kernels.using("reference")'
            )
        record.backward = "numba"
        needs = ctx.needs_input_grad
        weight, bias = gate.parameter("weight", weight, plan), gate.parameter("bias", bias, plan)
        own = torch.zeros(2, plan.channels, dtype=torch.float64, device="cpu")
        dx = dz = None
        if not empty:
            x = gate.like_x("input", x, plan)
            fused = again(plan, activation, residual, bits, inplace=False)
            dx, dz, own = cpu.backward_of_merged(
                dy, x, plan, weight, bias, moments, eps, fused, needs[4], sets,
                lambda sums: (merging.backward(sums), count),
            )  # fmt: skip
        else:  # the others wait for this process
            merging.backward(own)
            dx, dz = torch.zeros_like(dy), torch.zeros_like(dy)
        total, product = own
        inverse = (moments[1] + eps).rsqrt()
        grad_weight = product * inverse
        if moments.shape[0] == 4:
            grad_weight = grad_weight * moments[2] + total * moments[3]
        return (
            dx if needs[0] else None, None,
            grad_weight.to(plan.statistics) if needs[2] else None, total.to(plan.statistics) if needs[3] else None,
            dz if needs[4] else None, None, None, None, None,
        )  # fmt: skip
