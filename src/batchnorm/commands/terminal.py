"""The terminal: a bar while batches are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["batches"]


@contextmanager
def batches(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar on stderr, which is gone afterwards; gives the function to call with (done, total or None)."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
