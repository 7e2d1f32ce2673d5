"""The report: a table for the terminal, and one self-contained HTML page that needs no network and no script."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.table import Column, Table
from rich.text import Text

from batchnorm.reports import pages
from batchnorm.reports.files import write_texts
from batchnorm.study import plots
from batchnorm.study.results import (
    Comparison,
    Summary,
    judge,
    mean_accuracy,
    mean_batch_accuracy,
    paired,
    points,
)


def save(comparison: Comparison, directory: str | Path) -> tuple[Path, Path]:
    """Write results.json and report.html into a directory, which is made if need be; return their paths."""
    directory = Path(directory)
    contents = {directory / "results.json": comparison.to_json(), directory / "report.html": render(comparison)}
    directory.mkdir(parents=True, exist_ok=True)
    write_texts(contents)
    results, report = contents
    return results, report


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


def render(comparison: Comparison) -> str:
    """Return the report as HTML; names and values are escaped."""
    environment = pages.environment("batchnorm.study")
    environment.filters["percent"] = percent
    environment.filters["steps"] = steps
    control, treatment = (comparison.summary(arm) for arm in comparison.arms)
    check = running_against_batch(comparison)
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        settings=comparison.settings,
        verdict=judge(comparison),
        control=control,
        treatment=treatment,
        mean_accuracy=mean_accuracy,
        mean_batch_accuracy=mean_batch_accuracy,
        check=check,
        # Matplotlib has escaped the names in the figures.
        loss_plot=Markup(plots.svg(plots.loss, comparison, "Training loss against step")),
        rate_plot=Markup(plots.svg(plots.rates, comparison, "Validation accuracy against learning rate", height=4.6)),
        statistics_plot=Markup(plots.svg(plots.statistics, comparison, "Running against batch statistics"))
        if check
        else None,
    )


def percent(share: float | None) -> str:
    """Say a share of all images; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f}%"


def steps(count: float, most: int) -> str:
    """Say a number of steps; a run that never got there took more than the most it had."""
    return f"{count:g}" if math.isfinite(count) else f"> {most}"


def running_against_batch(comparison: Comparison) -> str | None:
    """Say what the second arm's accuracy gains or loses by running statistics; `None` if it has none."""
    runs = comparison.final(comparison.arms[1])
    pairs = [(run.accuracy, run.batch_accuracy) for run in runs if run.batch_accuracy is not None]
    return points(paired([running - batch for running, batch in pairs])) if pairs else None
