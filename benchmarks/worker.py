"""The process that times, one for each kind of memory: jobs come in as JSON, a line goes out for every operation."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from batchnorm import layers
from batchnorm.benchmark import contenders
from batchnorm.benchmark.cells import Operation
from batchnorm.benchmark.figures import by_ours
from batchnorm.benchmark.timing import Call
from benchmarks import baselines, chains, machine, memory, policies, results, traffic, whole
from benchmarks.grid import Cell
from benchmarks.results import Timing


def main() -> None:
    """Read a request, answer line by line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    request: dict[str, Any] = json.load(sys.stdin)
    if request.get("first_call"):
        print(json.dumps(first_call()), file=answers, flush=True)
        return
    for entry in request.get("peaks", ()):
        print(json.dumps(asdict(memory.peak_of(results.cell(entry)))), file=answers, flush=True)
    for job in request.get("jobs", ()):
        for timing in time_cell(job, request["seconds"]):
            print(json.dumps(asdict(timing)), file=answers, flush=True)


def time_cell(job: dict[str, Any], seconds: float) -> Iterator[Timing]:
    """Time every operation of a job on the same inputs; an exception becomes the timing's problem."""
    cell = results.cell(job["cell"])
    torch.set_num_threads(job["threads"])
    given = whole.given(cell) if cell.kind == "model" else contenders.inputs(cell)
    for operation in job["operations"]:
        head = (cell, job["threads"], job["regime"], operation)
        try:
            found = _time(cell, given, operation, job, seconds)
        except Exception as error:
            yield Timing(*head, problem=f"{type(error).__name__}: {error}")
        else:
            yield Timing(*head, **found)


def _time(cell: Cell, given: Any, operation: Operation, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    contending: dict[str, Callable[..., dict[str, Call]]] = {
        "layer": contenders.contenders,
        "chain": chains.contenders,
        "model": whole.contenders,
        "policy": policies.contenders,
    }
    evaluating = operation == "evaluation"
    skipped: dict[str, str] = {}
    with torch.no_grad() if evaluating else contextlib.nullcontext():
        calls = contending[cell.kind](cell, given, operation)
        if operation in job["baselines"]:
            slow: Any = whole.compiled if cell.kind == "model" else baselines.build
            more, skipped = slow(cell, given, operation)
            calls |= more
        figures = by_ours(calls, seconds, job["kernels"][evaluating])
    floor = traffic.floor(cell, operation, machine.last_level()) if cell.kind == "layer" else 0
    return {**vars(figures), "floor": floor, "skipped": skipped}


def first_call() -> dict[str, float]:
    """Seconds that the first forward and backward of this process take, beyond those of the second."""
    cell = Cell((8, 64, 56, 56))
    given = contenders.inputs(cell)
    layer: nn.Module = contenders.layer(layers, given, cell)
    took = []
    for _ in range(2):
        start = time.perf_counter()
        y = layer(given.x)
        middle = time.perf_counter()
        y.backward(given.grad_y)
        took.append((middle - start, time.perf_counter() - middle))
    return {"forward": took[0][0] - took[1][0], "backward": took[0][1] - took[1][1]}


if __name__ == "__main__":
    main()
