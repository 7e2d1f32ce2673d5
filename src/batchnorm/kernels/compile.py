"""Compile a loop into a C function, or take it from the cache on disk."""

from __future__ import annotations

import types as python_types
from typing import Any

import numba
import torch
from numba.core.ccallback import CFunc

from batchnorm.kernels import cache
from batchnorm.kernels.form import Form
from batchnorm.kernels.loops import activations, columns, planes
from batchnorm.kernels.loops.channels import finish
from batchnorm.kernels.loops.slots import barrier, select, thread_id
from batchnorm.kernels.loops.table import ALL_SLOTS, ONLY_LAST, PARTS, SETS, STAGES
from batchnorm.kernels.simd import alloca, pointer

work: Any = None  # these five are set for each function that `compiled` makes
stored = param = acc = form = work
_STORED = {torch.float32: numba.float32, torch.float64: numba.float64, torch.bfloat16: numba.uint16}


def _entry(slots: Any) -> None:
    whole = pointer(slots, numba.int64)  # type: ignore[call-arg, var-annotated]
    a = alloca(ALL_SLOTS, numba.int64)
    thread, threads = thread_id(whole)
    if whole[STAGES] != ONLY_LAST:
        for index in range(whole[SETS]):
            select(whole, a, index)
            work(a, thread, threads, stored, param, acc, form)
            if whole[SETS] > 1 and whole[PARTS] != 0:
                barrier(whole)  # the next set uses the same memory between its passes
    finish(whole, a, thread, param)


def compiled(name: str, dtype: torch.dtype, form: Form) -> Any:
    """A C function around one loop.

    The function is a copy of `_entry` with its own globals. Numba finds cached code by the function's qualified name
    and its file alone, so the name carries the loop, the dtype, the form and the build.
    """
    acc = numba.float64 if dtype == torch.float64 else numba.float32
    work = next(getattr(module, name) for module in (planes, columns) if hasattr(module, name))
    names = {"work": work, "stored": _STORED[dtype], "param": acc, "acc": acc, "form": activations.compiled(form)}
    code = _entry.__code__.replace(co_filename=__file__)  # bytecode without its source still names where that was
    entry = python_types.FunctionType(code, {**globals(), **names}, name)
    build = cache.build()
    how = "_".join(str(part) for part in (name, *form, build))
    entry.__qualname__ = f"{str(dtype).removeprefix('torch.')}_{how}"
    entry.__module__ = __name__
    function = CFunc(entry, ((numba.intp,), numba.void), locals={}, options={"error_model": "numpy"})
    if build is not None:
        cache.use_cache(function)
    function.compile()
    return function
