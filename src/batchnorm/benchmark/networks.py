"""Whole networks: a training step and an evaluation of any model, and whether two of them compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.benchmark.timing import Call
from batchnorm.surgery.inspect.example import forward, in_mode, seeded
from batchnorm.surgery.inspect.tensors import copied, tensors_in

ALLOWED = 2.0  # times the other one's own error; which of two roundings turns more activations over is chance
ROUNDING = 1e-5  # relative; below, both are as good as float32 can be


def training_step(network: nn.Module, inputs: Any) -> Call:
    """Give a training step without an optimizer: forward, and backward from gradients that stay the same.

    Raises:
        ValueError: if no output asks for a gradient.
    """
    in_mode(network, True)
    gradients = [torch.randn_like(y) for y in _trained(forward(network, inputs))]

    def step() -> None:
        torch.autograd.backward(_trained(forward(network, inputs)), gradients)
        for parameter in network.parameters():
            parameter.grad = None

    return step


def evaluation(network: nn.Module, inputs: Any) -> Call:
    """Give an evaluation; call it under ``torch.no_grad``."""
    in_mode(network, False)
    return lambda: forward(network, inputs)


def _trained(result: Any) -> list[Tensor]:
    found = [t for t in tensors_in(result) if t.requires_grad]
    if not found:
        raise ValueError("no output of the model asks for a gradient in training: nothing in it learns")
    return found


def errors(theirs: nn.Module, ours: nn.Module, inputs: Any) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Compare two networks with the first one in float64, by the root of the mean square over all values of a kind.

    Returns:
        The errors, ours and theirs, relative to the size of what is right, and which of ours are too large.
    """
    exact = _observed(copied(theirs).double(), _as(torch.float64, inputs))
    both = [_observed(copied(network), inputs) for network in (ours, theirs)]
    found, problems = {}, []
    for name, right in exact.items():
        size = float(right.norm()) or 1.0
        mine, other = (float((one[name] - right).norm()) / size for one in both)
        found[name] = mine, other
        if not mine <= max(ALLOWED * other, ROUNDING):  # nan fails, too
            problems.append(f"{name} is off by {mine:.2g} of its size, and torch.nn's by {other:.2g}")
    return found, problems


def _observed(network: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """What a network gives in evaluation, and a training step's output, gradients and running statistics."""
    with seeded(network):
        with torch.no_grad():
            evaluated = tensors_in(forward(in_mode(network, False), inputs))
        in_mode(network, True)
        for part in network.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):  # which draws other numbers in float64
                part.eval()
        outputs = _trained(forward(network, inputs))
        generator = torch.Generator().manual_seed(0)
        torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator).to(y) for y in outputs])
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    statistics = [b for b in network.buffers() if b.is_floating_point()]
    parts = {"evaluation": evaluated, "y": outputs, "gradients": gradients, "running statistics": statistics}
    return {
        name: torch.cat([t.detach().flatten().double() for t in found if t.is_floating_point()])
        for name, found in parts.items()
        if found
    }


def _as(dtype: torch.dtype, inputs: Any) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)
