"""What two processes do about recalibration, started by torchrun: `recalibration.py FILE`.

The first process writes JSON: for each case, errors against one process with all the data, or what was raised.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm
from batchnorm import Sync, kernels

SIZES = ((16, 3, 9), (12,))  # of the batches of each process


def network(norm: Any = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), norm(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)
    ).double()


def shares(sizes: Any = SIZES) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [
        [torch.randn(n, 2, 6, 6, dtype=torch.float64) * (1 + rank) + n for n in own] for rank, own in enumerate(sizes)
    ]


def errors(model: nn.Module, right: nn.Module) -> dict[str, float]:
    """The largest differences to the right buffers, and between the processes' buffers."""
    expected = dict(right.named_buffers())
    found = {n.removeprefix("module."): t.double() for n, t in model.named_buffers()}
    result = {n: float((t - expected[n].double()).abs().max()) for n, t in found.items()}
    own = torch.cat([t.flatten() for t in found.values()])
    heard = [torch.zeros_like(own) for _ in range(2)]
    dist.all_gather(heard, own)
    return {**result, "between": float((heard[0] - heard[1]).abs().max())}


def agreement(rank: int, method: Any, norm: Any = nn.BatchNorm2d, parallel: bool = False, sizes: Any = SIZES) -> Any:
    model, right = network(norm), network()
    alone = dist.new_group([0]), dist.new_group([1])
    batchnorm.recalibrate(right, [x for own in shares(sizes) for x in own], method=method, process_group=alone[rank])
    given = nn.parallel.DistributedDataParallel(model) if parallel else model
    report = batchnorm.recalibrate(given, shares(sizes)[rank], method=method)
    return {**errors(model, right), "batches": report.batches, "samples": report.samples}


def tolerance(rank: int) -> Any:
    """One process has endless data, the other three batches."""
    made = torch.Generator().manual_seed(rank)

    def data() -> Iterator[Tensor]:
        for number in range(10_000):
            if rank == 1 and number == 3:
                return
            yield torch.randn(8, 2, 6, 6, generator=made, dtype=torch.float64)

    model = network()
    report = batchnorm.recalibrate(model, data(), tolerance=0.05)
    worst = max(max(layer.mean_error, layer.variance_error) for layer in report.layers.values())
    return {"batches": report.batches, "stopped": report.stopped, "worst": worst, **errors(model, model)}


def sometimes(rank: int) -> Any:
    """A layer that only one process ever calls, and a batch that is not finite in the other."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x)) if rank == 0 else self.a(x)
            return y

    model = Sometimes().double()
    data = [torch.randn(4, 2, dtype=torch.float64)] * 2 + [torch.full((4, 2), torch.nan, dtype=torch.float64)] * rank
    report = {m: batchnorm.recalibrate(model, data, method=m) for m in ("batch", "layerwise")}
    counts = [report[m].layers[name].count for m in report for name in ("a", "b")]
    return {"counts": counts, "skipped": [r.skipped_batches for r in report.values()], **errors(model, model)}


def failing(rank: int, where: str) -> Any:
    """The second process fails; what each is told, after how long, and whether the model is as it was."""
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    calls = []

    def metric(m: nn.Module) -> float:
        calls.append(0)
        if rank == 1 and where == f"metric {len(calls)}":
            raise OSError("the disk is full")
        return 0.0

    def data() -> Iterator[Tensor]:
        yield from shares()[0]
        if rank == 1 and where == "data":
            raise OSError("the disk is full")

    if where == "sizes" and rank == 1:
        model[4] = nn.Identity()
        before = {name: t.clone() for name, t in model.state_dict().items()}
    start = time.perf_counter()
    told = ""
    try:
        batchnorm.recalibrate(
            model, data() if where == "data" else shares()[rank] * (where != "empty"), metric=metric,
            tolerance=0.05 if where == "data" else None,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
    same = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    heard: list[Any] = [None, None]
    dist.all_gather_object(heard, (told, time.perf_counter() - start, same))
    return heard


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    rank = dist.get_rank()
    with kernels.using("aten"):  # nothing here depends on which kernel normalizes
        found = cases(rank)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


def cases(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in ("batch", "layerwise"):
        found[method] = agreement(rank, method)
        found[f"{method}, one without data"] = agreement(rank, method, sizes=((5, 4), ()))
        found[f"{method}, SyncBatchNorm"] = agreement(rank, method, nn.SyncBatchNorm)
        found[f"{method}, Sync"] = agreement(rank, method, lambda c: batchnorm.BatchNorm2d(c, statistics=Sync()))
        found[f"{method}, DistributedDataParallel"] = agreement(rank, method, parallel=True)
    found["tolerance"], found["sometimes"] = tolerance(rank), sometimes(rank)
    for where in ("data", "metric 1", "metric 2", "sizes", "empty"):
        found[f"failing: {where}"] = failing(rank, where)
    return found


if __name__ == "__main__":
    main()
