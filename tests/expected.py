"""What is right: tensors of every layout, and torch.nn in float64 as the oracle they are judged by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import batchnorm

TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
OURS = {2: batchnorm.BatchNorm1d, 3: batchnorm.BatchNorm1d, 4: batchnorm.BatchNorm2d, 5: batchnorm.BatchNorm3d}


def channels_last(x: Tensor) -> Tensor:
    """The channel's neighbours are the other channels; for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x: Tensor) -> Tensor:
    """The same values with gaps between neighbours."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def batch_last(x: Tensor) -> Tensor:
    """The same values, dense, with the batch innermost."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "gaps": every_other,
    "batch_last": batch_last,
}


@cache
def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """float64 values whose channels have different means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    per_channel = (1, shape[1], *(1,) * (len(shape) - 2))
    deviation = 0.25 + 2 * torch.rand(per_channel, generator=generator, dtype=torch.float64)
    mean = 3 * torch.randn(per_channel, generator=generator, dtype=torch.float64)
    return mean + deviation * torch.randn(shape, generator=generator, dtype=torch.float64)


def laid(shape: tuple[int, ...], seed: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Those values in a dtype and a layout."""
    return LAYOUTS[layout](values(shape, seed).to(dtype, copy=True))  # the values are kept for others


class Result(NamedTuple):
    """Of one step; None where there is none."""

    y: Tensor
    x_grad: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


def step(layer: Any, x: Tensor, grad: Tensor) -> Result:
    """One forward and backward; the values, copied."""
    x = x.detach().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(grad)
    grads = [x.grad, *(None if p is None else p.grad for p in (layer.weight, layer.bias))]
    buffers = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    return Result(y.detach(), *grads, *(None if b is None else b.clone() for b in buffers))


def in_float64(layer: Any) -> nn.Module:
    """torch.nn's layer of the same kind with the same parameters and buffers, in float64."""
    kind = next(k for k in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(layer, k))
    twin = kind.__new__(kind)
    twin.__dict__.update(layer.__dict__)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().double().clone(), p.requires_grad)
        for name, p in layer._parameters.items()
    }
    twin._buffers = {
        name: None if b is None else (b.double() if b.is_floating_point() else b).clone()
        for name, b in layer._buffers.items()
    }
    return twin


# Relative to the value, and to the largest in the tensor: what rounding the inputs and the result costs in each dtype.
_TOLERANCE = {
    torch.float64: (1e-11, 1e-11),  # the oracle itself is no better: it adds up one value after the other
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2**-8, 2e-5),  # computed in float32, rounded once
    torch.float16: (2**-10, 2e-5),
}


def assert_right(found: Result, right: Result, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Every value of the step within the dtype's rounding of the oracle's.

    `slack` multiplies what is allowed; ATen, which takes some gradients of half precision in half precision, needs it.
    """
    for name, ours, oracle in zip(Result._fields, found, right, strict=True):
        if oracle is None:
            assert ours is None, name
            continue
        assert ours is not None, name
        if name == "num_batches_tracked":
            assert ours.item() == oracle.item(), name
            continue
        kept_wide = name.startswith("running") and dtype in (torch.bfloat16, torch.float16)
        if name in ("y", "x_grad"):
            assert ours.dtype == dtype, name
        relative, of_largest = _TOLERANCE[torch.float32 if kept_wide else dtype]
        absolute = slack * of_largest * max(oracle.abs().max().item(), 1e-30)
        if name in ("weight_grad", "bias_grad"):  # a sum of as many terms of either sign, each rounded
            absolute *= (right.y.numel() / oracle.numel()) ** 0.5
        torch.testing.assert_close(
            ours.double(), oracle, rtol=slack * relative, atol=absolute, msg=lambda m, name=name: f"{name}: {m}"
        )
