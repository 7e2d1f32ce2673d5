"""Batch normalization by the loops, differentiable: what eager mode calls.

Weights, biases and running statistics arrive here contiguous and in the plan's dtype of statistics: through the gate.
What a backward finds saved goes through it again. Moments and the weights of positions are nobody else's: they are
kept beside what is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from batchnorm.activations import PIECEWISE, Activation, applied
from batchnorm.kernels import cpu, gate, plans, reference
from batchnorm.kernels.choice import record


class Extras(NamedTuple):
    """What follows a normalization: an added residual, laid out like x; an activation; whether y takes x's place."""

    activation: Activation | None = None
    residual: Tensor | None = None
    inplace: bool = False


def train_cpu(
    x: Tensor,
    plan: plans.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    running: cpu.Running | None,
    eps: float,
    sets: cpu.Sets | None = None,
) -> Tensor:
    """Normalize with the batch's moments, moving the running statistics; differentiable in eager mode.

    Or with those of ``sets``, and a ``sets_plan``.
    """
    record.forward = "numba"
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _train_apply(x, plan, weight, bias, running, eps, sets)
        return y
    return cpu.forward(x, plan, weight, bias, running, eps, None, sets)[0]


class _Train(torch.autograd.Function):
    """Saves x and a reference to the weight; of its own, only the moments (2, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: plans.Plan,
        weight: Tensor | None,
        bias: Tensor | None,
        running: cpu.Running | None,
        eps: float,
        sets: cpu.Sets | None,
    ) -> Tensor:
        y, moments = cpu.forward(x, plan, weight, bias, running, eps, None, sets)
        ctx.save_for_backward(x, weight)
        ctx.rest = plan, moments, eps, sets
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        plan, moments, eps, sets = ctx.rest
        need_x, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or not gate.readable(dy):
            record.backward = "reference"
            saved = Saved(x, weight, None, None, moments)
            grads = _by_operations(dy, plan, saved, eps, (need_x, need_weight, need_bias, False), sets=sets)
        else:
            record.backward = "numba"
            x, weight = gate.like_x("input", x, plan), gate.parameter("weight", weight, plan)
            wanted = need_x, need_weight, need_bias
            grads = cpu.backward(dy, x, plan, weight, moments, eps, wanted, None, None, False, False, sets)
        return grads[0], None, grads[1], grads[2], None, None, None


# Without Function.apply's own look at function transforms: the choice of kernel has ruled them out.
_train_apply = super(torch.autograd.Function, _Train).apply


def fused_cpu(
    x: Tensor,
    plan: plans.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    running: cpu.Running | None,
    eps: float,
    extras: Extras,
    given: Tensor | None = None,
    sets: cpu.Sets | None = None,
) -> Tensor:
    """The same with what follows.

    Or with ``given`` moments (2, C), where ``plan`` is a ``given_plan``; or those of ``sets``, and a ``sets_plan``.
    """
    record.forward = "numba"
    activation, residual, inplace = extras
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        y: Tensor = _fused_apply(x, plan, weight, bias, residual, running, eps, activation, inplace, given, sets)
        return y
    if inplace and not x.is_inference():
        torch.autograd.graph.increment_version(x)  # whoever has saved it finds out
    fused = cpu.Fused(activation, residual, None, inplace)
    return _forward(x, plan, weight, bias, running, eps, fused, given, sets)[0]


def _forward(
    x: Tensor,
    plan: plans.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    running: cpu.Running | None,
    eps: float,
    fused: cpu.Fused,
    given: Tensor | None,
    sets: cpu.Sets | None,
) -> tuple[Tensor, Tensor]:
    if given is not None:
        return cpu.evaluate(x, plan, given, weight, bias, eps, fused), given
    return cpu.forward(x, plan, weight, bias, running, eps, fused, sets)


class _Fused(torch.autograd.Function):
    """Saves x (y in its place, if it was overwritten) and what else the activation's gradient needs.

    That is nothing but the bias without a residual, since z is computed again from x. With one, it is a bit an element
    for activations that are linear in pieces, and the residual for others. With given moments x is not saved where the
    weight does not learn and z is not needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: plans.Plan,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: cpu.Running | None,
        eps: float,
        activation: Activation | None,
        inplace: bool,
        given: Tensor | None,
        sets: cpu.Sets | None,
    ) -> Tensor:
        piecewise = activation is not None and activation.name in PIECEWISE and not inplace
        need_weight = ctx.needs_input_grad[2]
        lean = given is not None and not need_weight and not inplace  # x itself matters through z alone
        bits = plan.bits() if piecewise and (lean or residual is not None) else None
        y, moments = _forward(
            x, plan, weight, bias, running, eps, cpu.Fused(activation, residual, bits, inplace), given, sets
        )
        if inplace:
            ctx.mark_dirty(x)
        from_z = activation is not None and bits is None
        keep = None if lean and not from_z else y if inplace else x
        ctx.save_for_backward(keep, weight, bias if from_z or inplace else None, residual if from_z else None, bits)
        ctx.rest = plan, moments, eps, activation, inplace, given is not None, sets
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, residual, bits = ctx.saved_tensors
        plan, moments, eps, activation, inplace, given, sets = ctx.rest
        need_x, _, need_weight, need_bias, need_residual = ctx.needs_input_grad[:5]
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled() or not gate.readable(dy):
            record.backward = "reference"
            if inplace:
                raise RuntimeError(
                    "batch_norm(inplace=True) cannot be differentiated twice, nor for many gradients at once, nor "
                    "forwards: its input is gone; use inplace=False"
                )
            saved = Saved(x, weight, bias, residual, moments, bits)
            wanted = need_x, need_weight, need_bias, need_residual
            grads = _by_operations(dy, plan, saved, eps, wanted, activation, given, sets)
        else:
            record.backward = "numba"
            if x is not None:
                x = gate.like_x("input", x, plan)
            weight, bias = gate.parameter("weight", weight, plan), gate.parameter("bias", bias, plan)
            fused = again(plan, activation, residual, bits, inplace)
            weighted = sets is not None and sets.weights is not None
            passes_on = need_residual and activation is None and not weighted  # the residual's gradient is dy itself
            found = cpu.backward(
                dy, x, plan, weight, moments, eps, (need_x, need_weight, need_bias), fused, bias,
                need_residual and not passes_on, given, sets,
            )  # fmt: skip
            grads = (*found[:3], dy if passes_on else found.residual)
        dx, grad_weight, grad_bias, grad_residual = grads
        return dx, None, grad_weight, grad_bias, grad_residual, None, None, None, None, None, None


