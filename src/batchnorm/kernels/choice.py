"""Which kernel serves a tensor, which one ran, and how to insist on one.

* ``"numba"``: Numba's machine code, for plain float32, float64 and bfloat16 tensors on the CPU.
* ``"aten"``: torch's own operators; always there, for every device, dtype and tracer.
* ``"reference"``: plain PyTorch, differentiable any number of times; for function transforms and forward-mode
  derivatives.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from batchnorm.kernels.gate import PLAIN, alone, transformed
from batchnorm.kernels.plans import served

Kernel = Literal["numba", "aten", "reference"]

_PLAIN = {*PLAIN, type(None)}
EVALUATE_FROM = 24 * 2**20  # bytes; ATen's evaluation is as fast as memory allows below (measured: kernels/README.md)
EVALUATE_FUSED_FROM = (
    2**19
)  # elements; below, one pass by the Numba kernel takes longer to prepare than torch's two or three

asked_for: ContextVar[Kernel | None] = ContextVar("batchnorm_kernel", default=None)


class Ran(NamedTuple):
    """The kernels that the last forward and the last backward on this thread went through; None before the first."""

    forward: str | None
    backward: str | None


class _Record(threading.local):
    forward: str | None = None
    backward: str | None = None


record = _Record()


def ran() -> Ran:
    """Say which kernels served this thread's last forward and last backward."""
    return Ran(record.forward, record.backward)


@contextmanager
def using(kernel: Kernel) -> Iterator[None]:
    """Insist on one kernel; a call that it cannot serve raises instead of falling back.

    Example:
        >>> with batchnorm.kernels.using("reference"):
        ...     y = layer(x)
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"unknown kernel {kernel!r}: choose from {', '.join(get_args(Kernel))}")
    token = asked_for.set(kernel)
    try:
        yield
    finally:
        asked_for.reset(token)


def which(
    x: Tensor,
    training: bool = True,
    *others: Tensor | None,
    fused: bool = False,
    inplace: bool = False,
    batches: Tensor | None = None,
) -> Kernel:
    """Name the kernel that would serve ``x`` here and now (with weight, bias and statistics, if given, in ``others``).

    Args:
        fused: with an activation or a residual, which moves the size from which on the Numba kernel does evaluation.
        inplace: the result takes the place of ``x``, which only the Numba kernel does, and so for any size.
        batches: the count of batches, if there is one to move.

    Raises:
        RuntimeError: if ``using`` asks for a kernel that cannot serve it.
    """
    asked = asked_for.get()
    if asked is None:
        if transformed():
            return "reference"
        if not training and not inplace and _as_fast_by_aten(x, fused):
            return "aten"
        return "numba" if _obstacle(x, others, batches) is None else "aten"
    obstacle = _obstacle(x, others, batches) if asked == "numba" else None
    if asked == "numba" and obstacle is None and transformed():
        obstacle = "a function transform or forward-mode derivative is active"
    if obstacle is not None:
        raise RuntimeError(f"kernel 'numba' was asked for, but {obstacle}; ask for another or let batchnorm choose")
    return asked


def unwatched() -> bool:
    """Whether eager mode is alone: no kernel is asked for, no transform, mode or tracer wants operations."""
    return asked_for.get() is None and torch._C._get_tracing_state() is None and alone()


def _as_fast_by_aten(x: Tensor, fused: bool) -> bool:
    """Whether one pass less, or writing around the caches, gains nothing in evaluation."""
    if fused:
        return x.numel() < EVALUATE_FUSED_FROM
    return x.dtype == torch.bfloat16 or x.numel() * x.element_size() < EVALUATE_FROM


def _obstacle(x: Tensor, others: tuple[Tensor | None, ...], batches: Tensor | None) -> str | None:
    """Why the Numba kernel cannot serve x; None if it can."""
    others = (*others, batches)
    if type(x) not in _PLAIN or not all(type(t) in _PLAIN for t in others):
        return "not all tensors are plain: subclasses have semantics of their own"
    if not all(t is None or t.is_cpu for t in others):
        return "not all tensors are on the CPU"
    if not x.is_cpu or not served(x.dtype, 2):
        return f"x is {x.dtype} on {x.device}, not float32, float64 or bfloat16 on the CPU"
    if x.layout != torch.strided or x.is_neg() or x._is_zerotensor():
        return "x is not a plain strided tensor"
    if not served(x.dtype, x.dim()):
        return f"x has {x.dim()} dimensions, not 2 to 5"
    if x.numel() == 0:
        return "x is empty"
    if batches is not None and batches.dtype != torch.int64:
        return f"num_batches_tracked is {batches.dtype}, not int64"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode wants to see torch's operations"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording torch's operations"
    return None
