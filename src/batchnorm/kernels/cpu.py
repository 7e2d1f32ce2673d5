"""Batch normalization on the CPU: picks the view of the tensor and the division of work, allocates, and launches the loops.

The division depends on the tensor's shape alone, so that results are the same for any number of threads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import launch

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

_SLAB = 256 * 1024  # bytes: half a second-level cache, what one thread can keep at hand between two passes
_SMALL_SPACE = 64  # below this a run is too short for planes
_COLUMNS = 512  # the loops' limit
_RUN = 16384  # neighbours in one part of a long run
_PER_THREAD = 32 * 1024  # bytes that are worth waking a thread for


class View(NamedTuple):
    """A tensor as batch × channels × space, and which of the loops' views fits: "planes", "small" or "rows"."""

    kind: str
    batch: int
    channels: int
    space: int


class Division(NamedTuple):
    """How the work is cut: `parts` of `block` (rows, neighbours) in separate passes, or blocks of columns in one fused pass."""

    fused: bool
    parts: int
    block: int


class Running(NamedTuple):
    """The buffers that a training step moves, and the weight of the new value (negative: the cumulative average)."""

    mean: Tensor | None
    var: Tensor | None
    count: Tensor | None
    factor: float


def supports(x: Tensor) -> bool:
    """Whether the loops can serve this tensor, after a copy if its layout is unusual."""
    return x.dtype in DTYPES and x.device.type == "cpu" and x.layout == torch.strided and 2 <= x.dim() <= 5


