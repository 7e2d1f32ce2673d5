"""Chains: a layer between two convolutions, where a gain in the layer has to show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchnorm import kernels, layers
from batchnorm.benchmark import gate
from batchnorm.benchmark.cells import Operation
from batchnorm.benchmark.contenders import OURS, TORCH, Inputs, call, inputs, layer
from batchnorm.benchmark.timing import Call
from batchnorm.kernels.choice import record
from benchmarks.grid import Cell


def chain(source: Any, cell: Cell, given: Inputs) -> nn.Module:
    """Build a chain whose layer is of `source`, torch.nn or our layers."""
    generator = torch.Generator().manual_seed(1)
    channels = cell.shape[1]
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
    for convolution in convolutions:
        nn.init.normal_(convolution.weight, std=(9 * channels) ** -0.5, generator=generator)
    if cell.layout == "channels_last":
        for convolution in convolutions:
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    return nn.Sequential(convolutions[0], layer(source, given, cell), convolutions[1])


def contenders(cell: Cell, given: Inputs, operation: Operation) -> dict[str, Call]:
    """Give both calls, ours first."""
    return {name: call(chain(source, cell, given), given, operation) for name, source in ((OURS, layers), (TORCH, nn))}


def check(cell: Cell) -> gate.Check[Cell]:
    """Check the layer alone at this shape, since convolutions round as they please, and the kernel in the chain."""
    alone = gate.check(Cell(cell.shape, cell.dtype, cell.layout))
    given = inputs(cell)
    record.forward = record.backward = None
    chain(layers, cell, given)(given.x).backward(given.grad_y)
    problems = alone.problems
    if kernels.ran() != gate.expected(alone.training):
        problems += (f"kernel {kernels.ran()} ran in the chain, and {alone.training!r} in the layer alone",)
    return replace(alone, cell=cell, problems=problems)
