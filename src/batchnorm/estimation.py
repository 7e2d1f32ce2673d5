"""Training with moments that are not simply the batch's: masks, and every policy of ``statistics``.

The loops take moments over sets of samples and over weighted positions themselves. Where another kernel serves, the
same is done by plain PyTorch (``kernels.reference``), which can also be compiled, exported and differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.activations import applied
from batchnorm.arguments import Call
from batchnorm.distributed import Group
from batchnorm.kernels import cpu, gate, operators, plans, reference
from batchnorm.kernels.choice import asked_for, record, which
from batchnorm.kernels.merged import Merging, merged_cpu
from batchnorm.moments import Moments, merge
from batchnorm.statistics import Accumulated, Ghost, Policy, Renorm, Sync, check_policy, part

__all__ = ["common_case", "evaluate_masked", "positions", "put_back", "train"]


def common_case(
    x: Tensor,
    running: cpu.Running,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    extras: operators.Extras,
    mask: Tensor | None,
    policy: Policy | None,
    state: Tensor | None,
    recomputing: bool,
) -> Tensor | None:
    """Do what `train` does where nothing needs a closer look, in a fraction of the time; None where it does.

    All but mask, policy and state has been looked at.
    """
    kinds = _kinds(policy)
    N, C = x.shape[:2]
    size = N if kinds.ghost is None else min(kinds.ghost.size, N)
    values = x.numel() // (N * C)
    plan = plans.sets_plan(x.shape, x.stride(), x.dtype, size, mask is not None)
    if kinds.others or plan is None or (mask is None and (N % size or size) * values == 1):
        return None
    weights = counts = None
    if mask is not None:
        if (
            type(mask) is not Tensor or mask.dtype != torch.bool or not mask.is_cpu or not mask.is_contiguous()
            or mask.shape[:1] != x.shape[:1] or mask.shape[1:] != x.shape[2:]
        ):  # fmt: skip
            return None
        weights = mask.to(plan.statistics)
        if N * values > _SUMMED_BY_THREADS:
            _, counts = _summed(weights.view(N, values), size)
    limits, before = None, 0
    if kinds.renorm is not None:
        if running.mean is None or running.batches is None or state is None:
            return None
        if state.dim() != 0 or state.dtype != torch.int64 or not state.is_cpu:
            return None
        limits, before = kinds.renorm.limits(float(state)), int(running.batches)
        if recomputing:  # which looks at running statistics that do not move
            running = running._replace(batches=None, factor=0.0)
    given = None if recomputing and limits is None else running
    sets = cpu.sets_of(plan, size, weights, counts, limits)
    try:
        if extras.activation is None and extras.residual is None:
            return operators.train_cpu(x, plan, weight, bias, given, eps, sets)
        return operators.fused_cpu(x, plan, weight, bias, given, eps, extras, sets=sets)
    finally:  # both counters count a batch or none, even where a signal ends the call; two calls would be a gap
        if state is not None and running.batches is not None:
            state.add_(running.batches != before)


_SUMMED_BY_THREADS = 4096  # weights that a thread sums up in a microsecond


class _Kinds(NamedTuple):
    ghost: Ghost | None
    renorm: Renorm | None
    others: bool


@lru_cache(maxsize=256)
def _kinds(policy: Policy | None) -> _Kinds:
    check_policy(policy)
    others = part(policy, Sync) is not None or part(policy, Accumulated) is not None
    return _Kinds(part(policy, Ghost), part(policy, Renorm), others)


def train(call: Call, recomputing: bool) -> Tensor:
    """Normalize in training; moves the buffers unless this is a recomputation."""
    ghost = part(call.statistics, Ghost)
    size = call.x.shape[0] if ghost is None else min(ghost.size, max(call.x.shape[0], 1))
    weights = None if call.mask is None else positions(call.mask, call.x)
    sync = part(call.statistics, Sync)
    compiling = torch.compiler.is_compiling()
    group = None if sync is None else _group(sync, call.x)
    kernel = "reference" if compiling or (call.x.numel() == 0 and group is None) else _kernel(call, group is not None)
    moved = kernel == "numba" and group is None
    if moved:
        y, moments = _by_loops(call, size, weights, recomputing)
    elif kernel == "numba":
        assert group is not None
        y, moments = _by_loops_together(call, weights, group)
    else:
        if not compiling:
            record.forward = "reference"
        y, moments = _by_operations(call, size, weights, group)
    if not moved and not recomputing and part(call.statistics, Accumulated) is None:
        _move(call, moments)
    if not recomputing:
        _remember(call, moments)
    return y


def evaluate_masked(call: Call, evaluate: Callable[[Call], Tensor]) -> Tensor:
    """Normalize by running statistics; 0 at positions that do not count, whatever is there."""
    assert call.mask is not None
    weights = positions(call.mask, call.x)
    residual = None if call.residual is None else reference.counted(call.residual, weights)
    y = evaluate(call._replace(x=reference.counted(call.x, weights), residual=residual, mask=None))
    return reference.counted(y, weights)


def positions(mask: Tensor, x: Tensor) -> Tensor:
    """The weights of positions, ``(N, space)``, as the moments of x want them."""
    shape = x.shape[:1] + x.shape[2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights: Tensor = mask.detach().to(dtype, copy=True).expand(shape).reshape(x.shape[0], math.prod(x.shape[2:]))
    return weights.contiguous()


def _kernel(call: Call, together: bool) -> str:
    others = call.weight, call.bias, call.running_mean, call.running_var, call.batches, call.residual, call.mask
    x = call.x
    if together and x.numel() == 0:  # the loops have nothing to do, but the others wait
        x = x.new_empty((2, x.shape[1]))
    kernel = which(x, True, *others)
    if asked_for.get() == "aten":
        raise RuntimeError(
            "kernel 'aten' was asked for, but it has no masks and no policies; "
            "ask for 'numba' or 'reference', or let batchnorm choose"
        )
    return "reference" if call.batches is not None and call.batches.dtype != torch.int64 else kernel


def _group(sync: Sync, x: Tensor) -> Group:
    group = Group(sync.process_group, f"{sync.name or 'batch normalization'} ({x.shape[1]} channels)", sync.agreed)
    group.agree(x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
    return group


# --- by the loops ---


def _by_loops(call: Call, size: int, weights: Tensor | None, recomputing: bool) -> tuple[Tensor, Moments]:
    x, plan = plans.laid_out_sets(call.x, size, weights is not None)
    sets = cpu.sets_of(plan, size, *_summed(weights, size), _limits(call))
    mean, var, weight, bias = (gate.ready(t, plan) for t in call[1:5])
    still = recomputing or part(call.statistics, Accumulated) is not None
    running = None
    if sets.limits is not None or not still:  # renormalization looks at running statistics that do not move, too
        factor = 0.0 if still else -1.0 if call.momentum is None else call.momentum
        running = cpu.Running(mean, var, None if still else call.batches, factor)
    extras = operators.Extras(call.activation, gate.laid_like(call.residual, x), call.inplace)
    y = operators.fused_cpu(x, plan, weight, bias, running, call.eps, extras, sets=sets)
    if not still:
        for buffer, t in zip(call[1:3], (mean, var), strict=True):
            if buffer is not None and t is not None and t is not buffer:
                put_back(buffer, t)
    assert sets.moments is not None
    return y, _moments(sets.moments, sets, x)


def _by_loops_together(call: Call, weights: Tensor | None, group: Group) -> tuple[Tensor, Moments]:
    """With the moments of all processes, of which this one's tensor may be empty."""
    N, C = call.x.shape[:2]
    if call.x.numel() > 0:
        x, plan = plans.laid_out(call.x, given=True)
        sets = cpu.Sets(N, *_summed(weights, N))
        values = float(N * math.prod(x.shape[2:])) if sets.counts is None else float(sets.counts)
    else:
        x, values, sets = call.x, 0.0, cpu.Sets(1)
        _, plan = plans.laid_out(x.new_zeros((1, C)), given=True)
    sets = sets._replace(moments=torch.zeros(1, 2, C, dtype=torch.float64, device="cpu"), limits=_limits(call))
    everybodys = []

    def merge_moments(own: Tensor) -> tuple[Tensor, float]:
        count = torch.full((C,), values, dtype=torch.float64, device="cpu")
        moments = group.merged(Moments(count, own[0], own[1] * values), plan.statistics)
        everybodys.append(moments)
        found = moments.mean, moments.biased_variance
        return torch.stack((*found, *(_correction(call, *found) or ()))), float(moments.count[0])

    weight, bias = (gate.ready(t, plan) for t in call[3:5])
    merging = Merging(merge_moments, lambda sums: group.summed(sums, plan.statistics))
    extras = operators.Extras(call.activation, gate.laid_like(call.residual, x))
    y = merged_cpu(x, plan, weight, bias, call.eps, extras, sets, merging)
    (moments,) = everybodys
    return y, Moments(moments.count[None], moments.mean[None], moments.m2[None])


