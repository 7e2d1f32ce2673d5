"""Compile a loop into an object file that needs neither Numba nor Python.

Numba types and lowers the loop and all that it calls; LLVM then sees one module in which everything but the entry is
private, and optimizes it once. (Left to itself, Numba optimizes and loads each of the thirty functions for itself,
although all of them end up within the loop: that took half of the time.)
"""

from __future__ import annotations

import types as python_types
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core.registry import cpu_target

from batchnorm.kernels.key import Key
from batchnorm.kernels.loops import activations, columns, planes
from batchnorm.kernels.loops.channels import finish
from batchnorm.kernels.loops.slots import barrier, body, select, thread_id
from batchnorm.kernels.loops.table import ALL_SLOTS, ONLY_LAST, PARTS, SETS, STAGES
from batchnorm.kernels.pipeline import Parts
from batchnorm.kernels.simd import alloca, pointer

__all__ = ["object_code"]

work: Any = None  # these five are set for each function that `_typed` makes
stored = param = acc = form = work
_STORED = {"float32": numba.float32, "float64": numba.float64, "bfloat16": numba.uint16}
_PROVIDED = {"memset", "memcpy", "memmove", "sqrt", "exp", "expm1", "log1p", "erfc"}  # by any C library


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


def object_code(key: Key, processor: str | None = None) -> bytes:
    """Compile a loop: an object file with the one symbol ``key.symbol``, ``void f(int64_t *slots)``.

    Args:
        key: which loop.
        processor: LLVM's name for the least processor that shall run it; by default it is made for this one.

    Raises:
        RuntimeError: the code would need what not every process has.
    """
    module = _linked(_typed(key), key.symbol)
    machine = _machine(processor)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    # The loops have vectors where these pay; what LLVM would vectorize and unroll are their short tails.
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    needed = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")} - _PROVIDED
    if needed:
        raise RuntimeError(f"kernel {key.symbol} needs {', '.join(sorted(needed))}, which only Numba could provide")
    code: bytes = machine.emit_object(module)
    return code


def _typed(key: Key) -> Any:
    """Numba's result for a copy of ``_entry`` whose globals name the loop and its types."""
    acc = numba.float64 if key.dtype == "float64" else numba.float32
    work = next(getattr(module, key.name) for module in (planes, columns) if hasattr(module, key.name))
    names = {"work": work, "stored": _STORED[key.dtype], "param": acc, "acc": acc}
    names["form"] = activations.compiled(key.form)
    entry = python_types.FunctionType(_entry.__code__, {**globals(), **names}, key.name)
    function = body(entry)
    function.compile((numba.intp,))
    (result,) = function.overloads.values()
    return result


def _linked(result: Any, symbol: str) -> Any:
    """One module of all that the entry calls, and around it a C function, the only one that can be seen from outside.

    The loops raise nothing, so the C function drops the status by which Numba would hand on an exception.
    """
    context = cpu_target.target_context
    codegen = context.codegen()
    caller = codegen._create_empty_module(symbol)
    convention = context.call_conv.get_function_type(result.fndesc.restype, result.fndesc.argtypes)
    native = ir.Function(caller, convention, result.fndesc.llvm_func_name)
    function = ir.Function(caller, ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    unused = [builder.alloca(pointer.pointee) for pointer in convention.args[:2]]  # the result, and the exception
    builder.call(native, [*unused, *function.args])
    builder.ret_void()

    module = llvm.parse_assembly(str(caller))
    for part in Parts.of(result.library):
        module.link_in(part, preserve=True)
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != symbol:
            value.linkage = "internal"
    module.verify()
    return module


@cache
def _machine(processor: str | None) -> Any:
    """LLVM's description of the processor to compile for, as Numba has it; but for its own name and features."""
    codegen = cpu_target.target_context.codegen()
    options: dict[str, Any] = {"opt": 3}
    codegen._customize_tm_options(options)
    if processor is not None:
        options |= {"cpu": processor, "features": ""}
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(**options)
