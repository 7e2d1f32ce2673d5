"""Batch normalization in evaluation as a line, scale · x + shift, and the weights that take it over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.layers import channels_of

__all__ = [
    "CONVOLUTIONS", "LINEAR_MAPS", "TRANSPOSED", "along_inputs", "along_outputs", "bias_behind",
    "constant_through", "inputs_of", "is_linear_map", "is_plain", "line", "line_of", "outputs_of", "wide",
]  # fmt: skip

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LINEAR_MAPS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module is torch.nn's convolution or linear layer, or a subclass that may compute such a map.

    A subclass with a forward of its own (padding of its own, say) has to be tried: see ``acts_as_map``.
    """
    kind = type(module)
    if kind in LINEAR_MAPS:
        return True
    torchs_own = kind.__module__.startswith("torch.")  # lazy, quantized or parametrized
    return isinstance(module, LINEAR_MAPS) and not torchs_own and not module._modules


def outputs_of(module: Any) -> int:
    """How many channels a convolution or linear layer gives."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


def inputs_of(module: Any) -> int:
    """How many channels a convolution or linear layer takes."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)


def is_plain(module: nn.Module) -> bool:
    """Whether a convolution or linear layer computes what torch.nn's does."""
    kind = type(module)
    base = next(base for base in LINEAR_MAPS if isinstance(module, base))
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))


def line(
    mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, channels: int
) -> tuple[Tensor, Tensor]:
    """Give the scale and the shift that normalizing with running statistics amounts to.

    Args:
        mean, var, weight, bias: ``(channels,)``, of any floating dtype and on any device; None for 0, 1, 1 and 0. A
            variance of None is the deviation 1: no eps is added to it.
        eps: added to the variance.
        channels: how many there are.

    Returns:
        Scale and shift, ``(channels,)``, in float64 on the CPU:
        weight / √(var + eps) and bias - mean · scale (Ioffe & Szegedy 2015, algorithm 2, line 11).

    Example:
        >>> scale, shift = line(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, bn.num_features)
    """
    zero = torch.zeros(channels, dtype=torch.float64, device="cpu")
    scale = zero + 1 if var is None else (wide(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * wide(weight)
    shift = zero if bias is None else wide(bias)
    return scale, shift if mean is None else shift - wide(mean) * scale


def line_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Give the scale and the shift of a batch normalization layer of any make; see ``line``."""
    return line(layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps, channels_of(layer))


def along_outputs(weight: Tensor, scale: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Scale the outputs of a convolution or linear layer: each has a factor.

    Args:
        weight: ``(outputs, inputs / groups, *kernel)``, or ``(inputs, outputs / groups, *kernel)`` if transposed.
        scale: ``(outputs,)``.
        groups, transposed: as the convolution has them.

    Returns:
        The new weight, in float64 on the CPU. A bias is multiplied by ``scale`` as well.
    """
    weight = wide(weight)
    if not transposed:
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))).view(weight.shape)


def along_inputs(weight: Tensor, scale: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Scale the inputs of a convolution or linear layer: each has a factor; otherwise as ``along_outputs``."""
    return along_outputs(weight, scale, groups, not transposed)  # whose weight has inputs where this one has outputs


def bias_behind(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """Give the bias that takes a line over, in float64 on the CPU: scale · bias + shift."""
    return shift if bias is None else wide(bias) * scale + shift


def constant_through(weight: Tensor, shift: Tensor, groups: int = 1) -> Tensor:
    """What an input that is ``shift`` everywhere adds to each output where no padding is seen.

    Args:
        weight: ``(outputs, inputs / groups, *kernel)``; that of a transposed convolution, whose windows overlap less
            at the border, has no such number.
        shift: ``(inputs,)``.
        groups: as the convolution has them.

    Returns:
        ``(outputs,)``, in float64 on the CPU, to be added to the bias.
    """
    outputs, inputs = weight.shape[:2]
    sums = wide(weight).reshape(groups, outputs // groups, inputs, -1).sum(-1)
    return torch.einsum("goi,gi->go", sums, shift.view(groups, -1)).reshape(-1)


def wide(tensor: Tensor) -> Tensor:
    """Give the values in float64 on the CPU."""
    return tensor.detach().cpu().double()
