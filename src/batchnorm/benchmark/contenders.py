"""The contenders: our layer, torch.nn's, and a plain copy, which nothing can beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import layers
from batchnorm.activations import activation_of, module_of
from batchnorm.benchmark.cells import Cell, Operation, laid_out
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


class Plain(nn.modules.batchnorm._BatchNorm):
    """torch.nn's layer for any rank, and what ours can do besides by one operator each; tensors are named as in ours.

    Args:
        num_features: C.
        activation: as for our layers.
        inplace: whether the activation overwrites what it is given, which batch normalization does not need.
    """

    def __init__(self, num_features: int, activation: Any = None, inplace: bool = False) -> None:
        super().__init__(num_features)
        known = activation_of(activation)
        self.activation = None if known is None else module_of(known)
        if self.activation is not None and inplace:
            self.activation.inplace = True  # type: ignore[assignment]

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Give ``activation(batch_norm(input) + residual)``."""
        z = super().forward(input)
        if residual is not None:
            z = z + residual
        if self.activation is None:
            return z
        found: Tensor = self.activation(z)
        return found

    def _check_input_dim(self, input: Tensor) -> None:
        pass


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
        x=laid_out(x, cell).requires_grad_(),
        grad_y=laid_out(torch.randn(cell.shape, generator=generator), cell),
        weight=0.5 + torch.rand(channels, generator=generator),
        bias=torch.randn(channels, generator=generator),
        running_mean=mean + 0.1,
        running_var=deviation.square() * 1.1,
    )
    if cell.residual:
        drawn.residual = laid_out(torch.randn(cell.shape, generator=generator), cell).requires_grad_()
    return drawn


def layer(source: Any, given: Inputs, cell: Cell) -> nn.Module:
    """Build a cell's layer from `source`, torch.nn or our layers, and fill it."""
    channels = given.x.shape[1]
    kind = getattr(source, {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[given.x.dim()])
    built: nn.Module
    if cell.fused == "bn":
        built = kind(channels)
    else:
        built = Plain(channels, cell.activation) if source is nn else kind(channels, activation=cell.activation)
    state = {name: getattr(given, name) for name in ("weight", "bias", "running_mean", "running_var")}
    built.load_state_dict(state, strict=False)
    return built


def contenders(cell: Cell, given: Inputs, operation: Operation) -> dict[str, Call]:
    """Give everyone's call, ours first; call "evaluation" under ``torch.no_grad``."""
    target, source = torch.empty_like(given.x), given.x.detach()
    return {
        OURS: call(layer(layers, given, cell), given, operation),
        TORCH: call(layer(nn, given, cell), given, operation),
        COPY: lambda: target.copy_(source),
    }


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
