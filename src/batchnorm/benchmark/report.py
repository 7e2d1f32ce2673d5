"""The report: a summary for the terminal, and everything as Markdown. Rich draws the tables of both."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rich.table
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from batchnorm.benchmark import summary, tables
from batchnorm.benchmark.processes import WARM
from batchnorm.benchmark.results import Report
from batchnorm.benchmark.tables import Table
from batchnorm.files import write_text

Advance = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

QUICK = "This was a quick run: it shows that everything works, and its figures judge nothing."
READ = f"""\
Ratios are a rival's time divided by ours: above 1, ours is faster. All contenders take turns in rounds; a time is the
median over rounds, a ratio the median of the ratios within rounds, and in brackets is the interval that holds the true
median with 95 % confidence. A cell is called slower only if its whole interval is below {summary.NOISE}, after a second
look of four times the length. *× floor* is our time over what the least possible traffic would take at the speed of a
copy of the same input in the same run. *Warm* memory was allocated with
`GLIBC_TUNABLES={WARM}`,
*fresh* with the system's defaults. Parameters are float32 throughout. Evaluation is under `torch.no_grad`. No figure is
given for a cell whose results failed the check against float64."""

_WORST = 10  # rows on the terminal
_COLOURS = {tables.PASSED: "green", tables.MISSED: "bold red", tables.UNMEASURED: "dim"}
_KEPT, _PEAKS = "kept for the backward, activations", "most held in a training step, beyond its inputs"


@contextmanager
def progress(console: Console) -> Iterator[Advance]:
    """Show a bar for each thing that is done; gives the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        tasks = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def show(report: Report, console: Console) -> None:
    """Print the summary and what is worst."""
    summaries = (
        tables.machine(report),
        tables.means(report),
        tables.rivals(report),
        tables.chains(report),
        tables.networks(report),
        tables.policies(report),
        tables.processes(report),
        tables.memory(_KEPT, report.kept),
        tables.memory(_PEAKS, report.peaks),
    )
    for table in summaries:
        if table.rows:
            draw(table, console)
    behind = summary.slower(report)
    if behind:
        console.print(f"Slower than torch.nn: {len(behind)} of {len(report.timings)}" + _worst(len(behind)))
        draw(tables.slower(behind[:_WORST]), console)
    failed = summary.failures(report)
    if failed:
        console.print(f"[bold red]Without figures: {len(failed)}[/bold red]" + _worst(len(failed)))
        shortened = [(name, _shortened(why)) for name, why in failed[:_WORST]]
        draw(tables.failures(shortened), console)
    draw(tables.targets(report), console)
    if report.quick:
        console.print(f"[yellow]{QUICK}[/yellow]")


def sections(report: Report) -> Iterator[tuple[str, Table]]:
    """All tables but those of every cell, which `cell_sections` gives, with their titles."""
    yield "Machine", tables.machine(report)
    yield "Bars", tables.targets(report)
    yield "Geometric means over the 4-D cells, times torch.nn", tables.means(report)
    yield "Rivals that take long to build", tables.rivals(report)
    yield "Convolution, batch normalization, convolution: a training step", tables.chains(report)
    yield "Whole networks", tables.networks(report)
    yield "Policies and masks", tables.policies(report)
    yield "Two processes", tables.processes(report)
    yield "Memory", tables.memory(_KEPT, report.kept)
    yield "Peak memory", tables.memory(_PEAKS, report.peaks)
    yield "Slower than torch.nn", tables.slower(summary.slower(report))
    yield "Without figures", tables.failures(summary.failures(report))


def cell_sections(report: Report) -> Iterator[tuple[str, Table]]:
    """The tables of every cell, with their titles."""
    yield "Kept for the backward, bytes", tables.saved(report)
    for title, table in tables.every_cell(report):
        yield f"Every cell: {title}", table


def draw(table: Table, console: Console) -> None:
    """Print a table."""
    console.print(_drawn(table, box.SIMPLE_HEAD))


def save(report: Report, path: Path) -> Path:
    """Write everything as Markdown, whole or not at all."""
    write_text(path, markdown(report))
    return path


def markdown(report: Report) -> str:
    """Give the Markdown text."""
    parts = ["# Benchmark", *([f"**{QUICK}**"] if report.quick else []), READ]
    return "\n\n".join((*parts, written((*sections(report), *cell_sections(report)), 2)))


def written(found: tuple[tuple[str, Table], ...], level: int) -> str:
    """Give sections as Markdown, under headings of a level."""
    return "\n\n".join(f"{'#' * level} {title}\n\n{_text(table)}" for title, table in found) + "\n"


def _drawn(table: Table, style: box.Box) -> rich.table.Table:
    found = rich.table.Table(box=style)
    for i, column in enumerate(table.columns):
        words = i < table.words
        found.add_column(escape(column), justify="left" if words else "right", no_wrap=i > 0 and not words)
    for row in table.rows:
        found.add_row(*(f"[{_COLOURS[value]}]{value}" if value in _COLOURS else escape(value) for value in row))
    return found


def _text(table: Table) -> str:
    if not table.rows:
        return "None."
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    console.print(_drawn(table, box.MARKDOWN))
    drawn = console.file
    assert isinstance(drawn, io.StringIO)
    return "\n".join(line.rstrip() for line in drawn.getvalue().strip("\n").splitlines() if line.strip())


def _shortened(why: str) -> str:
    first, *others = why.split("; ")
    return first + (f" (and {len(others)} more)" if others else "")


def _worst(count: int) -> str:
    return f"; the worst {_WORST}:" if count > _WORST else ":"
