"""Cells: one input of a layer, and what the layer does with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from batchnorm.activations import Activation, activation_of

Operation = Literal["forward", "forward+backward", "evaluation"]

_NAMES = {"bn": "BN", "relu": "ReLU", "leaky_relu": "LeakyReLU", "relu6": "ReLU6", "silu": "SiLU", "elu": "ELU"}


@dataclass(frozen=True)
class Cell:
    """One input, how it lies in memory, and what it goes through.

    Attributes:
        layout: "contiguous"; "channels_last", for any rank; or the dimensions from the outermost to the innermost.
        fused: what the layer does: "bn", then "+add" where it adds a residual, then "+" and its activation.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    fused: str = "bn"

    @property
    def name(self) -> str:
        """Name the cell in a line."""
        return f"{self.label}, {self.size} {self.dtype} {self.layout}"

    @property
    def label(self) -> str:
        """What the layer does, as a reader would name it."""
        return label_of(self.fused)

    @property
    def residual(self) -> bool:
        """Whether a residual is added."""
        return "add" in self.fused.split("+")

    @property
    def activation(self) -> Activation | None:
        """The activation, with its default parameter."""
        last = self.fused.split("+")[-1]
        return None if last in ("bn", "add") else activation_of(last)

    @property
    def size(self) -> str:
        """Write the shape as a reader would."""
        return "×".join(map(str, self.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the input; parameters and statistics are float32 throughout, as in mixed-precision training."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def bytes(self) -> int:
        """The size of the input."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


def label_of(fused: str) -> str:
    """Name what a layer does as a reader would."""
    return "+".join(_NAMES.get(part, part) for part in fused.split("+"))


def cell_of(x: Tensor, fused: str) -> Cell:
    """Describe a tensor that a layer is called with."""
    strides = x.stride()
    if x.is_contiguous():
        layout = "contiguous"
    elif x.movedim(1, -1).is_contiguous():
        layout = "channels_last"
    else:
        layout = ",".join(map(str, sorted(range(x.dim()), key=lambda d: -strides[d])))
    return Cell(tuple(x.shape), str(x.dtype).removeprefix("torch."), layout, fused)


def laid_out(x: Tensor, cell: Cell) -> Tensor:
    """Give a tensor of a cell's shape the cell's dtype and layout."""
    named = {"contiguous": range(x.dim()), "channels_last": (0, *range(2, x.dim()), 1)}
    order = [*named[cell.layout]] if cell.layout in named else [*map(int, cell.layout.split(","))]
    back = [order.index(d) for d in range(x.dim())]
    return x.to(cell.torch_dtype).permute(order).contiguous().permute(back)
