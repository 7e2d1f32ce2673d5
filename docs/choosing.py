"""Trains with each policy on batches of 2 to 64, and tells which is best where.

    python docs/choosing.py

remakes docs/choosing.json, docs/choosing.svg and the tables of docs/choosing.md, in about half an hour on two cores. It
needs the extra "tools" and mnist1d.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from choosing_study import GHOST, GROUP, SYNC, Budget, Cell, Study, mnist1d, study
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from batchnorm.reports import pages
from batchnorm.reports.files import around, write_texts
from batchnorm.reports.pages import INK, MUTED
from batchnorm.reports.progress import progress
from batchnorm.study.data import Data, digits
from batchnorm.study.results import Paired

NETWORKS = {
    "digits": "a perceptron, in which a channel has one value a sample",
    "MNIST-1D": "a convolutional network, in which a channel has 20, 10 and 5 values a sample",
}
COLOURS = {  # Okabe & Ito's, which most colour-blind readers can tell apart
    "no norm": "#999999",
    "batch norm": "#000000",
    "ghost": "#e69f00",
    "renorm": "#d55e00",
    "group norm": "#0072b2",
    "layer norm": "#56b4e9",
    SYNC: "#009e73",
}
DODGE = 1.035  # so that the range bars of several arms stand side by side
BEGIN, END = "## Measured", "## What these numbers say"


def show(study: Study, console: Console) -> None:
    """Print the tables."""
    for data, title, table in _tables(study, box.SIMPLE_HEAD):
        console.print(f"{data}: {title}", style="bold", highlight=False)
        console.print(table)


def markdown(study: Study) -> str:
    """Return the tables as Markdown, with what they are of."""
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    console.print(_described(study), highlight=False, markup=False)
    above = None
    for data, title, table in _tables(study, box.MARKDOWN):
        heading = f"\n### {data}: {NETWORKS[data]}\n" if data != above else ""
        console.print(f"{heading}\n{title.capitalize()}:\n", highlight=False, markup=False)
        above = data
        console.print(table)
    drawn = console.file
    assert isinstance(drawn, io.StringIO)
    lines = (line.rstrip() for line in drawn.getvalue().splitlines())
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip("\n") + "\n"


def remake(folder: Path, budget: Budget, data: Sequence[Data], processes: int | None = None) -> list[Path]:
    """Run the study, and write its tables into a folder's choosing.md, with the plot and the runs beside.

    Raises:
        OSError: before anything is trained, if there is no guide with a place for results.
    """
    around(folder / "choosing.md", BEGIN, END)
    console = Console()
    with progress(console, "runs") as advance:
        found = study(data, budget, processes, progress=partial(advance, "training"))
    show(found, console)
    return publish(found, folder)


def publish(study: Study, folder: Path) -> list[Path]:
    """Write the tables into a folder's choosing.md, between two of its headings, with the plot and the runs beside."""
    before, after = around(folder / "choosing.md", BEGIN, END)
    picture = "![Accuracy against batch size, and what training mode gains](choosing.svg)"
    contents = {
        "choosing.md": f"{before}{BEGIN}\n\n{picture}\n\n{markdown(study)}\n{after}",
        "choosing.svg": figure(study),
        "choosing.json": study.to_json() + "\n",
    }
    write_texts({folder / name: text for name, text in contents.items()})
    return [folder / name for name in contents]


def figure(study: Study) -> str:
    """Draw accuracy, and what training mode gains, against batch size; returns an SVG file's text."""
    colours = {INK: "#1c1f24", MUTED: "#666d78"}  # of a file, which no style sheet reaches
    return pages.svg(lambda figure: _draw(figure, study), "Accuracy against batch size", colours, height=7.0) + "\n"


def _described(study: Study) -> str:
    budget, machine = study.budget, study.environment
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "scikit-learn", "mnist1d"))
    return f"""\
Written by `python docs/choosing.py` with {versions};
every run stands in [choosing.json](choosing.json). Each sees {budget.samples} samples, whatever its batches: small ones
take more steps. SGD with momentum 0.9 along a cosine; momentum 0.1 in the running statistics. Each arm's rate at each
batch size is the best on validation data over {budget.sweep_seeds} seeds; test data is seen by {budget.seeds} others,
for which all arms share initial weights and the order of the data. *Renorm*'s schedule is the paper's for 100 000
steps, scaled to the run; *group* is of {GROUP} channels; *sync over {budget.processes}* is what it equals: batch norm
of {budget.processes} times as many samples a step, and so in as many times fewer steps."""


