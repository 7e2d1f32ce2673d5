"""A small network with statistics as training leaves them, and its data."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

__all__ = ["batches", "network", "trained"]


def batches(number: int = 8, scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) * scale + shift for _ in range(number)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@cache
def _state() -> dict[str, Tensor]:
    model = network()
    with torch.no_grad():
        for _ in range(12):
            for x in batches():
                model(x)
    return model.state_dict()


def trained() -> nn.Sequential:
    """In training mode, with statistics of its data."""
    model = network()
    model.load_state_dict(_state())
    return model
