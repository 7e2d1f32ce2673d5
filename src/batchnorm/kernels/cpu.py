"""Batch normalization on the CPU: sees a tensor as the loops do, divides the work, allocates and launches.

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
_SMALL_SPACE = 32  # runs shorter than this are seen as columns
_COLUMNS = 512  # the loops' limit of columns in a block
_GROUP = 16  # the loops' limit of channels in a group
_LONG = 16384  # neighbours in one part of a long run
_PER_THREAD = 32 * 1024  # bytes that are worth waking a thread for


class Plan(NamedTuple):
    """How a tensor is seen (batch × channels × space, as "planes", "small" or "rows") and how the work is cut.

    Fused work keeps a block of channels or columns in cache between its two passes. Other work is cut into `parts` of
    `block` neighbours (planes) or rows, and one pass ends before the next begins.
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
    vector: torch.Size  # theirs
    moments: Tensor  # patterns: `empty_like` costs less than to say what is wanted
    gradient: Tensor
    strides: tuple[int, int, int]  # over batch, channels and space
    share: float  # of one value in its channel: 1 / (batch · space)

    def threads(self) -> int:
        return 1 if self.worth_threads == 1 else min(torch.get_num_threads(), self.worth_threads)


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


def laid_out(x: Tensor) -> tuple[Tensor, Plan]:
    """x itself where the loops can read it, else a copy that they can (autograd sees it made); and the plan for it."""
    found = plan(x.shape, x.stride(), x.dtype)
    if found is None:
        x = x.contiguous()
        found = plan(x.shape, x.stride(), x.dtype)
        assert found is not None, "contiguous tensors can always be read"
    return x, found


# --- planning ---


