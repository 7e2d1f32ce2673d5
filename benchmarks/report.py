"""The report: a summary for the terminal, and everything as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console

from batchnorm.benchmark.figures import NOISE
from batchnorm.benchmark.report import Table, draw
from batchnorm.benchmark.report import markdown as drawn
from benchmarks import summary, tables
from benchmarks.processes import WARM
from benchmarks.results import Report
from benchmarks.targets import judged

QUICK = "This was a quick run: it shows that everything works, and its figures judge nothing."
READ = f"""\
Ratios are a baseline's time divided by ours: above 1, ours is faster. All contenders take turns in rounds; a time is
the median over rounds, a ratio the median of the ratios within rounds, and in brackets is the interval that holds the
true median with 95 % confidence. A cell is called slower only if its whole interval is below {NOISE}, after a second
look of four times the length. *× floor* is our time over what the least possible traffic would take at the speed of a
copy of the same input in the same run. *Warm* memory was allocated with
`GLIBC_TUNABLES={WARM}`,
*fresh* with the system's defaults. Parameters are float32 throughout. Evaluation is under `torch.no_grad`. No figure is
given for a cell whose results failed the check against float64."""

_WORST = 10  # rows on the terminal
_COLOURS = {tables.PASSED: "green", tables.MISSED: "bold red", tables.UNMEASURED: "dim"}
_KEPT, _PEAKS = "kept for the backward, activations", "most held in a training step, beyond its inputs"


def show(report: Report, console: Console) -> None:
    """Print the summary and what is worst."""
    summaries = (
        tables.machine(report),
        tables.means(report),
        tables.baselines(report),
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
    draw(tables.targets(report), console, _COLOURS)
    if report.quick:
        console.print(f"[yellow]{QUICK}[/yellow]")


def sections(report: Report) -> Iterator[tuple[str, Table]]:
    """All tables but those of every cell, which `cell_sections` gives, with their titles."""
    yield "Machine", tables.machine(report)
    yield "Targets", tables.targets(report)
    yield "Geometric means over the 4-D cells, times torch.nn", tables.means(report)
    yield "Baselines that take long to build", tables.baselines(report)
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


def to_json(report: Report) -> str:
    """Give the JSON text, with targets and means for readers who do not compute."""
    means, reached = summary.geometric_means(report), judged(report)
    return report.to_json(targets=[asdict(one) for one in reached], geometric_means=[asdict(one) for one in means])


def markdown(report: Report) -> str:
    """Give the Markdown text."""
    parts = ["# Benchmark", *([f"**{QUICK}**"] if report.quick else []), READ]
    return "\n\n".join((*parts, written((*sections(report), *cell_sections(report)), 2)))


def written(found: tuple[tuple[str, Table], ...], level: int) -> str:
    """Give sections as Markdown, under headings of a level."""
    return "\n\n".join(f"{'#' * level} {title}\n\n{drawn(table)}" for title, table in found) + "\n"


def _shortened(why: str) -> str:
    first, *others = why.split("; ")
    return first + (f" (and {len(others)} more)" if others else "")


def _worst(count: int) -> str:
    return f"; the worst {_WORST}:" if count > _WORST else ":"
