"""Every buffer that a loop gets lies alone in memory, so that whatever a loop does outside of it shows.

Loops get addresses. Between the launch and the loop, each buffer is moved to a place of exactly the size that the loop
may touch, with margins that hold a pattern: NaN for values, 3 for the weights of positions, ones for bits. A margin
that is another one afterwards was written to; NaN in a result was read from one. With a fence, a page that may be
neither read nor written follows (or precedes) the buffer: a loop that goes there ends the process.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels import launch
from batchnorm.kernels.key import Key
from batchnorm.kernels.loops import table as at

Kind = Literal["bands", "fence_after", "fence_before"]
KINDS: tuple[Kind, ...] = ("bands", "fence_after", "fence_before")

_PAGE = mmap.PAGESIZE
_MARGIN = 4096
_VECTOR = 64  # a buffer keeps its offset from such an alignment: what is written around the caches depends on it
_WRITTEN = {  # by some loop; everything else is only read
    "OUT", "RUNNING_MEAN", "RUNNING_VAR", "COUNTER", "MOMENTS", "COEFFICIENTS", "PARTIALS", "GRAD_WEIGHT", "GRAD_BIAS",
    "GRAD_RESIDUAL", "SLOPE_BITS",
}  # fmt: skip
_MADE_HERE = _WRITTEN - {"RUNNING_MEAN", "RUNNING_VAR", "COUNTER"}  # not the user's
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class OutsideError(AssertionError):
    """A loop touched what is not its own, or was given less than it needs."""


class Need(NamedTuple):
    """One buffer of one launch."""

    name: str
    slot: int
    bytes: int


def needs(key: Key, a: list[Any]) -> list[Need]:
    """How many bytes a loop may touch from each address on: the contract between `cpu.py` and `loops/`."""
    name, dtype = key.name, getattr(torch, key.dtype)
    item, own = dtype.itemsize, 8 if dtype == torch.float64 else 4
    batch, channels, space, parts = (a[i] for i in (at.BATCH, at.CHANNELS, at.SPACE, at.PARTS))
    tensor = batch * channels * space * item
    steps = (a[at.DY_BATCH], a[at.DY_CHANNEL], a[at.DY_SPACE])
    last = sum((size - 1) * step for size, step in zip((batch, channels, space), steps, strict=True))
    lines = batch * {"planes": channels, "rows": space, "small": 1}[name.split("_")[0]]
    known = {
        "X": tensor,
        "DY": (last + 1) * item,
        "OUT": tensor,
        "WEIGHT": channels * own,
        "BIAS": channels * own,
        "RUNNING_MEAN": channels * own,
        "RUNNING_VAR": channels * own,
        "COUNTER": 8,
        "MOMENTS": a[at.SETS] * a[at.MOMENT_ROWS] * channels * 8,
        "COEFFICIENTS": (5 if name.endswith("backward") else 3) * channels * 8,
        "PARTIALS": 2 * parts * channels * 8,
        "GRAD_WEIGHT": channels * own,
        "GRAD_BIAS": channels * own,
        "RESIDUAL": tensor,
        "GRAD_RESIDUAL": tensor,
        "SLOPE_BITS": lines * a[at.BITS_ROW] // 8,
        "WEIGHTS": batch * space * own,
        "COUNTS": a[at.SETS] * 8,
    }
    return [Need(n, getattr(at, n), size) for n, size in known.items() if a[getattr(at, n)] != 0]


class _Place:
    """Memory for a copy of one buffer, and what surrounds it."""

    def __init__(self, need: Need, source: int, own: int, kind: Kind) -> None:
        self.need, self.source = need, source
        n, off = need.bytes, source % _VECTOR
        if kind == "bands":
            self.memory = np.empty(n + 2 * _MARGIN + 2 * _VECTOR, np.uint8)
            base = self.memory.ctypes.data
            first = base + _MARGIN
        else:
            pages = -(-(n + 2 * _VECTOR) // _PAGE)
            self.map = mmap.mmap(-1, (pages + 2) * _PAGE)
            self.memory = np.frombuffer(self.map, np.uint8)[_PAGE:-_PAGE]
            base = self.memory.ctypes.data
            for page in (base - _PAGE, base + pages * _PAGE):
                if _libc.mprotect(page, _PAGE, 0) != 0:
                    raise OSError(ctypes.get_errno(), "mprotect")
            first = base if kind == "fence_before" else base + pages * _PAGE - n - _VECTOR
        start = first + (off - first) % _VECTOR
        if kind == "fence_after" and start + _VECTOR + n <= base + len(self.memory):
            start += _VECTOR
        self.start, self.offset = start, start - base
        self.pattern = np.full(len(self.memory), 0xFF, np.uint8)
        if need.name == "WEIGHTS":  # values come in whole numbers of bytes from the buffer's own start
            three = np.frombuffer({4: np.float32, 8: np.float64}[own](3.0).tobytes(), np.uint8)
            self.pattern = np.roll(np.tile(three, -(-len(self.memory) // own)), self.offset % own)[: len(self.memory)]
        self.memory[:] = self.pattern
        ctypes.memmove(start, source, n)

    def margins(self) -> Iterator[tuple[int, int]]:
        """Where something else than the pattern is outside: (bytes from the buffer's start, what is there)."""
        end = self.offset + self.need.bytes
        for first, last in ((0, self.offset), (end, len(self.memory))):
            for i in np.flatnonzero(self.memory[first:last] != self.pattern[first:last]):
                yield first + int(i) - self.offset, int(self.memory[first + i])

    def own(self) -> bytes:
        return bytes(self.memory[self.offset : self.offset + self.need.bytes])


class Guard:
    """Watches all launches; what it found is raised where it happened, and counted here."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.launches = 0
        self.seen: set[str] = set()  # names of buffers
        self._allocated: list[tuple[int, int, Tensor]] = []  # kept alive: no address comes back

    def know(self, t: Tensor) -> Tensor:
        """Remember how large a tensor is: loops that are given its address must need no more."""
        if t.device.type == "cpu" and t.layout == torch.strided and t.numel() > 0:
            last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
            self._allocated.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), t))
        return t

    def places(self, key: Key, a: list[Any]) -> dict[int, _Place]:
        """A place for each buffer, by its address; those that share an address share the place."""
        largest: dict[int, Need] = {}
        for need in needs(key, a):
            self.seen.add(need.name)
            address = a[need.slot]
            self._check_allocation(key, need, address, a)
            if need.bytes > 0 and (address not in largest or largest[address].bytes < need.bytes):
                largest[address] = need
        own = 8 if key.dtype == "float64" else 4
        self._check_overlaps(key, largest, {a[n.slot] for n in needs(key, a) if n.name in _WRITTEN})
        return {address: _Place(need, address, own, self.kind) for address, need in largest.items()}

    def _check_allocation(self, key: Any, need: Need, address: int, a: list[Any]) -> None:
        for first, end, _ in self._allocated:
            if first <= address < end:
                if address + need.bytes > end:
                    raise OutsideError(f"{key}: {need.name} needs {need.bytes} bytes and has {end - address}")
                return
        in_place = need.name == "OUT" and address == a[at.X]
        handed_back = need.name in ("MOMENTS", "SLOPE_BITS") and key.name.endswith("backward")  # from anywhere
        if need.name in _MADE_HERE and need.bytes > 0 and not in_place and not handed_back:
            raise OutsideError(f"{key}: nobody knows how large the memory for {need.name} is")

    def _check_overlaps(self, key: Any, buffers: dict[int, Need], written: set[int]) -> None:
        for address in written & set(buffers):
            for other, need in buffers.items():
                if other != address and other < address + buffers[address].bytes and address < other + need.bytes:
                    raise OutsideError(f"{key}: {buffers[address].name} is written and overlaps {need.name}")

    def check(self, key: Any, a: list[Any], places: dict[int, _Place]) -> None:
        """Raise if anything outside, or anything that is only read, is another one than before; give results back."""
        names: dict[int, list[str]] = {}
        for need in needs(key, a):
            names.setdefault(a[need.slot], []).append(need.name)
        for address, place in places.items():
            touched = list(place.margins())
            if touched:
                raise OutsideError(
                    f"{key}: {'/'.join(names[address])} of {place.need.bytes} bytes was left: written at {touched[:4]}"
                )
            if not _WRITTEN & set(names[address]):
                if place.own() != ctypes.string_at(address, place.need.bytes):
                    raise OutsideError(f"{key}: {'/'.join(names[address])} is only read, and was written")
            else:
                ctypes.memmove(address, place.start, place.need.bytes)


class _Torch(ModuleType):
    """`torch` as the library's modules see it while they are watched: what they allocate is known."""

    def __init__(self, guard: Guard) -> None:
        super().__init__("torch")
        self.__dict__["_guard"] = guard

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full", "full_like", "stack"):
            return found

        def known(*args: Any, **options: Any) -> Any:
            return self._guard.know(getattr(torch, name)(*args, **options))

        return known


@contextmanager
def guarded(kind: Kind = "bands") -> Iterator[Guard]:
    """Give every loop that is launched here its buffers alone in memory.

    Raises:
        OutsideError: from the launch, if a loop wrote outside of a buffer or into one that is only read, or was given
            less memory than it needs.
    """
    guard = Guard(kind)
    call = launch.Kernel.__call__

    def watched(
        self: launch.Kernel, slots: bytes, threads: int, stages: int, sets: bytes = launch.ONE_SET, only: int = -1
    ) -> None:
        a = [*at.CALL.unpack(slots), *at.SAMPLE_SETS.unpack(sets)]
        places = guard.places(self.key, a)
        moved = list(a)
        for need in needs(self.key, a):
            if need.bytes > 0:
                moved[need.slot] = places[a[need.slot]].start
        first = at.CALL.pack(*moved[: at.SETS])
        rest = sets if moved[at.SETS :] == a[at.SETS :] else at.SAMPLE_SETS.pack(*moved[at.SETS :])
        guard.launches += 1
        call(self, first, threads, stages, rest, only)
        guard.check(self.key, a, places)

    importlib.import_module("batchnorm.functional")  # and with it all that is watched
    watching = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("batchnorm.kernels.", "batchnorm.estimation", "batchnorm.backends", "batchnorm.fast_path"))
        and getattr(module, "torch", None) is torch
    ]
    launch.Kernel.__call__ = watched  # type: ignore[method-assign]
    for module in watching:
        module.torch = _Torch(guard)  # type: ignore[attr-defined]
    try:
        yield guard
    finally:
        launch.Kernel.__call__ = call  # type: ignore[method-assign]
        for module in watching:
            module.torch = torch  # type: ignore[attr-defined]
