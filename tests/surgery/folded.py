"""Models to fold, and the comparison with what was folded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from networks import randomized
from torch import Tensor, nn

import batchnorm

SPACE = {0: (), 1: (7,), 2: (7, 6), 3: (5, 4, 6)}


def fresh(*modules: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return randomized(nn.Sequential(*modules))


def image(channels: int, dimensions: int = 2) -> Tensor:
    x = torch.randn(3, channels, *SPACE[dimensions], generator=torch.Generator().manual_seed(1))
    return x


def is_left(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if "BatchNorm" in type(m).__name__]


def same(result: Any, model: nn.Module, x: Any) -> None:
    """The folded model against the model, by torch's own float64 where only rounding could differ."""
    kept = copy.deepcopy(model).eval()
    with torch.no_grad(), batchnorm.kernels.using("aten"):
        torch.testing.assert_close(result.model(x), kept(x), rtol=1e-5, atol=1e-5)
