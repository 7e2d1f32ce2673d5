"""The report's tables as plain text, for whoever draws them: terminal, Markdown, HTML."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from batchnorm.benchmark.contenders import OURS, TORCH
from batchnorm.benchmark.report import Table, size, time, times
from benchmarks import summary
from benchmarks.baselines import BASELINES, COMPILED, JAX, ONNX
from benchmarks.grid import FUSED, OPERATIONS, Cell
from benchmarks.policies import COUNTED, GHOST, MASKED, RENORM, SYNC
from benchmarks.results import Memory, Report, Timing
from benchmarks.targets import judged
from benchmarks.whole import OURS_COMPILED

PASSED, MISSED, UNMEASURED = "passed", "missed", "not measured"


def machine(report: Report) -> Table:
    """What it ran on."""
    rows = [*report.machine.items(), ("load after", report.load_after)]
    rows += [(f"first {name}", f"{seconds:.2f} s") for name, seconds in report.first_call.items()]
    rows.append(("run", f"{report.created}, {report.seconds:.0f} s"))
    return Table(("machine", ""), rows, words=2)


def targets(report: Report) -> Table:
    """Every target."""
    words = {True: PASSED, False: MISSED, None: UNMEASURED}
    rows = [
        (one.name, one.wanted, "–" if one.value is None else f"{one.value:.2f}", str(one.figures), words[one.passed])
        for one in judged(report)
    ]
    return Table(("target", "wanted", "reached", "figures", ""), rows)


def means(report: Report) -> Table:
    """Geometric means of ratios to torch.nn."""
    found: dict[tuple[str, ...], dict[str, summary.Mean]] = {}
    for mean in summary.geometric_means(report):
        what = f"{FUSED[mean.fused]} {mean.dtype} {mean.layout}"
        found.setdefault((what, str(mean.threads), mean.regime), {})[mean.operation] = mean
    rows = [
        (*key, *(f"{row[o].mean:.2f} ×" if o in row else "–" for o in OPERATIONS), _lowest(row))
        for key, row in found.items()
    ]
    return Table(("4-D cells", "threads", "memory", *OPERATIONS, "lowest"), rows)


def _lowest(row: dict[str, summary.Mean]) -> str:
    return f"{min(mean.lowest for mean in row.values()):.2f} ×"


def baselines(report: Report) -> Table:
    """Those that are slow to build, where they ran."""
    rows = [
        (_titled(t.cell), t.regime, t.operation, time(t.seconds[OURS]), *(ratio(t, r) for r in (TORCH, *BASELINES)))
        for t in report.timings
        if t.cell.kind == "layer" and {COMPILED, JAX, ONNX} & set(t.ratios)
    ]
    return Table(("against baselines", "memory", "operation", "ours", TORCH, *BASELINES), rows)


def networks(report: Report) -> Table:
    """Whole networks, eager and compiled."""
    rows = []
    for t in _of_kind(report, "model"):
        compiled = t.seconds.get(OURS_COMPILED)
        rows.append(
            (t.cell.name, t.operation, time(t.seconds[OURS]), against_torch(t), ratio(t, COMPILED), time(compiled))
        )  # fmt: skip
    return Table(("network", "operation", "ours", "× torch.nn", "× torch.compile", OURS_COMPILED), rows)


def chains(report: Report) -> Table:
    """A convolution before and after."""
    rows = [(t.cell.name, t.regime, time(t.seconds[OURS]), against_torch(t)) for t in _of_kind(report, "chain")]
    return Table(("chain, training step", "memory", "ours", "× torch.nn"), rows)


def policies(report: Report) -> Table:
    """What policies and masks cost, over our plain layer: means over cells, and the most expensive."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for t in _of_kind(report, "policy"):
        for name in (GHOST, RENORM, MASKED):
            cost = t.ratio(name)
            if cost is not None:
                found.setdefault((t.cell.dtype, t.cell.layout, str(t.threads)), {}).setdefault(name, []).append(cost)
    rows = [
        (*key, *(f"{statistics.geometric_mean(costs[n]):.2f} × ({max(costs[n]):.2f})" for n in (GHOST, RENORM, MASKED)))
        for key, costs in found.items()
    ]
    columns = (
        "training step, × without (most)",
        "layout",
        "threads",
        GHOST,
        RENORM,
        f"{MASKED}, {COUNTED:.0%} counted",
    )
    return Table(columns, rows, words=2)


