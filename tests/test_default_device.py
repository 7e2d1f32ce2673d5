"""Another default device or dtype changes nothing for models and tensors that are on the CPU, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import batchnorm
from batchnorm import Accumulated, Ghost, Moments, Renorm
from batchnorm.kernels import using


@contextlib.contextmanager
def default(what: torch.device | torch.dtype) -> Iterator[None]:
    if isinstance(what, torch.device):
        torch.set_default_device(what)
        try:
            yield
        finally:
            torch.set_default_device(None)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(what)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def values(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) + 1


def network(kind: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 3, 1), kind(3))


IMAGE, ROWS = values(6, 2, 7, 7), values(6, 4)
MASK = torch.tensor([True] * 4 + [False] * 2)
Job = Callable[[], Any]


def step(layer: nn.Module, *given: Any, **named: Any) -> Job:
    """A step of training and an evaluation; gives outputs, gradients and buffers."""

    def job() -> Any:
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in given]
        outputs = [layer(*leaves, **named) for _ in range(2)]
        y = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        sum((t.square().sum() for t in y), start=torch.zeros((), device="cpu", dtype=torch.float32)).backward()
        layer.eval()
        return [y, [t.grad for t in (*leaves, *layer.parameters())], list(layer.buffers()), layer(*given, **named)]

    return job


def on(model: nn.Module, change: Callable[[nn.Module], Any]) -> Job:
    """A change in place, or one that gives a new model: what the model then computes."""

    def job() -> Any:
        found = change(model)
        after = getattr(found, "model", model)
        return [*after.state_dict().values(), after.eval()(IMAGE)]

    return job


def _split(model: nn.Module) -> list[Tensor]:
    batchnorm.split_domains(model, ["a", "b"])
    batchnorm.add_domain(model, "c", "a")
    return list(model.state_dict().values())


def layers() -> dict[str, Job]:
    one, two = batchnorm.BatchNorm1d, batchnorm.BatchNorm2d
    torch.manual_seed(0)
    found = {
        "BatchNorm2d": step(two(2), IMAGE),
        "fused": step(two(2, activation="relu"), IMAGE, residual=IMAGE),
        "masked": step(one(4), ROWS, mask=MASK),
        "weighted": step(one(4), ROWS, mask=MASK.float()),
        "ghost": step(one(4, statistics=Ghost(4)), ROWS),
        "ghost, masked": step(one(4, statistics=Ghost(4)), ROWS, mask=MASK),
        "renorm": step(one(4, statistics=Renorm()), ROWS),
        "renorm, cumulative": step(one(4, statistics=Renorm(), momentum=None), ROWS),
        "accumulated": step(one(4, statistics=Accumulated(2)), ROWS),
        "cumulative": step(two(2, momentum=None), IMAGE),
        "conditional": step(batchnorm.ConditionalBatchNorm(4, classes=3), ROWS, torch.arange(6) % 3),
        "domain": step(batchnorm.DomainBatchNorm(4, ["a", "b"]), ROWS, domain="a"),
        "domains": step(batchnorm.DomainBatchNorm(4, ["a", "b"]), ROWS, domain=["a", "b"] * 3),
        "LSTM": step(batchnorm.recurrent.LSTM(4, 3, max_steps=5), values(5, 6, 4)),
        "mask_from_lengths": lambda: batchnorm.mask_from_lengths(torch.tensor([2, 0, 3], device="cpu")),
        "Moments": lambda: Moments.of(ROWS, 0).merged(0).mean,
    }
    packed = nn.utils.rnn.pack_sequence([values(n, 4) for n in (3, 5, 2)], enforce_sorted=False)
    recurrent = batchnorm.recurrent.LSTM(4, 3, max_steps=5, bidirectional=True)
    return {**found, "LSTM, packed": lambda: [recurrent(packed), list(recurrent.buffers())]}


def models() -> dict[str, Job]:
    adapt = batchnorm.adapt
    pair = [IMAGE, values(5, 2, 7, 7)]
    ours = network(batchnorm.BatchNorm2d)
    return {
        "convert": on(network(), batchnorm.convert),
        "revert": on(ours, batchnorm.revert),
        "freeze": on(network(), batchnorm.freeze),
        "fold": on(network(), batchnorm.fold),
        "fold with inputs": on(network(), lambda m: batchnorm.fold(m, IMAGE)),
        "fuse": on(network(), lambda m: batchnorm.fuse(m, IMAGE)),
        "replace by group": on(network(), lambda m: batchnorm.replace(m, "group")),
        "replace by none": on(network(), lambda m: batchnorm.replace(m, None)),
        "replace by ghost": on(network(), lambda m: batchnorm.replace(m, Ghost(2))),
        "split_domains": partial(_split, network()),
        "recalibrate": on(network(), lambda m: batchnorm.recalibrate(m, pair)),
        "recalibrate, layerwise": on(network(), lambda m: batchnorm.recalibrate(m, pair, method="layerwise")),
        "recalibrate, tolerance": on(network(), lambda m: batchnorm.recalibrate(m, pair * 3, tolerance=0.5)),
        "adapt": on(network(), lambda m: adapt(m, IMAGE, prior=16)),
        "adapt by tent": on(network(), lambda m: adapt(m, IMAGE, method="tent")),
        "ported": lambda: list(
            batchnorm.ported({"mean": np.zeros(3), "var": np.ones(3)}, decay=0.9, eps=1e-3).state.values()
        ),
    }


def tensors(found: Any) -> list[Tensor]:
    return [t.detach() for t in tree_leaves(found) if isinstance(t, Tensor)]


@pytest.mark.filterwarnings("ignore:adapted to")
@pytest.mark.parametrize("what", [torch.device("meta"), torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["chosen", "reference"])
@pytest.mark.parametrize("name", [*layers(), *models()])
def test_defaults_change_nothing(name: str, kernel: str, what: torch.device | torch.dtype) -> None:
    jobs = layers if name in layers() else models
    chosen = using("reference") if kernel == "reference" else contextlib.nullcontext()
    with chosen:
        expected = tensors(jobs()[name]())
        job = jobs()[name]
        with default(what):
            found = tensors(job())
    assert len(found) == len(expected) > 0
    for ours, right in zip(found, expected, strict=True):
        assert (ours.dtype, ours.device) == (right.dtype, right.device)
        torch.testing.assert_close(ours, right, equal_nan=True)
