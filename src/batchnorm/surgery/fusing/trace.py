"""What a module's forward does, as a graph: torch.fx, with its silent mistakes turned into refusals."""

from __future__ import annotations

import inspect
import operator
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.surgery.find import is_batch_norm, shadow
from batchnorm.surgery.line import is_linear_map

__all__ = ["UntraceableError", "is_container", "takes_fixed_arguments", "trace"]

Leaf = Callable[[nn.Module], bool]


class UntraceableError(Exception):
    """A forward that a graph cannot stand for; the message says why."""


def is_container(module: nn.Module) -> bool:
    """Whether a module is not a building block of torch.nn, and so may be looked into."""
    return isinstance(module, nn.Sequential) or not (
        type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
        or is_batch_norm(module)
        or is_linear_map(module)
    )


def takes_fixed_arguments(module: nn.Module) -> bool:
    """Whether every call has the same arguments; optional ones are cases, of which a graph knows one."""
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return all(p.kind in fixed and p.default is inspect.Parameter.empty for p in parameters)


def trace(module: nn.Module, leaf: Leaf, modes: tuple[bool, bool] = (True, False)) -> fx.Graph:
    """Record what a module's forward does with its arguments.

    Tracing runs the forward once and believes what happened. So it runs twice, in training with gradients and in
    evaluation without; a forward that does not do the same both times, or has effects besides its result, is refused.

    Args:
        module: it is left as it was.
        leaf: whether to record a call of a submodule as a call, rather than what happens inside.
        modes: in which modes to run it, training (True) or evaluation, where one of them alone is asked about.

    Raises:
        UntraceableError: with the reason.
    """
    graphs = []
    for training in modes:
        try:
            twin, parts = shadow(module)
        except Exception as error:  # a tensor of a graph, kept as an attribute; whatever else does not copy
            raise UntraceableError(f"it cannot be copied: {str(error).splitlines()[0]}") from error
        for part in twin.modules():
            part.training = training
        before = {part: dict(vars(part)) for part in parts}
        with torch.set_grad_enabled(training):
            graphs.append(_traced(twin, _through(parts, leaf)))
        if any(not _same(vars(part), attributes) for part, attributes in before.items()):
            raise UntraceableError("its forward sets attributes")
    if str(graphs[0]) != str(graphs[1]):
        raise UntraceableError("training and evaluation, or two runs, differ in more than its layers")
    return graphs[0]


def _through(parts: dict[nn.Module, nn.Module], leaf: Leaf) -> Leaf:
    return lambda part: leaf(parts[part])


def _traced(module: nn.Module, leaf: Leaf) -> fx.Graph:
    draws = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they will come when the model runs
            graph = _Tracer(leaf).trace(module)
    except UntraceableError:
        raise
    except Exception as error:  # whatever a forward does when it is given no tensors
        first_line = (str(error).splitlines() or [""])[0]
        raise UntraceableError(f"{type(error).__name__}: {first_line}") from error
    finally:
        drawn = not torch.equal(draws[0], torch.get_rng_state()) or draws[1] != random.getstate()
        torch.set_rng_state(draws[0])
        random.setstate(draws[1])
    if drawn:
        raise UntraceableError("it draws random numbers that are no function of its input")
    return graph


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is; torch.fx would record ``x + y``, and others who hold x would not see it."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    operation = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    knows_epilogues = True  # a call of a fused layer is recorded as what it is, a call of the layer

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self._leaf = leaf
        self._surroundings = _surroundings()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise UntraceableError("it computes under no_grad, autocast or the like, which a graph does not keep")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        known = not isinstance(a, Tensor) or isinstance(a, nn.Parameter) or a in self.tensor_attrs
        if not known and all(a is not buffer for buffer in self.root.buffers()):
            raise UntraceableError("it makes a tensor that is no function of its input")
        return super().create_arg(a)


def _surroundings() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        (torch.is_autocast_enabled("cuda")),
    )
