"""How the Numba kernel's loops see a tensor, and how the work is divided.

The division depends on the tensor's shape alone, so that results are the same for any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from batchnorm.kernels import launch
from batchnorm.kernels.key import PLAIN, Form
from batchnorm.kernels.loops.table import COLUMNS, GROUP

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_SLAB = 256 * 1024  # bytes: half a second-level cache, what one thread can keep at hand between two passes
_SMALL_SPACE = 32  # runs shorter than this are seen as columns
_LONG = 16384  # neighbours in one part of a long run
PER_THREAD = 32 * 1024  # bytes that are worth waking a thread for


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
    dtype: torch.dtype
    statistics: torch.dtype  # of weight, bias, running statistics and their gradients
    vector: torch.Size  # theirs
    moments: Tensor  # patterns: `empty_like` costs less than to say what is wanted
    gradient: Tensor
    strides: tuple[int, int, int]  # over batch, channels and space
    share: float  # of one value in its channel: 1 / (batch · space)
    row_bits: int  # slope bits of a run or row, in whole bytes
    sizes: tuple[int, int, int, int, int, int, int]  # as the loops' slots BITS_ROW to BLOCK want them
    layout: tuple[torch.Size, tuple[int, ...]]  # shape and strides of the tensor
    format: torch.memory_format  # of the output and of gradients, as torch has it: channels_last or contiguous
    alike: bool  # those then have the tensor's strides, too, also along dimensions of size 1
    forward: launch.Kernel  # with nothing fused
    backward: launch.Kernel

    def threads(self) -> int:
        return 1 if self.worth_threads == 1 else min(torch.get_num_threads(), self.worth_threads)

    def kernel(self, direction: str, form: Form) -> launch.Kernel:
        return split_or_fused(self.kind, self.fused, direction, self.dtype, form)

    def empty_like(self, x: Tensor) -> Tensor:
        """Memory for an output or a gradient of x, the plan's tensor."""
        return torch.empty_like(x) if self.alike else torch.empty_like(x, memory_format=self.format)

    @property
    def runs(self) -> int:
        """Runs or rows of a sample, each with whole bytes of slope bits."""
        return {"planes": self.channels, "rows": self.space, "small": 1}[self.kind]

    def slope_bits(self) -> Tensor:
        """Memory for a bit an element, not filled."""
        return torch.empty(self.slope_bits_size(), dtype=torch.uint8, device="cpu")

    def slope_bits_size(self) -> torch.Size:
        """How many bytes that takes."""
        return torch.Size([self.batch * self.runs * self.row_bits // 8])

    def named_sizes(self) -> dict[str, int]:
        """The slots BITS_ROW to BLOCK."""
        names = ("BITS_ROW", "BATCH", "CHANNELS", "SPACE", "X_CHANNEL", "PARTS", "BLOCK")
        return dict(zip(names, self.sizes, strict=True))


def served(dtype: torch.dtype, dimensions: int) -> bool:
    """Whether there are loops for such tensors."""
    return dtype in _DTYPES and 2 <= dimensions <= 5


@lru_cache(maxsize=4096)
def plan(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Plan | None:
    """How to serve tensors of that shape, layout and dtype; None where the loops cannot or where no variance exists."""
    if not served(dtype, len(shape)) or shape.numel() <= shape[1]:
        return None
    seen = _view(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    return None if seen is None else planned((shape, strides), dtype, seen, *_divide(*seen, dtype.itemsize))


@lru_cache(maxsize=4096)
def inference_plan(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Plan | None:
    """The same with fixed moments: no channel needs to stay in cache, and runs go in memory order."""
    seen = _view(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    if seen is None:
        return None
    kind, batch, channels, space = seen
    if kind == "rows":
        return planned((shape, strides), dtype, seen, False, *_cut_rows(batch * space, channels, dtype.itemsize))
    return planned((shape, strides), dtype, ("planes", batch, channels, space), False, *_cut_planes(space))


@lru_cache(maxsize=4096)
def sets_plan(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, size: int, weighted: bool
) -> Plan | None:
    """The same for moments over sets of `size` samples, or over weighted positions: samples must stay apart."""
    seen = _view(torch.empty_strided(shape, strides, dtype=dtype, device="meta"), apart=True)
    if seen is None:
        return None
    kind, batch, channels, space = seen
    if weighted and kind == "small":  # whose columns would need a weight each
        kind = "planes"
    fused, parts, block = _divide(kind, size, channels, space, dtype.itemsize)
    if kind == "rows" and fused and size < batch:  # one set after the other: each must have blocks for all threads
        block = min(block, -(-channels // 64) * 16)
    return planned((shape, strides), dtype, (kind, batch, channels, space), fused, parts, block)


def laid_out(x: Tensor, find: Callable[..., Plan | None] = plan) -> tuple[Tensor, Plan]:
    """x itself where the loops can read it, else a copy that they can (autograd sees it made); and the plan for it."""
    found = find(x.shape, x.stride(), x.dtype)
    if found is None:
        x = x.contiguous(memory_format=memory_format(x))
        found = find(x.shape, x.stride(), x.dtype)
        assert found is not None, "tensors of such a format can always be read"
    return x, found


def laid_out_sets(x: Tensor, size: int, weighted: bool) -> tuple[Tensor, Plan]:
    """`laid_out` for moments over sets or over weighted positions."""
    return laid_out(x, lambda *view: sets_plan(*view, size, weighted))


@lru_cache(maxsize=4096)
def planned(
    layout: tuple[torch.Size, tuple[int, ...]],
    dtype: torch.dtype,
    seen: tuple[str, int, int, int],
    fused: bool,
    parts: int,
    block: int,
) -> Plan:
    """A view and a division of it, with all that follows from them."""
    kind, batch, channels, space = seen
    size = batch * channels * space * dtype.itemsize
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    like = torch.empty_strided(*layout, dtype=dtype, device="meta")
    suggested = memory_format(like)
    columns = channels if kind == "rows" else channels * space
    if fused:
        units = -(-(channels if kind == "planes" else columns) // block)
    else:
        units = parts * (channels if kind == "planes" else 1)
    run = {"rows": channels, "planes": space, "small": channels * space if block % 16 == 0 else 1}[kind]
    strides = (channels * space, 1, channels) if kind == "rows" else (channels * space, space, 1)
    if kind == "planes":
        row_bits = _whole_bytes(space)
    elif fused:
        row_bits = units * _whole_bytes(min(block, columns))
    else:
        row_bits = _whole_bytes(columns)
    return Plan(
        kind, batch, channels, space, fused, parts, block,
        worth_threads=min(1 + size // PER_THREAD, units),
        streams=size >= _beyond_cache() and run % 16 == 0,
        dtype=dtype,
        statistics=statistics,
        vector=torch.Size([channels]),
        moments=_pattern(2, channels, dtype=torch.float64),
        gradient=_pattern(channels, dtype=statistics),
        strides=strides,
        share=1.0 / (batch * space),
        row_bits=row_bits,
        sizes=(row_bits, batch, channels, space, strides[1], parts, block),
        layout=layout,
        format=suggested,
        alike=torch.empty_like(like, memory_format=suggested).stride() == layout[1],
        forward=split_or_fused(kind, fused, "forward", dtype, PLAIN),
        backward=split_or_fused(kind, fused, "backward", dtype, PLAIN),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _pattern(*size: int, dtype: torch.dtype) -> Tensor:
    """What `empty_like` makes a tensor of; one for all plans of so many channels, of which thousands may be kept.

    A pattern of one value, expanded, holds no memory at all, but `empty_like` takes 60 ns (7 %) longer.
    """
    return torch.empty(size, dtype=dtype, device="cpu")


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which torch lays out what batch normalization makes of x, in training and evaluation."""
    if not x.is_contiguous() and 4 <= x.dim() <= 5:
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return last if x.is_contiguous(memory_format=last) else suggest_memory_format(x)
    return torch.contiguous_format


def split_or_fused(kind: str, fused: bool, direction: str, dtype: torch.dtype, form: Form) -> launch.Kernel:
    """The loop for a kind of view and a kind of work."""
    return launch.kernel(f"{kind}_{'' if fused else 'split_'}{direction}", dtype, form)


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8) * 8


def _view(x: Tensor, apart: bool = False) -> tuple[str, int, int, int] | None:
    """(kind, batch, channels, space) of a tensor that is laid out as torch would lay its output out; else None."""
    batch, channels = x.shape[0], x.shape[1]
    space = x.numel() // (batch * channels)
    if x.is_contiguous():
        if space == 1:
            return "rows", batch, channels, 1
        if channels == 1 and not apart:  # every value is the channel's: one long run
            return "planes", 1, 1, batch * space
        return "small" if space < _SMALL_SPACE else "planes", batch, channels, space
    if x.is_contiguous(memory_format=memory_format(x)):
        return "rows", batch, channels, space
    return None


def _divide(kind: str, batch: int, channels: int, space: int, itemsize: int) -> tuple[bool, int, int]:
    """(fused, parts, block)."""
    if kind == "planes":
        if channels >= 8 or batch * channels * space * itemsize <= _SLAB:
            fits = _SLAB // (batch * space * itemsize)
            return True, 0, max(1, min(GROUP, fits, channels // 16))
        return False, *_cut_planes(space)
    if kind == "small":
        return True, 0, COLUMNS // space * space
    rows = batch * space
    if rows * min(COLUMNS, channels) * itemsize <= _SLAB:
        return True, 0, COLUMNS
    return False, *_cut_rows(rows, channels, itemsize)


def _cut_planes(space: int) -> tuple[int, int]:
    """(parts, block)."""
    return -(-space // _LONG), _LONG


def _cut_rows(rows: int, channels: int, itemsize: int) -> tuple[int, int]:
    """(parts, block)."""
    parts = max(4, min(32, rows * itemsize // 256))  # their sums, 16 bytes a channel and part, stay a small share
    block = max(_SLAB // (channels * itemsize), -(-rows // parts), 8)
    block = -(-block // 8) * 8
    return -(-rows // block), block


@cache
def _beyond_cache() -> int:
    """Bytes of a tensor from which on its output is written around the caches: half of the last level."""
    try:
        last_level = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError, AttributeError):
        last_level = 0
    return (last_level if last_level > 0 else 32 * 2**20) // 2
