"""Batch normalization by the loops, differentiable: for eager mode and for the compiler.

Eager mode calls the loops directly inside an ``autograd.Function``. The compiler sees ``torch.ops.batchnorm.train`` and
``train_backward``, opaque operators over the same loops: what inductor makes of batch normalization itself is slower
on CPUs.

Weights, biases and running statistics arrive here contiguous and in the plan's dtype of statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.activations import PIECEWISE, Activation, applied
from batchnorm.kernels import cpu, plans, reference
from batchnorm.kernels.choice import record


class Extras(NamedTuple):
    """What follows a normalization: an added residual, laid out like x; an activation; whether y takes x's place."""

    activation: Activation | None = None
    residual: Tensor | None = None
    inplace: bool = False


def ready(t: Tensor | None, plan: plans.Plan) -> Tensor | None:
    """A weight, a bias or running statistics as the loops want them."""
    return None if t is None else t.to(plan.statistics).contiguous()


def laid_like(residual: Tensor | None, x: Tensor) -> Tensor | None:
    """A residual as the loops want it: with the strides of x."""
    if residual is None or residual.stride() == x.stride():
        return residual
    return torch.empty_like(x).copy_(residual)


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
    record.forward = "cpu"
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _train_apply(x, plan, weight, bias, running, eps, sets)
        return y
    return cpu.forward(x, plan, weight, bias, running, eps, None, sets)[0]


class _Train(torch.autograd.Function):
    """Saves x, the moments (2, C) and references to the parameters; nothing else the size of x."""

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
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.rest = plan, eps, sets
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, moments = ctx.saved_tensors
        plan, eps, sets = ctx.rest
        need_x, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        wanted = need_x, need_weight, need_bias
        if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated itself
            record.backward = "reference"
            y = _reference(x, weight, bias, moments, eps, False, sets)
            dx, grad_weight, grad_bias = _differentiated(y, (x, weight, bias), wanted, dy)
        else:
            record.backward = "cpu"
            found = cpu.backward(dy, x, plan, weight, moments, eps, wanted, None, None, False, False, sets)
            dx, grad_weight, grad_bias, _ = found
        return dx, None, grad_weight, grad_bias, None, None, None


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
    record.forward = "cpu"
    activation, residual, inplace = extras
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        y: Tensor = _fused_apply(x, plan, weight, bias, residual, running, eps, activation, inplace, given, sets)
        return y
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
    """Saves x (y in its place, if it was overwritten) and the moments, and what else the activation's gradient needs.

    That is nothing without a residual, since z is computed again from x. With one, it is a bit an element for
    activations that are linear in pieces, and the residual for others. With given moments x is not saved where the
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
        smooth = activation is not None and bits is None
        keep = None if lean and not smooth else y if inplace else x
        ctx.save_for_backward(keep, weight, bias, moments, bits, residual if smooth else None)
        ctx.rest = plan, eps, activation, inplace, given is not None, residual is not None, sets
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, moments, bits, residual = ctx.saved_tensors
        plan, eps, activation, inplace, given, added, sets = ctx.rest
        need_x, _, need_weight, need_bias, need_residual = ctx.needs_input_grad[:5]
        wanted = need_x, need_weight, need_bias
        if torch.is_grad_enabled():
            record.backward = "reference"
            if inplace:
                raise RuntimeError(
                    "batch_norm(inplace=True) cannot be differentiated twice: its input is gone; use inplace=False"
                )
            slope = None
            if bits is not None:  # linear in pieces: the slopes are constants
                slope = _slopes(dy, x, plan, weight, bias, moments, eps, cpu.Fused(activation, None, bits), given, sets)
            if x is None:
                x = torch.zeros_like(dy)  # y is affine in x: any x has the same gradient
            if residual is None and added:
                residual = torch.zeros_like(x, requires_grad=True)
            if residual is not None and sets is not None and sets.weights is not None:
                residual = reference.counted(residual, sets.weights)  # nan there must meet no slope
            z = _reference(x, weight, bias, moments, eps, given, sets)
            z = z if residual is None else z + residual
            y = z * slope if slope is not None else applied(activation, z)
            if sets is not None and sets.weights is not None:
                y = reference.counted(y, sets.weights)
            grads = _differentiated(y, (x, weight, bias, residual), (*wanted, need_residual), dy)
        else:
            record.backward = "cpu"
            fused = cpu.Fused(activation, residual, bits, inplace)
            weighted = sets is not None and sets.weights is not None
            passes_on = need_residual and activation is None and not weighted  # the residual's gradient is dy itself
            found = cpu.backward(
                dy, x, plan, weight, moments, eps, wanted, fused, bias, need_residual and not passes_on, given, sets
            )
            grads = (*found[:3], dy if passes_on else found.residual)
        dx, grad_weight, grad_bias, grad_residual = grads
        return dx, None, grad_weight, grad_bias, grad_residual, None, None, None, None, None, None


_fused_apply = super(torch.autograd.Function, _Fused).apply


# --- to differentiate once more ---


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
    like: Tensor,
    x: Tensor | None,
    plan: plans.Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    eps: float,
    fused: cpu.Fused,
    given: bool,
    sets: cpu.Sets | None,
) -> Tensor:
    """The activation's slope everywhere: what it makes of a gradient of ones."""
    ones = torch.ones_like(like)
    with torch.no_grad():
        found = cpu.backward(ones, x, plan, weight, moments, eps, (False,) * 3, fused, bias, True, given, sets).residual
    assert found is not None
    return found


