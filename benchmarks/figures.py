"""Figures: what a report's page draws."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from batchnorm.benchmark.cells import Operation
from batchnorm.benchmark.contenders import OURS, TORCH
from batchnorm.reports import pages
from batchnorm.reports.pages import INK, MUTED
from benchmarks.grid import DTYPES, FUSED, LAYOUTS
from benchmarks.results import Report, Timing
from benchmarks.targets import FLOOR

# Stand-ins, as in ``pages``.
_FORMS = {"bn": "#030303", "bn+relu": "#040404", "bn+add+relu": "#050505"}
COLOURS = {"#030303": "var(--bn)", "#040404": "var(--relu)", "#050505": "var(--add)"}


def ratios(report: Report) -> str:
    """Draw the ratio to torch.nn against the input's size: training steps of every image."""
    return pages.svg(lambda figure: _ratios(figure, report), "Ratio to torch.nn against size", COLOURS, height=5.6)


def floors(report: Report) -> str:
    """Draw times the floor against the input's size, float32 contiguous."""
    return pages.svg(lambda figure: _floors(figure, report), "Times the floor against size", COLOURS)


def networks(report: Report) -> str:
    """Draw the ratio to torch.nn of every network."""
    count = sum(1 for _ in _networks(report))
    return pages.svg(lambda figure: _gains(figure, report), "Whole networks", COLOURS, height=1.0 + 0.24 * count)


def _ratios(figure: Figure, report: Report) -> None:
    grid = figure.subplots(2, 2, sharex=True, sharey=True, squeeze=False)
    for row, dtype in zip(grid, DTYPES, strict=True):
        for axes, layout in zip(row, LAYOUTS, strict=True):
            for fused, colour in _FORMS.items():
                points = [
                    (t.cell.bytes, ratio)
                    for t in _timings(report, fused, "forward+backward")
                    if (t.cell.dtype, t.cell.layout) == (dtype, layout) and (ratio := t.ratio(TORCH)) is not None
                ]
                _scatter(axes, points, colour, FUSED[fused])
            axes.set_title(f"{dtype} {layout}", fontsize=11)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_yticks([0.5, 1, 2, 5, 10])
            _by_size(axes, report)
    for axes in grid[1]:
        axes.set_xlabel("input (MB)")
    grid[0, 0].legend(frameon=False, loc="upper left", fontsize=9, handletextpad=0.1)


def _floors(figure: Figure, report: Report) -> None:
    operations: tuple[Operation, ...] = ("forward", "forward+backward")
    for axes, operation in zip(figure.subplots(1, 2, sharey=True), operations, strict=True):
        for fused, colour in _FORMS.items():
            points = [
                (t.cell.bytes, times)
                for t in _timings(report, fused, operation)
                if (t.cell.dtype, t.cell.layout) == (DTYPES[0], LAYOUTS[0]) and (times := t.times_floor()) is not None
            ]
            _scatter(axes, points, colour, FUSED[fused])
        axes.axhline(FLOOR, color=MUTED, linewidth=0.8, linestyle="--")
        axes.set_ylim(bottom=0)
        axes.set_title(operation, fontsize=11)
        axes.set(xlabel="input (MB)")
        _by_size(axes, report)
    figure.axes[0].set_ylabel("time by the floor's")
    figure.axes[0].legend(frameon=False, loc="best", fontsize=9, handletextpad=0.1)


def _gains(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    found = list(_networks(report))
    colours = {"forward+backward": "#040404", "evaluation": "#030303"}
    for place, t in enumerate(found):
        one = t.ratios[TORCH]
        axes.barh(place, one.median, color=colours[t.operation], height=0.7)
        axes.hlines(place, one.low, one.high, color=INK, linewidth=1)
        axes.text(one.high + 0.02, place, f"{one.median:.2f} ×", va="center", fontsize=9)
    names = [f"{t.cell.model} {t.cell.size} {t.cell.layout}, {_SHORT[t.operation]}" for t in found]
    axes.set_yticks(range(len(found)), names, fontsize=9)
    axes.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set(xlabel="torch.nn's time by ours", ylim=(len(found) - 0.4, -0.6))


_SHORT = {"forward+backward": "training", "evaluation": "evaluation"}


def _scatter(axes: Axes, points: list[tuple[int, float]], colour: str, label: str) -> None:
    sizes, values = [size / 1e6 for size, _ in points], [value for _, value in points]
    axes.plot(sizes, values, "o", color=colour, markersize=4, alpha=0.8, label=label)


def _by_size(axes: Axes, report: Report) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    axes.axvline(report.last_level / 1e6, color=MUTED, linewidth=0.8, linestyle=":")


def _timings(report: Report, fused: str, operation: Operation) -> Iterator[Timing]:
    """The main grid's images, in warm memory."""
    threads = max((t.threads for t in report.timings), default=0)
    for t in report.timings:
        image = t.cell.kind == "layer" and len(t.cell.shape) == 4
        if image and (t.cell.fused, t.operation, t.regime, t.threads) == (fused, operation, "warm", threads):
            yield t


def _networks(report: Report) -> Iterator[Timing]:
    return (t for t in report.timings if t.cell.kind == "model" and OURS in t.seconds)
