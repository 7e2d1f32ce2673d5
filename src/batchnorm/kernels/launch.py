"""Run a compiled loop on torch's own threads.

Numba's threading layers are not used: a second pool would fight torch's (convolutions slow down), Numba's own OpenMP
layer ends a forked child, and its workqueue layer aborts when two Python threads call at once. Instead each kernel is
a plain C function of one argument, and libgomp's `GOMP_parallel`, found through the library that torch is linked to,
calls it on the team that torch uses. So `torch.set_num_threads` is obeyed, each Python thread has the team that torch
would give it, and nothing global is configured.

* No OpenMP to be found (macOS without libomp's GNU entry points, Windows): a pool of Python threads does the same;
  the kernels hold no GIL.
* A child forked from a process whose OpenMP team exists has lost that team's threads; waiting for them would hang.
  Children run on one thread.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

_SLOTS = struct.Struct("=23q3d")  # addresses and sizes, then three numbers: X to SHARE in loops/slots.py
_TEAM = struct.Struct("=6q")  # this thread, all threads, where to ask instead, where to meet: THREAD to STAGE
_EVERY = -1  # stage: all of them

_forked = False


def _after_fork() -> None:
    global _forked, _compiling
    _forked = True
    _compiling = threading.Lock()  # another thread of the parent, which is not here to release it, may hold the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _OpenMP:
    """The OpenMP runtime that torch is linked to."""

    def __init__(self) -> None:
        library = ctypes.CDLL(torch._C.__file__)  # already loaded; symbols are looked up in what it depends on, too
        self.parallel = library.GOMP_parallel
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        self.parallel.restype = None
        ask = (library.omp_get_thread_num, library.omp_get_num_threads)
        known = (*ask, library.GOMP_barrier)
        self.team = _TEAM.pack(-1, 0, *(ctypes.cast(function, ctypes.c_void_p).value for function in known), _EVERY)


@cache
def openmp() -> _OpenMP | None:
    """The OpenMP runtime to share with torch; None where there is none."""
    try:
        return _OpenMP()
    except (AttributeError, OSError):
        return None


_SERIAL = _TEAM.pack(0, 1, 0, 0, 0, _EVERY)


@cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="batchnorm")


def run(name: str, dtype: torch.dtype, slots: tuple[Any, ...], threads: int, stages: int = 1) -> None:
    """Call the loop of that name with its slots on up to `threads` threads and wait for all of them.

    Args:
        stages: how many the loop has. Each begins when all threads have ended the one before.
    """
    kernel = _kernels.get((name, dtype)) or _compiled(name, dtype)
    arguments = _SLOTS.pack(*slots)
    if threads <= 1 or _forked:
        kernel.call(arguments + _SERIAL)
        return
    omp = openmp()
    if omp is not None:
        omp.parallel(kernel.address, arguments + omp.team, threads, 0)
        return
    for stage in range(stages):
        shares = [arguments + _TEAM.pack(i, threads, 0, 0, 0, stage) for i in range(threads)]
        others = [_python_threads().submit(kernel.call, share) for share in shares[1:]]
        kernel.call(shares[0])
        for other in others:
            other.result()


class Kernel:
    """A compiled loop for one dtype: the address of a C function `void f(int64_t *slots)`."""

    def __init__(self, function: Any) -> None:
        self._function = function  # keeps the machine code alive
        self.address = function.address
        self.call: Callable[[bytes], None] = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(function.address)


_compiling = threading.Lock()
_kernels: dict[tuple[str, torch.dtype], Kernel] = {}


def _compiled(name: str, dtype: torch.dtype) -> Kernel:
    """The loop of that name for tensors of `dtype`, compiled or read from Numba's cache, once in a process."""
    from batchnorm.kernels.compile import compiled  # loads Numba, which takes a second

    with _compiling:
        if (name, dtype) not in _kernels:
            _kernels[name, dtype] = Kernel(compiled(name, dtype))
        return _kernels[name, dtype]