def _differentiated(
    y: Tensor, inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted, as operations that autograd records."""
    chosen = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(y, chosen, dy, create_graph=True, materialize_grads=True))
    return tuple(next(found) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True))


# --- for torch.compile ---

_SIGNATURE = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? activation, float parameter"
torch.library.define("batchnorm::train", f"({_SIGNATURE}) -> (Tensor y, Tensor moments)")
torch.library.define(
    "batchnorm::train_backward",
    f"(Tensor dy, {_SIGNATURE}, Tensor moments, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _fused(activation: str | None, parameter: float, residual: Tensor | None, x: Tensor) -> cpu.Fused | None:
    if activation is None and residual is None:
        return None
    return cpu.Fused(None if activation is None else Activation(activation, parameter), laid_like(residual, x))


@torch.library.impl("batchnorm::train", "CPU")
def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    parameter: float,
) -> tuple[Tensor, Tensor]:
    read, plan = plans.laid_out(x)
    fused = _fused(activation, parameter, residual, read)
    y, moments = cpu.forward(read, plan, ready(weight, plan), ready(bias, plan), None, eps, fused)
    record.forward = "cpu"
    promised = torch.empty_like(x)
    return (y if y.stride() == promised.stride() else promised.copy_(y)), moments


@torch.library.impl("batchnorm::train_backward", "CPU")
def _train_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    parameter: float,
    moments: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    read, plan = plans.laid_out(x)
    want_x, want_weight, want_bias, want_residual = wanted
    found = cpu.backward(
        dy,
        read,
        plan,
        ready(weight, plan),
        moments,
        eps,
        (want_x, want_weight, want_bias),
        _fused(activation, parameter, residual if activation is not None else None, read),
        ready(bias, plan),
        want_residual and activation is not None,
    )
    record.backward = "cpu"
    parameters = (
        t if t is None or like is None or t.dtype == like.dtype else t.to(like.dtype)
        for t, like in ((found.weight, weight), (found.bias, bias))
    )
    grad_residual = dy.clone() if want_residual and activation is None else found.residual
    dx, grad_residual = (None if t is None else _promised(t, x) for t in (found.x, grad_residual))
    return tuple(x.new_empty(0) if t is None else t for t in (dx, *parameters, grad_residual))  # type: ignore[return-value]


def _promised(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout that the compiler has been told of."""
    promised = torch.empty_like(x)
    return t if t.stride() == promised.stride() else promised.copy_(t)


@torch.library.register_fake("batchnorm::train")
def _train_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    parameter: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("batchnorm::train_backward")
def _train_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    parameter: float,
    moments: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = torch.float64 if x.dtype == torch.float64 else torch.float32
    vectors = (x.new_empty(x.shape[1], dtype=own if t is None else t.dtype) for t in (weight, bias))
    found = (torch.empty_like(x), *vectors, torch.empty_like(x))
    return tuple(t if want else x.new_empty(0) for t, want in zip(found, wanted, strict=True))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, residual, *ctx.rest = inputs
    needed = residual if ctx.rest[1] is not None else None  # without an activation, its gradient is dy
    ctx.save_for_backward(x, weight, bias, needed, output[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor | None, _moments: Tensor | None) -> Any:
    if dy is None:
        return (None,) * 7
    x, weight, bias, residual, moments = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    grads = torch.ops.batchnorm.train_backward(dy, x, weight, bias, residual, *ctx.rest, moments, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None


torch.library.register_autograd("batchnorm::train", _differentiate, setup_context=_setup_context)

# What has been found from running statistics before they move. The compiler's backward would rather find it again than
# keep it, from statistics that have moved by then; what comes of an operator that it does not know is kept.
torch.library.define("batchnorm::kept", "(Tensor x) -> Tensor")
torch.library.impl("batchnorm::kept", "CompositeExplicitAutograd")(torch.clone)
torch.library.register_fake("batchnorm::kept")(torch.empty_like)