def view(x: Tensor) -> View | None:
    """How the loops can see x without a copy; None if they can't."""
    shape = x.shape
    batch, channels = shape[0], shape[1]
    if x.is_contiguous():
        space = x.numel() // (batch * channels)
        if space == 1:
            return View("rows", batch, channels, 1)
        if channels == 1:  # every value is the channel's: one long run
            return View("planes", 1, 1, batch * space)
        return View("small" if space < _SMALL_SPACE else "planes", batch, channels, space)
    if x.stride(1) == 1 and x.movedim(1, -1).is_contiguous():
        return View("rows", batch, channels, x.numel() // (batch * channels))
    return None


def laid_out(x: Tensor) -> Tensor:
    """x itself where the loops can read it, else a copy that they can."""
    return x if view(x) is not None else x.contiguous()


@cache
def _divide(kind: str, batch: int, channels: int, space: int, itemsize: int) -> Division:
    if kind == "planes":
        if channels >= 8 or batch * channels * space * itemsize <= _SLAB:
            return Division(True, 0, 0)
        return Division(False, -(-space // _RUN), _RUN)
    if kind == "small":
        return Division(True, 0, _COLUMNS // space * space)
    rows = batch * space
    for width in (512, 256, 128):
        if rows * min(width, channels) * itemsize <= _SLAB:
            return Division(True, 0, width)
    block = max(_SLAB // (channels * itemsize), -(-rows // 64), 4)
    block = -(-block // 4) * 4
    return Division(False, -(-rows // block), block)


@cache
def _beyond_cache() -> int:
    """Bytes of a tensor from which on its output is written around the caches: half of the last level."""
    try:
        last_level = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError, AttributeError):
        last_level = 0
    return (last_level if last_level > 0 else 32 * 2**20) // 2


@dataclass
class _Work:
    """One call's slots (loops.py names them), filled in step by step."""

    x: Tensor
    view: View
    division: Division
    threads: int
    dy: int = 0
    out: int = 0
    weight: int = 0
    bias: int = 0
    moments: int = 0
    coefficients: int = 0
    partials: int = 0
    grad_weight: int = 0
    grad_bias: int = 0
    dy_strides: tuple[int, int, int] = (0, 0, 0)
    stream: bool = False
    eps: float = 0.0
    running: tuple[int, int, int, float] = (0, 0, 0, 0.0)

    def run(self, name: str, threads: int | None = None) -> None:
        v, d = self.view, self.division
        slots = (
            self.x.data_ptr(), self.dy, self.out, self.weight, self.bias, *self.running[:3],
            self.moments, self.coefficients, self.partials, self.grad_weight, self.grad_bias,
            v.batch, v.channels, v.space, 1 if v.kind == "rows" else v.space, *self.dy_strides,
            d.parts, d.block, self.stream, self.eps, self.running[3],
        )  # fmt: skip
        launch.run(launch.kernel(name, self.x.dtype), slots, self.threads if threads is None else threads)

    def between_passes(self, coefficients: int) -> Tensor:
        """Memory for the parts' sums and for the coefficients, from one allocation (float64 slots serve both)."""
        sums = 2 * self.division.parts * self.view.channels
        memory = torch.empty(sums + coefficients * self.view.channels, dtype=torch.float64)
        self.partials = memory.data_ptr()
        self.coefficients = self.partials + 8 * sums
        return memory


def _work(x: Tensor) -> _Work:
    seen = view(x)
    assert seen is not None, "callers pass what laid_out() returned"
    size = x.numel() * x.element_size()
    threads = min(torch.get_num_threads(), 1 + size // _PER_THREAD)
    return _Work(x, seen, _divide(*seen, x.element_size()), threads)


def _can_stream(work: _Work, out: Tensor) -> bool:
    if out.numel() * out.element_size() < _beyond_cache() or out.data_ptr() % 64:
        return False
    run = work.view.channels if work.view.kind == "rows" else work.view.space
    if work.view.kind == "small":
        return work.view.channels * run % 8 == 0 and work.division.block % 8 == 0
    return run % 8 == 0


def parameter(t: Tensor | None, x: Tensor) -> Tensor | None:
    """weight or bias as the loops read it: contiguous, float32 (float64 beside a float64 x)."""
    if t is None:
        return None
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    return t if t.dtype == wanted and t.is_contiguous() else t.to(wanted).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float) -> tuple[Tensor, Tensor]:
    """Normalize with the batch's own moments; returns y and the moments (2, C): mean and biased variance, float64."""
    work = _work(x)
    y = torch.empty_like(x)
    moments = torch.empty((2, work.view.channels), dtype=torch.float64)
    weight, bias = parameter(weight, x), parameter(bias, x)
    work.out, work.weight, work.bias, work.moments, work.eps = (
        y.data_ptr(), _address(weight), _address(bias), moments.data_ptr(), eps,
    )  # fmt: skip
    work.stream = _can_stream(work, y)
    kind = work.view.kind
    if work.division.fused:
        work.run(f"{kind}_forward")
    else:
        memory = work.between_passes(coefficients=3)
        work.run(f"{kind}_reduce")
        work.run("combine", threads=1)
        work.run(f"{kind}_apply")
        del memory
    if running.mean is not None or running.count is not None:
        work.running = (_address(running.mean), _address(running.var), _address(running.count), running.factor)
        work.run("update_running", threads=1)
    return y, moments


def evaluate(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize with given moments."""
    work = _work(x)
    y = torch.empty_like(x)
    moments = torch.stack((mean.double(), var.double()))
    weight, bias = parameter(weight, x), parameter(bias, x)
    work.weight, work.bias, work.moments, work.eps = _address(weight), _address(bias), moments.data_ptr(), eps
    _apply(work, y, "prepare")
    return y


def _apply(work: _Work, y: Tensor, prepare: str) -> None:
    work.out, work.stream = y.data_ptr(), _can_stream(work, y)
    if work.view.kind != "rows":
        work.division = Division(False, -(-work.view.space // _RUN), _RUN)
    coefficients = torch.empty(3 * work.view.channels, dtype=torch.float64)
    work.coefficients = coefficients.data_ptr()
    work.run(prepare, threads=1)
    work.run("rows_apply" if work.view.kind == "rows" else "planes_apply")


def _readable_gradient(dy: Tensor, x: Tensor, seen: View) -> tuple[Tensor, tuple[int, int, int]]:
    """dy, or a copy laid out like x, with its strides over batch, channels and space; expanded gradients stay expanded."""
    dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
    if dy.stride() == x.stride() or (dy.is_contiguous() and x.is_contiguous()):
        return dy, (
            (seen.channels * seen.space, seen.space, 1) if seen.kind != "rows" else (seen.channels * seen.space, 1, seen.channels)
        )
    if seen.kind != "rows" and seen.channels > 1:
        step = _uniform_step(dy)
        if step in (0, 1):
            return dy, (dy.stride(0), dy.stride(1), step)
    if seen.kind == "rows" and dy.stride(1) == 1 and dy.dim() > 2:
        step = _uniform_step(dy)
        if step is not None:
            return dy, (dy.stride(0), 1, step)
    if seen.kind == "rows" and dy.dim() == 2 and dy.stride(1) == 1:
        return dy, (dy.stride(0), 1, 0)
    return _readable_gradient(torch.empty_like(x).copy_(dy), x, seen)


def _uniform_step(dy: Tensor) -> int | None:
    """The one stride that walks through all of dy's space in order, if there is one."""
    step: int | None = None
    expected = None
    for size, stride in zip(reversed(dy.shape[2:]), reversed(dy.stride()[2:]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return step


class Gradients(NamedTuple):
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, eps: float, wanted: tuple[bool, bool, bool]
) -> Gradients:
    """Gradients of x, weight and bias through the batch's moments; None where not wanted."""
    work = _work(x)
    dy, work.dy_strides = _readable_gradient(dy, x, work.view)
    kind = work.view.kind
    if kind == "small" and dy.stride() != x.stride():
        kind = "planes"
    need_x, need_weight, need_bias = wanted
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = torch.empty_like(x) if need_x else None
    grad_weight = torch.empty(work.view.channels, dtype=dtype) if need_weight else None
    grad_bias = torch.empty(work.view.channels, dtype=dtype) if need_bias else None
    weight = parameter(weight, x)
    work.dy, work.out, work.weight, work.moments, work.eps = (
        dy.data_ptr(), _address(dx), _address(weight), moments.data_ptr(), eps,
    )  # fmt: skip
    work.grad_weight, work.grad_bias = _address(grad_weight), _address(grad_bias)
    work.stream = dx is not None and _can_stream(work, dx)
    if work.division.fused:
        work.run(f"{kind}_backward")
    else:
        memory = work.between_passes(coefficients=4)
        work.run(f"{kind}_backward_reduce")
        work.run("backward_combine", threads=1)
        if dx is not None:
            work.run(f"{kind}_backward_apply")
        del memory
    return Gradients(dx, grad_weight, grad_bias)
