"""What is measured: the cells of the grid, and the plan of a full and of a quick run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Regime = Literal["warm", "fresh"]
Operation = Literal["forward", "forward+backward", "evaluation"]
Kind = Literal["layer", "chain"]

REGIMES: tuple[Regime, ...] = get_args(Regime)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
CHAIN_OPERATIONS: tuple[Operation, ...] = ("forward+backward",)

# Channels and side of the feature maps that ResNet-50 normalizes.
_RESNET50 = (
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
IMAGES = (*((n, c, s, s) for n in (32, 8) for c, s in _RESNET50), (128, 64, 32, 32))
OTHERS = ((64, 128, 1000), (65536, 256), (4096, 1024), (256, 128), (32, 64), (4, 32, 32, 64, 64))
OVERHEAD = ((32, 64), (256, 128))  # where the call itself is what costs
_FEW = ((32, 64, 56, 56), (8, 256, 14, 14), (32, 2048, 7, 7), *OTHERS)
_CHAINS = ((8, 64, 56, 56), (32, 256, 14, 14))


@dataclass(frozen=True)
class Cell:
    """One input, as contiguous or channels-last memory, to a layer or to a chain conv → BN → conv."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    kind: Kind = "layer"

    @property
    def name(self) -> str:
        """Name the cell in a line."""
        chain = "conv → BN → conv, " if self.kind == "chain" else ""
        return f"{chain}{self.size} {self.dtype} {self.layout}"

    @property
    def size(self) -> str:
        """Write the shape as a reader would."""
        return "×".join(map(str, self.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the input; parameters and statistics are float32 throughout, as in mixed-precision training."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def bytes(self) -> int:
        """The size of the input."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Job:
    """Time one cell: which operations, how many threads, which memory, and whether slow-to-build rivals run too."""

    cell: Cell
    threads: int
    regime: Regime
    operations: tuple[Operation, ...] = OPERATIONS
    rivals: bool = False


@dataclass(frozen=True)
class Plan:
    """A whole run: its jobs, and for how many seconds each operation of a cell is repeated."""

    jobs: tuple[Job, ...]
    seconds: float
    quick: bool
    first_call: bool


def cells(shapes: tuple[tuple[int, ...], ...]) -> list[Cell]:
    """Every dtype and layout of these shapes; two- and three-dimensional input has one layout."""
    return [
        Cell(shape, dtype, layout)
        for shape in shapes
        for dtype in ("float32", "bfloat16")
        for layout in ("contiguous", "channels_last")
        if len(shape) >= 4 or layout == "contiguous"
    ]


def threads() -> int:
    """The number of threads of the main grid: two, if there are two cores."""
    return min(2, os.cpu_count() or 1)


def full() -> Plan:
    """The grid on two threads with both kinds of memory, a part of it on one thread, and the chains."""
    rivals = {
        Cell((32, 64, 56, 56)),
        Cell((32, 64, 56, 56), layout="channels_last"),
        Cell((8, 256, 14, 14)),
        Cell((4096, 1024)),
    }
    jobs = [
        Job(cell, threads(), regime, rivals=cell in rivals) for regime in REGIMES for cell in cells((*IMAGES, *OTHERS))
    ]
    jobs += [
        Job(Cell(shape, layout=layout, kind="chain"), threads(), regime, CHAIN_OPERATIONS)
        for regime in REGIMES
        for shape in _CHAINS
        for layout in ("contiguous", "channels_last")
    ]
    if threads() > 1:
        jobs += [Job(cell, 1, "warm") for cell in cells(_FEW)]
    return Plan(tuple(jobs), seconds=0.25, quick=False, first_call=True)


def quick() -> Plan:
    """A few small cells of every kind, so that every part of the benchmark runs once."""
    few = cells(((8, 64, 56, 56), (8, 512, 7, 7), (256, 128), (32, 64), (16, 32, 100), (2, 16, 8, 16, 16)))
    jobs = [Job(cell, threads(), regime) for regime in REGIMES for cell in few]
    jobs += [Job(Cell((2, 16, 28, 28), kind="chain"), threads(), regime, CHAIN_OPERATIONS) for regime in REGIMES]
    return Plan(tuple(jobs), seconds=0.03, quick=True, first_call=False)
