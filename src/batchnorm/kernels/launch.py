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
* Kernels are found or compiled in a thread of their own, one after the other. A signal handler that runs a layer while
  the main thread waits for a kernel waits for it, too, instead of entering Numba's half-done work. A fork waits until
  nothing is being compiled: the child would find locks that nobody releases, and what they protect half changed.
* A forward that must be compiled is soon followed by its backward, which `ahead` compiles beside it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from batchnorm.kernels.key import PLAIN, Form, Key
from batchnorm.kernels.loops.table import CALL, LAST, TEAM, packed_sets

_EVERY = -1  # stages, a bit for each: all of them

_forked = False
_compiling = threading.RLock()


class _Forking(threading.local):
    """The locks that a thread holds while it forks; a signal handler may fork while another fork begins."""

    def __init__(self) -> None:
        self.held: list[list[Any]] = []


_forking = _Forking()


def _before_fork() -> None:
    locks: list[Any] = []
    _forking.held.append(locks)
    for find in (lambda: _compiling, _numbas_lock, _llvms_lock):  # in the order in which a compilation takes them
        lock = find()
        if lock is not None:
            lock.acquire()
            locks.append(lock)


def _numbas_lock() -> Any:
    """What Numba holds while it compiles, for us or for others; None if it is not loaded."""
    module = sys.modules.get("numba.core.compiler_lock")
    return getattr(getattr(module, "global_compiler_lock", None), "_lock", None)


def _llvms_lock() -> Any:
    module = sys.modules.get("llvmlite.binding.ffi")
    return getattr(getattr(getattr(module, "lib", None), "_lock", None), "_lock", None)


def _after_fork() -> None:
    for lock in reversed(_forking.held.pop()):
        lock.release()


def _after_fork_in_child() -> None:
    global _forked
    _forked = True
    _after_fork()
    ahead = sys.modules.get("batchnorm.kernels.ahead")
    if ahead is not None:
        ahead.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


class _OpenMP:
    """The OpenMP runtime that torch is linked to."""

    def __init__(self) -> None:
        library = ctypes.CDLL(torch._C.__file__)  # already loaded; symbols are looked up in what it depends on, too
        self.parallel = library.GOMP_parallel
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        self.parallel.restype = None
        ask = (library.omp_get_thread_num, library.omp_get_num_threads)
        known = (*ask, library.GOMP_barrier)
        self.addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in known]
        self.team = self.team_for(_EVERY)

    def team_for(self, stages: int) -> bytes:
        return TEAM.pack(-1, 0, *self.addresses, stages)


@cache
def openmp() -> _OpenMP | None:
    """The OpenMP runtime to share with torch; None where there is none."""
    try:
        return _OpenMP()
    except (AttributeError, OSError):
        return None


def _serial(stages: int) -> bytes:
    return TEAM.pack(0, 1, 0, 0, 0, stages)


_SERIAL = _serial(_EVERY)


@cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="batchnorm")


pack = CALL.pack


ONE_SET = packed_sets()


class Kernel:
    """A loop for one dtype and form: a C function `void f(int64_t *slots)`, compiled, or found compiled, when called.

    Call it with the packed slots and the number of threads that may share the work; it waits for all of them.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self._address = 0  # not loaded yet
        self._call: Callable[[bytes], None]

    def __call__(self, slots: bytes, threads: int, stages: int, sets: bytes = ONE_SET, only: int = _EVERY) -> None:
        """Run the loop.

        Args:
            slots: what ``pack`` made.
            threads: at most so many.
            stages: how many the loop has. Each begins when all threads have ended the one before.
            sets: what ``packed_sets`` made.
            only: the stages to do, a bit for each.
        """
        slots += sets
        if not self._address:
            self._find()
        if threads <= 1 or _forked:
            self._call(slots + (_SERIAL if only == _EVERY else _serial(only)))
            return
        omp = openmp()
        if omp is not None:
            omp.parallel(self._address, slots + (omp.team if only == _EVERY else omp.team_for(only)), threads, 0)
            return
        if sets is not ONE_SET:  # their stages alternate, and these threads cannot meet
            self._call(slots + _serial(only))
            return
        for stage in (*range(stages), LAST):
            if not only >> stage & 1:
                continue
            shares = [slots + TEAM.pack(i, threads, 0, 0, 0, 1 << stage) for i in range(threads)]
            others = [_python_threads().submit(self._call, share) for share in shares[1:]]
            self._call(shares[0])
            for other in others:
                other.result()

    def _find(self) -> None:
        """Find or compile it in another thread, and wait; a wait, unlike a compilation, can be interrupted anywhere."""
        done = threading.Event()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self._load()
            except BaseException as error:
                errors.append(error)
            done.set()

        try:
            threading.Thread(target=work, name="batchnorm-compile", daemon=False).start()
        except RuntimeError:  # there can be no more threads, or Python is about to end
            work()
        done.wait()
        if errors:
            raise errors[0]

    def _load(self) -> None:
        with _compiling:
            if not self._address:
                from batchnorm.kernels import load  # loads LLVM, which takes a tenth of a second

                address = load.address(_object_code(self.key), self.key.symbol)
                self._call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)
                self._address = address  # last: it says that the other is there


def _object_code(key: Key) -> bytes:
    """A kernel's object file: from the cache, from a process that is compiling it, or compiled now."""
    from batchnorm.kernels import ahead, cache

    code = cache.find(key)
    if code is None:
        ahead.wait_for(key, torch.get_num_threads())
        code = cache.find(key)
    if code is None:
        if "forward" in key.name:
            ahead.expect([backward_of(key)], torch.get_num_threads() - 1)
        from batchnorm.kernels.compile import object_code  # loads Numba, which takes a second

        code = object_code(key)
        cache.store(key, code)
    return code


def backward_of(key: Key) -> Key:
    """The backward that follows a forward: it needs the residual where an activation has no bits instead."""
    form = key.form
    form = form._replace(residual=form.residual and form.activation is not None and not form.slope_bits)
    return key._replace(name=key.name.replace("forward", "backward"), form=form)


def expect(keys: Iterable[Key]) -> None:
    """Have kernels that will be needed soon compiled beside this process, as many at once as torch has threads."""
    from batchnorm.kernels import ahead

    with _compiling:
        ahead.expect(keys, torch.get_num_threads())


@cache
def kernel(name: str, dtype: torch.dtype, form: Form = PLAIN) -> Kernel:
    """The loop of that name for tensors of `dtype`, one for the whole process."""
    return Kernel(Key(name, str(dtype).removeprefix("torch."), form))
