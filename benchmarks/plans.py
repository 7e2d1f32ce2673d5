"""The plans of a full and of a quick run: which cells, memory, numbers of threads and baselines."""

from __future__ import annotations

from batchnorm.benchmark.cells import Operation
from benchmarks.grid import (
    CHAIN_OPERATIONS,
    FUSED,
    IMAGES,
    LAYOUTS,
    MODEL_OPERATIONS,
    OPERATIONS,
    OTHERS,
    REGIMES,
    Cell,
    Job,
    Plan,
    every,
    threads,
)

# What is slow to build runs on these alone. First, all baselines in training and evaluation:
BASELINES = (
    *(Cell(shape) for shape in ((32, 64, 56, 56), (8, 256, 14, 14), (32, 512, 28, 28), (8, 64, 112, 112))),
    *(Cell(shape, layout="channels_last") for shape in ((32, 64, 56, 56), (8, 256, 14, 14))),
    Cell((32, 64, 56, 56), "bfloat16"),
)
# and then what a mean needs: shapes from both batch sizes, all channel counts, within the cache and beyond it.
COMPILED = {
    "contiguous": (
        (32, 64, 112, 112), (32, 64, 56, 56), (32, 128, 28, 28), (32, 512, 28, 28),
        (32, 1024, 14, 14), (8, 64, 112, 112), (8, 256, 14, 14), (8, 2048, 7, 7),
    ),
    "channels_last": ((32, 64, 56, 56), (32, 512, 28, 28), (8, 64, 112, 112), (8, 256, 14, 14)),
}  # fmt: skip
PEAKS = ((32, 64, 56, 56), (8, 256, 14, 14), (32, 256, 56, 56))
_WITH_MORE = tuple(fused for fused in FUSED if fused != "bn")
_FEW = ((32, 64, 56, 56), (8, 256, 14, 14), (32, 2048, 7, 7), *OTHERS)
_FRESH = ((32, 64, 56, 56), (8, 256, 14, 14), (32, 512, 28, 28))
_CHAINS = ((8, 64, 56, 56), (32, 256, 14, 14))
_MODELS = {"ResNet-18": (16, 16), "ResNet-50": (16, 8), "DenseNet-121": (16, 8), "MobileNetV2": (16, 16)}
_SIDES = (64, 128)
_UNCOMPILED = ("DenseNet-121",)  # two builds of two graphs took more than seven minutes; the others, one to five
_TOGETHER = ((16, 64, 56, 56), (16, 256, 14, 14), (16, 512, 7, 7), (64, 256))
_BOTH: tuple[Operation, ...] = ("forward+backward", "evaluation")


def full(seconds: float = 0.15) -> Plan:
    """Everything: the layer in both kinds of memory, what is fused with it in warm memory, chains, whole networks."""
    jobs = [
        *(_layer(cell, regime) for regime in REGIMES for cell in every((*IMAGES, *OTHERS))),
        *(_layer(cell, "warm") for fused in _WITH_MORE for cell in every(IMAGES, fused)),
        *(Job(cell, threads(), "fresh") for fused in _WITH_MORE for cell in _plain(_FRESH, fused)),
        *(
            Job(Cell(shape, layout=layout, kind="chain"), threads(), regime, CHAIN_OPERATIONS)
            for regime in REGIMES
            for shape in _CHAINS
            for layout in LAYOUTS
        ),
        *_models(),
        *(Job(_policies(cell), threads(), "warm", CHAIN_OPERATIONS) for cell in every((*IMAGES, *OTHERS))),
    ]
    if threads() > 1:
        jobs += [Job(cell, 1, "warm") for cell in every(_FEW)]
    peaks = [cell for fused in FUSED for cell in _plain(PEAKS, fused)]
    together = tuple(Cell(shape, kind="policy") for shape in _TOGETHER)
    return Plan(tuple(jobs), tuple(peaks), seconds, quick=False, first_call=True, together=together)


def quick(seconds: float = 0.02) -> Plan:
    """A few small cells of every kind, so that every part of the benchmark runs once."""
    few = every(((8, 64, 14, 14), (8, 512, 7, 7), (256, 128), (32, 64), (16, 32, 100), (2, 16, 8, 16, 16)))
    small = (8, 64, 14, 14)
    fused = [Cell(small, fused=fused) for fused in _WITH_MORE]
    jobs = [
        *(Job(cell, threads(), regime) for regime in REGIMES for cell in few),
        Job(fused[0], threads(), "warm", OPERATIONS, _BOTH),
        Job(fused[1], threads(), "warm"),
        *(Job(Cell((2, 16, 14, 14), kind="chain"), threads(), regime, CHAIN_OPERATIONS) for regime in REGIMES),
        Job(_model("ResNet-18", 2, 64), threads(), "warm", MODEL_OPERATIONS),
        Job(_policies(Cell(small)), threads(), "warm", CHAIN_OPERATIONS),
    ]
    together = (Cell((4, 64, 14, 14), kind="policy"),)
    return Plan(tuple(jobs), (Cell(small), *fused), seconds, quick=True, first_call=False, together=together)


def _layer(cell: Cell, regime: str) -> Job:
    """A layer's job; its baselines run in warm memory, where a large output does not cost more than the work."""
    against: tuple[Operation, ...] = ()
    if regime == "warm":
        alone = Cell(cell.shape, cell.dtype, cell.layout)
        compared = cell.dtype == "float32" and cell.fused != "bn" and cell.shape in COMPILED[cell.layout]
        against = _BOTH if alone in BASELINES else CHAIN_OPERATIONS if compared else ()
    return Job(cell, threads(), "warm" if regime == "warm" else "fresh", OPERATIONS, against)


def _policies(cell: Cell) -> Cell:
    return Cell(cell.shape, cell.dtype, cell.layout, kind="policy")


def _plain(shapes: tuple[tuple[int, ...], ...], fused: str) -> list[Cell]:
    return [Cell(shape, fused=fused) for shape in shapes]


def _models() -> list[Job]:
    jobs = []
    for name, batches in _MODELS.items():
        for side, batch in zip(_SIDES, batches, strict=True):
            against = MODEL_OPERATIONS if name not in _UNCOMPILED and side == _SIDES[0] else ()
            jobs.append(Job(_model(name, batch, side), threads(), "warm", MODEL_OPERATIONS, against))
        jobs.append(Job(_model(name, batches[0], _SIDES[0], "channels_last"), threads(), "warm", MODEL_OPERATIONS))
    return jobs


def _model(name: str, batch: int, side: int, layout: str = "contiguous") -> Cell:
    return Cell((batch, 3, side, side), layout=layout, kind="model", model=name)
