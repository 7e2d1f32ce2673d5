"""Batch normalization by the Numba kernel: allocates, tells the loops what is where, and launches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from batchnorm.kernels import launch
from batchnorm.kernels.epilogue import NOTHING, Epilogue
from batchnorm.kernels.key import Form
from batchnorm.kernels.loops.table import SAMPLE_SETS, packed_call
from batchnorm.kernels.plans import PER_THREAD, Plan, planned, split_or_fused
from batchnorm.kernels.running import Running

_SUMMED_BY_THREADS = 4096  # weights that a thread sums up in a microsecond


class Sets(NamedTuple):
    """The sets that moments are taken over, where they are not the batch with all its positions."""

    size: int  # samples of a set; the last one may have fewer
    weights: Tensor | None = None  # of positions: (N, *space), contiguous, in the plan's dtype of statistics
    counts: Tensor | None = None  # their sum in each set, float64; if not given, every thread takes it itself
    limits: tuple[float, float] | None = None  # of r and d, where renormalization follows
    moments: Tensor | None = None  # where they are written: (sets, 2, C), mean and biased variance; with r and d, 4
    number: int = 1
    slots: bytes = b""  # `packed`

    @property
    def weighted(self) -> bool:
        return self.weights is not None

    def packed(self, plan: Plan) -> bytes:
        rows, limits = (2, (0.0, 0.0)) if self.limits is None else (4, self.limits)
        return SAMPLE_SETS.pack(
            self.number, self.size, plan.runs * plan.row_bits // 8, rows, plan.dtype.itemsize,
            _address(self.weights), _address(self.counts), 0, 0, 0.0, *limits,
        )  # fmt: skip


def sets_of(plan: Plan, size: int, weights: Tensor | None, limits: tuple[float, float] | None) -> Sets:
    """The sets of a tensor, with memory for their moments."""
    rows, number = 2 if limits is None else 4, -(-plan.batch // size)
    moments = torch.empty(number, rows, plan.channels, dtype=torch.float64, device="cpu")
    counts = summed(weights, size) if weights is not None and weights.numel() > _SUMMED_BY_THREADS else None
    sets = Sets(size, weights, counts, limits, moments, number)
    return sets._replace(slots=sets.packed(plan))


def summed(weights: Tensor, size: int) -> Tensor:
    """The sum of the weights in each set of `size` samples."""
    n = weights.shape[0]
    sets, weights = -(-n // size), weights.reshape(n, -1)
    apart = pad(weights, (0, 0, 0, sets * size - n)) if n % size else weights
    return apart.view(sets, -1).sum(1, dtype=torch.float64)


class Gradients(NamedTuple):
    """Of x, weight, bias and residual; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None = None


# --- launching ---
# Where every microsecond counts, slots are packed in the order of loops/table.py; elsewhere by name.


