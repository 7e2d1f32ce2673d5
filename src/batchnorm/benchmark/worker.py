"""The process that times, one for each kind of memory: jobs come in as JSON, a line goes out for every operation."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from batchnorm import kernels, layers
from batchnorm.benchmark import machine, memory, peers, policies, results, rivals, traffic, whole
from batchnorm.benchmark.grid import Cell, Operation
from batchnorm.benchmark.results import Timing
from batchnorm.benchmark.summary import NOISE
from batchnorm.benchmark.timing import interleaved, measured, ratio

_LONGER = 4


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
    given = whole.given(cell) if cell.kind == "model" else peers.inputs(cell)
    for operation in job["operations"]:
        head = (cell, job["threads"], job["regime"], operation)
        try:
            found = _time(cell, given, operation, job, seconds)
        except Exception as error:
            yield Timing(*head, problem=f"{type(error).__name__}: {error}")
        else:
            yield Timing(*head, **found)


def _time(cell: Cell, given: Any, operation: Operation, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    evaluating = operation == "evaluation"
    source = (whole.contenders, whole.compiled) if cell.kind == "model" else (peers.contenders, rivals.rivals)
    if cell.kind == "policy":
        source = (lambda cell, given, _: policies.contenders(cell, given), rivals.rivals)
    with torch.no_grad() if evaluating else contextlib.nullcontext():
        calls = source[0](cell, given, operation)
        calls[peers.OURS]()
        checked = job["kernels"][evaluating]
        if kernels.ran().forward != checked:
            raise RuntimeError(f"kernel {checked!r} was checked, and {kernels.ran().forward!r} would be timed")
        more, left_out = source[1](cell, given, operation) if operation in job["rivals"] else ({}, {})
        calls |= more
        samples = interleaved(calls, seconds)
        if ratio(samples[peers.TORCH], samples[peers.OURS]).median < NOISE:  # a longer look before it is called slower
            samples = interleaved(calls, _LONGER * seconds)
    found = {name: measured(values) for name, values in samples.items()}
    ours = samples[peers.OURS]
    return {
        "seconds": {name: one.seconds for name, one in found.items()},
        "spread": {name: one.spread for name, one in found.items()},
        "ratios": {name: ratio(values, ours) for name, values in samples.items() if name != peers.OURS},
        "floor": traffic.floor(cell, operation, machine.last_level()) if cell.kind == "layer" else 0,
        "rounds": len(ours),
        "left_out": left_out,
    }


def first_call() -> dict[str, float]:
    """Seconds that the first forward and backward of this process take, beyond those of the second."""
    given = peers.inputs(Cell((8, 64, 56, 56)))
    layer: nn.Module = peers.layer(layers, given)
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
