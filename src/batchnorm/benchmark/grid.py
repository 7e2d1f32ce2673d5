"""What is measured: cells, jobs and plans, and the shapes of the grid."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Regime = Literal["warm", "fresh"]
Operation = Literal["forward", "forward+backward", "evaluation"]
Kind = Literal["layer", "chain", "model", "policy"]
Fused = Literal["bn", "bn+relu", "bn+add+relu"]

REGIMES: tuple[Regime, ...] = get_args(Regime)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
FUSED: dict[Fused, str] = {"bn": "BN", "bn+relu": "BN+ReLU", "bn+add+relu": "BN+add+ReLU"}
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
class Cell:
    """One input, as contiguous or channels-last memory, and what it goes through.

    Attributes:
        kind: a layer; a chain conv → BN → conv; a whole network; or the layer with one policy or another.
        fused: what the layer does besides normalizing. More than that only for images, (N, C, H, W).
        model: the name of the network, in ``models``.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    kind: Kind = "layer"
    fused: Fused = "bn"
    model: str = ""

    @property
    def name(self) -> str:
        """Name the cell in a line."""
        fused = "" if self.fused == "bn" else f"{FUSED[self.fused]}, "
        kinds = {"layer": fused, "chain": "conv → BN → conv, ", "model": f"{self.model}, ", "policy": "policies, "}
        what = kinds[self.kind]
        return f"{what}{self.size} {self.dtype} {self.layout}"

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
    """Time one cell: which operations, how many threads, which memory, and in which operations the rivals run too."""

    cell: Cell
    threads: int
    regime: Regime
    operations: tuple[Operation, ...] = OPERATIONS
    rivals: tuple[Operation, ...] = ()


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


def cells(shapes: tuple[tuple[int, ...], ...], fused: Fused = "bn") -> list[Cell]:
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
