"""Batch normalization with the batch's own moments, differentiable: for eager mode and for the compiler.

Eager mode calls the loops directly inside an ``autograd.Function``. The compiler sees ``torch.ops.batchnorm.train`` and
``train_backward``, opaque operators over the same loops: what inductor makes of batch normalization itself is slower
on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import cpu, reference
from batchnorm.kernels.choice import record
from batchnorm.moments import Moments


def train_cpu(
    x: Tensor, plan: cpu.Plan, weight: Tensor | None, bias: Tensor | None, running: cpu.Running | None, eps: float
) -> Tensor:
    """Normalize with the batch's moments, moving the running statistics; differentiable in eager mode."""
    record.forward = "cpu"
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _train_apply(x, plan, weight, bias, running, eps)
        return y
    return cpu.forward(x, plan, weight, bias, running, eps)[0]


class _Train(torch.autograd.Function):
    """Saves x, the moments (2, C) and references to the parameters; nothing else the size of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: cpu.Plan,
        weight: Tensor | None,
        bias: Tensor | None,
        running: cpu.Running | None,
        eps: float,
    ) -> Tensor:
        y, moments = cpu.forward(x, plan, weight, bias, running, eps)
        ctx.save_for_backward(x, weight, moments)
        ctx.rest = plan, eps, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, moments = ctx.saved_tensors
        plan, eps, bias_dtype = ctx.rest
        need_x, _, need_weight, need_bias, _, _ = ctx.needs_input_grad
        wanted = need_x, need_weight, need_bias
        if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated itself
            record.backward = "reference"
            dx, grad_weight, grad_bias = differentiable_backward(dy, x, weight, eps, wanted, bias_dtype)
        else:
            record.backward = "cpu"
            dx, grad_weight, grad_bias = cpu.backward(dy, x, plan, weight, moments, eps, wanted)
            grad_weight, grad_bias = _as(grad_weight, weight), _as(grad_bias, bias_dtype)
        return dx, None, grad_weight, grad_bias, None, None


def _as(t: Tensor | None, like: Tensor | torch.dtype | None) -> Tensor | None:
    """A gradient in its parameter's dtype."""
    if t is None or like is None:
        return None
    dtype = like.dtype if isinstance(like, Tensor) else like
    return t if t.dtype == dtype else t.to(dtype)


# Without Function.apply's own look at function transforms: the choice of kernel has ruled them out.
_train_apply = super(torch.autograd.Function, _Train).apply


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    wanted: tuple[bool, bool, bool],
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward as operations that autograd records, in terms of x itself."""
    moments = Moments.of(x, (0, *range(2, x.dim())))
    found = reference.train_backward(dy, x, weight, moments.mean, moments.biased_variance, eps)
    grads = [
        _as(g, like) if want else None for g, like, want in zip(found, (x, weight, bias_dtype), wanted, strict=True)
    ]
    return grads[0], grads[1], grads[2]


# --- evaluation ---


def evaluate_cpu(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize with given moments on the CPU loops; differentiable in eager mode in x, weight and bias."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _Evaluate.apply(x, weight, bias, mean, var, eps)
        return y
    x, plan = cpu.laid_out(x)
    return cpu.evaluate(x, plan, mean, var, weight, bias, eps)


class _Evaluate(torch.autograd.Function):
    """Saves x only if the weight learns. Of the statistics it keeps copies: a later training step moves the buffers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        x, plan = cpu.laid_out(x)
        moments = torch.stack((mean.double(), var.double()))
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, moments)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return cpu.evaluate(x, plan, mean, var, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, (mean, var) = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        record.backward = "reference"  # affine in x: plain operations, which autograd can differentiate again
        per_channel = (slice(None), *(None,) * (dy.dim() - 2))
        dims, wide = (0, *range(2, dy.dim())), torch.promote_types(dy.dtype, torch.float32)
        scale = (var + ctx.eps).rsqrt()
        grad_weight = grad_bias = grad_x = None
        if need_x:
            whole = scale if weight is None else scale * weight
            grad_x = (dy * whole.to(wide)[per_channel]).to(dy.dtype)
        if need_weight:
            x_hat = (x - mean.to(wide)[per_channel]) * scale.to(wide)[per_channel]
            grad_weight = (dy * x_hat).sum(dims).to(weight.dtype)
        if need_bias:
            grad_bias = dy.sum(dims, dtype=wide).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


# --- for torch.compile ---

torch.library.define(
    "batchnorm::train", "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor moments)"
)
torch.library.define(
    "batchnorm::train_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor moments, float eps, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("batchnorm::train", "CPU")
def _train(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    read, plan = cpu.laid_out(x)
    y, moments = cpu.forward(read, plan, weight, bias, None, eps)
    record.forward = "cpu"
    promised = torch.empty_like(x)
    return (y if y.stride() == promised.stride() else promised.copy_(y)), moments


@torch.library.impl("batchnorm::train_backward", "CPU")
def _train_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, eps: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    read, plan = cpu.laid_out(x)
    dx, *rest = cpu.backward(dy, read, plan, weight, moments, eps, (wanted[0], wanted[1], wanted[2]))
    record.backward = "cpu"
    grad_weight, grad_bias = (_as(t, plan.statistics if weight is None else weight) for t in rest)
    none = x.new_empty(0)
    if dx is not None:
        promised = torch.empty_like(x)
        dx = dx if dx.stride() == promised.stride() else promised.copy_(dx)
    return (
        none if dx is None else dx,
        x.new_empty(0) if grad_weight is None else grad_weight,
        x.new_empty(0) if grad_bias is None else grad_bias,
    )


@torch.library.register_fake("batchnorm::train")
def _train_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("batchnorm::train_backward")
def _train_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, eps: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = weight.dtype if weight is not None else (torch.float64 if x.dtype == torch.float64 else torch.float32)
    none = x.new_empty(0)
    vector = x.new_empty(x.shape[1], dtype=dtype)
    return (
        torch.empty_like(x) if wanted[0] else none,
        vector if wanted[1] else x.new_empty(0),
        torch.empty_like(vector) if wanted[2] else x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor | None, _moments: Tensor | None) -> Any:
    if dy is None:
        return None, None, None, None
    x, weight, moments = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.batchnorm.train_backward(dy, x, weight, moments, ctx.eps, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


torch.library.register_autograd("batchnorm::train", _differentiate, setup_context=_setup_context)
