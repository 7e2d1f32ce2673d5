"""Blocks that are undone as a whole, whatever ends them: an error, Ctrl-C, or any other signal at any line.

A signal's handler is a Python function that runs between any two instructions of the main thread, and may raise:
``KeyboardInterrupt`` after Ctrl-C, ``TimeoutError`` after an alarm. So ``finally`` is not enough: the exception may
come while it works, or between the block's end and its first line. What holds and what cannot is in README.md.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Restoring", "completely"]

_Self = TypeVar("_Self", bound="Restoring")


class Restoring:
    """A ``with`` block whose changes are undone at its end, all of them, however it ends.

    Signals wait from the first instruction of ``__exit__``, not only from where it could ask them to. What else raises
    there (a debugger, another thread, a lack of memory) makes ``restore`` run once more.
    """

    def note(self) -> None:
        """Take down what the block may change, and change nothing."""

    def change(self) -> None:
        """Make the changes that the block begins with."""

    def restore(self) -> None:
        """Undo all changes; must be able to begin again after it was broken off anywhere."""
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        self.note()
        self._signals = _Signals(self)
        try:
            self._signals.take()
            self.change()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self.restore()
        except BaseException:
            self.restore()
            raise
        finally:
            self._signals.give_back()


def completely(step: Callable[[], None]) -> None:
    """Run a step to its end, and let signals wait for it; it must be able to begin again."""
    with _Step(step):
        pass


class _Step(Restoring):
    def __init__(self, step: Callable[[], None]) -> None:
        self.restore = step  # type: ignore[method-assign]


class _Signals:
    """Takes the place of all signal handlers: calls them, except while a block is undone, for which they wait.

    They are in place for the whole block, since a block that ends has no time to install them: a handler may run at the
    first instruction of ``__exit__``. They know by the frames of the program where it is.
    """

    def __init__(self, block: Restoring) -> None:
        self._block = block
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._waiting: dict[int, FrameType | None] = {}

    def take(self) -> None:
        """Begin; in the main thread, since no other is interrupted."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def give_back(self) -> None:
        """Give the handlers their place back, then call those that have waited."""
        try:
            self._give_places_back()
        finally:  # from the first that has its place back, signals are heard again
            self._give_places_back()
            with ExitStack() as waiting:  # which calls all, whatever some raise
                for number, frame in self._waiting.items():
                    waiting.callback(self._handlers[number], number, frame)

    def _give_places_back(self) -> None:
        for number, handler in self._handlers.items():
            # Not where the block has set another one. One of a block within, that something has broken off, is ours.
            if isinstance(getattr(signal.getsignal(number), "__self__", None), _Signals):
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._undoing(frame):
            self._waiting.setdefault(number, frame)
        else:
            self._handlers[number](number, frame)

    def _undoing(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is Restoring.__exit__.__code__ and frame.f_locals.get("self") is self._block:
                return True
            frame = frame.f_back
        return False
