"""What went wrong, in one line: in the user's own files with the place, otherwise as the library says it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

__all__ = ["in_one_line", "one_line"]

_OTHERS = tuple(
    os.path.join(place, "")
    for place in (
        str(Path(__file__).parents[1]),
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
    )
)


@contextmanager
def one_line(debug: bool = False) -> Iterator[None]:
    """Turn whatever is raised in the block, by user code as well, into one line; Ctrl-C into "stopped".

    Args:
        debug: let exceptions through, with their tracebacks.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        click.echo("batchnorm: stopped", err=True)
        raise SystemExit(130) from None
    except (Exception, SystemExit) as error:  # a script that exits has not made a model
        if debug:
            raise
        raise click.ClickException(in_one_line(error)) from None


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
