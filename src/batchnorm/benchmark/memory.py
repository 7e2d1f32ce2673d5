"""Memory: what a training step keeps for its backward, and the most that it holds at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from batchnorm import layers
from batchnorm.benchmark.grid import Cell
from batchnorm.benchmark.peers import OURS, TORCH, call, inputs, module
from batchnorm.benchmark.results import Memory, Saved
from batchnorm.benchmark.timing import Call
from batchnorm.kernels.cpu import Sets

TORCH_INPLACE = "torch.nn, ReLU in place"
ALONE, CHAINED, LEAKY = "BN → ReLU", "(conv → BN → ReLU) × 4", "(conv → BN → LeakyReLU) × 4, ours in place"
_BLOCKS, _CHANNELS, _SIDE, _BATCH = 4, 64, 32, 8


def saved(built: nn.Module, *arguments: Tensor) -> Saved:
    """Count the bytes that a training forward keeps for its backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _y = built.train()(*arguments)  # named, so that no storage is freed and its address counted as another's
    for t in _beside(_y):
        pack(t)
    own = {t.untyped_storage().data_ptr() for t in (*built.parameters(), *built.buffers())}
    given = {t.untyped_storage().data_ptr() for t in arguments}
    return Saved(
        input=sum(size for address, size in kept.items() if address in given),
        layer=sum(size for address, size in kept.items() if address in own),
        extra=sum(size for address, size in kept.items() if address not in own | given),
    )


def _beside(y: Tensor) -> Iterator[Tensor]:
    """What our functions keep for themselves, which hooks on saved tensors are not shown: moments, and a set's."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for part in getattr(node, "rest", ()):
            yield from (t for t in (part if isinstance(part, Sets) else (part,)) if isinstance(t, Tensor))


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
    steps = {name: call(module(source, cell, given), given, "forward+backward") for name, source in sources.items()}
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
