"""Batch normalization by each kernel, of a call that has been checked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.arguments import NARROW, Call
from batchnorm.kernels import (
    gate,
    library,  # noqa: F401  # defines torch.ops.batchnorm
    operators,
    plans,
    reference,
)
from batchnorm.kernels.choice import record, which
from batchnorm.kernels.cpu import Sets
from batchnorm.kernels.running import put_back, update_running

__all__ = ["evaluate_aten", "run", "torchs_batch_norm", "train_numba"]

torchs_batch_norm = F.batch_norm  # as it is, whoever may put ours in its place


def run(call: Call) -> Tensor:
    """Choose the kernel and let it normalize: with the batch's moments in training, with the running ones otherwise."""
    if torch.compiler.is_compiling():
        return _traced(call)
    return _train(call) if call.training else _evaluate(call)


# --- training ---


def _train(call: Call) -> Tensor:
    x, running, weight, bias = call[:4]
    others = weight, bias, running.mean, running.var, call.epilogue.residual
    kernel = record.forward = which(x, True, *others, batches=running.batches)
    if kernel == "numba":
        return train_numba(call, *plans.laid_out(x))
    train = _train_reference if kernel == "reference" else _train_aten
    return _finished(call, *train(call))


def train_numba(call: Call, x: Tensor, plan: plans.Plan, sets: Sets | None = None) -> Tensor:
    """Normalize and move the running statistics, unless these wait for other batches.

    Args:
        call: what is asked for.
        x: its input as the loops read it, with ``plan``.
        sets: whose moments to take, if not the batch's.
    """
    # The loops move contiguous statistics of one dtype; others are copied there and back.
    mean, var, weight, bias = (gate.ready(t, plan) for t in (*call.running[:2], call.weight, call.bias))
    running = call.running._replace(mean=mean, var=var)
    moves = call.updates and call.statistics.accumulated is None
    if not moves:
        running = running.frozen()
    y = operators.normalize(x, plan, weight, bias, running, call.eps, call.epilogue.laid_like(x), None, sets)
    if moves:
        put_back(call.running.mean, mean)
        put_back(call.running.var, var)
    return y


def _train_aten(call: Call) -> tuple[Tensor, float | None, Tensor, Tensor]:
    """Momentum 1 makes ATen write the batch's mean and unbiased variance where the running statistics would be."""
    x, running, weight, bias = call[:4]
    dtype = torch.float32 if x.dtype in NARROW else x.dtype
    if x.dtype in NARROW:
        weight, bias = _widened(weight), _widened(bias)
    mean, var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    wanted = running.has_buffers() and x.numel() > 0  # also in a recomputation, whose graph must be the same
    y = torchs_batch_norm(
        x, mean if wanted else None, var if wanted else None, _dense(weight), _dense(bias), True, 1.0, call.eps
    )  # fmt: skip
    return y, None, mean, var


def _train_reference(call: Call) -> tuple[Tensor, float | None, Tensor, Tensor]:
    moments: list[Tensor] = []

    def normalized(x: Tensor) -> Tensor:
        y, *found = reference.train_forward(x, call.weight, call.bias, call.eps)
        moments.extend(t.detach() for t in found)
        return y

    y = operators.formatted(normalized, call.x)
    mean, var = moments
    return y, call.x.numel() // call.x.shape[1], mean, var


def _finished(call: Call, y: Tensor, count: float | None, mean: Tensor, var: Tensor) -> Tensor:
    """What the Numba kernel does in the same pass: move the running statistics, add the residual, activate."""
    if call.updates and call.running.has_buffers() and call.x.numel() > 0:
        update_running(call.running, count, mean, var)
    elif call.updates and call.running.batches is not None:
        call.running.batches.add_(1)  # an empty batch is counted, as torch does
    return call.epilogue.applied(y)


def _traced(call: Call) -> Tensor:
    """What torch.compile and torch.export record."""
    x, running, weight, bias = call[:4]
    if not call.training:
        return call.epilogue.applied(evaluate_aten(x, running.mean, running.var, weight, bias, call.eps))
    opaque = x.is_cpu and plans.served(x.dtype, x.dim()) and x.numel() > 0
    if opaque and not torch.compiler.is_exporting():
        activation, residual, _ = call.epilogue
        name, parameter = (None, 0.0) if activation is None else activation
        y, moments = torch.ops.batchnorm.train(x, weight, bias, residual, call.eps, name, parameter)
        if call.updates and running.has_buffers():
            update_running(running, x.numel() // x.shape[1], moments[0], moments[1])
        done: Tensor = y
        return done
    return _finished(call, *_train_aten(call))


# --- evaluation ---


def _evaluate(call: Call) -> Tensor:
    x, (mean, var, _, _), weight, bias, _, eps, epilogue = call[:7]
    assert mean is not None, "check has seen to it"
    assert var is not None
    fused = epilogue.activation is not None or epilogue.residual is not None
    others = weight, bias, mean, var, epilogue.residual
    kernel = record.forward = which(x, False, *others, fused=fused, inplace=epilogue.inplace)
    if kernel == "reference":
        moments = mean, var
        return epilogue.applied(operators.formatted(lambda x: reference.inference(x, *moments, weight, bias, eps), x))
    if kernel == "numba":
        x, plan = plans.laid_out(x, plans.inference_plan)
        fixed = torch.stack((mean.double(), var.double()))
        weight, bias = gate.ready(weight, plan), gate.ready(bias, plan)
        return operators.normalize(x, plan, weight, bias, None, eps, epilogue.laid_like(x), fixed)
    if not mean.dtype == var.dtype == x.dtype:
        wanted = torch.float32 if x.dtype in NARROW else x.dtype  # by ATen
        mean, var = mean.to(wanted), var.to(wanted)
    return epilogue.applied(evaluate_aten(x, mean, var, weight, bias, eps))


def evaluate_aten(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Let ATen, which checks its arguments, normalize by running statistics."""
    if x.dtype in NARROW and mean is not None and mean.dtype == torch.float32:
        weight, bias = _widened(weight), _widened(bias)
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, _dense(weight), _dense(bias), _dense(mean), _dense(var), False, 0.0, eps, cudnn)


def _dense(t: Tensor | None) -> Tensor | None:
    """ATen's backward (2.13) takes weights and statistics with gaps for contiguous ones, and gives nonsense."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def _widened(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype not in NARROW else t.float()
