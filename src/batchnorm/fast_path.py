"""The fast path of a call: what needs no closer look is done here, in a fraction of the time that looking takes.

Whatever is not plainly right, or not what most calls are, gets None: the arguments are then checked, and a kernel is
chosen for them (`arguments.check`, `kernels.which`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.activations import Activation
from batchnorm.backends import evaluate_aten
from batchnorm.kernels import cpu, gate, operators, plans
from batchnorm.kernels.choice import EVALUATE_FROM, EVALUATE_FUSED_FROM, asked_for, record, unwatched
from batchnorm.kernels.epilogue import NOTHING, Epilogue
from batchnorm.kernels.running import Running, recomputing
from batchnorm.statistics import Batch, Policy, resolve

__all__ = ["evaluate", "train"]


def train(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    batches: Tensor | None,
    activation: Any,
    residual: Tensor | None,
    mask: Tensor | None,
    policy: Policy | None,
    state: Tensor | None,
) -> Tensor | None:
    """Train by the Numba kernel."""
    if type(x) is not Tensor or not x.is_cpu or x.is_neg() or not unwatched():
        return None
    plan = plans.plan(x.shape, x.stride(), x.dtype)
    if plan is None or not gate.vectors(plan, running_mean, running_var, weight, bias):
        return None
    if batches is not None and not (type(batches) in gate.PLAIN and batches.is_cpu and batches.dtype == torch.int64):
        return None
    if (running_mean is None) != (running_var is None) or not eps > 0 or momentum is None or not 0 <= momentum <= 1:
        return None
    if activation is None and residual is None:
        epilogue = NOTHING
    elif _can_follow(activation, residual, x):
        epilogue = Epilogue(activation, residual)
    else:
        return None
    running, updates = Running(running_mean, running_var, batches, momentum), not recomputing()
    if mask is None and (policy is None or type(policy) is Batch):
        return operators.normalize(x, plan, weight, bias, running if updates else None, eps, epilogue)
    return _train_sets(x, running, updates, weight, bias, eps, epilogue, mask, policy, state)


def evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Any,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Tensor | None:
    """Evaluate by ATen, up to a size as fast as anything. It checks its arguments itself, and changes nothing."""
    if mask is not None or asked_for.get() is not None or not eps >= 0:
        return None
    fused = activation is not None or residual is not None
    if fused and not (x.numel() < EVALUATE_FUSED_FROM and _can_follow(activation, residual, x)):
        return None
    if x.numel() * x.element_size() >= EVALUATE_FROM:
        return None
    try:
        y = evaluate_aten(x, running_mean, running_var, weight, bias, eps)
    except (RuntimeError, IndexError, ValueError):
        return None
    record.forward = "aten"
    return Epilogue(activation, residual).applied(y) if fused else y


def _can_follow(activation: Any, residual: Tensor | None, x: Tensor) -> bool:
    """Whether what follows is known, and can be added to x as it is."""
    if activation is not None and type(activation) is not Activation:
        return False
    return residual is None or (
        type(residual) is Tensor
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.stride() == x.stride()
        and residual.is_cpu
        and not residual.is_neg()
    )


def _train_sets(
    x: Tensor,
    running: Running,
    updates: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue,
    mask: Tensor | None,
    policy: Policy | None,
    state: Tensor | None,
) -> Tensor | None:
    """Train over ghosts or valid positions, or with renormalization; of running, only the rest has been looked at."""
    _, ghost, renorm, sync, accumulated = resolve(policy)
    N, C = x.shape[:2]
    size = N if ghost is None else min(ghost.size, N)
    plan = plans.sets_plan(x.shape, x.stride(), x.dtype, size, mask is not None)
    alone_in_set = mask is None and (N % size or size) * x.numel() == N * C
    if sync is not None or accumulated is not None or plan is None or alone_in_set:
        return None
    if mask is not None and (
        type(mask) is not Tensor or mask.dtype != torch.bool or not mask.is_cpu or not mask.is_contiguous()
        or mask.shape[:1] != x.shape[:1] or mask.shape[1:] != x.shape[2:]
    ):  # fmt: skip
        return None
    limits, before = None, 0
    if renorm is not None:
        if running.mean is None or running.batches is None or state is None:
            return None
        if state.dim() != 0 or state.dtype != torch.int64 or not state.is_cpu:
            return None
        limits, before = renorm.limits(float(state)), int(running.batches)
    weights = None if mask is None else mask.to(plan.statistics)
    sets = cpu.sets_of(plan, size, weights, limits)
    if not updates:
        running = running.frozen()
    try:
        return operators.normalize(x, plan, weight, bias, running, eps, epilogue, None, sets)
    finally:  # both counters count a batch or none, even where a signal ends the call; two calls would be a gap
        if state is not None and running.batches is not None:
            state.add_(running.batches != before)
