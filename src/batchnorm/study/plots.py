"""Plots: the report's figures, as SVG whose text and colours follow the page that they stand in."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from batchnorm.reports import pages
from batchnorm.reports.pages import INK, MUTED
from batchnorm.study.results import Comparison, Run

# Stand-ins, as in ``pages``.
CONTROL, TREATMENT = "#030303", "#040404"
COLOURS = {CONTROL: "var(--control)", TREATMENT: "var(--treatment)"}
LABEL_GAP = 0.15  # of the axes' height, between the two-line labels of curves that end close together
DODGE = 1.03  # so that the range bars of two arms at one rate stand side by side

Plot = Callable[[Figure, Comparison], None]
Label = tuple[str, float, str]


def svg(plot: Plot, comparison: Comparison, title: str, height: float = 3.8) -> str:
    """Return a plot as an SVG element for a page, its title there for those who do not see it."""
    return pages.svg(lambda figure: plot(figure, comparison), title, COLOURS, height)


def loss(figure: Figure, comparison: Comparison) -> None:
    """Draw training loss against step, each arm at its best rate: median over seeds and range."""
    axes = figure.subplots()
    axes.set_yscale("log")
    guessing = math.log(comparison.classes)
    labels = []
    for arm, colour in _coloured(comparison):
        runs = comparison.final(arm)
        end = _curve(axes, runs, [run.loss for run in runs], colour)
        labels.append((f"{arm}\nrate {runs[0].rate:g}", end, colour))
    axes.axhline(guessing, color=MUTED, linewidth=0.8, linestyle=":")
    most = comparison.settings.steps
    axes.annotate("guessing", (most, guessing), (0, 4), textcoords="offset points", color=MUTED, ha="right")
    axes.set_xlim(0, most)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="step", ylabel="training loss (nats, log scale)")
    _label_ends(axes, labels)


def rates(figure: Figure, comparison: Comparison) -> None:
    """Draw validation accuracy against learning rate, and under it how many runs failed at each."""
    axes, counts = figure.subplots(2, sharex=True, height_ratios=(6, 1))
    labels = []
    for row, (arm, colour) in enumerate(_coloured(comparison)):
        by_rate = _by_rate(comparison, arm)
        labels.append((arm, _line(axes, by_rate, colour, dodge=DODGE ** (2 * row - 1)), colour))
        best = comparison.summary(arm).rate
        ring = 100 * float(np.median([run.accuracy for run in by_rate[best]]))
        axes.plot(best * DODGE ** (2 * row - 1), ring, "o", markersize=14, markerfacecolor="none", color=colour)
        counts.text(-0.02, row, arm, color=colour, ha="right", va="center", transform=counts.get_yaxis_transform())
        for rate, runs in by_rate.items():
            failed = sum(run.outcome != "learned" for run in runs)
            counts.text(rate, row, str(failed) if failed else "·", color=colour, ha="center", va="center")
    axes.axhline(100 / comparison.classes, color=MUTED, linewidth=0.8, linestyle=":")
    axes.tick_params(labelbottom=False, bottom=False)
    axes.set(ylabel="validation accuracy (%)", ylim=(-3, 103))
    _label_ends(axes, labels)
    counts.set(ylim=(1.6, -0.6), yticks=[], xlabel="learning rate (log scale)")
    counts.spines["left"].set_visible(False)
    counts.text(
        1.02, 0.5, f"failed runs\nof {comparison.settings.sweep_seeds}", transform=counts.transAxes, va="center"
    )
    _rate_axis(counts, comparison)


def statistics(figure: Figure, comparison: Comparison) -> None:
    """Draw the second arm's accuracy with running and with batch statistics while it trains at its best rate."""
    axes = figure.subplots()
    runs = comparison.final(comparison.arms[1])
    labels = []
    for name, colour, line, curves in (
        ("running\nstatistics", TREATMENT, "-", [run.validation for run in runs]),
        ("batch\nstatistics", INK, "--", [run.validation_batch for run in runs]),
    ):
        percent = [[100 * share for share in curve] for curve in curves]
        labels.append((name, _curve(axes, runs, percent, colour, line), colour))
    axes.set(xlabel="step", ylabel="validation accuracy (%)", xlim=(0, comparison.settings.steps), ylim=(0, 103))
    _label_ends(axes, labels)


def _coloured(comparison: Comparison) -> Iterator[tuple[str, str]]:
    return zip(comparison.arms, (CONTROL, TREATMENT), strict=True)


def _by_rate(comparison: Comparison, arm: str) -> dict[float, tuple[Run, ...]]:
    return {rate: comparison.sweep(arm, rate) for rate in comparison.settings.rates}


def _curve(
    axes: Axes, runs: Sequence[Run], curves: Sequence[Sequence[float | None]], colour: str, line: str = "-"
) -> float:
    """Draw the median over seeds of curves over steps, and their range; return its last finite value."""
    steps = max((run.steps for run in runs), key=len)
    padded = np.ma.masked_invalid([_padded(curve, len(steps)) for curve in curves])
    middle = np.ma.median(padded, axis=0)
    axes.plot(steps, middle, line, color=colour)
    axes.fill_between(steps, padded.min(axis=0), padded.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    finite = middle.compressed()
    return float(finite[-1]) if len(finite) else math.inf


def _line(axes: Axes, by_rate: dict[float, tuple[Run, ...]], colour: str, dodge: float) -> float:
    """Draw accuracies over rates: medians over seeds, ranges, failed runs as crosses; return where the line ends."""
    shares = [[100 * run.accuracy for run in runs] for runs in by_rate.values()]
    middle = np.median(shares, axis=1)
    x = np.array(list(by_rate)) * dodge
    axes.plot(x, middle, "o-", color=colour, markersize=5)
    axes.vlines(x, np.min(shares, axis=1), np.max(shares, axis=1), color=colour, linewidth=1)
    for rate, runs in by_rate.items():
        failed = [100 * run.accuracy for run in runs if run.outcome != "learned"]
        axes.plot([rate * dodge] * len(failed), failed, "x", color=colour, markersize=8)
    return float(middle[-1])


def _rate_axis(axes: Axes, comparison: Comparison) -> None:
    axes.set_xscale("log")
    axes.set_xticks(comparison.settings.rates, [f"{rate:g}" for rate in comparison.settings.rates])
    axes.xaxis.set_minor_locator(NullLocator())


def _label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Write the names of two curves at their right ends, a little apart where the curves end together."""
    axes.get_ylim()  # settles the limits, which the positions depend on
    lower, upper = sorted(labels, key=lambda label: label[1])
    low, high = (_height(axes, value) for _, value, _ in (lower, upper))
    if high - low < LABEL_GAP:
        high = min((low + high + LABEL_GAP) / 2, 1.0)
        low = high - LABEL_GAP
    for (text, _, colour), height in ((lower, low), (upper, high)):
        axes.text(1.02, height, text, color=colour, va="center", transform=axes.transAxes)


def _height(axes: Axes, value: float) -> float:
    """Return where a value is between the foot of the axes, 0, and their top, 1."""
    _, pixels = axes.transData.transform((1, value))
    _, height = axes.transAxes.inverted().transform((0, pixels))
    return float(np.clip(height, 0, 1))


def _padded(values: Sequence[float | None], length: int) -> list[float]:
    """Return a curve as numbers, NaN where the loss was not finite and after the run's end."""
    numbers = [math.nan if value is None else value for value in values]
    return numbers + [math.nan] * (length - len(numbers))