def _tables(study: Study, style: box.Box) -> Iterator[tuple[str, str, Table]]:
    budget = study.budget
    kinds: dict[str, tuple[Callable[[Cell], str | None], bool]] = {
        f"test accuracy in %, mean of {budget.seeds} seeds (lowest to highest)": (_accuracy, False),
        "points of accuracy above batch norm's at the same batch size (95% confidence)": (_against, False),
        "points gained by training mode, where the batch's moments normalize / by recalibration": (_gaps, True),
        "learning rate, * where the best is at the end of those tried": (_rate, False),
    }
    for data in study.data:
        for title, (say, only_running) in kinds.items():
            table = Table("samples in a step", *map(str, budget.batches), box=style)
            for column in table.columns[1:]:
                column.justify = "right"
            for arm in study.arms:
                cells = [study.cell(data, arm, batch) for batch in budget.batches]
                if only_running and not any(cell and cell.recalibrated is not None for cell in cells):
                    continue
                table.add_row(_name(study, arm), *("–" if cell is None else say(cell) or "–" for cell in cells))
            yield data, title, table


def _name(study: Study, arm: str) -> str:
    return {"ghost": f"ghost of {GHOST}", SYNC: f"sync over {study.budget.processes}"}.get(arm, arm)


def _accuracy(cell: Cell) -> str:
    return f"{100 * cell.accuracy:.1f} ({100 * cell.lowest:.0f} to {100 * cell.highest:.0f})"


def _against(cell: Cell) -> str | None:
    found = cell.against_batch_norm
    return None if found.estimate == found.low == found.high == 0 else f"{_points(found.estimate)} ({_span(found)})"


def _span(interval: Paired) -> str:
    return f"{_points(interval.low)} to {_points(interval.high)}"


def _gaps(cell: Cell) -> str | None:
    if cell.batch_accuracy is None or cell.recalibrated is None:
        return None
    return f"{_points(cell.batch_accuracy - cell.accuracy)} / {_points(cell.recalibrated - cell.accuracy)}"


def _rate(cell: Cell) -> str:
    return f"{cell.rate:g}{'*' if cell.at_edge else ''}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _draw(figure: Figure, study: Study) -> None:
    figure.set_facecolor("white")
    grid = figure.subplots(2, len(study.data), sharex=True, squeeze=False, height_ratios=(3, 2))
    for column, data in enumerate(study.data):
        above, below = grid[:, column]
        above.set_title(f"{data}, {NETWORKS[data].partition(',')[0]}", fontsize=11)
        for place, arm in enumerate(study.arms):
            dodge = DODGE ** (place - len(study.arms) / 2)
            _accuracies(above, study, data, arm, dodge)
            _gains(below, study, data, arm, dodge)
        below.axhline(0, color=MUTED, linewidth=0.8, linestyle=":")
        below.set_xscale("log", base=2)
        below.set_xticks(study.budget.batches, [str(batch) for batch in study.budget.batches])
        below.xaxis.set_minor_locator(NullLocator())
        below.set_xlabel("samples in a step (log scale)")
    grid[0, 0].set_ylabel("test accuracy (%)\nmean and range")
    grid[1, 0].set_ylabel("gained in training\nmode (points)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _accuracies(axes: Axes, study: Study, data: str, arm: str, dodge: float) -> None:
    """Draw means as a line, and ranges."""
    cells = _cells(study, data, arm)
    x = np.array(list(cells)) * dodge
    low, mean, high = (
        [100 * getattr(cell, name) for cell in cells.values()] for name in ("lowest", "accuracy", "highest")
    )
    line = "--" if arm in ("no norm", SYNC) else "-"
    axes.plot(x, mean, "o" + line, color=COLOURS[arm], markersize=4, linewidth=1.5, label=_name(study, arm))
    axes.vlines(x, low, high, color=COLOURS[arm], linewidth=0.8)


def _gains(axes: Axes, study: Study, data: str, arm: str, dodge: float) -> None:
    """Draw how much better training mode does, where the batch's moments normalize, than running statistics."""
    cells = _cells(study, data, arm)
    points = [(b, c.batch_accuracy - c.accuracy) for b, c in cells.items() if c.batch_accuracy is not None]
    if points:
        x, y = zip(*points, strict=True)
        line = "--" if arm == SYNC else "-"
        axes.plot(np.array(x) * dodge, 100 * np.array(y), "o" + line, color=COLOURS[arm], markersize=4, linewidth=1.5)


def _cells(study: Study, data: str, arm: str) -> dict[int, Cell]:
    found = {batch: study.cell(data, arm, batch) for batch in study.budget.batches}
    return {batch: cell for batch, cell in found.items() if cell is not None}


if __name__ == "__main__":
    remake(Path(__file__).parent, Budget(), (digits(), mnist1d()))
