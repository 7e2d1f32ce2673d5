"""A run of the project's benchmark: checked, timed, reported, and published where asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console

from batchnorm.benchmark import gate
from batchnorm.benchmark.gate import Check
from batchnorm.reports.files import write_texts
from batchnorm.reports.progress import Advance, progress
from benchmarks import chains, grid, machine, memory, page, plans, policies, processes, publish, report, whole
from benchmarks.results import Report, Timing


def run(out: Path, quick: bool, seconds: float | None = None, publish_to: Path | None = None) -> None:
    """Check, time and report; writes ``benchmark.json``, ``benchmark.md`` and ``benchmark.html`` into `out`.

    Args:
        out: directory, made if it is not there.
        quick: a few small cells and short clocks, to see that all works; its figures judge nothing.
        seconds: for how long each operation of a cell is repeated, if not for as long as the plan says.
        publish_to: the folder whose ``README.md`` and ``cells.md`` are to show this run.
    """
    out.mkdir(parents=True, exist_ok=True)
    if publish_to is not None:
        publish.check(publish_to, publish.RESULTS, quick)
    console = Console(width=None if sys.stdout.isatty() else 130)  # a file or a pipe is as wide as the tables
    plan = plans.quick() if quick else plans.full()
    with torch.device("cpu"):
        found = measure(plan if seconds is None else replace(plan, seconds=seconds), console)
    texts = {
        out / "benchmark.json": report.to_json(found) + "\n",
        out / "benchmark.md": report.markdown(found),
        out / "benchmark.html": page.render(found),
    }
    write_texts(texts)
    paths = list(texts)
    if publish_to is not None:
        paths += publish.publish(found, publish_to)
    report.show(found, console)
    for path in paths:
        console.print(f"[dim]{path}[/dim]")


def measure(plan: grid.Plan, console: Console) -> Report:
    """Carry out a plan. A cell that fails its check is not timed at all."""
    began = time.perf_counter()
    described = machine.describe()
    with progress(console) as advance:
        checks = _checks(plan, advance)
        passed = {c.cell: c for c in checks if not c.problems}
        peaks = processes.peaks([cell for cell in plan.peaks if cell in passed], advance)
        first_call = processes.first_call() if plan.first_call else {}
        timings: list[Timing] = []
        for regime in grid.REGIMES:
            jobs = [j for j in plan.jobs if j.regime == regime and (j.cell in passed)]
            timings += processes.time_jobs(regime, jobs, passed, plan.seconds, advance)
        timings += processes.time_sync([cell for cell in plan.together if cell in passed])
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=plan.quick,
        seconds=time.perf_counter() - began,
        machine=described,
        last_level=machine.last_level(),
        load_after=machine.load(),
        first_call=first_call,
        checks=tuple(checks),
        timings=tuple(timings),
        kept=memory.kept(),
        peaks=peaks,
    )


def _checks(plan: grid.Plan, advance: Advance) -> list[Check[grid.Cell]]:
    cells = list(dict.fromkeys((*(job.cell for job in plan.jobs), *plan.together)))
    judges: dict[str, Callable[[grid.Cell], Check[grid.Cell]]] = {
        "layer": gate.check,
        "chain": chains.check,
        "model": whole.check,
        "policy": policies.check,
    }
    found = []
    for done, cell in enumerate(cells):
        advance("checking", done, len(cells))
        found.append(gate.guarded(judges[cell.kind], cell))
    advance("checking", len(cells), len(cells))
    return found
