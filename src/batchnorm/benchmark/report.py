"""Tables as plain text, which rich draws for the terminal and in Markdown, and how figures are written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import rich.table
from rich import box
from rich.console import Console
from rich.markup import escape

from batchnorm.benchmark.timing import Ratio


@dataclass(frozen=True)
class Table:
    """Rows of text. The first columns are words, the others figures."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]] = ()
    words: int = 1


def draw(table: Table, console: Console, colours: Mapping[str, str] | None = None) -> None:
    """Print a table; `colours` has the styles of some of its values."""
    console.print(_drawn(table, box.SIMPLE_HEAD, colours or {}))


def markdown(table: Table) -> str:
    """Give a table as Markdown."""
    if not table.rows:
        return "None."
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    console.print(_drawn(table, box.MARKDOWN, {}))
    drawn = console.file
    assert isinstance(drawn, io.StringIO)
    return "\n".join(line.rstrip() for line in drawn.getvalue().strip("\n").splitlines() if line.strip())


def _drawn(table: Table, style: box.Box, colours: Mapping[str, str]) -> rich.table.Table:
    found = rich.table.Table(box=style)
    for i, column in enumerate(table.columns):
        words = i < table.words
        found.add_column(escape(column), justify="left" if words else "right", no_wrap=i > 0 and not words)
    for row in table.rows:
        found.add_row(*(f"[{colours[value]}]{value}" if value in colours else escape(value) for value in row))
    return found


def times(ratio: Ratio | None) -> str:
    """Write a ratio and where it lies with 95 % confidence."""
    return "–" if ratio is None else f"{ratio.median:.2f} × ({ratio.low:.2f}–{ratio.high:.2f})"


def time(seconds: float | None) -> str:
    """Write a time."""
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def size(count: int) -> str:
    """Write a number of bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
