"""The processes that time: their memory's regime has to be set before they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import batchnorm
from batchnorm.benchmark.gate import Check
from benchmarks import policies
from benchmarks.grid import Cell, Job, Regime
from benchmarks.results import Memory, Timing, timing

# glibc gives large blocks back to the system when they are freed, and the next one is made of new pages, each cleared
# when it is first touched. These thresholds keep them. Elsewhere the variable means nothing, and both are alike.
WARM = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"

_PEAKS = "measuring memory"


def time_jobs(
    regime: Regime,
    jobs: list[Job],
    checks: dict[Cell, Check[Cell]],
    seconds: float,
    advance: Callable[[str, int, int], None],
) -> list[Timing]:
    """Time jobs in a process with this regime's memory.

    Should it end early, what it had not come to is reported as failed.
    """
    if not jobs:
        return []
    label = f"timing, {regime} memory"
    wanted = [(job, operation) for job in jobs for operation in job.operations]
    requests = [{**asdict(job), "kernels": (checks[job.cell].training, checks[job.cell].evaluation)} for job in jobs]
    found: list[Timing] = []
    advance(label, 0, len(wanted))
    with _worker(
        {"jobs": requests, "seconds": seconds}, {"GLIBC_TUNABLES": WARM if regime == "warm" else None}
    ) as answers:
        for line in answers:
            found.append(timing(json.loads(line)))
            advance(label, len(found), len(wanted))
    lost = "the process that timed it ended early; see its last words above"
    return found + [
        Timing(job.cell, job.threads, regime, operation, problem=lost) for job, operation in wanted[len(found) :]
    ]


def time_sync(cells: list[Cell]) -> list[Timing]:
    """Time ``Sync`` in two processes of one thread each."""
    if not cells:
        return []
    with tempfile.TemporaryDirectory() as folder:
        answers, asked = Path(folder) / "answers.jsonl", json.dumps([asdict(cell) for cell in cells])
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launch, "-m", "benchmarks.policies", str(answers), asked],
            env={**os.environ, "PYTHONPATH": _path(), "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": WARM},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = [timing(json.loads(line)) for line in answers.read_text().splitlines()] if answers.exists() else []
    for cell in cells[len(found) :]:
        why = f"two processes did not end well: {done.stderr[-300:]}"
        found.append(Timing(cell, 1, policies.REGIME, "forward+backward", problem=why))
    return found


def _path() -> str:
    packages = (str(Path(batchnorm.__file__).parents[1]), str(Path(__file__).parents[1]))
    return os.pathsep.join(filter(None, (*packages, os.environ.get("PYTHONPATH"))))


def peaks(cells: list[Cell], advance: Callable[[str, int, int], None]) -> tuple[Memory, ...]:
    """Measure the peak memory of cells; what the profiler has to say is not shown."""
    if not cells:
        return ()
    found: list[Memory] = []
    advance(_PEAKS, 0, len(cells))
    with _worker({"peaks": [asdict(cell) for cell in cells]}, {}) as answers:
        for line in answers:
            found.append(Memory(**json.loads(line)))
            advance(_PEAKS, len(found), len(cells))
    return tuple(found)


def first_call() -> dict[str, float]:
    """Seconds by which a process's first training step is longer, with kernels to be compiled, and with cached ones."""
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for state in ("compiling", "cached"):
            with _worker({"first_call": True}, {"NUMBA_CACHE_DIR": cache}) as answers:
                for line in answers:
                    took |= {f"{direction}, {state}": seconds for direction, seconds in json.loads(line).items()}
    return took


@contextmanager
def _worker(request: dict[str, Any], environment: dict[str, str | None]) -> Iterator[IO[str]]:
    """A worker's answers; it is ended with the block, and its last words are shown if it failed."""
    # Inductor's own pool of compiling processes would stay and disturb.
    variables = {**os.environ, "PYTHONPATH": _path(), "TORCHINDUCTOR_COMPILE_THREADS": "1", **environment}
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+", errors="replace") as said:
        json.dump(request, asked)
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=asked, stdout=subprocess.PIPE, stderr=said, encoding="utf-8",
            env={name: value for name, value in variables.items() if value is not None},
        )  # fmt: skip
        assert process.stdout is not None
        try:
            yield process.stdout
            if process.wait() != 0:
                said.seek(0)
                print("".join(said.readlines()[-20:]), file=sys.stderr)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
