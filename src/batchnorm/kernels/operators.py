"""Batch normalization by the Numba kernel, differentiable: what eager mode calls.

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
from batchnorm.kernels import cpu, gate, launch, plans, reference
from batchnorm.kernels.choice import record
from batchnorm.kernels.epilogue import NOTHING, Epilogue
from batchnorm.kernels.key import Form
from batchnorm.kernels.running import Running

Saved = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # x to residual, slope bits


class Work(NamedTuple):
    """A normalization, but for the tensors that are differentiated; a plain tuple until somebody asks by name."""

    plan: plans.Plan
    running: Running | None
    eps: float
    activation: Activation | None
    inplace: bool
    fixed: Tensor | None  # moments
    sets: cpu.Sets | None


def normalize(
    x: Tensor,
    plan: plans.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    epilogue: Epilogue = NOTHING,
    fixed: Tensor | None = None,
    sets: cpu.Sets | None = None,
) -> Tensor:
    """Normalize with the batch's moments, moving the running statistics; differentiable in eager mode.

    Or with ``fixed`` moments (2, C), where ``plan`` is an ``inference_plan``; or with those of ``sets``, and a
    ``sets_plan``.
    """
    record.forward = "numba"
    activation, residual, inplace = epilogue
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y: Tensor = _apply(x, weight, bias, residual, (plan, running, eps, activation, inplace, fixed, sets))
        return y
    if inplace and not x.is_inference():
        torch.autograd.graph.increment_version(x)  # whoever has saved it finds out
    if fixed is not None:
        return cpu.evaluate(x, plan, fixed, weight, bias, eps, epilogue)
    return cpu.forward(x, plan, weight, bias, running, eps, epilogue, None, sets)[0]


class _Normalize(torch.autograd.Function):
    """Saves x (y in its place, if it was overwritten), the weight, and what else the activation's gradient needs.

    That is nothing but the bias without a residual, since z is computed again from x. With one, it is a bit an element
    for activations that are linear in pieces, and the residual for others. With fixed moments x is not saved where the
    weight does not learn and z is not needed. Of its own it keeps the moments and the bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, work: Any
    ) -> Tensor:
        plan, running, eps, activation, inplace, fixed, sets = work
        if activation is None and residual is None and not inplace and fixed is None:
            y, moments = cpu.forward(x, plan, weight, bias, running, eps, NOTHING, None, sets)
            ctx.save_for_backward(x, weight)
            ctx.rest = work, moments
            return y
        lean = fixed is not None and not ctx.needs_input_grad[1] and not inplace  # x itself matters through z alone
        bits = slope_bits(plan, activation, lean or residual is not None) if not inplace else None
        epilogue = Epilogue(activation, residual, inplace)
        if fixed is not None:
            y, moments = cpu.evaluate(x, plan, fixed, weight, bias, eps, epilogue, bits), fixed
        else:
            y, moments = cpu.forward(x, plan, weight, bias, running, eps, epilogue, bits, sets)
        if inplace:
            ctx.mark_dirty(x)
        from_z = activation is not None and bits is None
        kept = None if lean and not from_z else y if inplace else x
        ctx.save_for_backward(kept, weight, bias if from_z or inplace else None, residual if from_z else None, bits)
        ctx.rest = work, moments
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        work, moments = ctx.rest
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        plan, _, eps, activation, inplace, fixed, sets = work
        alone = len(saved) == 2  # nothing follows, which is worth 2 % of a tiny tensor's step
        if torch.is_grad_enabled() or not gate.readable(dy):
            record.backward = "reference"
            if inplace:
                raise RuntimeError(
                    "batch_norm(inplace=True) cannot be differentiated twice, nor for many gradients at once, nor "
                    "forwards: its input is gone; use inplace=False"
                )
            saved = (*saved, None, None, None) if alone else saved
            return *_by_operations(dy, saved, moments, Work(*work), wanted), None
        record.backward = "numba"
        if alone:
            v, w = gate.like_x("input", saved[0], plan), gate.parameter("weight", saved[1], plan)
            return *cpu.backward(dy, v, plan, w, moments, eps, wanted, NOTHING, None, None, False, sets), None
        x, weight, bias, residual, bits = gated(plan, saved)
        # The residual's gradient is dy itself where no activation and no weight of 0 changes it.
        passed_on = wanted[3] and activation is None and (sets is None or sets.weights is None)
        if passed_on:
            wanted = (*wanted[:3], False)
        epilogue = NOTHING if activation is None and not inplace else Epilogue(activation, residual, inplace)
        found = cpu.backward(
            dy, x, plan, weight, moments, eps, wanted, epilogue, bits, bias, fixed is not None, sets
        )  # fmt: skip
        dx, grad_weight, grad_bias, grad_residual = found
        return dx, grad_weight, grad_bias, dy if passed_on else grad_residual, None


