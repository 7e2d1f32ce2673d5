"""What is measured: cells, jobs and plans, and the shapes of the grid."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from batchnorm.benchmark import cells
from batchnorm.benchmark.cells import Operation

Regime = Literal["warm", "fresh"]
Kind = Literal["layer", "chain", "model", "policy"]

REGIMES: tuple[Regime, ...] = get_args(Regime)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
FUSED = {fused: cells.label_of(fused) for fused in ("bn", "bn+relu", "bn+add+relu")}
CHAIN_OPERATIONS: tuple[Operation, ...] = ("forward+backward",)
MODEL_OPERATIONS: tuple[Operation, ...] = ("forward+backward", "evaluation")
DTYPES, LAYOUTS = ("float32", "bfloat16"), ("contiguous", "channels_last")

# Channels and side of the feature maps that ResNet-50 normalizes.
_RESNET50 = (
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
IMAGES = (*((n, c, s, s) for n in (32, 8) for c, s in _RESNET50), (128, 64, 32, 32))
OTHERS = ((64, 128, 1000), (65536, 256), (4096, 1024), (256, 128), (32, 64), (4, 32, 32, 64, 64))
OVERHEAD = ((32, 64), (256, 128))  # where the call itself is what costs


@dataclass(frozen=True)
class Cell(cells.Cell):
    """One input, and what it goes through.

    Attributes:
        kind: a layer; a chain conv → BN → conv; a whole network; or the layer with one policy or another.
        model: the name of the network, in ``models``.
    """

    kind: Kind = "layer"
    model: str = ""

    @property
    def name(self) -> str:
        """Name the cell in a line."""
        fused = "" if self.fused == "bn" else f"{self.label}, "
        kinds = {"layer": fused, "chain": "conv → BN → conv, ", "model": f"{self.model}, ", "policy": "policies, "}
        return f"{kinds[self.kind]}{self.size} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Job:
    """Time one cell: which operations, how many threads, which memory, and where the baselines run too."""

    cell: Cell
    threads: int
    regime: Regime
    operations: tuple[Operation, ...] = OPERATIONS
    baselines: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        jobs: what is timed.
        peaks: cells whose peak memory is measured.
        seconds: for how long each operation of a cell is repeated.
        quick: whether it is too short to judge by.
        first_call: whether a process's first call is timed.
        together: cells that two processes take together, each its own.
    """

    jobs: tuple[Job, ...]
    peaks: tuple[Cell, ...]
    seconds: float
    quick: bool
    first_call: bool
    together: tuple[Cell, ...] = ()

    @property
    def timings(self) -> int:
        """How many figures it gives."""
        return sum(len(job.operations) for job in self.jobs) + len(self.together)


def every(shapes: tuple[tuple[int, ...], ...], fused: str = "bn") -> list[Cell]:
    """Every dtype and layout of these shapes; two- and three-dimensional input has one layout."""
    return [
        Cell(shape, dtype, layout, fused=fused)
        for shape in shapes
        for dtype in DTYPES
        for layout in LAYOUTS
        if len(shape) >= 4 or layout == "contiguous"
    ]


def threads() -> int:
    """The number of threads of the main grid: two, if there are two cores."""
    return min(2, os.cpu_count() or 1)
