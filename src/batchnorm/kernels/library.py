"""Batch normalization by the Numba kernel for ``torch.compile``: ``torch.ops.batchnorm.train`` and ``train_backward``.

They are opaque operators over the same loops that eager mode calls. What inductor makes of batch normalization itself
is slower on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.activations import Activation
from batchnorm.kernels import cpu, gate, plans
from batchnorm.kernels.choice import record
from batchnorm.kernels.epilogue import Epilogue

_SIGNATURE = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? activation, float parameter"
torch.library.define("batchnorm::train", f"({_SIGNATURE}) -> (Tensor y, Tensor moments)")
torch.library.define(
    "batchnorm::train_backward",
    f"(Tensor dy, {_SIGNATURE}, Tensor moments, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _epilogue(activation: str | None, parameter: float, residual: Tensor | None, x: Tensor) -> Epilogue:
    return Epilogue.of(None if activation is None else Activation(activation, parameter), residual).laid_like(x)


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
    _check_sizes(plan, weight, bias, residual)
    epilogue = _epilogue(activation, parameter, residual, read)
    record.forward = "numba"
    return cpu.forward(read, plan, gate.ready(weight, plan), gate.ready(bias, plan), None, eps, epilogue)


def _check_sizes(plan: plans.Plan, weight: Tensor | None, bias: Tensor | None, *like_x: Tensor | None) -> None:
    """Sizes and dtypes, whoever calls the operators: nothing is read or written outside of a tensor."""
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != plan.vector:
            raise RuntimeError(f"{name} should contain {plan.channels} elements not {t.numel()}")
    for t in like_x:
        if t is not None and (t.shape != plan.layout[0] or t.dtype != plan.dtype):
            raise RuntimeError(
                f"residual and gradient should have the input's size {tuple(plan.layout[0])} and {plan.dtype}, "
                f"got {tuple(t.shape)} and {t.dtype}"
            )


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
) -> tuple[Tensor, ...]:
    read, plan = plans.laid_out(x)
    _check_sizes(plan, weight, bias, residual, dy)
    moments = gate.flat("moments", moments, torch.float64, plan.moments.shape)
    want_x, want_weight, want_bias, want_residual = wanted
    found = cpu.backward(
        dy, read, plan, gate.ready(weight, plan), moments, eps,
        (want_x, want_weight, want_bias, want_residual and activation is not None),
        _epilogue(activation, parameter, residual if activation is not None else None, read),
        None, gate.ready(bias, plan),
    )  # fmt: skip
    record.backward = "numba"
    parameters = (
        t if t is None or like is None or t.dtype == like.dtype else t.to(like.dtype)
        for t, like in ((found.weight, weight), (found.bias, bias))
    )
    grad_residual = plan.empty_like(read).copy_(dy) if want_residual and activation is None else found.residual
    return tuple(x.new_empty(0) if t is None else t for t in (found.x, *parameters, grad_residual))


def _promised(x: Tensor) -> Tensor:
    """What the compiler is told of outputs and gradients of the size of x: torch's layout for them."""
    return torch.empty_like(x, memory_format=plans.memory_format(x))


@torch.library.register_fake("batchnorm::train")
def _train_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _promised(x), x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("batchnorm::train_backward")
def _train_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *more: Any
) -> tuple[Tensor, ...]:
    own = torch.float64 if x.dtype == torch.float64 else torch.float32
    vectors = (x.new_empty(x.shape[1], dtype=own if t is None else t.dtype) for t in (weight, bias))
    grads, wanted = (_promised(x), *vectors, _promised(x)), more[-1]
    return tuple(t if want else x.new_empty(0) for t, want in zip(grads, wanted, strict=True))


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
