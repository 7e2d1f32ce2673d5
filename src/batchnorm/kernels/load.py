"""Make an object file's function callable, by the LLVM that comes with Numba; Numba itself is not loaded."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import llvmlite.binding as llvm

__all__ = ["address"]


def address(code: bytes, symbol: str) -> int:
    """Load an object file, for good, and give its function's address."""
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    found: int = engine.get_function_address(symbol)
    return found


@cache
def _engine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    where = "static" if platform.machine().lower() in ("x86_64", "amd64") else "default"  # as Numba compiles
    machine = target.create_target_machine(opt=3, reloc=where, codemodel="jitdefault", jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
