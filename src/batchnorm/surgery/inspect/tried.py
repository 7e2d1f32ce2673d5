"""Subclasses of convolutions and linear layers, tried: whether their weight and bias can take a line over."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from batchnorm.kernels import using
from batchnorm.surgery.inspect.affine import inputs_of
from batchnorm.surgery.inspect.example import seeded
from batchnorm.surgery.inspect.handover import handed_over, put

__all__ = ["Call", "does_not_take"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
_SIDE = 17  # odd, so that a padding that depends on size and stride is seen


def does_not_take(module: Any, line: tuple[Tensor, Tensor], before: bool, call: Call | None = None) -> str | None:
    """Find out whether a module with other weights computes a line as well; why not, or None if it does.

    Module and line, each for itself, and the module with the line in its weights are run in float64 on the same input.

    Args:
        module: with weight and bias; it is left as it was.
        line: scale and shift, ``(channels,)``, in float64 on the CPU.
        before: whether the module comes before the line, or behind it.
        call: what it was called with; otherwise it is called with random numbers.
    """
    alone = copy.deepcopy(module).double().eval()
    both = copy.deepcopy(alone)
    put(both, *handed_over(both, both.weight, both.bias, line, before))
    args, kwargs = _random(module) if call is None else call
    args, kwargs = tree_map(_wide, (args, kwargs))
    try:
        with seeded(alone), torch.no_grad(), using("aten"):
            if before:
                right = _along(alone(*args, **kwargs), alone, line)
            else:
                right = alone(_along(args[0], alone, line), *args[1:], **kwargs)
            found = both(*args, **kwargs)
        same = found.shape == right.shape and (found - right).abs().max() <= 1e-9 * right.abs().max()
    except Exception as error:
        return f"could not be tried: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if same else "does more with its weight, bias or input than a convolution or linear layer"


def _along(x: Tensor, module: Any, line: tuple[Tensor, Tensor]) -> Tensor:
    """Scale and shift a tensor along the channels that a module has."""
    after = module.weight.dim() - 2
    scale, shift = (each.to(x.device).view(-1, *(1,) * after) for each in line)
    return x * scale + shift


def _random(module: Any) -> Call:
    generator = torch.Generator().manual_seed(0)
    sides = [_SIDE + 2 * (size - 1) for size in module.weight.shape[2:]]
    x = torch.randn(2, inputs_of(module), *sides, dtype=torch.float64, generator=generator)
    return (x.to(module.weight.device),), {}


def _wide(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
