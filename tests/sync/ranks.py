"""What two processes do, started by torchrun: `ranks.py compute FILE` or `ranks.py fail FILE`.

The first process writes JSON: for each case its largest relative errors against torch.nn in float64 on the whole batch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join

import batchnorm
from batchnorm import Accumulated, Renorm, Sync, kernels

PATIENCE = 10  # seconds: longer than a busy machine stops a process that has a little to do
KINDS: dict[int, tuple[Any, Any]] = {
    2: (batchnorm.BatchNorm1d, nn.BatchNorm1d),
    3: (batchnorm.BatchNorm1d, nn.BatchNorm1d),
    4: (batchnorm.BatchNorm2d, nn.BatchNorm2d),
}


class Case(NamedTuple):
    shape: tuple[int, ...]
    first: int  # samples of the first process
    dtype: torch.dtype = torch.float32
    momentum: float | None = 0.1
    activation: str | None = None
    channels_last: bool = False
    masked: bool = False
    kernel: Any = None
    compiled: bool = False
    policy: Any = Sync()


CASES = {
    "equal": Case((32, 7, 9, 11), 16),
    "different sizes": Case((32, 7, 9, 11), 10, momentum=None),
    "channels last": Case((32, 7, 9, 11), 21, channels_last=True),
    "one process is empty": Case((32, 7), 32),
    "one value in a process": Case((33, 7), 32),
    "bfloat16": Case((32, 7, 9, 11), 16, torch.bfloat16),
    "float64": Case((32, 7, 13), 5, torch.float64),
    "masked": Case((32, 7, 13), 16, masked=True),
    "all of one process is masked": Case((32, 7, 13), 16, masked=True, activation="relu"),
    "fused": Case((32, 7, 9, 11), 13, activation="relu"),
    "plain PyTorch": Case((32, 7, 9, 11), 10, kernel="reference"),
    "plain PyTorch, one process is empty": Case((32, 7), 0, kernel="reference"),
    "compiled": Case((32, 7, 9, 11), 16, compiled=True),
    "gathered": Case((32, 7, 9, 11), 10, policy=Accumulated(1, over=Sync())),
}


def share(t: Tensor, case: Case, rank: int) -> Tensor:
    return t[: case.first].clone() if rank == 0 else t[case.first :].clone()


def errors(case: Case, name: str, rank: int) -> dict[str, float]:
    torch.manual_seed(0)
    shape, C = case.shape, case.shape[1]
    per_channel = (1, C, *(1,) * (len(shape) - 2))
    x = (torch.randn(shape) * 3 + 10 * torch.randn(per_channel)).to(case.dtype)
    residual, grad = (torch.randn(shape).to(case.dtype) for _ in range(2))
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if case.masked else None
    if mask is not None and name.startswith("all of one"):
        mask[: case.first] = False

    ours, theirs = KINDS[len(shape)]
    layer = ours(C, momentum=case.momentum, activation=case.activation, statistics=case.policy)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(C) + 0.5)
        layer.bias.copy_(torch.randn(C))
    oracle = (ours if mask is not None else theirs)(C, momentum=case.momentum).double()
    oracle.load_state_dict(layer.state_dict(), strict=False)
    oracle.double()
    if case.dtype == torch.float64:
        layer.double()

    whole = x.double().clone().requires_grad_()
    added = residual.double().clone().requires_grad_()
    z = oracle(whole, mask=mask) if mask is not None else oracle(whole)
    expected = z + added if case.activation is None else (z + added).relu()
    if mask is not None:
        expected = torch.where(mask.unsqueeze(1), expected, 0.0)
    expected.backward(grad.double())

    own, beside = share(x, case, rank).requires_grad_(), share(residual, case, rank).requires_grad_()
    run = torch.compile(layer, fullgraph=True) if case.compiled else layer
    more = {} if mask is None else {"mask": share(mask, case, rank)}
    with nullcontext() if case.kernel is None else kernels.using(case.kernel):
        y = run(own, beside, **more)
    y.backward(share(grad, case, rank))
    wanted = case.kernel or "numba"
    assert case.compiled or kernels.ran().forward == wanted, kernels.ran()

    gradients = [layer.weight.grad.double(), layer.bias.grad.double()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    pairs = {
        "y": (y, share(expected, case, rank)),
        "x": (own.grad, share(whole.grad, case, rank)),
        "residual": (beside.grad, share(added.grad, case, rank)),
        "weight": (gradients[0], oracle.weight.grad),
        "bias": (gradients[1], oracle.bias.grad),
        "running_mean": (layer.running_mean, oracle.running_mean),
        "running_var": (layer.running_var, oracle.running_var),
        "count": (layer.num_batches_tracked, oracle.num_batches_tracked),
    }
    return {what: distance(found, right) for what, (found, right) in pairs.items()}


def distance(found: Tensor, right: Tensor) -> float:
    if found.numel() == 0:
        return 0.0
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).abs().max() / right.abs().max().clamp(min=1e-30))


def renorm_errors(rank: int) -> dict[str, float]:
    """Renormalization over both processes against the same layer alone with the whole batch."""
    torch.manual_seed(1)
    x, grad = torch.randn(32, 5, 7) * 2 + 1, torch.randn(32, 5, 7)
    both = batchnorm.BatchNorm1d(5, statistics=Renorm(schedule=None, over=Sync()))
    alone = batchnorm.BatchNorm1d(5, statistics=Renorm(schedule=None))
    part = slice(0, 12) if rank == 0 else slice(12, None)
    whole, own = x.clone().requires_grad_(), x[part].clone().requires_grad_()
    for _ in range(2):
        expected, y = alone(whole), both(own)
    expected.backward(grad)
    y.backward(grad[part])
    found = {"y": distance(y, expected[part]), "x": distance(own.grad, whole.grad[part])}
    for name in ("running_mean", "running_var", "renorm_batches"):
        found[name] = distance(getattr(both, name), getattr(alone, name))
    return found


def training_errors(rank: int) -> dict[str, float]:
    """Three steps of DistributedDataParallel on 16 samples each against one process on the 32."""

    def network() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))

    alone, model = network(), network()
    batchnorm.convert(model, statistics=Sync())
    both = nn.parallel.DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (alone, both)]
    for step in range(3):
        x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        for net, batch in ((alone, x), (both, x[:16] if rank == 0 else x[16:])):
            (net(batch) - 1).pow(4).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = alone.state_dict()
    # Absolute, since some of them are nearly 0: a bias before batch normalization learns nothing.
    return {name: float((t - expected[name]).abs().max()) for name, t in model.state_dict().items()}


def bytes_sent() -> dict[str, dict[str, int]]:
    """Bytes that one process sends in a step of a layer of 64 channels."""
    sent = {"forward": 0, "backward": 0}
    originals = dist.all_gather_single, dist.all_reduce

    def gather(out: Tensor, own: Tensor, **options: Any) -> Any:
        sent["forward"] += own.numel() * own.element_size()
        return originals[0](out, own, **options)

    def reduce(own: Tensor, **options: Any) -> Any:
        sent["backward"] += own.numel() * own.element_size()
        return originals[1](own, **options)

    layer = batchnorm.BatchNorm2d(64, statistics=Sync())
    found = {}
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        x = torch.randn(4, 64, 5, 5, dtype=dtype)
        layer(x)  # which also compares the numbers of channels, and the dtypes
        sent.update(forward=0, backward=0)
        dist.all_gather_single, dist.all_reduce = gather, reduce
        try:
            layer(x).square().sum().backward()
        finally:
            dist.all_gather_single, dist.all_reduce = originals
        found[str(dtype)] = dict(sent)
    return found


def compile_once(group: Any) -> None:
    """Let one process alone compile what both would compile at the same time otherwise; the other finds it cached."""
    for case in CASES.values():
        if case.kernel is None and not case.compiled:
            ours, _ = KINDS[len(case.shape)]
            layer = ours(case.shape[1], activation=case.activation, statistics=Sync(group)).to(case.dtype)
            x = torch.randn(case.shape).to(case.dtype)
            if case.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            mask = torch.rand(case.shape[0], *case.shape[2:]) > 0.3 if case.masked else None
            layer(x.requires_grad_(), torch.randn_like(x), mask=mask).sum().backward()


def compute() -> dict[str, Any]:
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    alone = dist.new_group([0])
    if rank == 0:
        compile_once(alone)
    dist.barrier()
    for name, case in CASES.items():
        found[name] = together(errors(case, name, rank))
    found["renorm"] = together(renorm_errors(rank))
    found["training"] = together(training_errors(rank))
    found["bytes"] = bytes_sent()
    return found


def together(own: dict[str, float]) -> dict[str, float]:
    """The larger errors of both processes."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return {name: max(one[name] for one in gathered) for name in own}