@lru_cache(maxsize=4096)
def plan(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Plan | None:
    """How to serve tensors of that shape, layout and dtype; None where the loops cannot or where no variance exists."""
    if dtype not in DTYPES or not 2 <= len(shape) <= 5 or shape.numel() <= shape[1]:
        return None
    seen = _view(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    if seen is None:
        return None
    kind, batch, channels, space = seen
    size = batch * channels * space * dtype.itemsize
    fused, parts, block = _divide(kind, batch, channels, space, dtype.itemsize)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    columns = channels if kind == "rows" else channels * space
    if fused:
        units = -(-(channels if kind == "planes" else columns) // block)
    else:
        units = parts * (channels if kind == "planes" else 1)
    run = {"rows": channels, "planes": space, "small": channels * space if block % 16 == 0 else 1}[kind]
    return Plan(
        kind, batch, channels, space, fused, parts, block,
        worth_threads=min(1 + size // _PER_THREAD, units),
        streams=size >= _beyond_cache() and run % 16 == 0,
        statistics=statistics,
        vector=torch.Size([channels]),
        moments=torch.empty(2, channels, dtype=torch.float64, device="cpu"),
        gradient=torch.empty(channels, dtype=statistics, device="cpu"),
        strides=(channels * space, 1, channels) if kind == "rows" else (channels * space, space, 1),
        share=1.0 / (batch * space),
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
    parts = max(4, min(32, rows * itemsize // 256))  # their sums, 16 bytes a channel and part, stay a small share
    block = max(_SLAB // (channels * itemsize), -(-rows // parts), 8)
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


# --- launching ---
# `slots` below are what loops/slots.py names X, DY, OUT … SHARE, in that order.


def _shape_slots(plan: Plan) -> tuple[int, int, int, int, int, int]:
    """BATCH to BLOCK."""
    return plan.batch, plan.channels, plan.space, plan.strides[1], plan.parts, plan.block


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _as_statistics(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A channel vector as the loops read it."""
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def _streams(plan: Plan, out: int) -> bool:
    return plan.streams and out % 64 == 0


def _between_passes(plan: Plan, coefficients: int) -> tuple[Tensor, int, int]:
    """Memory for the parts' sums and for the coefficients (float64 slots serve both), and where each begins."""
    sums = 2 * plan.parts * plan.channels
    memory = torch.empty(sums + coefficients * plan.channels, dtype=torch.float64, device="cpu")
    return memory, memory.data_ptr(), memory.data_ptr() + 8 * sums


def forward(
    x: Tensor, plan: Plan, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalize with the batch's own moments; returns y and the moments (2, C): mean and biased variance, float64."""
    y = torch.empty_like(x)
    moments = torch.empty_like(plan.moments)
    weight, bias = _as_statistics(weight, plan.statistics), _as_statistics(bias, plan.statistics)
    buffers, factor = (0, 0, 0), 0.0
    if running is not None:
        buffers = (_address(running.mean), _address(running.var), _address(running.batches))
        factor = running.factor
    memory, partials, coefficients = (None, 0, 0) if plan.fused else _between_passes(plan, 3)
    out = y.data_ptr()
    slots = (
        x.data_ptr(), 0, out, _address(weight), _address(bias), *buffers, moments.data_ptr(), coefficients, partials,
        0, 0, *_shape_slots(plan), 0, 0, 0, _streams(plan, out), eps, factor, plan.share,
    )  # fmt: skip
    if plan.fused:
        launch.run(f"{plan.kind}_forward", x.dtype, slots, plan.threads(), stages=2)
    else:
        launch.run(f"{plan.kind}_split_forward", x.dtype, slots, plan.threads(), stages=3)
    del memory  # alive until here
    return y, moments


def backward(
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    weight: Tensor | None,
    moments: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients through the batch's moments of x, weight and bias, each only if wanted."""
    same = dy.dtype == x.dtype and dy.is_contiguous() and x.is_contiguous()
    dy, strides = (dy, plan.strides) if same else _readable(dy, x, plan)
    if plan.kind == "small" and strides[1:] != (plan.space, 1):  # a sample of dy is no row of columns
        plan = plan._replace(kind="planes", block=1, streams=plan.streams and plan.space % 16 == 0)
    dx = torch.empty_like(x) if wanted[0] else None
    grad_weight = torch.empty_like(plan.gradient) if wanted[1] else None
    grad_bias = torch.empty_like(plan.gradient) if wanted[2] else None
    weight = _as_statistics(weight, plan.statistics)
    memory, partials, coefficients = (None, 0, 0) if plan.fused else _between_passes(plan, 4)
    out = _address(dx)
    slots = (
        x.data_ptr(), dy.data_ptr(), out, _address(weight), 0, 0, 0, 0, moments.data_ptr(), coefficients, partials,
        _address(grad_weight), _address(grad_bias), *_shape_slots(plan), *strides,
        _streams(plan, out), eps, 0.0, plan.share,
    )  # fmt: skip
    if plan.fused:
        launch.run(f"{plan.kind}_backward", x.dtype, slots, plan.threads())
    else:
        launch.run(f"{plan.kind}_split_backward", x.dtype, slots, plan.threads(), stages=3)
    del memory
    return Gradients(dx, grad_weight, grad_bias)


def evaluate(
    x: Tensor, plan: Plan, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize with given moments."""
    if plan.kind != "rows":  # runs in memory order, whatever the channels
        streams = plan.streams and plan.space % 16 == 0
        plan = plan._replace(kind="planes", parts=-(-plan.space // _LONG), block=_LONG, streams=streams)
    plan = plan._replace(worth_threads=1 + x.numel() * x.element_size() // _PER_THREAD)
    y = torch.empty_like(x)
    memory = torch.empty(5, plan.channels, dtype=torch.float64, device="cpu")  # two moments, three coefficients
    memory[0], memory[1] = mean, var
    weight, bias = _as_statistics(weight, plan.statistics), _as_statistics(bias, plan.statistics)
    moments, out = memory.data_ptr(), y.data_ptr()
    slots = (
        x.data_ptr(), 0, out, _address(weight), _address(bias), 0, 0, 0, moments, moments + 16 * plan.channels, 0, 0, 0,
        *_shape_slots(plan), 0, 0, 0, _streams(plan, out), eps, 0.0, plan.share,
    )  # fmt: skip
    launch.run("prepare", x.dtype, slots, 1)
    launch.run(f"{plan.kind}_apply", x.dtype, slots, plan.threads())
    return y


# --- gradients of every layout ---


def _readable(dy: Tensor, x: Tensor, plan: Plan) -> tuple[Tensor, tuple[int, int, int]]:
    """dy, or a copy laid out like x, and its strides over batch, channels and space; expanded ones stay so."""
    if dy.dtype != x.dtype:
        dy = dy.to(x.dtype)
    if dy.stride() == x.stride():
        return dy, plan.strides
    step = _step(dy) if plan.channels > 1 else None
    if step is not None and (dy.stride(1) == 1 if plan.kind == "rows" else step in (0, 1)):
        return dy, (dy.stride(0), dy.stride(1), step)
    return torch.empty_like(x).copy_(dy), plan.strides


def _step(dy: Tensor) -> int | None:
    """The one stride that walks through all of dy's space in order, if there is one."""
    step: int | None = None
    following = 0
    for size, stride in zip(reversed(dy.shape[2:]), reversed(dy.stride()[2:]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != following:
            return None
        following = stride * size
    return step or 0
