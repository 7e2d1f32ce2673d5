"""Compile kernels before they are needed, in processes beside this one.

A model needs a dozen kernels, each of which takes seconds to compile the first time ever. Threads cannot share that
work: Numba compiles under one lock. So kernels that will be needed soon are named to worker processes, which leave
them in the cache on disk. Whatever goes wrong with a worker, the process that needs the kernel compiles it itself.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from batchnorm.kernels import cache
from batchnorm.kernels.key import Key

__all__ = ["expect", "forget", "wait_for"]

_LIMIT = 60.0  # seconds to wait for a worker; a kernel takes 2 to 5


class _Worker:
    """A process that compiles, in order, the kernels it is told."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("worker.py"))
        self.keys: list[Key] = []
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            text=True, bufsize=1,
        )  # fmt: skip
        self.send(sys.path)

    def send(self, message: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")

    def compile(self, key: Key) -> None:
        self.send([key.name, key.dtype, *key.form])
        self.keys.append(key)

    def at_work_on(self) -> Key | None:
        """The kernel that it is compiling; None if it has done all or has ended."""
        while self.keys and cache.find(self.keys[0]) is not None:
            del self.keys[0]
        return self.keys[0] if self.keys and self.process.poll() is None else None

    def end(self) -> None:
        with suppress(OSError):
            self.process.terminate()
            self.process.communicate()


_workers: list[_Worker] = []


def expect(keys: Iterable[Key], processes: int) -> None:
    """Let at most so many processes compile these kernels, the first ones first, if they are not in the cache.

    ``BATCHNORM_PROCESSES`` in the environment allows fewer, or none.
    """
    allowed = os.environ.get("BATCHNORM_PROCESSES", "")
    processes = min(processes, int(allowed)) if allowed.isdecimal() else processes
    if processes < 1 or not _can_start():
        return
    told = {key for worker in _workers for key in worker.keys}
    for key in dict.fromkeys(keys):
        if key not in told and cache.find(key) is None:
            with suppress(OSError):  # no process can be started, or it has ended; then whoever needs it compiles it
                _least_busy(processes).compile(key)


def wait_for(key: Key, processes: int) -> None:
    """Wait for a kernel that a worker compiles now, or that one will while ``processes`` compile already.

    Where a worker has nothing to do, it gets the kernel. Where there could be more workers, this returns: the process
    that needs the kernel had better compile it itself.
    """
    end = time.monotonic() + _LIMIT
    while time.monotonic() < end and any(key in worker.keys for worker in _workers):
        alive = [worker for worker in _workers if worker.process.poll() is None]
        doing = [worker.at_work_on() for worker in alive]
        if key not in doing:
            if None in doing and cache.find(key) is None:
                with suppress(OSError):
                    alive[doing.index(None)].compile(key)
                    continue
            if len(alive) < processes:
                return
        time.sleep(0.01)


def forget() -> None:
    """Leave the workers to the parent, in a forked child."""
    _workers.clear()


def _least_busy(processes: int) -> _Worker:
    for worker in [worker for worker in _workers if worker.process.poll() is not None]:
        worker.end()
        _workers.remove(worker)
    if len(_workers) < processes and all(worker.at_work_on() for worker in _workers):
        if not _workers:
            atexit.register(_end)
        _workers.append(_Worker())
        return _workers[-1]
    return min(_workers, key=lambda worker: len(worker.keys))


def _end() -> None:
    while _workers:
        _workers.pop().end()


def _can_start() -> bool:
    """Whether ``sys.executable`` is Python, and not a program that Python is built into; and whether files can stay."""
    is_python = "python" in os.path.basename(sys.executable or "") and not getattr(sys, "frozen", False)
    return is_python and cache.build() is not None and os.path.exists(Path(__file__).with_name("worker.py"))
