"""The gate: what must be true of a tensor before a loop gets its address.

A loop reads and writes memory as its plan says. So dtype, device, sizes and strides are compared here, and what makes
values differ from what stands in memory is looked for: the negative bit, subclasses, function transforms, dispatch
modes, forward-mode derivatives. In a forward that is done by ``fast_path`` and ``backends`` with `vectors`, `ready` and
``Epilogue.laid_like``; in a backward by the operations themselves, for what was saved may have become another tensor:
``saved_tensors_hooks`` return whatever they like, and ``.data = …``, ``half()`` and ``double()`` exchange what a
parameter holds without changing its version.

What can be made to fit is copied; the rest raises what torch raises. A gradient that has no memory of its own (batched
by ``vmap``, dual) is none of the loops' business: `readable` says so, and the reference takes over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.kernels.plans import Plan

PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}  # a subclass has semantics that raw memory lacks


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is watching: they need operations, not memory."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def alone() -> bool:
    """Whether operations would be seen by nobody else: no function transform, dispatch mode or forward derivative."""
    return (
        not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
    )


def has_strides(t: Tensor) -> bool:
    """Whether it can be asked how a tensor lies in memory: not of what a transform, old or new, has made of one."""
    return alone() and not torch._C._functorch.is_legacy_batchedtensor(t)


# --- forward ---


def vectors(plan: Plan, *tensors: Tensor | None) -> bool:
    """Whether weights, biases and running statistics are what the loops want of them."""
    size, dtype = plan.vector, plan.statistics
    for t in tensors:
        if t is not None and not (
            t.dtype == dtype
            and t.shape == size
            and type(t) in PLAIN
            and t.is_cpu
            and t.is_contiguous()
            and not t.is_neg()
        ):
            return False
    return True


def ready(t: Tensor | None, plan: Plan) -> Tensor | None:
    """A weight, a bias or running statistics as the loops want them: itself, or a copy."""
    return None if t is None else t.to(plan.statistics).contiguous().resolve_neg()


# --- backward ---


def readable(dy: Tensor) -> bool:
    """Whether a gradient's values can be read from memory at all; what cannot be is left to operations."""
    if type(dy) not in PLAIN or not dy.is_cpu or not alone():
        return False
    try:
        return dy.data_ptr() != 0  # 0: zeros that have no memory
    except RuntimeError:  # a wrapper that has none
        return False


def like_x(name: str, t: Tensor, plan: Plan) -> Tensor:
    """A saved tensor of the plan's layout: itself, or a copy that has it."""
    shape, strides = plan.layout
    if (
        t.dtype == plan.dtype
        and t.shape == shape
        and type(t) in PLAIN
        and t.is_cpu
        and t.layout == torch.strided
        and t.stride() == strides
        and not t.is_neg()
    ):
        return t
    check(name, t, plan.dtype, shape)
    return torch.empty_strided(shape, strides, dtype=plan.dtype, device="cpu").copy_(t)


def parameter(name: str, t: Tensor | None, plan: Plan) -> Tensor | None:
    """A saved weight or bias: itself, or a copy as the loops want it."""
    return t if t is None or vectors(plan, t) else flat(name, t, plan.statistics, plan.vector)


def flat(name: str, t: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A saved tensor that is contiguous: itself, or a copy."""
    check(name, t, dtype, shape)
    whole = type(t) in PLAIN and t.is_contiguous() and not t.is_neg()
    return t if whole else torch.empty(shape, dtype=dtype, device="cpu").copy_(t)


def check(name: str, t: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    """Raise what torch raises where a saved tensor has become one of another device, layout, dtype or size."""
    since = (
        "it has changed since the forward: by saved_tensors_hooks, by an assignment to .data, or by half() or double() "
        "of its layer; run the forward again"
    )
    if not t.is_cpu:
        raise RuntimeError(f"Tensor on device {t.device} is not on the expected device cpu!: {name}; {since}")
    if t.layout != torch.strided:
        raise NotImplementedError(
            f"Could not run 'batch_norm_backward' with arguments of layout {t.layout}: {name}; {since}"
        )
    if t.shape != shape:
        if len(shape) == 1 and t.numel() != shape.numel():
            raise RuntimeError(f"{name} should contain {shape.numel()} elements not {t.numel()}: {since}")
        raise RuntimeError(f"{name} should have size {tuple(shape)}, got {tuple(t.shape)}: {since}")
    if t.dtype != dtype:
        raise RuntimeError(f"mixed dtype (CPU): {name} should be {dtype}, got {t.dtype}: {since}")
