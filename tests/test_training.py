"""In real training: activation checkpointing counts a batch once, and data parallel ranks agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import kernels


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 9, 3), batchnorm.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 5, 3), batchnorm.BatchNorm2d(5)
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kernel", ["numba", "aten", "reference"])
def test_checkpointed_batches_count_once(kernel: Any, reentrant: bool, momentum: float | None) -> None:
    plain = block()
    plain[1].momentum = momentum  # type: ignore[assignment]
    saved = copy.deepcopy(plain)
    with kernels.using(kernel):
        for _ in range(3):
            x = torch.randn(5, 3, 9, 11, requires_grad=True)
            again = x.detach().clone().requires_grad_()
            plain(x).square().sum().backward()
            checkpoint(saved, again, use_reentrant=reentrant).square().sum().backward()
            torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=0)
    assert saved[1].num_batches_tracked == 3
    for ours, right in zip(saved.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, right)
    for mine, theirs in zip(saved.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_torch_itself_counts_a_checkpointed_batch_twice() -> None:
    """The difference that is made on purpose; when torch changes, this says so."""
    layer = nn.BatchNorm2d(3)
    x = torch.randn(5, 3, 2, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 2


def train_a_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        model = nn.parallel.DistributedDataParallel(block())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            x = torch.randn(5, 3, 9, 11, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).square().mean().backward()
            assert kernels.ran() == ("numba", "numba")
            optimizer.step()
            optimizer.zero_grad()
        torch.save(model.module.state_dict(), f"{folder}/rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_ranks_agree(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_a_rank, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    start = block().state_dict()
    for name, value in first.items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(value, second[name])
    assert not torch.equal(first["1.weight"], start["1.weight"])
    assert first["1.num_batches_tracked"] == 2
