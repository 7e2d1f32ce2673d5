"""The bars that the project has set itself, and whether a report reaches them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from batchnorm.benchmark.grid import OPERATIONS, OVERHEAD, Cell, Operation
from batchnorm.benchmark.peers import COPY, OURS, TORCH
from batchnorm.benchmark.results import Report, Timing
from batchnorm.benchmark.summary import NOISE

FRESH_LIMIT = 32 * 2**20  # bytes: glibc gives every freed block above this back to the system


@dataclass(frozen=True)
class Bar:
    """A target and what was reached; `passed` is None where nothing was to be measured."""

    name: str
    target: str
    value: float | None
    passed: bool | None
    figures: int


@dataclass(frozen=True)
class _Rule:
    """What a bar looks at, and what it asks for: a mean or the lowest of ratios to torch.nn, or the most copies."""

    name: str
    operations: tuple[Operation, ...]
    target: float
    how: Literal["mean", "lowest", "copies"] = "mean"
    regime: str | None = "warm"
    layout: str | None = None
    dtype: str | None = None
    images: bool = True  # only four dimensions
    shapes: tuple[tuple[int, ...], ...] = ()  # only these
    at_least: float = 0  # bytes
    below: float = math.inf
    chains: bool = False

    def covers(self, cell: Cell) -> bool:
        return (
            self.layout in (None, cell.layout)
            and self.dtype in (None, cell.dtype)
            and (len(cell.shape) == 4 or not self.images)
            and (cell.shape in self.shapes or not self.shapes)
            and self.at_least <= cell.bytes < self.below
            and (cell.kind == "layer" or self.chains)
        )


def _rules(last_level: int) -> tuple[_Rule, ...]:
    forward, both = ("forward",), ("forward+backward",)  # type: tuple[Operation, ...], tuple[Operation, ...]
    training = (*forward, *both)
    plain, last, limit, beyond = ("contiguous", "float32"), "channels_last", FRESH_LIMIT, last_level + 1
    return (
        _Rule("float32 contiguous, forward", forward, 5.0, "mean", "warm", *plain),
        _Rule("float32 contiguous, forward+backward", both, 3.0, "mean", "warm", *plain),
        _Rule("… beyond the cache, most copies", forward, 1.6, "copies", "warm", *plain, False, at_least=beyond),
        _Rule("… fresh, below 32 MiB, forward", forward, 1.5, "mean", "fresh", *plain, below=limit),
        _Rule("… fresh, below 32 MiB, both", both, 1.5, "mean", "fresh", *plain, below=limit),
        _Rule("fresh, from 32 MiB on, lowest", training, 1.0, "lowest", "fresh", images=False, at_least=limit),
        _Rule("channels_last float32, forward+backward", both, 1.3, "mean", "warm", last, "float32"),
        _Rule("channels_last bfloat16, forward+backward", both, 1.3, "mean", "warm", last, "bfloat16"),
        _Rule("bfloat16, both layouts, forward+backward", both, 2.5, "mean", "warm", None, "bfloat16"),
        _Rule("call overhead, forward, lowest", forward, 1.0, "lowest", "warm", *plain, images=False, shapes=OVERHEAD),
        _Rule("lowest of all", OPERATIONS, 1.0, "lowest", None, images=False, chains=True),
    )  # fmt: skip


def bars(report: Report) -> list[Bar]:
    """Judge every bar. A cell that should count and has no figures fails it."""
    return [*(_judge(rule, report) for rule in _rules(report.last_level)), _saved(report)]


def _judge(rule: _Rule, report: Report) -> Bar:
    rival = COPY if rule.how == "copies" else TORCH
    ratios = [t.ratio(rival) for t in _timings(rule, report)]
    found = [ratio for ratio in ratios if ratio is not None]
    failed = len(found) < len(ratios) or any(rule.covers(c.cell) for c in report.checks if c.problems)
    if not found:
        return Bar(rule.name, _target(rule), None, False if failed else None, 0)
    if rule.how == "copies":
        value = 1 / min(found)
        reached = value <= rule.target
    elif rule.how == "lowest":
        value = min(found)
        reached = value >= rule.target * NOISE
    else:
        value = statistics.geometric_mean(found)
        reached = value >= rule.target
    return Bar(rule.name, _target(rule), value, reached and not failed, len(found))


def _timings(rule: _Rule, report: Report) -> list[Timing]:
    """Means are over the main grid, which has the most threads; the lowest is of everything."""
    threads = max((t.threads for t in report.timings), default=0)
    return [
        t
        for t in report.timings
        if t.operation in rule.operations
        and rule.regime in (None, t.regime)
        and (t.threads == threads or rule.how == "lowest")
        and rule.covers(t.cell)
    ]


def _target(rule: _Rule) -> str:
    if rule.how == "copies":
        return f"≤ {rule.target:g}"
    return f"≥ {rule.target:g} ×" + (f" ({NOISE:g}: noise)" if rule.how == "lowest" else "")


def _saved(report: Report) -> Bar:
    """The moments are two vectors of C in float64."""
    vectors = [c.saved[OURS].extra / (8 * c.cell.shape[1]) for c in report.checks if OURS in c.saved]
    most = max(vectors, default=None)
    return Bar("saved besides x, float64 vectors of C", "≤ 2", most, None if most is None else most <= 2, len(vectors))