def again(
    plan: plans.Plan, activation: Activation | None, residual: Tensor | None, bits: Tensor | None, inplace: bool
) -> cpu.Fused:
    """What went along with a forward, from what is saved of it."""
    if residual is not None:
        residual = gate.like_x("residual", residual, plan)
    if bits is not None:
        bits = gate.flat("the slopes of the activation", bits, torch.uint8, plan.bits_size())
    return cpu.Fused(activation, residual, bits, inplace)


_fused_apply = super(torch.autograd.Function, _Fused).apply


# --- to differentiate once more, or what has no memory ---


class Saved(NamedTuple):
    """What a backward has of its forward."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    moments: Tensor
    bits: Tensor | None = None


def _by_operations(
    dy: Tensor,
    plan: plans.Plan,
    saved: Saved,
    eps: float,
    wanted: tuple[bool, bool, bool, bool],
    activation: Activation | None = None,
    given: bool = False,
    sets: cpu.Sets | None = None,
) -> tuple[Tensor | None, ...]:
    """The wanted gradients of x, weight, bias and residual by operations, which can be recorded, batched and dual."""
    shape, once_more = plan.layout[0], torch.is_grad_enabled()
    of_x, of_channel = (plan.dtype, shape), (plan.statistics, plan.vector)
    weights = None if sets is None else sets.weights
    slope = None if saved.bits is None else _slopes(plan, saved, eps, activation, given, sets)
    inputs: list[Tensor | None] = []
    names, likes = ("input", "weight", "bias", "residual"), (of_x, of_channel, of_channel, of_x)
    for name, t, want, like in zip(names, saved[:4], wanted, likes, strict=True):
        if t is not None:
            gate.check(name, t, *like)
            inputs.append(_alias(t, want))
        elif want or name == "input":  # y is affine in it: whatever it is, the gradient is the same
            inputs.append(torch.zeros(like[1], dtype=like[0], device="cpu", requires_grad=want))
        else:
            inputs.append(None)
    with torch.enable_grad():
        x, weight, bias, residual = inputs
        assert x is not None
        if residual is not None and weights is not None:
            residual = reference.counted(residual, weights)  # nan there must meet no slope
        z = _reference(x, weight, bias, saved.moments, eps, given, sets)
        z = z if residual is None else z + residual
        y = z * slope if slope is not None else applied(activation, z)
        if weights is not None:
            y = reference.counted(y, weights)
        chosen = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
        found = iter(torch.autograd.grad(y, chosen, dy, create_graph=once_more, materialize_grads=True))
    return tuple(next(found) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True))


def _alias(t: Tensor, want: bool) -> Tensor:
    """A saved tensor as the beginning of a graph of its own: a residual may depend on x, whose path it is not."""
    with torch.enable_grad():
        if t.requires_grad:
            return t.view_as(t)
        return t.detach().requires_grad_() if want else t


def _reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    eps: float,
    given: bool,
    sets: cpu.Sets | None,
) -> Tensor:
    if given:
        return reference.inference(x, moments[0], moments[1], weight, bias, eps)
    if sets is not None:
        renorm = None if sets.limits is None else (moments[:, 2], moments[:, 3])
        weights = None if sets.weights is None else sets.weights.reshape(x.shape[0], -1)
        return reference.sets_forward(x, weight, bias, eps, sets.size, weights, lambda *_: renorm)[0]
    return reference.train_forward(x, weight, bias, eps)[0]


def _slopes(
    plan: plans.Plan, saved: Saved, eps: float, activation: Activation | None, given: bool, sets: cpu.Sets | None
) -> Tensor:
    """The activation's slope everywhere: what it makes of a gradient of ones. Constants, as it is linear in pieces."""
    with torch.no_grad(), _disable_current_modes():
        x = None if saved.x is None else gate.like_x("input", saved.x, plan)
        weight = gate.parameter("weight", saved.weight, plan)
        fused = again(plan, activation, None, saved.bits, False)
        ones = torch.ones((), dtype=plan.dtype, device="cpu").expand(plan.layout[0])
        found = cpu.backward(
            ones, x, plan, weight, saved.moments, eps, (False,) * 3, fused, None, True, given, sets
        ).residual
    assert found is not None
    return found


# --- what plain PyTorch computes, laid out like what the loops and torch's own operators give ---


def formatted(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``compute(x)``, it and the gradient of x in the memory format that torch would give them."""
    if not torch.compiler.is_compiling() and not gate.alone():
        return compute(x)  # a transform's tensors say nothing of memory
    wanted = plans.memory_format(x)
    watched = x.requires_grad and not torch.compiler.is_compiling()
    y = compute(_Formatted.apply(x, wanted) if watched else x)
    promised = torch.empty_like(y, memory_format=wanted)
    return y if y.stride() == promised.stride() else promised.copy_(y)


class _Formatted(torch.autograd.Function):
    """The identity, with a gradient in a memory format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: torch.memory_format) -> Tensor:
        ctx.format = wanted
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # which has no strides that could be asked for
        return (grad.contiguous(memory_format=ctx.format) if gate.alone() and not batched else grad), None
