"""Moments that are not simply the batch's: masks, and every policy of ``statistics``.

The Numba kernel takes moments over sets of samples and over weighted positions itself. Where another kernel serves, the
same is done by plain PyTorch (``kernels.reference``), which can also be compiled, exported and differentiated twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm import backends
from batchnorm.arguments import Call
from batchnorm.distributed import Group
from batchnorm.kernels import cpu, gate, operators, plans, reference
from batchnorm.kernels.choice import asked_for, record, which
from batchnorm.kernels.merged import Merging, normalize_merged
from batchnorm.kernels.running import can_update, update_running
from batchnorm.moments import Moments, merge
from batchnorm.statistics import Accumulated, Sync

__all__ = ["positions", "run"]


def run(call: Call) -> Tensor:
    """Normalize with a mask or a policy."""
    return _train(call) if call.training else _evaluate_masked(call)


def _evaluate_masked(call: Call) -> Tensor:
    """Normalize by running statistics; 0 at positions that do not count, whatever is there."""
    assert call.mask is not None
    weights = positions(call.mask, call.x)
    epilogue = call.epilogue
    if epilogue.residual is not None:
        epilogue = epilogue._replace(residual=reference.counted(epilogue.residual, weights))
    y = backends.run(call._replace(x=reference.counted(call.x, weights), epilogue=epilogue, mask=None))
    return reference.counted(y, weights)


def _train(call: Call) -> Tensor:
    ghost, sync = call.statistics.ghost, call.statistics.sync
    size = call.x.shape[0] if ghost is None else min(ghost.size, max(call.x.shape[0], 1))
    weights = None if call.mask is None else positions(call.mask, call.x)
    group = None if sync is None else _group(sync, call.x)
    kernel = _kernel(call, group is not None)
    if not torch.compiler.is_compiling():
        record.forward = kernel
    if kernel == "reference":
        y, moments = _by_operations(call, size, weights, group)
    elif group is None:
        y, moments = _by_numba(call, size, weights)
    else:
        y, moments = _by_numba_synchronized(call, weights, group)
    if call.updates:
        if call.statistics.accumulated is not None:
            _accumulate(call, call.statistics.accumulated, moments)
        else:
            _update(call, moments, moved=kernel == "numba" and group is None)
    return y


def positions(mask: Tensor, x: Tensor) -> Tensor:
    """The weights of positions, ``(N, space)``, as the moments of x want them."""
    shape = x.shape[:1] + x.shape[2:]
    weights: Tensor = mask.detach().to(_message_dtype(x), copy=True).expand(shape)
    return weights.reshape(x.shape[0], math.prod(x.shape[2:])).contiguous()


def _message_dtype(x: Tensor) -> torch.dtype:
    """Of weights and sums: no less than float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kernel(call: Call, together: bool) -> str:
    x, running = call.x, call.running
    if torch.compiler.is_compiling() or (x.numel() == 0 and not together):
        return "reference"
    others = call.weight, call.bias, running.mean, running.var, call.epilogue.residual, call.mask
    if x.numel() == 0:  # the loops have nothing to do, but the others wait
        x = x.new_empty((2, x.shape[1]))
    kernel = which(x, True, *others, batches=running.batches)
    if asked_for.get() == "aten":
        raise RuntimeError(
            "kernel 'aten' was asked for, but it has no masks and no policies; "
            "ask for 'numba' or 'reference', or let batchnorm choose"
        )
    return "numba" if kernel == "numba" else "reference"


def _group(sync: Sync, x: Tensor) -> Group:
    group = Group(sync.process_group, f"{sync.name or 'batch normalization'} ({x.shape[1]} channels)", sync.agreed)
    group.check_channels(x.shape[1], _message_dtype(x), x.device)
    return group


# --- by the Numba kernel ---


def _by_numba(call: Call, size: int, weights: Tensor | None) -> tuple[Tensor, Moments]:
    x, plan = plans.laid_out_sets(call.x, size, weights is not None)
    sets = cpu.sets_of(plan, size, weights, _limits(call))
    y = backends.train_numba(call, x, plan, sets)
    found = sets.moments
    assert found is not None
    if weights is not None:
        counts = cpu.summed(weights, size) if sets.counts is None else sets.counts
    else:
        n, space = x.shape[0], math.prod(x.shape[2:])
        counts = torch.full((found.shape[0],), float(size * space), dtype=torch.float64, device="cpu")
        counts[-1] = float((n - (found.shape[0] - 1) * size) * space)
    count = counts[:, None].expand(-1, x.shape[1])
    return y, Moments(count, found[:, 0], found[:, 1] * count)


