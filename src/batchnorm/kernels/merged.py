"""Batch normalization by the Numba kernel where the moments are of more than the tensor: those of all processes.

Between a tensor's own sums and what is done with the sums of all, somebody else merges them: once in the forward, once
in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.activations import Activation
from batchnorm.kernels import cpu, gate, plans
from batchnorm.kernels.choice import record
from batchnorm.kernels.epilogue import Epilogue
from batchnorm.kernels.operators import gated, slope_bits


class Merging(NamedTuple):
    """How sums are merged.

    Attributes:
        forward: gives, for this tensor's mean and biased variance (2, C), those of all, (2, C), or (4, C) with r and d
            of renormalization; and the weight that all values of a channel have together.
        backward: gives, for this tensor's sums (2, C), the sums of all.
    """

    forward: Callable[[Tensor], tuple[Tensor, float]]
    backward: Callable[[Tensor], Tensor]


def normalize_merged(
    x: Tensor,
    plan: plans.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue,
    sets: cpu.Sets,
    merging: Merging,
) -> Tensor:
    """Normalize with merged moments; `plan` is an ``inference_plan``, `sets` one set, this tensor; it can be empty."""
    record.forward = "numba"
    y: Tensor = _Merged.apply(x, weight, bias, epilogue.residual, plan, eps, epilogue.activation, sets, merging)
    return y


class _Merged(torch.autograd.Function):
    """Saves x and the moments, and what the activation's gradient needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        plan: plans.Plan,
        eps: float,
        activation: Activation | None,
        sets: cpu.Sets,
        merging: Merging,
    ) -> Tensor:
        assert sets.moments is not None
        if x.numel() > 0:
            cpu.moments_of(x, plan, sets)
        moments, count = merging.forward(sets.moments[0, :2])
        bits = slope_bits(plan, activation, residual is not None)
        if x.numel() > 0:
            y = cpu.evaluate(x, plan, moments, weight, bias, eps, Epilogue(activation, residual), bits, sets)
        else:
            y = torch.empty_like(x)
        from_z = activation is not None and bits is None
        ctx.save_for_backward(x, weight, bias if from_z else None, residual if from_z else None, bits)
        ctx.rest = plan, moments, eps, activation, sets, merging, count
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        plan, moments, eps, activation, sets, merging, count = ctx.rest
        dx: Tensor | None
        dz: Tensor | None
        empty = dy.numel() == 0
        if torch.is_grad_enabled() or not (gate.readable(dy) or empty):
            raise RuntimeError(
                "batch_norm over several processes cannot be differentiated twice by the Numba kernel, nor for many "
                "gradients at once: insist on plain PyTorch in the forward, with "
                'batchnorm.kernels.using("reference")'
            )
        record.backward = "numba"
        needs = ctx.needs_input_grad
        if empty:  # the others wait for this process
            own = torch.zeros(2, plan.channels, dtype=torch.float64, device="cpu")
            merging.backward(own)
            dx, dz = torch.zeros_like(dy), torch.zeros_like(dy)
        else:
            x, weight, bias, residual, bits = gated(plan, ctx.saved_tensors)
            assert x is not None
            dx, dz, own = cpu.backward_of_merged(
                dy, x, plan, weight, bias, moments, eps, Epilogue(activation, residual), bits, needs[3], sets,
                lambda sums: (merging.backward(sums), count),
            )  # fmt: skip
        total, product = own
        grad_weight = product * (moments[1] + eps).rsqrt()
        if moments.shape[0] == 4:
            grad_weight = grad_weight * moments[2] + total * moments[3]
        grads = dx, grad_weight.to(plan.statistics), total.to(plan.statistics), dz
        return *(g if need else None for g, need in zip(grads, needs[:4], strict=True)), None, None, None, None, None