def forward(
    x: Tensor,
    plan: Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    epilogue: Epilogue = NOTHING,
    slope_bits: Tensor | None = None,
    sets: Sets | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize with the batch's own moments, and what follows.

    Args:
        x: laid out so that ``plan`` is its plan; so is a residual.
        weight, bias: ``(C,)`` or None, contiguous, in the plan's dtype of statistics; so are the running statistics.
        slope_bits: ``plan.slope_bits()`` to be filled, if wanted.
        sets: then ``plan`` is a ``sets_plan``.

    Returns:
        y, and the moments (2, C): mean and biased variance, float64; with ``sets``, theirs.
    """
    moments = torch.empty_like(plan.moments) if sets is None else sets.moments
    assert moments is not None
    mean = var = batches = 0
    factor: float | Tensor = 0.0
    if running is not None:
        mean, var, batches = map(_address, running[:3])
        factor = -1.0 if running.momentum is None else running.momentum
    memory, partials, coefficients = (None, 0, 0) if plan.fused else _between_passes(plan, 3)
    if epilogue is NOTHING:
        y, residual, parameter = plan.empty_like(x), 0, 0.0
        kernel = plan.forward if sets is None or sets.weights is None else plan.kernel("forward", Form(weighted=True))
    else:
        y = x if epilogue.inplace else plan.empty_like(x)
        form, residual, parameter = _form(epilogue, slope_bits, sets)
        kernel = plan.kernel("forward", form)
    out = y.data_ptr()
    slots = launch.pack(
        _address(x), 0, out, _address(weight), _address(bias), mean, var, batches, moments.data_ptr(),
        coefficients, partials, 0, 0, residual, 0, _address(slope_bits), *plan.sizes, 0, 0, 0,
        plan.streams and out % 64 == 0, eps, factor, plan.share, parameter,
    )  # fmt: skip
    kernel(slots, plan.threads(), 1 if plan.fused else 3, launch.ONE_SET if sets is None else sets.slots)
    del memory  # alive until here
    return y, moments


def backward(
    dy: Tensor,
    x: Tensor | None,
    plan: Plan,
    weight: Tensor | None,
    moments: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool, bool],
    epilogue: Epilogue = NOTHING,
    slope_bits: Tensor | None = None,
    bias: Tensor | None = None,
    fixed: bool = False,
    sets: Sets | None = None,
) -> Gradients:
    """Gradients of x, weight, bias and residual, each only if wanted; through the moments unless these are fixed.

    Args:
        x: what the forward normalized; y, where that took x's place; None where moments are fixed and nothing else
            depends on it.
        epilogue: the forward's, without a residual that nothing depends on.
        bias: only what the activation gets depends on it.
        fixed: the moments did not depend on x, and ``plan`` is an ``inference_plan``.
    """
    own_plan = plan
    if x is None:
        x = torch.empty_strided(*plan.layout, dtype=plan.dtype, device="cpu")
    strides = plan.strides
    if dy.dtype != plan.dtype or dy.stride() != plan.layout[1] or dy.is_neg():
        dy, strides = _readable(dy, x, plan)
        if plan.kind == "small" and strides[1:] != (plan.space, 1):  # a sample of dy is no row of columns
            if slope_bits is not None:  # which are laid out as this plan has it
                dy, strides = torch.empty_like(x).copy_(dy), plan.strides
            else:
                plan = planned(plan.layout, plan.dtype, ("planes", *plan[1:4]), True, 0, 1)
    dx = plan.empty_like(x) if wanted[0] or wanted[3] else None
    grad_weight = torch.empty_like(plan.gradient) if wanted[1] else None
    grad_bias = torch.empty_like(plan.gradient) if wanted[2] else None
    grad_residual = plan.empty_like(x) if wanted[3] else None
    memory, partials, coefficients = (None, 0, 0) if plan.fused else _between_passes(plan, 5)
    if epilogue is NOTHING and not fixed and (sets is None or sets.weights is None):
        kernel, residual, parameter = plan.backward, 0, 0.0
    else:
        form, residual, parameter = _form(epilogue, slope_bits, sets, fixed)
        kernel = plan.kernel("backward", form)
    out, dz = _address(dx), _address(grad_residual)
    slots = launch.pack(
        _address(x), _address(dy), out, _address(weight), _address(bias), 0, 0, 0, moments.data_ptr(),
        coefficients, partials, _address(grad_weight), _address(grad_bias), residual, dz, _address(slope_bits),
        *plan.sizes, *strides, plan.streams and out % 64 == 0 and dz % 64 == 0,
        eps, 0.0, 0.0 if fixed else plan.share, parameter,
    )  # fmt: skip
    packed = launch.ONE_SET
    if sets is not None:
        packed = sets.slots if plan is own_plan else sets.packed(plan)
    kernel(slots, plan.threads(), 1 if plan.fused else 4, packed)
    del memory
    return Gradients(dx if wanted[0] else None, grad_weight, grad_bias, grad_residual)


def evaluate(
    x: Tensor,
    plan: Plan,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue = NOTHING,
    slope_bits: Tensor | None = None,
    sets: Sets | None = None,
) -> Tensor:
    """Normalize with fixed moments (2, C), float64; ``plan`` is an ``inference_plan``; the rest as for ``forward``."""
    y = x if epilogue.inplace else plan.empty_like(x)
    memory, _, coefficients = _between_passes(plan, 3)
    form, residual, parameter = _form(epilogue, slope_bits, sets)
    out = y.data_ptr()
    slots = packed_call(
        X=_address(x), OUT=out, WEIGHT=_address(weight), BIAS=_address(bias), MOMENTS=moments.data_ptr(),
        COEFFICIENTS=coefficients, RESIDUAL=residual, SLOPE_BITS=_address(slope_bits), **plan.named_sizes(),
        STREAM=plan.streams and out % 64 == 0, EPS=eps, PARAMETER=parameter,
    )  # fmt: skip
    threads = min(torch.get_num_threads(), 1 + x.numel() * x.element_size() // PER_THREAD)
    packed = launch.ONE_SET if sets is None else sets.packed(plan)
    launch.kernel(f"{plan.kind}_evaluate", plan.dtype, form)(slots, threads, 2, packed)
    del memory
    return y


# --- where the moments are of more than this tensor: the halves of a forward and of a backward ---

_REDUCE, _APPLY = 0b11, 0b1100  # stages of the split loops: up to the sums, and from them on


def moments_of(x: Tensor, plan: Plan, sets: Sets) -> None:
    """The first half of a forward: fill ``sets.moments``, of one set; ``plan`` is an ``inference_plan``."""
    assert sets.moments is not None
    memory, partials, coefficients = _between_passes(plan, 3)
    slots = packed_call(
        X=_address(x), MOMENTS=sets.moments.data_ptr(), COEFFICIENTS=coefficients, PARTIALS=partials,
        **plan.named_sizes(), EPS=1.0, SHARE=plan.share,
    )  # fmt: skip
    kernel = split_or_fused(plan.kind, False, "forward", plan.dtype, Form(weighted=sets.weighted))
    kernel(slots, plan.threads(), 3, sets._replace(limits=None).packed(plan), _REDUCE)
    del memory


def backward_of_merged(
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    eps: float,
    epilogue: Epilogue,
    slope_bits: Tensor | None,
    residual_wanted: bool,
    sets: Sets,
    merge: Callable[[Tensor], tuple[Tensor, float]],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A backward through moments of more than this tensor.

    Args:
        moments: (2 or 4, C), of all of it.
        sets: of one set, the tensor; with limits where the moments have r and d.
        merge: gives for this tensor's sums, (2, C) float64, those of all, and how much weight all values of a channel
            have together. Called once.
        plan: an ``inference_plan``; the rest as for ``backward``.

    Returns:
        Gradients of x and the residual (if wanted), and this tensor's own sums (2, C): of dz, and of dz·(x − mean).
    """
    dy, strides = _readable(dy, x, plan)
    dx = plan.empty_like(x)
    dz = plan.empty_like(x) if residual_wanted else None
    memory, partials, coefficients = _between_passes(plan, 5)
    memory.zero_()  # where no position counts, the loops take no sums
    form, residual, parameter = _form(epilogue, slope_bits, sets)
    kernel = split_or_fused(plan.kind, False, "backward", plan.dtype, form)
    out, out_residual = dx.data_ptr(), _address(dz)

    def launch_stages(stages: int, share: float, counts: Tensor | None) -> None:
        slots = packed_call(
            X=_address(x), DY=_address(dy), OUT=out, WEIGHT=_address(weight), BIAS=_address(bias),
            MOMENTS=moments.data_ptr(), COEFFICIENTS=coefficients, PARTIALS=partials, RESIDUAL=residual,
            GRAD_RESIDUAL=out_residual, SLOPE_BITS=_address(slope_bits), **plan.named_sizes(),
            DY_BATCH=strides[0], DY_CHANNEL=strides[1], DY_SPACE=strides[2],
            STREAM=plan.streams and out % 64 == 0 and out_residual % 64 == 0, EPS=eps, SHARE=share, PARAMETER=parameter,
        )  # fmt: skip
        kernel(slots, plan.threads(), 4, sets._replace(counts=counts).packed(plan), stages)

    launch_stages(_REDUCE, plan.share, sets.counts)
    parts = memory[: 2 * plan.parts * plan.channels].view(plan.parts, 2, plan.channels)
    own = parts.sum(0)
    every, count = merge(own)
    parts.zero_()
    parts[0] = every
    counts = None if sets.counts is None else torch.full_like(sets.counts, count)
    launch_stages(_APPLY, 1.0 / count if count > 0 else 0.0, counts)
    del memory
    return dx, dz, own


def _address(t: Tensor | None) -> int:
    """Where a tensor begins; 0, which says to a loop that there is none, only for None."""
    if t is None:
        return 0
    address = t.data_ptr()
    if address == 0:
        raise RuntimeError(f"a tensor of size {tuple(t.shape)} has no memory to read or write: make one with clone()")
    return address


def _form(
    epilogue: Epilogue, slope_bits: Tensor | None, sets: Sets | None, fixed: bool = False
) -> tuple[Form, int, float]:
    """(what the loop is compiled for, the residual's address, the activation's parameter)."""
    activation, residual, inplace = epilogue
    name, parameter = (None, 0.0) if activation is None else activation
    weighted = sets is not None and sets.weights is not None
    form = Form(name, residual is not None, slope_bits is not None, inplace, fixed, weighted)
    return form, _address(residual), parameter


def _between_passes(plan: Plan, coefficients: int) -> tuple[Tensor, int, int]:
    """Memory for the parts' sums and for the coefficients (float64 slots serve both), and where each begins."""
    sums = 2 * plan.parts * plan.channels
    memory = torch.empty(sums + coefficients * plan.channels, dtype=torch.float64, device="cpu")
    return memory, memory.data_ptr(), memory.data_ptr() + 8 * sums


# --- gradients of every layout ---


def _readable(dy: Tensor, x: Tensor, plan: Plan) -> tuple[Tensor, tuple[int, int, int]]:
    """dy, or a copy laid out like x, and its strides over batch, channels and space; expanded ones stay so."""
    if dy.dtype != x.dtype:
        dy = dy.to(x.dtype)
    dy = dy.resolve_neg()
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
