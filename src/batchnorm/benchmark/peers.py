"""The contenders that are always there: our layer, torch.nn, and a plain copy, which nothing can beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm import layers
from batchnorm.benchmark.grid import Cell, Fused, Operation
from batchnorm.benchmark.timing import Call

OURS, TORCH, COPY = "ours", "torch.nn", "copy"


@dataclass
class Inputs:
    """What a cell's contenders share: x, the gradient of y, what the layers are filled with, and what is added."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What a layer is called with."""
        return (self.x,) if self.residual is None else (self.x, self.residual)


class Plain(nn.BatchNorm2d):
    """torch.nn's layer, and what ours can do besides by one operator each; tensors have the same names as in ours.

    Args:
        num_features: C.
        activation: None, "relu" or "relu6".
        inplace: whether the activation overwrites what it is given, which batch normalization does not need.
    """

    def __init__(self, num_features: int, activation: str | None = None, inplace: bool = False) -> None:
        super().__init__(num_features)
        self.activation, self.inplace = activation, inplace

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Give ``activation(batch_norm(input) + residual)``."""
        z = super().forward(input)
        if residual is not None:
            z = z + residual
        if self.activation is None:
            return z
        return (F.relu if self.activation == "relu" else F.relu6)(z, inplace=self.inplace)


def inputs(cell: Cell, offset: float = 0.0) -> Inputs:
    """Draw a cell's inputs, the same ones every time; each channel has its own mean and deviation.

    Args:
        cell: its shape, dtype and layout.
        offset: added to every channel's mean, in units of its deviation.
    """
    generator = torch.Generator().manual_seed(0)
    channels = cell.shape[1]
    deviation = 0.5 + torch.rand(channels, generator=generator)
    mean = torch.randn(channels, generator=generator) + offset * deviation
    per_channel = (slice(None), *(None,) * (len(cell.shape) - 2))
    x = torch.randn(cell.shape, generator=generator).mul_(deviation[per_channel]).add_(mean[per_channel])
    drawn = Inputs(
        x=_laid_out(x, cell).requires_grad_(),
        grad_y=_laid_out(torch.randn(cell.shape, generator=generator), cell),
        weight=0.5 + torch.rand(channels, generator=generator),
        bias=torch.randn(channels, generator=generator),
        running_mean=mean + 0.1,
        running_var=deviation.square() * 1.1,
    )
    if cell.fused == "bn+add+relu":
        drawn.residual = _laid_out(torch.randn(cell.shape, generator=generator), cell).requires_grad_()
    return drawn


def _laid_out(x: Tensor, cell: Cell) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[x.dim()] if cell.layout == "channels_last" else torch.contiguous_format
    return x.to(cell.torch_dtype, memory_format=memory_format).contiguous(memory_format=memory_format)


def layer(source: Any, given: Inputs, fused: Fused = "bn") -> nn.Module:
    """Build the layer for an input from `source`, torch.nn or our layers, and fill it."""
    channels = given.x.shape[1]
    built: nn.Module
    if fused != "bn":
        built = Plain(channels, "relu") if source is nn else layers.BatchNorm2d(channels, activation="relu")
    else:
        kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[given.x.dim()]
        built = getattr(source, kind)(channels)
    state = {name: getattr(given, name) for name in ("weight", "bias", "running_mean", "running_var")}
    built.load_state_dict(state, strict=False)
    return built


def module(source: Any, cell: Cell, given: Inputs) -> nn.Module:
    """Build what a cell measures: the layer alone, or between two convolutions."""
    if cell.kind == "layer":
        return layer(source, given, cell.fused)
    generator = torch.Generator().manual_seed(1)
    channels = cell.shape[1]
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
    for convolution in convolutions:
        nn.init.normal_(convolution.weight, std=(9 * channels) ** -0.5, generator=generator)
    if cell.layout == "channels_last":
        for convolution in convolutions:
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    return nn.Sequential(convolutions[0], layer(source, given), convolutions[1])


def contenders(cell: Cell, given: Inputs, operation: Operation) -> dict[str, Call]:
    """Give the calls of those that are always there, ours first; call "evaluation" under ``torch.no_grad``."""
    sources = {OURS: layers, TORCH: nn}
    calls = {name: call(module(source, cell, given), given, operation) for name, source in sources.items()}
    if cell.kind == "layer":
        target, source = torch.empty_like(given.x), given.x.detach()
        calls[COPY] = lambda: target.copy_(source)
    return calls


def call(built: nn.Module, given: Inputs, operation: Operation) -> Call:
    """Give what is repeated to time one operation of a module."""
    built.train(operation != "evaluation")
    arguments, grad_y = given.arguments, given.grad_y
    if operation != "forward+backward":
        return lambda: built(*arguments)
    leaves = [*arguments, *built.parameters()]

    def step() -> None:
        built(*arguments).backward(grad_y)
        for leaf in leaves:
            leaf.grad = None

    return step
