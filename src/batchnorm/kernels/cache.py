"""Object files of compiled kernels on disk: what this machine compiled before, and what came with the package.

A cache may be damaged (a full disk, a killed process, a failed disk), unreadable, of another user, or on a disk that
is full or read-only. Whatever it is: what cannot be read is compiled again, and what cannot be written is not.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import llvmlite.binding as llvm

from batchnorm.kernels.key import Key

__all__ = ["LEVELS", "archive_of", "build", "find", "path_in", "shipped", "source", "store"]

_PACKAGE = "batchnorm.kernels"
_MODULES = ("compile", "elementary", "key", "pipeline", "simd")
_LOOPS = ("activations", "channels", "columns", "forms", "planes", "slots", "table")
_OPTIONS = ("NUMBA_OPT", "NUMBA_BOUNDSCHECK", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
_DIGEST = hashlib.sha256().digest_size

# What a released package has object files for, best first: Linux on x86-64, by the levels of its psABI.
_V3 = {"avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
LEVELS = {"x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "x86-64-v3": _V3}


def find(key: Key) -> bytes | None:
    """Give a kernel's object file: what this machine compiled for itself, or else what came with the package."""
    return _compiled_here(key) or shipped(key)


def store(key: Key, code: bytes) -> None:
    """Leave a kernel's object file in the first folder that takes it; what is there is replaced as a whole."""
    if build() is None:
        return
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path_in(folder, key), code + hashlib.sha256(code).digest())
        except OSError:
            continue
        return


def _compiled_here(key: Key) -> bytes | None:
    if build() is None:
        return None
    for folder in _folders():
        try:
            data = path_in(folder, key).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]:
            return data[:-_DIGEST]
    return None


def path_in(folder: Path, key: Key) -> Path:
    """Where a kernel's object file is: its name says what it depends on, so that nothing is ever served to another."""
    return folder / f"{key.symbol}.{build()}.o"


def _folders() -> Iterator[Path]:
    """Where object files may be, by preference: as it is said, beside the package, in the user's cache."""
    said = os.environ.get("NUMBA_CACHE_DIR")
    if said:
        yield Path(said)
        return
    yield Path(__file__).parent / "__pycache__"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    yield Path(base, "batchnorm")


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}-{threading.get_ident()}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


# --- what machine code depends on ---


@cache
def build() -> str | None:
    """Name what machine code depends on besides the kernel itself: sources, compiler, its options, processor.

    It is part of every file's name: two computers with one home directory cannot give each other code for the wrong
    processor. None if the sources cannot be read; then nothing is kept.
    """
    try:
        options = [os.environ.get(option, "") for option in _OPTIONS]
        versions = [version("numba"), version("llvmlite")]
        processor = [llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
        parts = repr((source(), options, versions, processor)).encode()
    except Exception:
        return None
    return hashlib.sha256(parts).hexdigest()[:16]


@cache
def source() -> str:
    """A digest of the modules that machine code is made of."""
    names = [f"{_PACKAGE}.{name}" for name in _MODULES] + [f"{_PACKAGE}.loops.{name}" for name in _LOOPS]
    return hashlib.sha256(b"\0".join(_stored(name) for name in names)).hexdigest()


def _stored(name: str) -> bytes:
    """A module as it is stored: its source, or its bytecode where there is nothing else, in a folder or an archive."""
    spec: Any = find_spec(name)
    data: bytes = spec.loader.get_data(spec.origin)
    return data


# --- what came with the package ---


def shipped(key: Key) -> bytes | None:
    """Give the object file that came with the package: from these sources, for this system and processor."""
    level = _level()
    if level is None or any(os.environ.get(option) for option in _OPTIONS):
        return None
    try:
        with ZipFile(archive_of(level)) as archive:
            return archive.read(key.symbol) if archive.comment.decode() == source() else None
    except Exception:  # whatever: there is none, it is damaged, it lacks this kernel
        return None


def archive_of(level: str) -> Path:
    """Where a released package has the object files for a level of processors."""
    return Path(__file__).parent / "compiled" / f"{level}.zip"


@cache
def _level() -> str | None:
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return None
    features = {name for name, there in llvm.get_host_cpu_features().items() if there}
    return next((level for level, needed in LEVELS.items() if needed <= features), None)
