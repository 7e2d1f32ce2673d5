"""What a module's forward does, as a graph: torch.fx, with its silent mistakes turned into refusals."""

from __future__ import annotations

import inspect
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.surgery.inspect.affine import is_linear_map
from batchnorm.surgery.inspect.find import is_batch_norm, shadow

__all__ = ["Shadows", "UntraceableError", "is_container", "refusing", "takes_fixed_arguments", "trace"]

Leaf = Callable[[nn.Module], bool]


class UntraceableError(Exception):
    """A forward that a graph cannot stand for; the message says why."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn whatever is raised inside, by user code perhaps, into the reason why a module must be left alone."""
    try:
        yield
    except (UntraceableError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UntraceableError(f"{type(error).__name__}: {first_line}") from error


def is_container(module: nn.Module) -> bool:
    """Whether a module is not a building block of torch.nn, and so may be looked into."""
    return isinstance(module, nn.Sequential) or not (
        type(module).__module__.startswith(("torch.nn", "torch.ao.nn", "torch.jit"))
        or is_batch_norm(module)
        or is_linear_map(module)
    )


def takes_fixed_arguments(module: nn.Module) -> bool:
    """Whether every call has the same arguments; optional ones are cases, of which a graph knows one."""
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return all(p.kind in fixed and p.default is inspect.Parameter.empty for p in parameters)


class Shadows:
    """Copies of a model's modules to try things on: one of the whole model, as long as nothing has gone wrong in it."""

    def __init__(self, model: nn.Module) -> None:
        self._spoilt: set[nn.Module] = set()
        try:
            _, self._parts = shadow(model)
        except Exception:  # some part does not copy
            self._parts = {}
        self._twins = {part: twin for twin, part in self._parts.items()}

    def of(self, module: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
        """A module's copy, and for each of its parts the original."""
        if module in self._twins and self._spoilt.isdisjoint(module.modules()):
            return self._twins[module], self._parts
        return shadow(module)

    def spoil(self, module: nn.Module) -> None:
        """Do not use this copy again: a forward may have written into it."""
        self._spoilt.update(module.modules())


def trace(
    module: nn.Module,
    leaf: Leaf,
    modes: Sequence[bool] = (True, False),
    to_run: bool = False,
    shadows: Shadows | None = None,
) -> fx.Graph:
    """Record what a module's forward does with its arguments.

    Tracing runs the forward once and believes what happened. So it runs twice, in training with gradients and in
    evaluation without; a forward that does not do the same both times, or has effects besides its result, is refused.

    Args:
        module: it is left as it was.
        leaf: whether to record a call of a submodule as a call, rather than what happens inside.
        modes: in which modes to run it, training (True) or evaluation, where one of them alone is asked about.
        to_run: whether the graph will be the module's forward, so that what is returned must be of its own class.
        shadows: of a model with this module, if that has not changed since.

    Raises:
        UntraceableError: with the reason.
    """
    try:
        twin, parts = shadow(module) if shadows is None else shadows.of(module)
    except Exception as error:
        raise UntraceableError(f"it cannot be copied: {str(error).splitlines()[0]}") from error
    try:
        with refusing():
            graphs = [_traced(twin, training, lambda part: leaf(parts[part]), to_run) for training in modes]
    except UntraceableError:
        if shadows is not None:
            shadows.spoil(module)
        raise
    if str(graphs[0]) != str(graphs[-1]):
        raise UntraceableError("training and evaluation, or two runs, differ in more than its layers")
    return graphs[0]


def _traced(module: nn.Module, training: bool, leaf: Leaf, to_run: bool) -> fx.Graph:
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    for part in module.modules():
        vars(part)["training"] = training  # nn.Module's own way takes ten times as long
    before = _Held(parts)
    draws = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(training):
            warnings.simplefilter("ignore")  # they will come when the model runs
            graph = _Tracer(leaf, to_run).trace(module)
    finally:
        drawn = not torch.equal(draws[0], torch.get_rng_state()) or draws[1] != random.getstate()
        torch.set_rng_state(draws[0])
        random.setstate(draws[1])
    if drawn:
        raise UntraceableError("it draws random numbers that are no function of its input")
    if not _Held(parts).same(before):
        raise UntraceableError("its forward sets attributes")
    return graph


class _Held:
    """What modules hold, what the lists and dicts among that hold, and how often their tensors were written into."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        values: list[Any] = []  # themselves, not their ids, which others might get
        for module in modules:
            for name, value in vars(module).items():
                values += (name, value)
                if value and isinstance(value, (dict, list, set)):
                    values += value
                    values += value.values() if isinstance(value, dict) else ()
        self._values = values
        self._versions = [v._version for v in values if isinstance(v, Tensor) and not v.is_inference()]

    def same(self, other: _Held) -> bool:
        """Whether nothing is another object, and no tensor was written into."""
        return self._versions == other._versions and (
            len(self._values) == len(other._values) and all(map(operator.is_, self._values, other._values))
        )


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is; torch.fx would record ``x + y``, and others who hold x would not see it."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    operation = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


_CONTAINERS = (dict, list, fx.immutable_collections.immutable_dict, fx.immutable_collections.immutable_list)


class _Tracer(fx.Tracer):
    knows_epilogues = True  # a call of a fused layer is recorded as what it is, a call of the layer

    def __init__(self, leaf: Leaf, to_run: bool) -> None:
        super().__init__()
        self._leaf, self._to_run = leaf, to_run
        self._surroundings = _surroundings()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        made_on_the_way = m not in (self.submodule_paths or ())  # as in nn.ReLU()(x)
        if made_on_the_way and not [*m.parameters(), *m.buffers()]:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise UntraceableError("it computes under no_grad, autocast or the like, which a graph does not keep")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if self._to_run and isinstance(a, (dict, list)) and type(a) not in _CONTAINERS:
            raise UntraceableError(f"it makes a {type(a).__name__}, whose class a graph does not keep")
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