def fail() -> dict[str, Any]:
    """What the processes are told when they cannot meet."""
    rank = dist.get_rank()

    def told(step: Callable[[Any], None]) -> tuple[str, float]:
        group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
        dist.barrier()
        start = time.perf_counter()
        try:
            step(group)
        except RuntimeError as error:
            return str(error), time.perf_counter() - start
        return "", time.perf_counter() - start

    def uneven(group: Any) -> None:
        layer = batchnorm.BatchNorm1d(5, statistics=Sync(group, name="head.norm"))
        for _ in range(2 if rank == 0 else 1):
            layer(torch.randn(8, 5))

    def backward_missing(group: Any) -> None:
        layer = batchnorm.BatchNorm1d(5, statistics=Sync(group, name="head.norm"))
        y = layer(torch.randn(8, 5))
        if rank == 0:
            y.sum().backward()

    def channels(group: Any) -> None:
        layer = batchnorm.BatchNorm1d(5 + rank, statistics=Sync(group, name="head.norm"))
        layer(torch.randn(8, 5 + rank))

    def doubled(group: Any) -> None:
        layer = batchnorm.BatchNorm1d(5, statistics=Sync(group, name="head.norm"))
        layer(torch.randn(8, 5))
        if rank == 1:
            layer.double()
        layer(torch.randn(8, 5, dtype=layer.weight.dtype))

    def floated(group: Any) -> None:
        layer = batchnorm.BatchNorm1d(5, statistics=Sync(group, name="head.norm")).double()
        layer(torch.randn(8, 5).double())
        if rank == 0:
            layer.float()
        layer(torch.randn(8, 5, dtype=layer.weight.dtype))

    def other_channels(group: Any) -> None:
        layer = free(group)
        layer(torch.randn(8, 5))
        layer(torch.randn(8, 5 + rank))

    def free(group: Any) -> Any:
        """A layer for any number of channels."""
        return batchnorm.BatchNorm1d(
            5, affine=False, track_running_stats=False, statistics=Sync(group, name="head.norm")
        )

    def changed_by_all(group: Any) -> None:
        """All change, also after one was wrong alone: then everything is as it should be."""
        layer = free(group)
        for C, dtype in ((5, torch.float32), (7, torch.float32), (7, torch.float64), (2, torch.float64)):
            message = ""
            try:
                layer(torch.randn(8, 9 if rank == 0 else C))
            except RuntimeError as error:
                message = str(error)
            assert f"(9, 4), ({C}, 4)" in message, message
            for _ in range(2):
                x = torch.randn(16, C, generator=torch.Generator().manual_seed(C)).to(dtype)
                own = x[8 * rank : 8 * rank + 8].clone().requires_grad_()
                y = layer(own)
                y.pow(3).sum().backward()
                whole = x.double().requires_grad_()
                right = nn.functional.batch_norm(whole, None, None, training=True)
                right.pow(3).sum().backward()
                mine = slice(8 * rank, 8 * rank + 8)
                assert distance(y, right[mine]) < 1e-5
                assert distance(own.grad, whole.grad[mine]) < 1e-4

    def outside(group: Any) -> None:
        first = dist.new_group([0])
        layer = batchnorm.BatchNorm1d(5, statistics=Sync(first, name="head.norm"))
        layer(torch.randn(8, 5))

    def evaluates_alone(group: Any) -> None:
        if rank == 0:
            for policy in (Sync(group), Renorm(over=Sync(group)), Accumulated(2, over=Sync(group))):
                layer = batchnorm.BatchNorm1d(5, track_running_stats=isinstance(policy, Renorm), statistics=policy)
                layer.eval()(torch.randn(8, 5))

    def joined(group: Any) -> None:
        layer = batchnorm.BatchNorm1d(5, statistics=Sync(group, name="head.norm"))
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(5, 5), layer), process_group=group)
        with Join([model], throw_on_early_termination=True):
            for _ in range(2 if rank == 0 else 1):
                model(torch.randn(8, 5)).sum().backward()

    for dtype in (torch.float32, torch.float64):  # compiles what is used below
        batchnorm.BatchNorm1d(5, statistics=Sync(), dtype=dtype)(torch.randn(8, 5, dtype=dtype)).sum().backward()
    found = {}
    steps = (
        uneven, backward_missing, channels, doubled, floated, other_channels, changed_by_all, outside, evaluates_alone,
        joined,
    )  # fmt: skip
    for step in steps:
        message: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(message, told(step))
        found[step.__name__] = message
    return found


def main() -> None:
    what, path = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=8))
    found = {"compute": compute, "fail": fail}[what]()
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
