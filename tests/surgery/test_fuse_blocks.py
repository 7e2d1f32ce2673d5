"""In networks as people put them together, every normalization that an activation follows is fused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from blocks import DeepLab, Detector, Scales, Toolbox, UNet
from networks import randomized
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.surgery.inspect.tensors import tensors_in

UNTRACEABLE = "cannot be traced: TypeError: '_Proxy' object does not support item assignment; observed: followed by add"
# What is fused, and why the other layers are not: no activation follows them.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], list[str]]] = {
    "detector": (
        Detector, {"silu": 15, "add": 1, "add + silu": 1}, ["it is the residual of model.4.conv2.bn"],
    ),
    "toolbox": (Toolbox, {"relu": 3, "add + relu": 1}, []),
    "U-Net": (UNet, {"relu": 6}, []),
    "DeepLab": (DeepLab, {"relu": 10, "add + relu": 1}, []),
    "high resolution": (
        Scales,
        {"relu": 9},
        [
            "followed by stages.0.fuse_layers.0.1.2 (Upsample)", f"stages.0 {UNTRACEABLE}",
            "followed by stages.1.fuse_layers.0.1.2 (Upsample)", f"stages.1 {UNTRACEABLE}",
        ],
    ),
}  # fmt: skip


def image() -> Tensor:
    return torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, training: bool) -> list[Tensor]:
    model, x = copy.deepcopy(model).train(training), image().requires_grad_()
    with kernels.using("aten"):
        (y,) = tensors_in(model(x))
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [p.grad for p in (x, *model.parameters())]
    return [y.detach(), *gradients, *model.buffers()]


@pytest.mark.parametrize(("make", "fused", "left"), NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(make: Callable[[], nn.Module], fused: dict[str, int], left: list[str]) -> None:
    torch.manual_seed(0)
    model = randomized(make()).double()
    result = batchnorm.fuse(model, image())
    assert Counter(result.fused.values()) == fused
    assert list(result.skipped.values()) == left
    for training in (True, False):
        for ours, right in zip(step(result.model, training), step(model, training), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-8, atol=1e-9)
    assert batchnorm.revert(result.model).skipped == {}
    assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]
