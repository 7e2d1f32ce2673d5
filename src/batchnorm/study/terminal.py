"""The terminal: the progress of a comparison and its table of results."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.study import compare
from batchnorm.study.report import percent, steps
from batchnorm.study.results import Comparison


@contextmanager
def progress(console: Console) -> Iterator[compare.Progress]:
    """Show a bar while a comparison runs; gives the function to call after each run."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("training", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(comparison: Comparison) -> Table:
    """Return the results as a table, an arm a row."""
    settings = comparison.settings
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("")
    for heading in (
        "best rate",
        "test accuracy",
        "range",
        f"steps to {settings.target:.0%}",
        f"rates that reach {settings.target:.0%}",
        "failed runs",
        "ms a step",
    ):
        result.add_column(heading, justify="right")
    for arm in comparison.arms:
        summary = comparison.summary(arm)
        result.add_row(
            arm,
            f"{summary.rate:g}{' (edge)' if summary.at_edge else ''}",
            percent(summary.accuracy),
            f"{percent(summary.lowest)} to {percent(summary.highest)}",
            steps(summary.steps_to_target, settings.steps),
            ", ".join(f"{rate:g}" for rate in summary.usable_rates) or "none",
            f"{summary.failed} of {len(settings.rates) * settings.seeds}",
            f"{1000 * summary.seconds_per_step:.1f}",
        )
    return result
