"""Batch normalization on the CPU: picks the view of the tensor and the division of work, allocates, and launches the loops.

The division depends on the tensor's shape alone, so that results are the same for any number of threads.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import launch

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

_SLAB = 256 * 1024  # bytes: half a second-level cache, what one thread can keep at hand between two passes
_SMALL_SPACE = 64  # runs shorter than this are seen as columns
_COLUMNS = 512  # the loops' limit of columns in a block
_GROUP = 16  # the loops' limit of channels in a group
_LONG = 16384  # neighbours in one part of a long run
_PER_THREAD = 32 * 1024  # bytes that are worth waking a thread for


class Plan(NamedTuple):
    """How a tensor is seen, batch × channels × space in the view `kind` ("planes", "small" or "rows"), and how the work is cut.

    Fused work keeps a block of channels or columns in cache between its two passes. Other work is cut into `parts` of `block`
    neighbours (planes) or rows, and one pass ends before the next begins.
    """

    kind: str
    batch: int
    channels: int
    space: int
    fused: bool
    parts: int
    block: int
    worth_threads: int
    streams: bool  # the output is large and regular enough to be written around the caches
    statistics: torch.dtype  # of weight, bias, running statistics and their gradients


class Running(NamedTuple):
    """The buffers that a training step moves, and the weight of the new value (negative: the cumulative average)."""

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    factor: float = 0.0


class Gradients(NamedTuple):
    """Of x, weight and bias; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def supports(x: Tensor) -> bool:
    """Whether the loops can serve this tensor, after a copy if its layout is unusual."""
    return x.dtype in DTYPES and x.device.type == "cpu" and x.layout == torch.strided and 2 <= x.dim() <= 5


def laid_out(x: Tensor) -> Tensor:
    """x itself where the loops can read it, else a copy that they can."""
    return x if _plan(x.shape, x.stride(), x.dtype) is not None else x.contiguous()


def holds_statistics(buffer: Tensor | None, x: Tensor) -> bool:
    """Whether the loops can move this buffer in place."""
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    return buffer is None or (buffer.dtype == wanted and buffer.is_contiguous())


# --- planning ----------------------------------------------------------------------------------------------------------------------


def plan(x: Tensor) -> Plan:
    """The plan for a tensor that `laid_out` returned."""
    found = _plan(x.shape, x.stride(), x.dtype)
    if found is None:
        raise ValueError(f"no CPU loop reads strides {x.stride()} of shape {tuple(x.shape)}: pass laid_out(x)")
    return found


