"""Compile a loop into a C function, or take it from Numba's cache on disk."""

from __future__ import annotations

import hashlib
import types as python_types
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch

from batchnorm.kernels.form import Form
from batchnorm.kernels.loops import activations, columns, planes
from batchnorm.kernels.loops.channels import finish
from batchnorm.kernels.loops.slots import ALL_SLOTS, ONLY_LAST, PARTS, SETS, STAGES, meet, select, who
from batchnorm.kernels.simd import alloca, pointer

work: Any = None  # these five are set for each function that `compiled` makes
stored = param = acc = form = work
_STORED = {torch.float32: numba.float32, torch.float64: numba.float64, torch.bfloat16: numba.uint16}


def _entry(slots: Any) -> None:
    whole = pointer(slots, numba.int64)  # type: ignore[call-arg, var-annotated]
    a = alloca(ALL_SLOTS, numba.int64)
    thread, threads = who(whole)
    if whole[STAGES] != ONLY_LAST:
        for index in range(whole[SETS]):
            select(whole, a, index)
            work(a, thread, threads, stored, param, acc, form)
            if whole[SETS] > 1 and whole[PARTS] != 0:
                meet(whole)  # the next set uses the same memory between its passes
    finish(whole, a, thread, param)


def compiled(name: str, dtype: torch.dtype, form: Form) -> Any:
    """A C function around one loop.

    The function is a copy of `_entry` with its own globals. Numba finds cached code by qualified name and the age of
    this file alone, so the name carries the loop, the dtype, the form and a digest of the sources that are compiled in.
    """
    acc = numba.float64 if dtype == torch.float64 else numba.float32
    work = next(getattr(module, name) for module in (planes, columns) if hasattr(module, name))
    names = {"work": work, "stored": _STORED[dtype], "param": acc, "acc": acc, "form": activations.compiled(form)}
    entry = python_types.FunctionType(_entry.__code__, {**globals(), **names}, name)
    how = "_".join(str(part) for part in (name, *form, _digest()))
    entry.__qualname__ = f"{str(dtype).removeprefix('torch.')}_{how}"
    entry.__module__ = __name__
    signature = numba.void(numba.intp)
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(entry)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        # Neither the package's folder nor the user's cache can be written.
        return numba.cfunc(signature, error_model="numpy")(entry)


@cache
def _digest() -> str:
    here = Path(__file__).parent
    sources = [here / "simd.py", here / "elementary.py", here / "compile.py", *sorted((here / "loops").glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
