"""Summary: geometric means, and the bars that the project has set itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from batchnorm.benchmark.grid import OPERATIONS, OVERHEAD, REGIMES, Cell
from batchnorm.benchmark.machine import last_level
from batchnorm.benchmark.peers import COPY, OURS, TORCH
from batchnorm.benchmark.results import Report, Timing

NOISE = 0.97  # a ratio from here on is not called slower
FRESH_LIMIT = 32 * 2**20  # bytes: glibc keeps no freed block above this


@dataclass(frozen=True)
class Mean:
    """The geometric mean of the ratios to torch.nn over the 4-D cells of one kind, and the lowest."""

    threads: int
    regime: str
    operation: str
    layout: str
    dtype: str
    mean: float
    lowest: float
    cells: int


@dataclass(frozen=True)
class Bar:
    """A target and what was reached; `passed` is None where nothing was measured."""

    name: str
    target: str
    value: float | None
    passed: bool | None
    cells: int


def geometric_means(report: Report) -> list[Mean]:
    """Give the mean of every kind of 4-D cell that was timed."""
    found: dict[tuple[int, str, str, str, str], list[float]] = {}
    for t in report.timings:
        ratio = t.ratio(TORCH)
        if len(t.cell.shape) == 4 and t.cell.kind == "layer" and ratio is not None:
            key = (t.threads, t.regime, t.operation, t.cell.layout, t.cell.dtype)
            found.setdefault(key, []).append(ratio)
    order = {name: i for i, name in enumerate((*REGIMES, *OPERATIONS))}
    keys = sorted(found, key=lambda k: (-k[0], order[k[1]], k[3] != "contiguous", k[4] != "float32", order[k[2]]))
    return [Mean(*k, statistics.geometric_mean(found[k]), min(found[k]), len(found[k])) for k in keys]


def slower(report: Report, below: float = 1.0) -> list[Timing]:
    """Timings in which torch.nn was faster, the worst first."""
    found = [(ratio, t) for t in report.timings if (ratio := t.ratio(TORCH)) is not None and ratio < below]
    return [t for _, t in sorted(found, key=lambda pair: pair[0])]


def failures(report: Report) -> list[tuple[str, str]]:
    """Give what has no figures, and why."""
    refused = [(check.cell.name, "; ".join(check.problems)) for check in report.checks if check.problems]
    broken = [(f"{t.cell.name}, {t.operation}, {t.regime}", t.problem) for t in report.timings if t.problem]
    return refused + broken


def bars(report: Report) -> list[Bar]:
    """Judge every bar. A cell of it that has no figures fails the bar."""
    plain = _cells(layout="contiguous", dtype="float32")
    images = _cells(dimensions=4)
    small, large = (lambda c: c.bytes < FRESH_LIMIT), (lambda c: c.bytes >= FRESH_LIMIT)
    beyond = lambda c: c.bytes > last_level()  # noqa: E731
    both = "forward+backward"
    judge = _Judge(report)
    return [
        judge.mean("float32 contiguous, forward", 5.0, "warm", "forward", plain, images),
        judge.mean("float32 contiguous, forward+backward", 3.0, "warm", both, plain, images),
        judge.copies("float32 contiguous beyond the cache, forward: slowest in copies", 1.6, plain, beyond),
        judge.mean("fresh memory below 32 MiB, float32 contiguous, forward", 1.5, "fresh", "forward", plain, images, small),
        judge.mean("fresh memory below 32 MiB, float32 contiguous, forward+backward", 1.5, "fresh", both, plain, images, small),
        judge.lowest("fresh memory from 32 MiB on, lowest of all training", "fresh", ("forward", both), large),
        judge.mean("channels_last float32, forward+backward", 1.3, "warm", both, _cells("channels_last", "float32"), images),
        judge.mean("channels_last bfloat16, forward+backward", 1.3, "warm", both, _cells("channels_last", "bfloat16"), images),
        judge.mean("bfloat16 in both layouts, forward+backward", 2.5, "warm", both, _cells(dtype="bfloat16"), images),
        judge.lowest("call overhead, [32, 64] and [256, 128], forward", None, ("forward",), plain, lambda c: c.shape in OVERHEAD),
        judge.lowest("lowest of all cells", None, OPERATIONS),
        judge.saved("saved beyond the input and the layer: most vectors of C"),
    ]  # fmt: skip


Select = Callable[[Cell], bool]


def _cells(layout: str | None = None, dtype: str | None = None, dimensions: int | None = None) -> Select:
    return lambda c: (
        (layout is None or c.layout == layout)
        and (dtype is None or c.dtype == dtype)
        and (dimensions is None or len(c.shape) == dimensions)
    )


class _Judge:
    """Bars over a report. The means are over the main grid, on the most threads; the lowest is of everything."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.refused = [check.cell for check in report.checks if check.problems]
        self.threads = max((t.threads for t in report.timings), default=0)

    def mean(self, name: str, target: float, regime: str, operation: str, *select: Select) -> Bar:
        ratios, failed = self._ratios(TORCH, regime, (operation,), select, self.threads)
        value = statistics.geometric_mean(ratios) if ratios else None
        return _bar(name, f"≥ {target:g} ×", value, value is not None and value >= target, failed, len(ratios))

    def lowest(self, name: str, regime: str | None, operations: Iterable[str], *select: Select) -> Bar:
        ratios, failed = self._ratios(TORCH, regime, tuple(operations), select, None)
        value = min(ratios, default=None)
        return _bar(
            name, f"≥ 1 × ({NOISE:g} is noise)", value, value is not None and value >= NOISE, failed, len(ratios)
        )

    def copies(self, name: str, target: float, *select: Select) -> Bar:
        ratios, failed = self._ratios(COPY, "warm", ("forward",), select, self.threads)
        value = 1 / min(ratios) if ratios else None
        return _bar(name, f"≤ {target:g} copies", value, value is not None and value <= target, failed, len(ratios))

    def saved(self, name: str) -> Bar:
        """The moments are two float64 vectors."""
        extra = [c.saved[OURS].extra / (8 * c.cell.shape[1]) for c in self.report.checks if OURS in c.saved]
        return _bar(name, "≤ 2 float64", max(extra, default=None), max(extra, default=0) <= 2, False, len(extra))

    def _ratios(
        self,
        rival: str,
        regime: str | None,
        operations: tuple[str, ...],
        select: tuple[Select, ...],
        threads: int | None,
    ) -> tuple[list[float], bool]:
        """The ratios to a rival, and whether any is missing that should be there."""
        wanted = [
            t for t in self.report.timings
            if t.operation in operations and t.regime == (regime or t.regime) and t.threads == (threads or t.threads)
            and (t.cell.kind == "layer" or not select) and all(s(t.cell) for s in select)
        ]  # fmt: skip
        ratios = [t.ratio(rival) for t in wanted if rival != COPY or t.cell.kind == "layer"]
        refused = any(all(s(cell) for s in select) for cell in self.refused)
        return [r for r in ratios if r is not None], refused or None in ratios


def _bar(name: str, target: str, value: float | None, reached: bool, failed: bool, cells: int) -> Bar:
    passed = None if value is None and not failed else reached and not failed
    return Bar(name, target, value, passed, cells)
