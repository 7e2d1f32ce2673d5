"""Runs of a model on example inputs, which leave it as it was."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.kernels import using
from batchnorm.surgery.inspect.tensors import copy_sharing_parameters

__all__ = ["Arguments", "Calls", "calls_of", "copied_inputs", "forward", "in_mode", "seeded"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_Module = TypeVar("_Module", bound=nn.Module)
_Inputs = TypeVar("_Inputs")


class Calls(dict[nn.Module, list[Arguments]]):
    """With what every module is called.

    Attributes:
        writing: the modules that write into lists or dicts that they are given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writing: set[nn.Module] = set()


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call a model: a dict holds its keyword arguments, a tuple or list its arguments, else it is the argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def copied_inputs(inputs: _Inputs) -> _Inputs:
    """Give the same inputs as tensors, lists and dicts of their own, into which a forward may write."""

    def fresh(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    copied: _Inputs = tree_map(fresh, inputs)
    return copied


def in_mode(model: _Module, training: bool) -> _Module:
    """Put a model into training or evaluation, and give it back, which some people's own ``train`` does not."""
    if training:
        model.train()
    else:
        model.eval()
    return model


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """The same random numbers every time, and afterwards the generators as they were; without warnings.

    They will come when the model is run for its own sake.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
    twin, original = copy_sharing_parameters(model)
    calls = Calls()
    running: list[Arguments] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(_with_own_containers((args, kwargs)))
        calls.setdefault(original[module], []).append(running[-1])

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if [*map(id, tree_leaves((args, kwargs)))] != [*map(id, tree_leaves(running.pop()))]:
            calls.writing.add(original[module])

    for module in twin.modules():
        if module._modules and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            module.register_forward_pre_hook(note, with_kwargs=True)
            module.register_forward_hook(compare, with_kwargs=True)
    with seeded(model), torch.no_grad(), using("aten"):
        forward(in_mode(twin, False), _with_own_containers(inputs))
    return calls


def _with_own_containers(inputs: _Inputs) -> _Inputs:
    """The same tensors in copies of their lists and dicts, into which a forward may write."""
    copied: _Inputs = tree_map(lambda value: value, inputs)
    return copied
