"""The terminal: the progress of a comparison and its table of results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from batchnorm.study import compare
from batchnorm.study.report import percent, steps
from batchnorm.study.results import Comparison, Summary


@contextmanager
def progress(console: Console) -> Iterator[compare.Progress]:
    """Show a bar while a comparison runs; gives the function to call after each run."""
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
    )
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(comparison: Comparison) -> Table:
    """Return the results as a table, an arm a column."""
    settings = comparison.settings
    target = f"{100 * settings.target:g}%"
    arms = [comparison.summary(arm) for arm in comparison.arms]
    result = Table("", *(Column(Text(arm.arm), justify="right") for arm in arms), box=box.SIMPLE_HEAD)
    rows: dict[str, Callable[[Summary], str]] = {
        "best learning rate": lambda arm: f"{arm.rate:g}{' (edge)' if arm.at_edge else ''}",
        "test accuracy, mean": lambda arm: percent(arm.accuracy),
        "  lowest to highest": lambda arm: f"{percent(arm.lowest)} to {percent(arm.highest)}",
        "  with batch statistics": lambda arm: percent(arm.batch_accuracy),
        f"steps to {target}, median": lambda arm: steps(arm.steps_to_target, settings.steps),
        f"rates that reach {target}": lambda arm: ", ".join(f"{rate:g}" for rate in arm.usable_rates) or "none",
        "failed runs of the sweep": lambda arm: f"{arm.failed} of {len(settings.rates) * settings.sweep_seeds}",
        "time a step, median": lambda arm: f"{1000 * arm.seconds_per_step:.1f} ms",
    }
    for heading, value in rows.items():
        result.add_row(heading, *(value(arm) for arm in arms))
    return result
