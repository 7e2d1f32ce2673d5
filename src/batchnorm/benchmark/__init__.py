"""The benchmark: our layers against their rivals, every figure behind a check that the results are right.

``grid`` and ``plans`` say what is measured, ``check`` lets a cell through or not, ``peers``, ``rivals`` and ``whole``
hold the contenders, ``timing`` the clock, ``worker`` the process that times, ``traffic`` and ``memory`` count bytes,
``bars`` judges, and ``tables``, ``report`` and ``page`` show and write. ``folding`` measures folded networks, and has a
report of its own.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console

from batchnorm.benchmark import check, grid, machine, memory, plans, processes, publish, report
from batchnorm.benchmark.results import Check, Report, Timing

__all__ = ["run"]


def run(out: Path, quick: bool, seconds: float | None = None, publish_to: Path | None = None) -> None:
    """Check, time and report; writes ``benchmark.json``, ``benchmark.md`` and ``benchmark.html`` into `out`.

    Args:
        out: directory, made if it is not there.
        quick: a few small cells and short clocks, to see that all works; its figures judge nothing.
        seconds: for how long each operation of a cell is repeated, if not for as long as the plan says.
        publish_to: the folder whose ``README.md`` and ``cells.md`` are to show this run.
    """
    from batchnorm.benchmark import page  # which draws; the processes that time import this module, and do not

    out.mkdir(parents=True, exist_ok=True)
    if publish_to is not None:
        publish.check(publish_to, quick)
    console = Console(width=None if sys.stdout.isatty() else 130)  # a file or a pipe is as wide as the tables
    plan = plans.quick() if quick else plans.full()
    with torch.device("cpu"):
        found = measure(plan if seconds is None else replace(plan, seconds=seconds), console)
    paths = [
        found.save(out / "benchmark.json"),
        report.save(found, out / "benchmark.md"),
        page.save(found, out / "benchmark.html"),
    ]
    if publish_to is not None:
        paths += publish.publish(found, publish_to)
    report.show(found, console)
    for path in paths:
        console.print(f"[dim]{path}[/dim]")


def measure(plan: grid.Plan, console: Console) -> Report:
    """Carry out a plan. A cell that fails its check is not timed at all."""
    began = time.perf_counter()
    described = machine.describe()
    with report.progress(console) as advance:
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


def _checks(plan: grid.Plan, advance: report.Advance) -> list[Check]:
    cells = list(dict.fromkeys((*(job.cell for job in plan.jobs), *plan.together)))
    found = []
    for done, cell in enumerate(cells):
        advance("checking", done, len(cells))
        found.append(check.check(cell))
    advance("checking", len(cells), len(cells))
    return found
