"""A short grid of layers: which are faster here than torch.nn's, and by how much."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import torch

from batchnorm.benchmark.cells import Cell, Operation
from batchnorm.benchmark.contenders import COPY, OURS, TORCH, contenders, inputs
from batchnorm.benchmark.figures import Figures, by_ours
from batchnorm.benchmark.gate import Check, check
from batchnorm.benchmark.report import Table, time, times
from batchnorm.reports.progress import Advance

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_SMALL = (Cell((8, 64, 14, 14)), Cell((8, 64, 14, 14), fused="bn+relu"), Cell((32, 64)))
_LARGE = (32, 64, 56, 56)
CELLS = (
    *(Cell(_LARGE, dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("contiguous", "channels_last")),
    *(Cell(_LARGE, fused=fused) for fused in ("bn+relu", "bn+add+relu")),
    *(Cell(shape) for shape in ((8, 256, 14, 14), (32, 2048, 7, 7), (32, 128, 500), (256, 128))),
)


@dataclass(frozen=True)
class Row:
    """One cell: whether its results are right, and for each operation what it took."""

    check: Check[Cell]
    figures: dict[Operation, Figures] = field(default_factory=dict, hash=False)


def measure(quick: bool, seconds: float, advance: Advance) -> list[Row]:
    """Check and time the cells; what fails its check is not timed at all."""
    cells = _SMALL if quick else CELLS
    found = []
    for done, cell in enumerate(cells):
        advance("layers", done, len(cells))
        judged = check(cell)
        found.append(Row(judged, {} if judged.problems else dict(_timed(judged, seconds))))
    return found


def _timed(judged: Check[Cell], seconds: float) -> Iterator[tuple[Operation, Figures]]:
    given = inputs(judged.cell)
    for operation in OPERATIONS:
        with torch.no_grad() if operation == "evaluation" else contextlib.nullcontext():
            calls = contenders(judged.cell, given, operation)
            yield operation, by_ours(calls, seconds, judged.kernel(operation))


def tables(rows: list[Row]) -> dict[str, Table]:
    """The figures as text, with titles."""
    lines = [
        (row.check.cell.name, row.check.kernel(operation), operation, time(found.seconds[OURS]),
         times(found.ratios[TORCH]), f"{1 / found.ratios[COPY].median:.2f}")
        for row in rows
        for operation, found in row.figures.items()
    ]  # fmt: skip
    failed = [(row.check.cell.name, "; ".join(row.check.problems)) for row in rows if row.check.problems]
    found = {
        "Layers": Table(("layer", "kernel", "operation", OURS, "× torch.nn", "copies"), lines, words=3),
        "Without figures": Table(("layer", "why"), failed, words=2),
    }
    return {title: table for title, table in found.items() if table.rows}
