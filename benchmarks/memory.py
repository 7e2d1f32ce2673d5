"""Memory: what a training step keeps for its backward, and the most that it holds at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from batchnorm import layers
from batchnorm.benchmark.contenders import OURS, TORCH, call, inputs, layer
from batchnorm.benchmark.memory import saved
from batchnorm.benchmark.timing import Call
from benchmarks.grid import Cell
from benchmarks.results import Memory

TORCH_INPLACE = "torch.nn, ReLU in place"
ALONE, CHAINED, LEAKY = "BN → ReLU", "(conv → BN → ReLU) × 4", "(conv → BN → LeakyReLU) × 4, ours in place"
_BLOCKS, _CHANNELS, _SIDE, _BATCH = 4, 64, 32, 8


def kept() -> tuple[Memory, ...]:
    """Count what blocks keep: batch normalization and activation alone, and in a chain with convolutions.

    A convolution keeps its own input. So in a chain, the activation's result is kept anyway, whether or not the
    activation asks for it, and only a layer that works in place saves anything.
    """
    kinds = {TORCH: _plain("relu"), TORCH_INPLACE: _plain("relu", True), OURS: _ours(activation="relu")}
    leaky = {TORCH: _plain("leaky_relu"), OURS: _ours(activation="leaky_relu", inplace=True)}
    return (
        Memory(ALONE, {name: _activations(kind()) for name, kind in kinds.items()}),
        Memory(CHAINED, {name: _activations(_chain(kind)) for name, kind in kinds.items()}),
        Memory(LEAKY, {name: _activations(_chain(kind)) for name, kind in leaky.items()}),
    )


def peak_of(cell: Cell) -> Memory:
    """Measure how much a training step of a cell holds at most, ours and torch.nn's, beyond what its inputs take."""
    given = inputs(cell)
    sources = {OURS: layers, TORCH: nn}
    steps = {name: call(layer(source, given, cell), given, "forward+backward") for name, source in sources.items()}
    return Memory(cell.name, {name: peak(step) for name, step in steps.items()})


def peak(step: Call) -> int:
    """Give the most bytes that torch's allocator has handed out at once within a call, as its profiler sees it."""
    step()  # it compiles, and fills caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def _activations(built: nn.Module) -> int:
    """What is kept of a batch, the input among it."""
    x = torch.randn(_BATCH, _CHANNELS, _SIDE, _SIDE).requires_grad_()
    found = saved(built, x * 1)  # not a leaf, which nothing may overwrite
    return found.input + found.extra


def _chain(kind: Callable[[], nn.Module]) -> nn.Module:
    convolutions = (nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False) for _ in range(_BLOCKS))
    return nn.Sequential(*(nn.Sequential(convolution, kind()) for convolution in convolutions))


def _plain(activation: str, inplace: bool = False) -> Callable[[], nn.Module]:
    follows = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[activation]
    return lambda: nn.Sequential(nn.BatchNorm2d(_CHANNELS), follows(inplace=inplace))


def _ours(activation: str, inplace: bool = False) -> Callable[[], nn.Module]:
    return lambda: layers.BatchNorm2d(_CHANNELS, activation=activation, inplace=inplace)