# Without Function.apply's own look at function transforms: the choice of kernel has ruled them out.
_apply = super(torch.autograd.Function, _Normalize).apply


def expect(x: Tensor, activation: Activation | None, residual: bool) -> None:
    """Have the kernels of such a training step compiled beside this process, where they must be compiled at all."""
    plan = plans.plan(x.shape, x.stride(), x.dtype) if x.is_cpu else None
    if plan is not None:
        name = None if activation is None else activation.name
        forward = plan.kernel("forward", Form(name, residual, residual and name in PIECEWISE)).key
        launch.expect([forward, launch.backward_of(forward)])


def slope_bits(plan: plans.Plan, activation: Activation | None, instead: bool) -> Tensor | None:
    """Memory for the bits that say which slope an element has, if they serve ``instead`` of what z is made of."""
    return plan.slope_bits() if instead and activation is not None and activation.name in PIECEWISE else None


def gated(plan: plans.Plan, saved: Saved) -> Saved:
    """What was saved, as the loops can read it."""
    x, weight, bias, residual, bits = saved
    if bits is not None:
        bits = gate.flat("the slope bits", bits, torch.uint8, plan.slope_bits_size())
    return (
        x if x is None else gate.like_x("input", x, plan),
        gate.parameter("weight", weight, plan),
        bias if bias is None else gate.parameter("bias", bias, plan),
        residual if residual is None else gate.like_x("residual", residual, plan),
        bits,
    )


# --- to differentiate once more, or what has no memory ---


def _by_operations(
    dy: Tensor, saved: Saved, moments: Tensor, work: Work, wanted: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The wanted gradients of x, weight, bias and residual by operations, which can be recorded, batched and dual."""
    plan, sets, once_more = work.plan, work.sets, torch.is_grad_enabled()
    of_x, of_channel = (plan.dtype, plan.layout[0]), (plan.statistics, plan.vector)
    weights = None if sets is None else sets.weights
    slope = None if saved[4] is None else _slopes(saved, moments, work)
    inputs: list[Tensor | None] = []
    names, likes = ("input", "weight", "bias", "residual"), (of_x, of_channel, of_channel, of_x)
    for name, t, want, like in zip(names, saved[:4], wanted, likes, strict=True):
        if t is not None:
            gate.check_saved(name, t, *like)
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
        z = _reference(x, weight, bias, moments, work)
        z = z if residual is None else z + residual
        y = z * slope if slope is not None else applied(work.activation, z)
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


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, work: Work) -> Tensor:
    sets = work.sets
    if work.fixed is not None:
        return reference.inference(x, moments[0], moments[1], weight, bias, work.eps)
    if sets is not None:
        renorm = None if sets.limits is None else (moments[:, 2], moments[:, 3])
        weights = None if sets.weights is None else sets.weights.reshape(x.shape[0], -1)
        return reference.sets_forward(x, weight, bias, work.eps, sets.size, weights, lambda *_: renorm)[0]
    return reference.train_forward(x, weight, bias, work.eps)[0]


def _slopes(saved: Saved, moments: Tensor, work: Work) -> Tensor:
    """The activation's slope everywhere: what it makes of a gradient of ones. Constants, as it is linear in pieces."""
    plan = work.plan
    with torch.no_grad(), _disable_current_modes():
        x, weight, _, _, bits = gated(plan, (*saved[:2], None, None, saved[4]))
        ones = torch.ones((), dtype=plan.dtype, device="cpu").expand(plan.layout[0])
        found = cpu.backward(
            ones, x, plan, weight, moments, work.eps, (False, False, False, True), Epilogue(work.activation), bits,
            None, work.fixed is not None, work.sets,
        ).residual  # fmt: skip
    assert found is not None
    return found


# --- what plain PyTorch computes, laid out like what the Numba kernel and torch's own operators give ---


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
        return (grad.contiguous(memory_format=ctx.format) if gate.has_strides(grad) else grad), None
