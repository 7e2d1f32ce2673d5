"""The contenders of a cell: our layer, torch.nn eager and compiled, JAX, and a plain copy, which nothing can beat."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import layers
from batchnorm.benchmark.grid import Cell, Operation
from batchnorm.benchmark.timing import Call

OURS, TORCH, COPY, COMPILED, JAX = "ours", "torch.nn", "copy", "torch.compile", "JAX"


@dataclass(frozen=True)
class Inputs:
    """What a cell's contenders share: x, the gradient of y, and what the layers are filled with."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


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
    return Inputs(
        x=_laid_out(x, cell).requires_grad_(),
        grad_y=_laid_out(torch.randn(cell.shape, generator=generator), cell),
        weight=0.5 + torch.rand(channels, generator=generator),
        bias=torch.randn(channels, generator=generator),
        running_mean=mean + 0.1,
        running_var=deviation.square() * 1.1,
    )


def _laid_out(x: Tensor, cell: Cell) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[x.dim()] if cell.layout == "channels_last" else torch.contiguous_format
    return x.to(cell.torch_dtype, memory_format=memory_format).contiguous(memory_format=memory_format)


def layer(source: Any, given: Inputs) -> nn.Module:
    """Build the layer for an input from `source`, torch.nn or our layers, and fill it."""
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[given.x.dim()]
    built: nn.Module = getattr(source, kind)(given.x.shape[1])
    state = {name: getattr(given, name) for name in ("weight", "bias", "running_mean", "running_var")}
    built.load_state_dict(state, strict=False)
    return built


def module(source: Any, cell: Cell, given: Inputs) -> nn.Module:
    """Build what a cell measures: the layer alone, or between two convolutions."""
    if cell.kind == "layer":
        return layer(source, given)
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
    calls = {name: _call(module(source, cell, given), given, operation) for name, source in sources.items()}
    if cell.kind == "layer":
        target, source = torch.empty_like(given.x), given.x.detach()
        calls[COPY] = lambda: target.copy_(source)
    return calls


def rivals(cell: Cell, given: Inputs, operation: Operation) -> tuple[dict[str, Call], dict[str, str]]:
    """Build the calls of those that compile; returns them, and for each that cannot be had here, why."""
    builders = {COMPILED: _compiled}
    if cell.layout == "contiguous" and importlib.util.find_spec("jax") is not None:
        builders[JAX] = _jax
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, build in builders.items():
        try:
            call = build(cell, given, operation)
            call()
        except Exception as error:  # a compiler is missing, or versions do not fit
            left_out[name] = f"{type(error).__name__}: {error}"
        else:
            calls[name] = call
    return calls, left_out


def _call(built: nn.Module, given: Inputs, operation: Operation) -> Call:
    built.train(operation != "evaluation")
    x, grad_y = given.x, given.grad_y
    if operation != "forward+backward":
        return lambda: built(x)
    leaves = [x, *built.parameters()]

    def step() -> None:
        built(x).backward(grad_y)
        for leaf in leaves:
            leaf.grad = None

    return step


def _compiled(cell: Cell, given: Inputs, operation: Operation) -> Call:
    torch.compiler.reset()  # it compiles anew for a limited number of shapes, then never again
    compiled: Any = torch.compile(module(nn, cell, given), dynamic=False)
    return _call(compiled, given, operation)


def _jax(cell: Cell, given: Inputs, operation: Operation) -> Call:
    """The same under ``jax.jit``. JAX has its own threads, as many as there are cores."""
    import jax
    import jax.numpy as jnp

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.detach().float().numpy(), dtype=str(t.dtype).removeprefix("torch."))

    x, grad_y, weight, bias, mean, var = map(array, vars(given).values())
    per_channel = (None, slice(None), *(None,) * (x.ndim - 2))
    axes = (0, *range(2, x.ndim))
    unbiased = x.size / x.shape[1] / (x.size / x.shape[1] - 1)

    def normalize(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        scale = weight * jax.lax.rsqrt(var + 1e-5)
        y = (x.astype("float32") - mean[per_channel]) * scale[per_channel] + bias[per_channel]
        return y.astype(x.dtype)

    def train(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype("float32")
        now, spread = wide.mean(axes), wide.var(axes)
        moved = 0.9 * mean + 0.1 * now, 0.9 * var + 0.1 * unbiased * spread
        return normalize(x, weight, bias, now, spread), moved

    def step(x: Any, weight: Any, bias: Any, grad_y: Any) -> Any:
        y, pull, moved = jax.vjp(train, x, weight, bias, has_aux=True)
        return y, pull(grad_y), moved

    calls: dict[Operation, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "forward": (train, (x, weight, bias)),
        "forward+backward": (step, (x, weight, bias, grad_y)),
        "evaluation": (normalize, (x, weight, bias, mean, var)),
    }
    function, arguments = calls[operation]
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arguments))
