"""Summary: geometric means, what is slower than torch.nn, and what has no figures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from batchnorm.benchmark.contenders import TORCH
from batchnorm.benchmark.figures import NOISE
from benchmarks.grid import DTYPES, FUSED, LAYOUTS, OPERATIONS, REGIMES
from benchmarks.results import Report, Timing


@dataclass(frozen=True)
class Mean:
    """The geometric mean of the ratios to torch.nn over the 4-D cells of one kind, and the lowest."""

    fused: str
    threads: int
    regime: str
    operation: str
    layout: str
    dtype: str
    mean: float
    lowest: float
    cells: int


def geometric_means(report: Report) -> list[Mean]:
    """Give the mean of every kind of 4-D cell that was timed."""
    found: dict[tuple[str, int, str, str, str, str], list[float]] = {}
    for t in report.timings:
        ratio = t.ratio(TORCH)
        if len(t.cell.shape) == 4 and t.cell.kind == "layer" and ratio is not None:
            key = (t.cell.fused, t.threads, t.regime, t.operation, t.cell.layout, t.cell.dtype)
            found.setdefault(key, []).append(ratio)
    order: dict[str, int] = {name: i for i, name in enumerate((*FUSED, *REGIMES, *OPERATIONS, *LAYOUTS, *DTYPES))}
    keys = sorted(found, key=lambda k: (order[k[0]], -k[1], order[k[2]], order[k[4]], order[k[5]], order[k[3]]))
    return [Mean(*k, statistics.geometric_mean(found[k]), min(found[k]), len(found[k])) for k in keys]


def slower(report: Report) -> list[Timing]:
    """Timings in which torch.nn was faster beyond doubt and noise, the worst first."""
    found = [(t.ratio(TORCH) or 0.0, t) for t in report.timings if t.cell.kind != "policy" and t.slower(TORCH, NOISE)]
    return [t for _, t in sorted(found, key=lambda pair: pair[0])]


def failures(report: Report) -> list[tuple[str, str]]:
    """Give what has no figures, and why; what a baseline lacks everywhere is said once."""
    refused = [(check.cell.name, "; ".join(check.problems)) for check in report.checks if check.problems]
    broken = [(f"{t.cell.name}, {t.operation}, {t.regime}", t.problem) for t in report.timings if t.problem]
    missing: dict[tuple[str, str], list[str]] = {}
    for t in report.timings:
        for baseline, why in t.skipped.items():
            missing.setdefault((baseline, why), []).append(f"{t.cell.name}, {t.operation}")
    lacking = [
        (f"{where[0]}, {baseline}" + (f" (and {len(where) - 1} more)" if len(where) > 1 else ""), why)
        for (baseline, why), where in missing.items()
    ]
    return refused + broken + lacking
