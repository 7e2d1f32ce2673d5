"""The report: a summary for the terminal, and every cell in a Markdown file. Rich draws the tables of both."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.benchmark import summary
from batchnorm.benchmark.bars import bars
from batchnorm.benchmark.grid import OPERATIONS, Cell
from batchnorm.benchmark.peers import COMPILED, COPY, JAX, OURS, TORCH
from batchnorm.benchmark.processes import WARM
from batchnorm.benchmark.results import Report, Timing, write_text

Advance = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

_WORST = 10  # rows on the terminal
_QUICK = "This was a quick run: it shows that everything works, and its figures judge nothing."
_READ = f"""\
Ratios are torch.nn's time divided by ours: above 1, ours is faster. Times are medians of rounds in which all contenders
take turns. *Copies* is our time divided by that of copying the input into memory that is already there. *Warm* memory
was allocated with
`GLIBC_TUNABLES={WARM}`,
*fresh* with the system's defaults. Parameters are float32 throughout. Evaluation is under `torch.no_grad`. No figure is
given for a cell whose results failed the check against float64. Where ours looked slower by more
than noise, the operation was timed again for four times as long, and the second result stands."""


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
    console.print(_machine(report, box.SIMPLE_HEAD))
    console.print(_means(report, box.SIMPLE_HEAD))
    if any(_rivals(report)):
        console.print(_rival_table(report, box.SIMPLE_HEAD))
    console.print(_chains(report, box.SIMPLE_HEAD))
    behind = summary.slower(report)
    if behind:
        console.print(f"Slower than torch.nn: {len(behind)} of {len(report.timings)}" + _worst(len(behind)))
        console.print(_slower(behind[:_WORST], box.SIMPLE_HEAD))
    failed = summary.failures(report)
    if failed:
        console.print(f"[bold red]Without figures: {len(failed)}[/bold red]" + _worst(len(failed)))
        console.print(_failures([(name, _shortened(why)) for name, why in failed[:_WORST]], box.SIMPLE_HEAD))
    console.print(_bars(report, box.SIMPLE_HEAD))
    if report.quick:
        console.print(f"[yellow]{_QUICK}[/yellow]")


def save(report: Report, path: Path) -> Path:
    """Write everything as Markdown, whole or not at all."""
    write_text(path, markdown(report))
    return path


def markdown(report: Report) -> str:
    """Give the Markdown text."""
    sections: list[tuple[str, str | Table]] = [
        ("# Benchmark", _READ),
        ("## Machine", _machine(report, box.MARKDOWN)),
        ("## Bars", _bars(report, box.MARKDOWN)),
        ("## Geometric means over the 4-D cells, times torch.nn", _means(report, box.MARKDOWN)),
        ("## Rivals that take long to build", _rival_table(report, box.MARKDOWN)),
        ("## Convolution, batch normalization, convolution: a training step", _chains(report, box.MARKDOWN)),
        ("## Slower than torch.nn", _slower(summary.slower(report), box.MARKDOWN)),
        ("## Without figures", _failures(summary.failures(report), box.MARKDOWN)),
        ("## Saved for the backward, bytes", _saved(report, box.MARKDOWN)),
    ]
    for threads, regime in dict.fromkeys((t.threads, t.regime) for t in report.timings):
        title = f"## Every cell: {regime} memory, {threads} thread{'s' if threads > 1 else ''}"
        sections.append((title, _every_cell(report, threads, regime)))
    if report.quick:
        sections.insert(1, ("", f"**{_QUICK}**"))
    return "\n\n".join(f"{head}\n\n{_text(body)}".strip() for head, body in sections) + "\n"


def _text(body: str | Table) -> str:
    if isinstance(body, str):
        return body
    if not body.row_count:
        return "None."
    console = Console(file=io.StringIO(), width=500, color_system=None)
    console.print(body)
    drawn = console.file
    assert isinstance(drawn, io.StringIO)
    return "\n".join(line.rstrip() for line in drawn.getvalue().strip("\n").splitlines())


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(style: box.Box, *columns: str) -> Table:
    """A table whose first column is words and whose others are figures."""
    table = Table(box=style)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
    return table


def _machine(report: Report, style: box.Box) -> Table:
    table = Table("machine", "", box=style)
    for name, value in report.machine.items():
        table.add_row(name, escape(value))
    table.add_row("load after", report.load_after)
    for name, seconds in report.first_call.items():
        table.add_row(f"first {name}", f"{seconds:.2f} s")
    table.add_row("run", f"{report.created}, {report.seconds:.0f} s")
    return table


def _bars(report: Report, style: box.Box) -> Table:
    table = _table(style, "bar", "target", "reached", "figures", "")
    words = {True: "[green]passed[/green]", False: "[bold red]missed[/bold red]", None: "[dim]not measured[/dim]"}
    for bar in bars(report):
        value = "–" if bar.value is None else f"{bar.value:.2f}"
        table.add_row(escape(bar.name), bar.target, value, str(bar.figures), words[bar.passed])
    return table


def _means(report: Report, style: box.Box) -> Table:
    table = _table(style, "4-D cells", "threads", "memory", *OPERATIONS, "lowest")
    rows: dict[tuple[int, str, str, str], dict[str, summary.Mean]] = {}
    for mean in summary.geometric_means(report):
        rows.setdefault((mean.threads, mean.regime, mean.layout, mean.dtype), {})[mean.operation] = mean
    for (threads, regime, layout, dtype), means in rows.items():
        values = [f"{means[o].mean:.2f} ×" if o in means else "–" for o in OPERATIONS]
        lowest = min(mean.lowest for mean in means.values())
        table.add_row(f"{dtype} {layout}", str(threads), regime, *values, f"{lowest:.2f} ×")
    return table


def _rivals(report: Report) -> Iterator[Timing]:
    return (t for t in report.timings if {COMPILED, JAX} & {*t.seconds, *t.left_out} and OURS in t.seconds)


def _rival_table(report: Report, style: box.Box) -> Table:
    table = _table(style, "against rivals", "memory", "operation", "ours", TORCH, COMPILED, JAX)
    for t in _rivals(report):
        ratios = [_ratio(t, rival) for rival in (TORCH, COMPILED, JAX)]
        table.add_row(t.cell.name, t.regime, t.operation, _time(t.seconds[OURS]), *ratios)
    return table


def _chains(report: Report, style: box.Box) -> Table:
    table = _table(style, "chain, training step", "memory", "ours", "× torch.nn")
    for t in report.timings:
        if t.cell.kind == "chain" and OURS in t.seconds:
            table.add_row(t.cell.name, t.regime, _time(t.seconds[OURS]), _ratio(t, TORCH))
    return table


def _slower(timings: list[Timing], style: box.Box) -> Table:
    table = _table(style, "slower", "threads", "memory", "operation", "ours", "× torch.nn", "spread", "")
    for t in timings:
        noise = "noise" if (t.ratio(TORCH) or 0) >= summary.NOISE else ""
        spread = f"{100 * max(t.spread[OURS], t.spread[TORCH]):.0f} %"
        table.add_row(
            t.cell.name, str(t.threads), t.regime, t.operation, _time(t.seconds[OURS]), _ratio(t, TORCH), spread, noise
        )
    return table


def _failures(failed: list[tuple[str, str]], style: box.Box) -> Table:
    table = Table("cell", "why", box=style)
    for name, why in failed:
        table.add_row(name, escape(why))
    return table


def _saved(report: Report, style: box.Box) -> Table:
    table = _table(style, "shape", "dtype", "input", "extra, ours", "extra, torch.nn")
    for check in report.checks:
        if check.cell.layout == "contiguous" and check.cell.kind == "layer" and OURS in check.saved:
            ours, theirs = check.saved[OURS], check.saved[TORCH]
            table.add_row(check.cell.size, check.cell.dtype, str(ours.input), str(ours.extra), str(theirs.extra))
    return table


def _every_cell(report: Report, threads: int, regime: str) -> Table:
    table = _table(box.MARKDOWN, "shape", "dtype", "layout", "kernel", *OPERATIONS, "forward in copies")
    kernel = {check.cell: check.training for check in report.checks}
    rows: dict[Cell, dict[str, Timing]] = {}
    for t in report.timings:
        if (t.threads, t.regime) == (threads, regime) and t.cell.kind == "layer":
            rows.setdefault(t.cell, {})[t.operation] = t
    for cell, row in rows.items():
        values = [
            f"{_time(row[o].seconds[OURS])}, {_ratio(row[o], TORCH)}" if _has(row, o) else "–" for o in OPERATIONS
        ]
        copies = row["forward"].ratio(COPY) if "forward" in row else None
        table.add_row(
            cell.size, cell.dtype, cell.layout, kernel.get(cell, ""), *values, f"{1 / copies:.2f}" if copies else "–"
        )
    return table


def _has(row: dict[str, Timing], operation: str) -> bool:
    return operation in row and OURS in row[operation].seconds


def _ratio(t: Timing, rival: str) -> str:
    ratio = t.ratio(rival)
    return "–" if ratio is None else f"{ratio:.2f} ×"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def _shortened(why: str) -> str:
    first, *others = why.split("; ")
    return first + (f" (and {len(others)} more)" if others else "")


def _worst(count: int) -> str:
    return f"; the worst {_WORST}:" if count > _WORST else ":"
