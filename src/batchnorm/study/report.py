"""The report: one self-contained HTML page that needs no network and no script."""

import math

from markupsafe import Markup

from batchnorm import pages
from batchnorm.study import plots
from batchnorm.study.results import Comparison, mean_accuracy, mean_batch_accuracy
from batchnorm.study.verdict import judge, paired, points


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