@lru_cache(maxsize=4096)
def _plan(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Plan | None:
    seen = _view(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    if seen is None:
        return None
    kind, batch, channels, space = seen
    itemsize = dtype.itemsize
    size = batch * channels * space * itemsize
    fused, parts, block = _divide(kind, batch, channels, space, itemsize)
    run = {"rows": channels, "planes": space, "small": channels * space if block % 8 == 0 else 1}[kind]
    return Plan(
        kind, batch, channels, space, fused, parts, block,
        worth_threads=1 + size // _PER_THREAD,
        streams=size >= _beyond_cache() and run % 8 == 0,
        statistics=torch.float64 if dtype == torch.float64 else torch.float32,
    )  # fmt: skip


def _view(x: Tensor) -> tuple[str, int, int, int] | None:
    batch, channels = x.shape[0], x.shape[1]
    space = x.numel() // (batch * channels)
    if x.is_contiguous():
        if space == 1:
            return "rows", batch, channels, 1
        if channels == 1:  # every value is the channel's: one long run
            return "planes", 1, 1, batch * space
        return "small" if space < _SMALL_SPACE else "planes", batch, channels, space
    if x.stride(1) == 1 and x.movedim(1, -1).is_contiguous():
        return "rows", batch, channels, space
    return None


def _divide(kind: str, batch: int, channels: int, space: int, itemsize: int) -> tuple[bool, int, int]:
    """(fused, parts, block)."""
    if kind == "planes":
        if channels >= 8 or batch * channels * space * itemsize <= _SLAB:
            fits = _SLAB // (batch * space * itemsize)
            return True, 0, max(1, min(_GROUP, fits, channels // 16))
        return False, -(-space // _LONG), _LONG
    if kind == "small":
        return True, 0, _COLUMNS // space * space
    rows = batch * space
    if rows * min(_COLUMNS, channels) * itemsize <= _SLAB:
        return True, 0, _COLUMNS
    block = max(_SLAB // (channels * itemsize), -(-rows // 32), 8)
    block = -(-block // 8) * 8
    return False, -(-rows // block), block


@cache
def _beyond_cache() -> int:
    """Bytes of a tensor from which on its output is written around the caches: half of the last level."""
    try:
        last_level = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError, AttributeError):
        last_level = 0
    return (last_level if last_level > 0 else 32 * 2**20) // 2


# --- launching ---------------------------------------------------------------------------------------------------------------------


class _Call:
    """One call's memory and plan, as the loops' slots."""

    def __init__(self, x: Tensor, planned: Plan, eps: float) -> None:
        self.x, self.plan, self.eps = x, planned, eps
        self.dy = self.out = self.weight = self.bias = self.moments = 0
        self.coefficients = self.partials = self.grad_weight = self.grad_bias = 0
        self.running: tuple[int, int, int] = (0, 0, 0)
        self.factor = 0.0
        self.dy_strides: tuple[int, int, int] = (0, 0, 0)
        self.stream = False

    def run(self, name: str, threads: int | None = None) -> bool:
        p = self.plan
        slots = (
            self.x.data_ptr(), self.dy, self.out, self.weight, self.bias, *self.running,
            self.moments, self.coefficients, self.partials, self.grad_weight, self.grad_bias,
            p.batch, p.channels, p.space, 1 if p.kind == "rows" else p.space, *self.dy_strides,
            p.parts, p.block, self.stream, self.eps, self.factor,
        )  # fmt: skip
        if threads is None:
            threads = 1 if p.worth_threads == 1 else min(torch.get_num_threads(), p.worth_threads)
        return launch.run(launch.kernel(name, self.x.dtype), slots, threads)

    def writes(self, out: Tensor) -> Tensor:
        self.out = out.data_ptr()
        self.stream = self.plan.streams and self.out % 64 == 0
        return out

    def between_passes(self, coefficients: int) -> Tensor:
        """Memory for the parts' sums and for the coefficients, from one allocation (float64 slots serve both)."""
        sums = 2 * self.plan.parts * self.plan.channels
        memory = torch.empty(sums + coefficients * self.plan.channels, dtype=torch.float64)
        self.partials = memory.data_ptr()
        self.coefficients = self.partials + 8 * sums
        return memory


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _as_statistics(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A channel vector as the loops read it."""
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalize with the batch's own moments; returns y and the moments (2, C): mean and biased variance, float64."""
    planned = plan(x)
    call = _Call(x, planned, eps)
    y = call.writes(torch.empty_like(x))
    moments = torch.empty((2, planned.channels), dtype=torch.float64)
    weight, bias = _as_statistics(weight, planned.statistics), _as_statistics(bias, planned.statistics)
    call.weight, call.bias, call.moments = _address(weight), _address(bias), moments.data_ptr()
    if running is not None:
        call.running = (_address(running.mean), _address(running.var), _address(running.batches))
        call.factor = running.factor
    if planned.fused:
        alone = call.run(f"{planned.kind}_forward")
        if running is not None and not alone:
            call.run("update_running", threads=1)
    else:
        _memory = call.between_passes(coefficients=3)  # named, so that it lives until the last pass is done
        call.run(f"{planned.kind}_reduce")
        call.run("combine", threads=1)
        call.run(f"{planned.kind}_apply")
    return y, moments


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, eps: float, wanted: tuple[bool, bool, bool]
) -> Gradients:
    """Gradients through the batch's moments of x, weight and bias, each only if wanted."""
    planned = plan(x)
    call = _Call(x, planned, eps)
    dy, call.dy_strides = _readable(dy, x, planned)
    call.dy, call.moments = dy.data_ptr(), moments.data_ptr()
    dx = call.writes(torch.empty_like(x)) if wanted[0] else None
    grad_weight, grad_bias = _vector(planned, wanted[1]), _vector(planned, wanted[2])
    weight = _as_statistics(weight, planned.statistics)
    call.weight, call.grad_weight, call.grad_bias = _address(weight), _address(grad_weight), _address(grad_bias)
    if planned.fused:
        if planned.kind == "small" and call.dy_strides[1:] != (planned.space, 1):  # a sample of dy is no row of columns
            call.plan = planned = planned._replace(kind="planes", block=1)
        call.run(f"{planned.kind}_backward")
    else:
        _memory = call.between_passes(coefficients=4)
        call.run(f"{planned.kind}_backward_reduce")
        call.run("backward_combine", threads=1)
        if dx is not None:
            call.run(f"{planned.kind}_backward_apply")
    return Gradients(dx, grad_weight, grad_bias)


def _vector(planned: Plan, wanted: bool) -> Tensor | None:
    return torch.empty(planned.channels, dtype=planned.statistics) if wanted else None


def evaluate(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize with given moments."""
    planned = plan(x)
    if planned.kind != "rows":
        planned = planned._replace(parts=-(-planned.space // _LONG), block=_LONG, streams=planned.streams and planned.space % 8 == 0)
    call = _Call(x, planned, eps)
    y = call.writes(torch.empty_like(x))
    memory = torch.empty((5, planned.channels), dtype=torch.float64)
    memory[0].copy_(mean)
    memory[1].copy_(var)
    weight, bias = _as_statistics(weight, planned.statistics), _as_statistics(bias, planned.statistics)
    call.weight, call.bias, call.moments = _address(weight), _address(bias), memory.data_ptr()
    call.coefficients = call.moments + 16 * planned.channels
    call.run("prepare", threads=1)
    call.run("rows_apply" if planned.kind == "rows" else "planes_apply")
    return y


# --- gradients of every layout -----------------------------------------------------------------------------------------------------


def _readable(dy: Tensor, x: Tensor, planned: Plan) -> tuple[Tensor, tuple[int, int, int]]:
    """dy, or a copy laid out like x, and its strides over batch, channels and space; expanded gradients are read as they are."""
    if dy.dtype != x.dtype:
        dy = dy.to(x.dtype)
    whole = planned.channels * planned.space
    if dy.stride() == x.stride() or (dy.is_contiguous() and x.is_contiguous()):
        return dy, (whole, 1, planned.channels) if planned.kind == "rows" else (whole, planned.space, 1)
    step = _step(dy) if planned.channels > 1 else None
    if step is not None and (dy.stride(1) == 1 if planned.kind == "rows" else step in (0, 1)):
        return dy, (dy.stride(0), dy.stride(1), step)
    return _readable(torch.empty_like(x).copy_(dy), x, planned)


def _step(dy: Tensor) -> int | None:
    """The one stride that walks through all of dy's space in order, if there is one."""
    step = following = 0
    for size, stride in zip(reversed(dy.shape[2:]), reversed(dy.stride()[2:]), strict=True):
        if size == 1:
            continue
        if following == 0 and step == 0:
            step = stride
        elif stride != following:
            return None
        following = stride * size
    return step
