"""The part of the benchmark about folding: measured, printed, written to ``folding.json`` and published."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from batchnorm.benchmark.report import Table, draw, time, times
from batchnorm.memory import keep_freed_memory
from batchnorm.reports.files import write_text
from batchnorm.reports.progress import progress
from benchmarks import machine, publish, report
from benchmarks.folding import (
    FOLDED,
    FOLDED_FREEZING,
    FREEZING,
    FX,
    UNFOLDED,
    Row,
    jobs,
    measure,
)  # fmt: skip

SCHEMA, VERSION = "batchnorm.benchmarks.folding", 2
ABOUT = """\
Times are medians over rounds in which all contenders take turns, in one process, with freed memory kept. *×* is the
first contender's time by the other's, the median over rounds with its 95 % interval: above 1, the other one is faster.
None is timed before its results agree with the unfolded network in float64. Weights and statistics are drawn.
Evaluation is under `torch.no_grad`. Inductor's freezing is `torch.compile` with
`torch._inductor.config.freezing`, of the unfolded and of the folded network. Where a figure is missing, *Folding:
without figures* says why."""
_SECONDS, _QUICK_SECONDS = 3.0, 0.02


def run(out: Path, quick: bool, seconds: float | None = None, publish_to: Path | None = None) -> None:
    """Measure what folding gains; writes ``folding.json`` and ``folding.md`` into `out`.

    Args:
        out: directory, made if it is not there.
        quick: two small jobs, to see that all works; the figures judge nothing.
        seconds: for how long the contenders of a job take turns.
        publish_to: the folder whose ``README.md`` is to show this run.

    Raises:
        OSError: if `out` cannot be written, or nothing could be published, before anything is measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    if publish_to is not None:
        publish.check(publish_to, publish.FOLDING, quick)
    if not quick:
        keep_freed_memory()
    console = Console(width=None if sys.stdout.isatty() else 130)  # a file or a pipe is as wide as the tables
    described, rows = machine.describe(), []
    todo = jobs(quick)
    with progress(console) as advance:
        for done, job in enumerate(todo):
            advance("folding", done, len(todo))
            rows.append(measure(job, seconds or (_QUICK_SECONDS if quick else _SECONDS)))
    described |= {"load after": machine.load(), "run": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found = tuple(sections(rows, described))
    paths = [_save(rows, described, quick, out / "folding.json"), out / "folding.md"]
    parts = ["# Folding", *([f"**{report.QUICK}**"] if quick else []), ABOUT, report.written(found, 2)]
    write_text(paths[1], "\n\n".join(parts))
    if publish_to is not None:
        paths.append(publish.put(publish_to, publish.FOLDING, f"{ABOUT}\n\n{report.written(found, 3)}"))
    for title, table in found:
        if table.rows:
            console.print(title)
            draw(table, console)
    for path in paths:
        console.print(f"[dim]{path}[/dim]")


def sections(rows: list[Row], described: dict[str, str]) -> Iterator[tuple[str, Table]]:
    """The tables, with their titles."""
    yield "Machine of this run", Table(("machine", ""), list(described.items()), words=2)
    others = FOLDED, FX, FREEZING, FOLDED_FREEZING
    columns = "network", UNFOLDED, *others
    lines = [
        (_titled(row), time(row.seconds[UNFOLDED]), *(_gain(row, name) for name in others))
        for row in rows
        if row.seconds
    ]
    yield "Evaluation of folded networks", Table(columns, lines)
    failed = [(_titled(row), name, why) for row in rows for name, why in row.skipped.items()]
    yield "Folding: without figures", Table(("network", "contender", "why"), failed, words=3)


def _titled(row: Row) -> str:
    job = row.job
    return f"{job.network}, {'×'.join(map(str, job.shape))} {job.layout}"


def _gain(row: Row, name: str) -> str:
    return times(row.gains.get(name))


def _save(rows: list[Row], described: dict[str, str], quick: bool, path: Path) -> Path:
    data: dict[str, Any] = {"schema": SCHEMA, "version": VERSION, "quick": quick, "machine": described}
    write_text(path, json.dumps(data | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return path
