"""What went wrong, in one line: in the user's own files with the place, otherwise as the library says it."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import click

from batchnorm.reports.files import written

__all__ = ["in_one_line", "one_line"]

_OTHERS = tuple(
    os.path.join(place, "")
    for place in (
        str(Path(__file__).parents[1]),
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
    )
)


FAILED, WRITTEN, STOPPED = 1, 3, 130  # exit codes; after the second alone something has been written


@contextmanager
def one_line(debug: bool = False, failed: int = FAILED) -> Iterator[None]:
    """Turn whatever is raised in the block, by user code as well, into one line and an exit code.

    Args:
        debug: show the traceback, too.
        failed: the exit code after an error.
    """
    before = len(written)
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except BaseException as error:  # a script that exits has not made a model
        if debug:
            traceback.print_exc()
        placed = ", ".join(map(str, written[before:]))
        causes = [error, *_causes(error)]
        stopped = any(isinstance(cause, KeyboardInterrupt) for cause in causes)
        broken = next((cause for cause in causes if isinstance(cause, BrokenPipeError)), error)
        said = "batchnorm: stopped" if stopped else f"Error: {in_one_line(broken)}"
        _give_up_unwritable(sys.stdout)
        click.echo(f"{said}; but written: {placed}" if placed else said, err=True)
        raise click.exceptions.Exit(WRITTEN if placed else STOPPED if stopped else failed) from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an exception was raised for: an interrupted import is an ImportError, a broken pipe the end of a program."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _give_up_unwritable(stream: TextIO | None) -> None:
    """Let a stream that nobody reads, or whose disk is full, not fail once more at the end of the process."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def in_one_line(error: BaseException) -> str:
    """Return an exception's message with, if it passed through a file of the user's, its place there and its type.

    Example:
        >>> in_one_line(error)
        'train.py:31: RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x64 and 32x10)'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # What a worker of a DataLoader raised comes with its traceback as text; the last line is the error.
    message = lines[-1] if any("Original Traceback" in line for line in lines) else lines[0]
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if os.path.isabs(f.filename) and not f.filename.startswith(_OTHERS)]
    if users:
        return f"{_short(users[-1].filename)}:{users[-1].lineno}: {kind}: {message}"
    said = isinstance(error, (ValueError, OSError)) and message
    return message if said else f"{kind}: {message} (--debug shows where)"


def _short(path: str) -> str:
    """Shorten a path to one relative to the current directory, if it lies there."""
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here)
