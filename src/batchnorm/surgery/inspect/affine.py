"""Batch normalization in evaluation as an affine map, scale · x + shift, and the modules whose weights take it over."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.kernels import using
from batchnorm.layers import channels_of
from batchnorm.surgery.inspect.example import Arguments, seeded
from batchnorm.surgery.report import summary

__all__ = [
    "CONVOLUTIONS", "LINEAR_MAPS", "TRANSPOSED", "Affine", "along_inputs", "along_outputs", "bias_behind",
    "constant_through", "does_not_take", "handed_over", "has_middle", "in_the_middle", "inputs_of", "is_linear_map",
    "is_plain", "outputs_of", "put", "scale_and_shift", "scale_and_shift_of", "share_of",
]  # fmt: skip

Affine = tuple[Tensor, Tensor]  # scale and shift, ``(channels,)``, in float64 on the CPU
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


def scale_and_shift(
    mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, channels: int
) -> Affine:
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
        >>> scale, shift = scale_and_shift(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, bn.num_features)
    """
    zero = torch.zeros(channels, dtype=torch.float64, device="cpu")
    scale = zero + 1 if var is None else (_wide(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * _wide(weight)
    shift = zero if bias is None else _wide(bias)
    return scale, shift if mean is None else shift - _wide(mean) * scale


def scale_and_shift_of(layer: Any) -> Affine:
    """Give the scale and the shift of a batch normalization layer of any make; see ``scale_and_shift``."""
    return scale_and_shift(
        layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps, channels_of(layer)
    )


def along_outputs(weight: Tensor, scale: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Scale the outputs of a convolution or linear layer: each has a factor.

    Args:
        weight: ``(outputs, inputs / groups, *kernel)``, or ``(inputs, outputs / groups, *kernel)`` if transposed.
        scale: ``(outputs,)``.
        groups, transposed: as the convolution has them.

    Returns:
        The new weight, in float64 on the CPU. A bias is multiplied by ``scale`` as well.
    """
    weight = _wide(weight)
    if not transposed:
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))).view(weight.shape)


def along_inputs(weight: Tensor, scale: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Scale the inputs of a convolution or linear layer: each has a factor; otherwise as ``along_outputs``."""
    return along_outputs(weight, scale, groups, not transposed)  # whose weight has inputs where this one has outputs


def bias_behind(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """Give the bias that takes an affine map over, in float64 on the CPU: scale · bias + shift."""
    return shift if bias is None else _wide(bias) * scale + shift


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
    sums = _wide(weight).reshape(groups, outputs // groups, inputs, -1).sum(-1)
    return torch.einsum("goi,gi->go", sums, shift.view(groups, -1)).reshape(-1)


def _wide(tensor: Tensor) -> Tensor:
    """Give the values in float64 on the CPU."""
    return tensor.detach().cpu().double()


# --- modules that take it over ---


def share_of(layer: Any, channels: Tensor | None) -> Affine:
    """The scale and shift of some of a layer's channels; 1 and 0 where there is none."""
    scale, shift = scale_and_shift_of(layer)
    if channels is None:
        return scale, shift
    there = channels >= 0
    return torch.where(there, scale[channels], 1.0), torch.where(there, shift[channels], 0.0)


def handed_over(
    module: Any, weight: Tensor, bias: Tensor | None, affine: Affine, before: bool
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias with which a module also computes an affine map behind it, or in front of it."""
    scale, shift = affine
    groups, transposed = getattr(module, "groups", 1), isinstance(module, TRANSPOSED)
    if before:
        return along_outputs(weight, scale, groups, transposed), bias_behind(bias, scale, shift)
    return along_inputs(weight, scale, groups, transposed), _shifted(weight, bias, shift, groups)


def _shifted(weight: Tensor, bias: Tensor | None, shift: Tensor, groups: int) -> Tensor | None:
    """The bias behind a shift; without a shift none is needed, and a transposed weight not asked."""
    if not shift.any():
        return bias
    more = constant_through(weight, shift, groups)
    return more if bias is None else _wide(bias) + more


def put(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a module parameters of its own: another one may share the old ones."""
    old, learns = module.weight, module.weight.requires_grad
    made = torch.empty_like(old).copy_(weight)  # with its strides, channels-last or not
    bias_learns = learns if module.bias is None else module.bias.requires_grad
    module.weight = nn.Parameter(made, learns)
    module.bias = None if bias is None else nn.Parameter(bias.to(old), bias_learns)


_WITH_MIDDLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def has_middle(module: Any) -> bool:
    """Whether a convolution's kernel has a place that reads, for each output, the input at the same place."""
    if not isinstance(module, _WITH_MIDDLE) or not is_plain(module) or module.in_channels != module.out_channels:
        return False
    sizes, strides, dilations = module.kernel_size, module.stride, module.dilation
    if any(stride != 1 for stride in strides) or any(size % 2 == 0 for size in sizes):
        return False
    padding: Any = module.padding
    wanted = tuple(dilation * (size - 1) // 2 for size, dilation in zip(sizes, dilations, strict=True))
    return padding == "same" or tuple(wanted) == ((0,) * len(sizes) if padding == "valid" else tuple(padding))


def in_the_middle(module: Any, weight: Tensor, bias: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """Give the weight and bias with which a convolution adds scale · input + shift to what it computes.

    Args:
        module: a convolution that has a middle.
        weight, bias: its own.
        affine: scale and shift.

    Returns:
        Both in float64 on the CPU.
    """
    scale, shift = affine
    made = _wide(weight).clone()
    outputs = torch.arange(len(scale))
    middle = tuple(size // 2 for size in module.kernel_size)
    made[(outputs, outputs % made.shape[1], *middle)] += scale
    return made, shift if bias is None else _wide(bias) + shift


def does_not_take(module: Any, affine: Affine, before: bool, call: Arguments | None = None) -> str | None:
    """Find out whether a module with other weights computes an affine map as well; why not, or None if it does.

    The module and the map, one after the other, and the module with the map in its weights run in float64 on one input.

    Args:
        module: with weight and bias; it is left as it was.
        affine: scale and shift.
        before: whether the module comes before the map, or behind it.
        call: what it was called with; otherwise it is called with random numbers.
    """
    alone = copy.deepcopy(module).double().eval()
    both = copy.deepcopy(alone)
    put(both, *handed_over(both, both.weight, both.bias, affine, before))
    args, kwargs = _random(module) if call is None else call
    args, kwargs = tree_map(_doubled, (args, kwargs))
    try:
        with seeded(alone), torch.no_grad(), using("aten"):
            if before:
                right = _along(alone(*args, **kwargs), alone, affine)
            else:
                right = alone(_along(args[0], alone, affine), *args[1:], **kwargs)
            found = both(*args, **kwargs)
        same = found.shape == right.shape and (found - right).abs().max() <= 1e-9 * right.abs().max()
    except Exception as error:
        return f"could not be tried: {summary(error)}"
    return None if same else "does more with its weight, bias or input than a convolution or linear layer"


def _along(x: Tensor, module: Any, affine: Affine) -> Tensor:
    """Scale and shift a tensor along the channels that a module has."""
    after = module.weight.dim() - 2
    scale, shift = (each.to(x.device).view(-1, *(1,) * after) for each in affine)
    return x * scale + shift


def _random(module: Any) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    # Odd, so that a padding that depends on size and stride is seen.
    sides = [17 + 2 * (size - 1) for size in module.weight.shape[2:]]
    x = torch.randn(2, inputs_of(module), *sides, dtype=torch.float64, generator=generator)
    return (x.to(module.weight.device),), {}


def _doubled(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
