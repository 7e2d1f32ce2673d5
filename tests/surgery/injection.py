"""Exceptions at every line that some files execute: raised there, or by a signal whose handler raises."""

from __future__ import annotations

import dis
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from batchnorm import surgery

SURGERY = Path(surgery.__file__).parent
Place = tuple[str, int]


class InjectedError(BaseException):
    """Not an ``Exception``, which something on the way might catch."""


def raising() -> None:
    raise InjectedError


def signalled() -> None:
    """A signal comes, whose handler raises where ``alarmed`` has set it."""
    signal.raise_signal(signal.SIGINT)


@contextmanager
def alarmed(stays: bool = True) -> Iterator[None]:
    """The handler of the signal raises, and is still the handler at the end."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise InjectedError

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
        assert not stays or signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


class Injection:
    """Does something as soon as the k-th line of some files is about to run.

    Args:
        files: paths of files, or of folders of them, relative to ``batchnorm/surgery``.
        at: k, from 0; None for never.
        act: what to do.
        opcodes: count every instruction instead, except those that return, at which Python looks for no signals.

    Attributes:
        places: function and line of all that ran, until it was done.
        done: whether it was.
    """

    def __init__(
        self, files: tuple[str, ...], at: int | None, act: Callable[[], None] = raising, opcodes: bool = False
    ) -> None:
        self._files = tuple(str(SURGERY / file) for file in files)
        self._at, self._act, self._event = at, act, "opcode" if opcodes else "line"
        self.places: list[Place] = []
        self.done = False

    @contextmanager
    def armed(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, value: Any) -> Any:
        if self.done or not frame.f_code.co_filename.startswith(self._files):
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        return self._line

    def _line(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == self._event and not self.done and not (event == "opcode" and _returns(frame)):
            self.places.append((frame.f_code.co_name, frame.f_lineno))
            if self._at == len(self.places) - 1:
                self.done = True
                self._act()
        return self._line


def _returns(frame: FrameType) -> bool:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")


def chosen(places: list[Place]) -> list[int]:
    """Which lines to try: of each the first and the last time that it runs; all where BATCHNORM_SLOW=1."""
    if os.environ.get("BATCHNORM_SLOW") == "1":
        return list(range(len(places)))
    times: dict[Place, list[int]] = {}
    for k, place in enumerate(places):
        times.setdefault(place, []).append(k)
    return sorted({k for found in times.values() for k in (found[0], found[-1])})
