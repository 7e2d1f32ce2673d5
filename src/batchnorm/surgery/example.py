"""Runs of a model on example inputs, which leave it as it was."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from batchnorm.kernels import using
from batchnorm.surgery.find import shadow
from batchnorm.surgery.fusing.patterns import Form, has_additions

__all__ = ["Calls", "calls_of", "forms_of", "forward", "seeded"]

Calls = dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]]


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


class _Forms(fx.Interpreter):
    """Notes the shape and dtype of every node's value."""

    def __init__(self, module: fx.GraphModule, found: dict[fx.Node, set[Form]]) -> None:
        super().__init__(module)
        self._found = found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._found.setdefault(n, set()).add(Form(value.shape, value.dtype))
        return value


def forms_of(
    module: nn.Module, graph: fx.Graph, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
) -> dict[fx.Node, set[Form]]:
    """The shapes and dtypes that the values of a module's graph have in those calls."""
    found: dict[fx.Node, set[Form]] = {}
    if not has_additions(graph):
        return found
    twin, _ = shadow(module)
    for part in twin.modules():
        part.training = False
    runnable = fx.GraphModule(twin, graph)
    with seeded(module), torch.no_grad(), using("aten"):
        for args, kwargs in calls:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            _Forms(runnable, found).run(*bound.args)
    return found