def processes(report: Report) -> Table:
    """What it costs to talk to another process."""
    rows = []
    for t in _of_kind(report, "policy"):
        if SYNC in t.ratios:
            cost, channels = t.ratios[SYNC], t.cell.shape[1]
            added = time(t.seconds[SYNC] - t.seconds[OURS])
            rows.append(
                (t.cell.size, time(t.seconds[OURS]), time(t.seconds[SYNC]), times(cost), added, str(16 * channels + 4))
            )
    columns = ("training step in each of two processes", "alone", SYNC, "× alone", "added", "bytes sent")
    return Table(columns, rows)


def slower(timings: list[Timing]) -> Table:
    """Where torch.nn was faster."""
    rows = [
        (_titled(t.cell), str(t.threads), t.regime, t.operation, time(t.seconds[OURS]), against_torch(t), str(t.rounds))
        for t in timings
    ]
    return Table(("slower", "threads", "memory", "operation", "ours", "× torch.nn", "rounds"), rows)


def failures(failed: list[tuple[str, str]]) -> Table:
    """What has no figures."""
    return Table(("cell", "why"), list(failed), words=2)


def memory(title: str, entries: tuple[Memory, ...]) -> Table:
    """Bytes of several contenders, and our share."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.bytes))
    rows = []
    for entry in entries:
        share = entry.share(OURS, TORCH)
        values = (size(entry.bytes[name]) if name in entry.bytes else "–" for name in names)
        rows.append((entry.what, *values, "–" if share is None else f"{share:.2f} ×"))
    return Table((title, *names, "ours by torch.nn"), rows)


def saved(report: Report) -> Table:
    """What every contiguous cell keeps for its backward, beside what the network holds anyway."""
    rows = []
    for check in report.checks:
        if check.cell.layout == "contiguous" and check.cell.kind == "layer" and OURS in check.saved:
            ours, theirs = check.saved[OURS], check.saved[TORCH]
            head = check.cell.size, FUSED[check.cell.fused], check.cell.dtype
            rows.append((*head, str(ours.input), str(theirs.input), str(ours.extra), str(theirs.extra)))
    columns = "input, ours", "input, torch.nn", "other, ours", "other, torch.nn"
    return Table(("shape", "layer", "dtype", *columns), rows)


def every_cell(report: Report) -> Iterator[tuple[str, Table]]:
    """All figures of layers, and what each table is of."""
    kernel = {check.cell: check.training for check in report.checks}
    groups: dict[tuple[str, str, int], dict[Cell, dict[str, Timing]]] = {}
    for t in report.timings:
        if t.cell.kind == "layer":
            group = groups.setdefault((t.cell.fused, t.regime, t.threads), {})
            group.setdefault(t.cell, {})[t.operation] = t
    figures = (name for o in OPERATIONS for name in (o, "× torch.nn (95 %)", "× floor"))
    columns = ("shape", "dtype", "layout", "kernel", *figures)
    for (fused, regime, threads), cells in groups.items():
        title = f"{FUSED[fused]}, {regime} memory, {threads} thread{'s' if threads > 1 else ''}"
        rows = [
            (cell.size, cell.dtype, cell.layout, kernel.get(cell, ""), *(f for o in OPERATIONS for f in _three(row, o)))
            for cell, row in cells.items()
        ]
        yield title, Table(columns, rows, words=4)


def _three(row: dict[str, Timing], operation: str) -> tuple[str, str, str]:
    t = row.get(operation)
    if t is None or OURS not in t.seconds:
        return "–", "–", "–"
    floors = t.times_floor()
    return time(t.seconds[OURS]), against_torch(t), "–" if floors is None else f"{floors:.2f} of {size(t.floor)}"


def _titled(cell: Cell) -> str:
    return f"BN, {cell.name}" if cell.kind == "layer" and cell.fused == "bn" else cell.name


def _of_kind(report: Report, kind: str) -> Iterator[Timing]:
    return (t for t in report.timings if t.cell.kind == kind and OURS in t.seconds)


def ratio(t: Timing, baseline: str) -> str:
    """Write how many times as fast as a baseline ours is."""
    found = t.ratio(baseline)
    return "–" if found is None else f"{found:.2f} ×"


def against_torch(t: Timing) -> str:
    """Write the ratio to torch.nn and where it lies with 95 % confidence."""
    return times(t.ratios.get(TORCH))
