"""Runs of a model on example inputs, which leave it as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from batchnorm.kernels import using
from batchnorm.surgery.find import shadow

__all__ = ["Arguments", "Calls", "calls_of", "forward", "seeded"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Calls = dict[nn.Module, list[Arguments]]


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call a model: a dict holds its keyword arguments, a tuple or list its arguments, else it is the argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """The same random numbers every time, and afterwards the generators as they were."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def calls_of(model: nn.Module, inputs: Any) -> Calls:
    """Run a copy of the model once, in evaluation, and note with what every module is called."""
    twin, original = shadow(model)
    calls: Calls = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(original[module], []).append((args, kwargs))

    for module in twin.modules():
        if module._modules:
            module.register_forward_pre_hook(note, with_kwargs=True)
    with seeded(model), torch.no_grad(), using("aten"):
        forward(twin.eval(), inputs)
    return calls
