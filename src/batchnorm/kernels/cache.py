"""Machine code on disk: Numba's cache, made so that nothing that is wrong with it can stop or spoil a run.

A cache may be damaged (a full disk, a killed process, a failed disk), unreadable, of another user, or on a disk that
is full or read-only. Whatever it is: what cannot be read is compiled again, and what cannot be written is not.
"""

from __future__ import annotations

import hashlib
import io
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target

__all__ = ["build", "use_cache"]

_PACKAGE = "batchnorm.kernels"
_DIGEST = hashlib.sha256().digest_size


def use_cache(function: Any) -> None:
    """Let a ``CFunc`` look for its machine code on disk, and leave it there, where there is a place for it."""
    try:
        function._cache = _Cache(function.__wrapped__)
    except Exception:  # whatever: no folder can be written, no source can be read, Numba is another one
        return


@cache
def build() -> str | None:
    """Name what machine code depends on besides the function itself: sources, processor, Numba and its options.

    It is part of every entry's name, so that there is one index and one file of code for each: two computers with one
    home directory cannot give each other code for the wrong processor, as they could by writing one index at once.

    None if the sources cannot be read.
    """
    try:
        names = [f"{_PACKAGE}.{name}" for name in ("compile", "elementary", "pruning", "simd")]
        loops: Any = find_spec(f"{_PACKAGE}.loops")
        found = pkgutil.iter_modules(loops.submodule_search_locations, f"{loops.name}.")
        names += sorted(module.name for module in found)
        parts = [_stored(name) for name in names]
        config: Any = numba_config
        processor = cpu_target.target_context.codegen().magic_tuple()
        how = (numba.__version__, processor, str(config.OPT), bool(config.BOUNDSCHECK))
    except Exception:
        return None
    return hashlib.sha256(b"\0".join((*parts, repr(how).encode()))).hexdigest()[:12]


def _stored(name: str) -> bytes:
    """A module as it is stored: its source, or its bytecode where there is nothing else, in a folder or an archive."""
    spec: Any = find_spec(name)
    data: bytes = spec.loader.get_data(spec.origin)
    return data


class _Cache(FunctionCache):
    """Numba's, without its errors."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Give what was compiled before, or None."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Leave what was compiled on disk, if possible; what is there is replaced as a whole or not at all."""
        try:
            super().save_overload(sig, data)
        except Exception:
            return


class _Files(IndexDataCacheFile):
    """Index and code, each followed by a digest of its bytes: unpickling would not notice zeros within the code."""

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[Any]:
        with super()._open_for_write(filepath) as file:
            written = io.BytesIO()
            yield written
            data = written.getvalue()
            file.write(data + hashlib.sha256(data).digest())  # unpickling ends before it

    def _load_index(self) -> Any:
        try:
            _check(self._index_path)
            return super()._load_index()
        except Exception:
            return {}  # so that it is written anew

    def _load_data(self, name: str) -> Any:
        _check(self._data_path(name))
        return super()._load_data(name)


def _check(path: str) -> None:
    data = Path(path).read_bytes()
    if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise OSError(f"{path} is damaged")