def _summed(weights: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """The weights, and their sum in each set."""
    if weights is None:
        return None, None
    n = weights.shape[0]
    sets = -(-n // size)
    apart = torch.nn.functional.pad(weights, (0, 0, 0, sets * size - n)) if n % size else weights
    return weights, apart.view(sets, -1).sum(1, dtype=torch.float64)


def _limits(call: Call) -> tuple[float, float] | None:
    renorm = part(call.statistics, Renorm)
    if renorm is None:
        return None
    return renorm.limits(0.0 if call.state is None else float(call.state))


def _moments(found: Tensor, sets: cpu.Sets, x: Tensor) -> Moments:
    """What the loops found, ``(sets, 2 or 4, C)``."""
    if sets.counts is not None:
        counts = sets.counts
    else:
        n, space = x.shape[0], math.prod(x.shape[2:])
        counts = torch.full((found.shape[0],), float(sets.size * space), dtype=torch.float64, device="cpu")
        counts[-1] = float((n - (found.shape[0] - 1) * sets.size) * space)
    count = counts[:, None].expand(-1, x.shape[1])
    return Moments(count, found[:, 0], found[:, 1] * count)


# --- by plain PyTorch ---


def _correction(call: Call, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor] | None:
    """(r, d) of renormalization for the moments of a batch."""
    renorm, running_mean, running_var = part(call.statistics, Renorm), call.running_mean, call.running_var
    if renorm is None:
        return None
    assert running_mean is not None
    assert running_var is not None
    batches = mean.new_zeros(()) if call.state is None else call.state.to(mean.dtype)
    r_max, d_max = renorm.limits(batches)
    sigma = (running_var.to(var.dtype) + call.eps).sqrt()
    r, d = (var + call.eps).sqrt() / sigma, (mean - running_mean.to(mean.dtype)) / sigma
    r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return torch.ops.batchnorm.kept(r), torch.ops.batchnorm.kept(d)
    return r, d


def _by_operations(call: Call, size: int, weights: Tensor | None, group: Group | None) -> tuple[Tensor, Moments]:
    x = call.x

    def correction(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor] | None:
        return _correction(call, mean, var)

    def merged(own: Moments) -> Moments:
        assert group is not None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        every = group.merged(Moments(own.count[0], own.mean[0], own.m2[0]), dtype)
        return Moments(every.count[None], every.mean[None], every.m2[None])

    found: list[Moments] = []

    def normalized(x: Tensor) -> Tensor:
        y, moments = reference.sets_forward(
            x, call.weight, call.bias, call.eps, size, weights, correction, None if group is None else merged
        )
        found.append(moments)
        residual = call.residual
        if weights is not None and residual is not None:
            residual = reference.counted(residual, weights)  # an activation's slope at nan would make 0 · nan of it
        y = applied(call.activation, y if residual is None else y + residual)
        return y if weights is None else reference.counted(y, weights)

    y = operators.formatted(normalized, x)
    moments = found[0]
    return y, Moments(moments.count.detach(), moments.mean.detach(), moments.m2.detach())


# --- what is remembered ---


def put_back(buffer: Tensor, moved: Tensor) -> None:
    """Put statistics that were moved in the loops' precision back; those that did not move are not rounded by it."""
    buffer.copy_(torch.where(moved == buffer.to(moved.dtype), buffer, moved.to(buffer.dtype)))


def _move(call: Call, moments: Moments) -> None:
    """Move the running statistics by each set in order, and count it, without looking at a value."""
    with torch.no_grad():
        if call.batches is not None:
            call.batches.add_(_empty(call, moments))
        for count, mean, var in zip(moments.count, moments.mean, moments.biased_variance, strict=True):
            _move_once(call, count, mean, var)


def _empty(call: Call, moments: Moments) -> Tensor | bool:
    """Whether the batch has no samples: it is counted, as torch does, though nothing can be learnt of it."""
    return call.x.numel() == 0 and (moments.count == 0).all()  # unless other processes have some


def _move_once(call: Call, count: Tensor, mean: Tensor, var: Tensor, when: Tensor | None = None) -> None:
    running_mean, running_var, batches = call.running_mean, call.running_var, call.batches
    good, unbiased = _lesson(call, count, mean, var)
    good = good if when is None else good & when
    if batches is not None:
        batches.add_(good)
    if running_mean is None or running_var is None:
        return
    if call.momentum is not None:
        factor = torch.full_like(mean[0], call.momentum)
    else:
        assert batches is not None
        factor = 1.0 / batches.clamp(min=1).to(mean.dtype)
    new_mean = (1 - factor) * running_mean + factor * mean
    if part(call.statistics, Renorm) is not None:
        sigma = (1 - factor) * (running_var.to(var.dtype) + call.eps).sqrt() + factor * (var + call.eps).sqrt()
        new_var = (sigma.square() - call.eps).clamp(min=0)
    else:
        new_var = (1 - factor) * running_var + factor * unbiased
    running_mean.copy_(torch.where(good, new_mean.to(running_mean.dtype), running_mean))
    running_var.copy_(torch.where(good, new_var.to(running_var.dtype), running_var))


def _lesson(call: Call, count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the running statistics can learn from a set, and its unbiased variance.

    They cannot if it has no variance, or if anything would be stored as something not finite.
    """
    unbiased = var * torch.where(count > 1, count / (count - 1), 1.0)
    stored = [mean.dtype if t is None else t.dtype for t in call[1:3]]
    finite = mean.to(stored[0]).isfinite().all() & unbiased.to(stored[1]).isfinite().all()
    return (count > 1).all() & finite, unbiased


def _remember(call: Call, moments: Moments) -> None:
    """What a policy keeps from batch to batch."""
    state, accumulated = call.state, part(call.statistics, Accumulated)
    if state is None:
        return
    with torch.no_grad():
        if accumulated is None:
            state.add_(_lesson(call, moments.count, moments.mean, moments.biased_variance)[0] | _empty(call, moments))
            return
        C = moments.mean.shape[-1]
        finite = (moments.mean.isfinite() & moments.m2.isfinite()).all(-1, keepdim=True)  # else the set is left out
        now = Moments(*(torch.where(finite, t, 0.0) for t in (moments.count, moments.mean, moments.m2))).merged(0)
        both = merge(Moments(state[1].expand(C), state[2 : 2 + C], state[2 + C :]), now)
        steps = state[0] + 1
        full = steps >= accumulated.steps
        if call.batches is not None:
            call.batches.add_(full & _empty(call, both))
        _move_once(call, both.count, both.mean, both.biased_variance, full)
        kept = torch.cat((steps.reshape(1), both.count[:1], both.mean, both.m2))
        state.copy_(torch.where(full, 0.0, kept))
