"""Whole networks as contenders: the same weights in torch.nn and in ours, checked against float64, then timed.

In torch.nn's build activations are in place, as in torchvision's networks: it is the faster way that people use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import kernels, layers
from batchnorm.benchmark import networks
from batchnorm.benchmark.cells import Operation
from batchnorm.benchmark.contenders import OURS, TORCH, Plain
from batchnorm.benchmark.gate import Check
from batchnorm.benchmark.timing import Call
from benchmarks.baselines import COMPILED
from benchmarks.grid import Cell
from benchmarks.models import MODELS, Norm, loss

OURS_COMPILED = "ours, compiled"


@dataclass(frozen=True)
class Given:
    """What a network's contenders share: images, classes, and initial values."""

    x: Tensor
    target: Tensor
    state: dict[str, Tensor]


def given(cell: Cell) -> Given:
    """Draw a network's inputs and initial values, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(cell.shape)
        target = torch.randint(100, cell.shape[:1])
        state = MODELS[cell.model](_plain).state_dict()
    return Given(x.contiguous(memory_format=_format(cell)), target, state)


def build(norm: Norm, cell: Cell, given: Given) -> nn.Module:
    """Build a cell's network of one kind of layers."""
    with torch.random.fork_rng(devices=[]):
        built = MODELS[cell.model](norm)
    built.load_state_dict(given.state)
    built.to(memory_format=_format(cell))  # type: ignore[call-overload]
    return built


def contenders(cell: Cell, given: Given, operation: Operation) -> dict[str, Call]:
    """Give the calls of both, ours first; call "evaluation" under ``torch.no_grad``."""
    return {name: _call(build(norm, cell, given), given, operation) for name, norm in _KINDS.items()}


def compiled(cell: Cell, given: Given, operation: Operation) -> tuple[dict[str, Call], dict[str, str]]:
    """Give the calls of both under ``torch.compile``; and for each that cannot be compiled here, why."""
    torch.compiler.reset()
    calls: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    for name, norm in ((COMPILED, _plain), (OURS_COMPILED, _ours)):
        try:
            network: Any = torch.compile(build(norm, cell, given), dynamic=False)
            call = _call(network, given, operation)
            call()
        except Exception as error:  # a compiler is missing, or versions do not fit
            skipped[name] = f"{type(error).__name__}: {error}"
        else:
            calls[name] = call
    return calls, skipped


def check(cell: Cell) -> Check[Cell]:
    """Compare both with torch.nn in float64, by the root of the mean square over all values of a kind."""
    shared = given(cell)
    ours = build(_ours, cell, shared)
    errors, problems = networks.errors(build(_plain, cell, shared), ours, shared.x)
    training = kernels.ran()
    with torch.no_grad():
        ours.eval()(shared.x)
    evaluation = kernels.ran().forward
    if training != ("numba", "numba"):
        problems.append(f"kernels {training} ran in training, not the Numba kernel")
    return Check(cell, str(training.forward), str(evaluation), errors, problems=tuple(problems))


def _call(network: nn.Module, given: Given, operation: Operation) -> Call:
    network.train(operation != "evaluation")
    if operation == "evaluation":
        return lambda: network(given.x)

    def step() -> None:
        loss(network, given.x, given.target).backward()
        for parameter in network.parameters():
            parameter.grad = None

    return step


def _plain(channels: int, activation: str | None) -> nn.Module:
    return Plain(channels, activation, inplace=True)


def _ours(channels: int, activation: str | None) -> nn.Module:
    return layers.BatchNorm2d(channels, activation=activation)


_KINDS: dict[str, Callable[[int, str | None], nn.Module]] = {OURS: _ours, TORCH: _plain}


def _format(cell: Cell) -> torch.memory_format:
    return torch.channels_last if cell.layout == "channels_last" else torch.contiguous_format
