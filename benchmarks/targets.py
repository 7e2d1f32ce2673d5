"""The targets that the project has set itself, and whether a report reaches them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

from batchnorm.benchmark.cells import Operation
from batchnorm.benchmark.contenders import COPY, OURS, TORCH
from batchnorm.benchmark.figures import NOISE
from benchmarks import memory
from benchmarks.baselines import COMPILED
from benchmarks.grid import FUSED, OPERATIONS, OVERHEAD, Cell
from benchmarks.policies import GHOST, MASKED, RENORM
from benchmarks.results import Report, Timing

FRESH_LIMIT = 32 * 2**20  # bytes: glibc gives every freed block above this back to the system
SAVED_SHARE, FLOOR = 0.55, 1.35


@dataclass(frozen=True)
class Target:
    """What is wanted and what was reached; `passed` is None where nothing was to be measured."""

    name: str
    wanted: str
    value: float | None
    passed: bool | None
    figures: int


@dataclass(frozen=True)
class _Rule:
    """What a target looks at, and what it asks for.

    That is, by `how`: the mean of the ratios to a baseline, at least; or at most, where the baseline is our own layer
    with a policy ("cost"); that no ratio is lower beyond doubt; or that our time is at most so many copies of the
    input, or times the floor.
    """

    name: str
    operations: tuple[Operation, ...]
    target: float
    how: Literal["mean", "lowest", "copies", "floor", "cost"] = "mean"
    baseline: str = TORCH
    fused: tuple[str, ...] = ("bn",)
    regime: str | None = "warm"
    layout: str | None = None
    dtype: str | None = None
    images: bool = True  # only four dimensions
    shapes: tuple[tuple[int, ...], ...] = ()  # only these
    at_least: float = 0  # bytes
    below: float = math.inf
    kinds: tuple[str, ...] = ("layer",)
    model: str = ""  # only this

    def covers(self, cell: Cell) -> bool:
        return (
            cell.kind in self.kinds
            and cell.model == (self.model or cell.model)
            and cell.fused in self.fused
            and self.layout in (None, cell.layout)
            and self.dtype in (None, cell.dtype)
            and (len(cell.shape) == 4 or not self.images)
            and (cell.shape in self.shapes or not self.shapes)
            and self.at_least <= cell.bytes < self.below
        )


_FORWARD: tuple[Operation, ...] = ("forward",)
_BOTH: tuple[Operation, ...] = ("forward+backward",)


def _alone(last_level: int) -> list[_Rule]:
    """Batch normalization by itself."""
    forward = _Rule("float32 contiguous, forward", _FORWARD, 5.0, layout="contiguous", dtype="float32")
    both = replace(forward, name="float32 contiguous, forward+backward", operations=_BOTH, target=3.0)
    fresh = replace(forward, name="… fresh, below 32 MiB, forward", target=1.5, regime="fresh", below=FRESH_LIMIT)
    fresh_both = replace(fresh, name="… fresh, below 32 MiB, both", operations=_BOTH)
    copies = replace(forward, name="… beyond the cache, most copies", target=1.6, how="copies", images=False)
    lowest = _Rule("fresh, from 32 MiB on, lowest", _FORWARD + _BOTH, 1.0, "lowest", regime="fresh", images=False)
    last = replace(both, name="channels_last float32, forward+backward", target=1.3, layout="channels_last")
    last16 = replace(last, name="channels_last bfloat16, forward+backward", dtype="bfloat16")
    overhead = replace(forward, name="call overhead, forward, lowest", target=1.0, how="lowest", images=False)
    return [
        forward,
        both,
        replace(copies, at_least=last_level + 1),
        fresh,
        fresh_both,
        replace(lowest, at_least=FRESH_LIMIT),
        last,
        last16,
        replace(last16, name="bfloat16, both layouts, forward+backward", target=2.5, layout=None),
        replace(overhead, shapes=OVERHEAD),
    ]


def _fused() -> list[_Rule]:
    """What follows batch normalization, computed with it: training steps."""
    rules = []
    forms: tuple[tuple[str, str], ...] = (("BN+ReLU", "bn+relu"), ("BN+add+ReLU", "bn+add+relu"))
    for name, fused in forms:
        eager = _Rule(f"{name} float32 contiguous", _BOTH, 4.0, fused=(fused,), layout="contiguous", dtype="float32")
        last = replace(eager, name=f"{name} float32 channels_last", target=1.7, layout="channels_last")
        rules += [
            eager,
            replace(eager, name=f"{eager.name}, torch.compile", target=2.0, baseline=COMPILED),
            last,
            replace(last, name=f"{last.name}, torch.compile", target=1.1, baseline=COMPILED),
        ]
    half = replace(rules[0], name="BN+ReLU bfloat16 contiguous", target=3.0, dtype="bfloat16")
    return [*rules, half]


def _floor(last_level: int) -> list[_Rule]:
    """How near the least possible traffic: float32 beyond the cache."""
    beyond = _Rule("", _FORWARD, FLOOR, "floor", layout="contiguous", dtype="float32", images=False)
    beyond = replace(beyond, at_least=last_level + 1)
    pairs: tuple[tuple[str, str], ...] = (("BN", "bn"), ("BN+ReLU", "bn+relu"))
    return [
        replace(
            beyond, name=f"{name} beyond the cache, {operation}, most × floor", fused=(fused,), operations=(operation,)
        )
        for name, fused in pairs
        for operation in (*_FORWARD, *_BOTH)
    ]


def _everything() -> list[_Rule]:
    network = _Rule("", _BOTH, 1.0, layout="contiguous", kinds=("model",))
    lowest = _Rule("lowest of all", OPERATIONS, 1.0, "lowest", fused=tuple(FUSED), regime=None, images=False)
    return [
        replace(network, name="ResNet-18, training step", target=1.12, model="ResNet-18"),
        replace(network, name="DenseNet-121, training step", target=1.25, model="DenseNet-121"),
        replace(lowest, kinds=("layer", "chain", "model")),
    ]


def _policies() -> list[_Rule]:
    """Policies and masks, by our plain layer."""
    ghost = _Rule("ghost by plain, training step", _BOTH, 1.1, "cost", baseline=GHOST, images=False, kinds=("policy",))
    return [
        ghost,
        replace(ghost, name="renorm by plain, training step", baseline=RENORM, target=1.25),
        replace(ghost, name="masked by plain, training step", baseline=MASKED, target=1.25),
    ]


def judged(report: Report) -> list[Target]:
    """Judge every target. A cell that should count and has no figures fails it."""
    rules = [*_alone(report.last_level), *_fused(), *_floor(report.last_level), *_everything(), *_policies()]
    return [*(_judge(rule, report) for rule in rules), _vectors(report), *_kept(report)]


def _judge(rule: _Rule, report: Report) -> Target:
    timings = _timings(rule, report)
    figures = [_figure(rule, t) for t in timings]
    found = [figure for figure in figures if figure is not None]
    failed = len(found) < len(figures) or any(rule.covers(c.cell) for c in report.checks if c.problems)
    if not found:
        return Target(rule.name, _wanted(rule), None, False if failed else None, 0)
    if rule.how in ("copies", "floor"):
        value = max(found)
        reached = value <= rule.target
    elif rule.how == "lowest":
        value = min(found)
        reached = not any(t.slower(rule.baseline, rule.target * NOISE) for t in timings)
    else:
        value = statistics.geometric_mean(found)
        reached = value <= rule.target if rule.how == "cost" else value >= rule.target
    return Target(rule.name, _wanted(rule), value, reached and not failed, len(found))


def _figure(rule: _Rule, t: Timing) -> float | None:
    if rule.how == "floor":
        return t.times_floor()
    if rule.how == "copies":
        copy = t.ratio(COPY)
        return None if copy is None else 1 / copy
    return t.ratio(rule.baseline)


def _timings(rule: _Rule, report: Report) -> list[Timing]:
    """Means are over the main grid, which has the most threads; the lowest is of everything.

    Baselines that are slow to build were asked to a few cells only.
    """
    threads = max((t.threads for t in report.timings), default=0)
    return [
        t
        for t in report.timings
        if t.operation in rule.operations
        and rule.regime in (None, t.regime)
        and (t.threads == threads or rule.how == "lowest")
        and rule.covers(t.cell)
        and (rule.baseline == TORCH or rule.baseline in {*t.ratios, *t.skipped})
    ]


def _wanted(rule: _Rule) -> str:
    if rule.how in ("copies", "floor", "cost"):
        return f"≤ {rule.target:g}"
    return f"≥ {rule.target:g} ×" + (f" ({NOISE:g}: noise)" if rule.how == "lowest" else "")


def _vectors(report: Report) -> Target:
    """The moments are two vectors of C in float64; what a residual needs besides is not among them."""
    checks = [c for c in report.checks if OURS in c.saved and c.cell.fused != "bn+add+relu"]
    vectors = [c.saved[OURS].extra / (8 * c.cell.shape[1]) for c in checks]
    most = max(vectors, default=None)
    return Target(
        "saved besides x, float64 vectors of C", "≤ 2", most, None if most is None else most <= 2, len(vectors)
    )


def _kept(report: Report) -> list[Target]:
    shares = {entry.what: entry.share(OURS, TORCH) for entry in report.kept}
    found = []
    for what in (memory.ALONE, memory.CHAINED, memory.LEAKY):
        share = shares.get(what)
        passed = None if share is None else share <= SAVED_SHARE
        found.append(Target(f"saved by {what}, share", f"≤ {SAVED_SHARE:g}", share, passed, int(share is not None)))
    return found
