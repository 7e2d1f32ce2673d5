"""Compile a loop into a C function, or take it from Numba's cache on disk."""

from __future__ import annotations

import hashlib
import types as python_types
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch

from batchnorm.kernels import loops
from batchnorm.kernels.simd import pointer

_STORED = {torch.float32: numba.float32, torch.float64: numba.float64, torch.bfloat16: numba.uint16}


def _entry(slots):  # type: ignore[no-untyped-def]  # compiled by Numba; the names come from `compiled`
    a = pointer(slots, int64)  # noqa: F821
    thread, threads = who(a)  # noqa: F821
    work(a, thread, threads, stored, param, acc)  # noqa: F821


def compiled(name: str, dtype: torch.dtype) -> Any:
    """A C function around one loop.

    The function is a copy of `_entry` with its own globals. Numba finds cached code by qualified name and the age of this file
    alone, so the name carries the loop, the dtype and a digest of the sources that are compiled in.
    """
    acc = numba.float64 if dtype == torch.float64 else numba.float32
    names = {
        "pointer": pointer, "who": loops.who, "work": getattr(loops, name), "int64": numba.int64,
        "stored": _STORED[dtype], "param": acc, "acc": acc,
    }  # fmt: skip
    entry = python_types.FunctionType(_entry.__code__, {**globals(), **names}, name)
    entry.__qualname__ = f"{name}_{str(dtype).removeprefix('torch.')}_{_digest()}"
    entry.__module__ = __name__
    options = {"error_model": "numpy"}
    signature = numba.void(numba.intp)
    try:
        return numba.cfunc(signature, cache=True, **options)(entry)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return numba.cfunc(signature, **options)(entry)  # neither the package's folder nor a user's cache can be written


@cache
def _digest() -> str:
    sources = (Path(__file__).with_name(name).read_bytes() for name in ("simd.py", "loops.py", "compile.py"))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]