def _by_numba_synchronized(call: Call, weights: Tensor | None, group: Group) -> tuple[Tensor, Moments]:
    """With the moments of all processes, of which this one's tensor may be empty."""
    N, C = call.x.shape[:2]
    x, sets, values = call.x, cpu.Sets(N or 1), 0.0
    if x.numel() > 0:
        x, plan = plans.laid_out(x, plans.inference_plan)
        values = float(N * math.prod(x.shape[2:]))
        if weights is not None:
            sets = cpu.Sets(N, weights, cpu.summed(weights, N))
            values = float(sets.counts)  # type: ignore[arg-type]
    else:
        _, plan = plans.laid_out(x.new_zeros((1, C)), plans.inference_plan)
    sets = sets._replace(moments=torch.zeros(1, 2, C, dtype=torch.float64, device="cpu"), limits=_limits(call))
    merged = []

    def merge_moments(own: Tensor) -> tuple[Tensor, float]:
        count = torch.full((C,), values, dtype=torch.float64, device="cpu")
        moments = group.merged(Moments(count, own[0], own[1] * values), plan.statistics)
        merged.append(moments)
        found = moments.mean, moments.biased_variance
        return torch.stack((*found, *(_correction(call, *found) or ()))), float(moments.count[0])

    weight, bias = (gate.ready(t, plan) for t in (call.weight, call.bias))
    merging = Merging(merge_moments, lambda sums: group.all_reduce(sums, plan.statistics))
    y = normalize_merged(x, plan, weight, bias, call.eps, call.epilogue.laid_like(x), sets, merging)
    return y, _as_one_set(merged[0])


def _limits(call: Call) -> tuple[float, float] | None:
    renorm = call.statistics.renorm
    return None if renorm is None else renorm.limits(0.0 if call.state is None else float(call.state))


def _as_one_set(m: Moments) -> Moments:
    return Moments(m.count[None], m.mean[None], m.m2[None])


# --- by plain PyTorch ---


def _correction(call: Call, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor] | None:
    """(r, d) of renormalization for the moments of a batch."""
    renorm, running = call.statistics.renorm, call.running
    if renorm is None:
        return None
    assert running.mean is not None, "check has seen to it"
    assert running.var is not None
    r_max, d_max = renorm.limits(mean.new_zeros(()) if call.state is None else call.state.to(mean.dtype))
    sigma = (running.var.to(var.dtype) + call.eps).sqrt()
    r, d = (var + call.eps).sqrt() / sigma, (mean - running.mean.to(mean.dtype)) / sigma
    r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return torch.ops.batchnorm.kept(r), torch.ops.batchnorm.kept(d)
    return r, d


def _by_operations(call: Call, size: int, weights: Tensor | None, group: Group | None) -> tuple[Tensor, Moments]:
    def correction(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor] | None:
        return _correction(call, mean, var)

    def merged(own: Moments) -> Moments:
        assert group is not None
        return _as_one_set(group.merged(Moments(own.count[0], own.mean[0], own.m2[0]), _message_dtype(call.x)))

    found: list[Moments] = []

    def normalized(x: Tensor) -> Tensor:
        y, moments = reference.sets_forward(
            x, call.weight, call.bias, call.eps, size, weights, correction, None if group is None else merged
        )
        found.append(moments)
        return call.epilogue.applied(y, weights)

    y = operators.formatted(normalized, call.x)
    moments = found[0]
    return y, Moments(moments.count.detach(), moments.mean.detach(), moments.m2.detach())


# --- running statistics, and what policies remember ---


@torch.no_grad()
def _update(call: Call, moments: Moments, moved: bool) -> None:
    """Move the running statistics by each set in order, unless they have moved, and count the batch in the state."""
    running, renorm = call.running, call.statistics.renorm
    empty, mean, var = _empty(call, moments), moments.mean, moments.biased_variance
    if not moved:
        if running.batches is not None:
            running.batches.add_(empty)
        for of_set in zip(moments.count, mean, var, strict=True):
            update_running(running, *of_set, renorm_eps=None if renorm is None else call.eps)
    if call.state is not None:
        call.state.add_(can_update(running, moments.count, mean, var) | empty)


@torch.no_grad()
def _accumulate(call: Call, accumulated: Accumulated, moments: Moments) -> None:
    """Remember the moments; after the last micro-batch of a batch, move the running statistics by all of them."""
    state = call.state
    if state is None:
        return
    C = moments.mean.shape[-1]
    finite = (moments.mean.isfinite() & moments.m2.isfinite()).all(-1, keepdim=True)  # else the set is left out
    now = Moments(*(torch.where(finite, t, 0.0) for t in (moments.count, moments.mean, moments.m2))).merged(0)
    both = merge(Moments(state[1].expand(C), state[2 : 2 + C], state[2 + C :]), now)
    steps = state[0] + 1
    full = steps >= accumulated.steps
    if call.running.batches is not None:
        call.running.batches.add_(full & _empty(call, both))
    update_running(call.running, both.count, both.mean, both.biased_variance, full)
    remembered = torch.cat((steps.reshape(1), both.count[:1], both.mean, both.m2))
    state.copy_(torch.where(full, 0.0, remembered))


def _empty(call: Call, moments: Moments) -> Tensor | bool:
    """Whether the batch has no samples: it is counted, as torch does, though it moves nothing."""
    return call.x.numel() == 0 and (moments.count == 0).all()  # unless other processes have some
