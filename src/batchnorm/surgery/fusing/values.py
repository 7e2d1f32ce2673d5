"""What the values of a graph are in example runs: their shapes, and who else reads the memory they are in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.kernels import using
from batchnorm.surgery.inspect.example import Arguments, seeded
from batchnorm.surgery.inspect.tensors import copy_sharing_parameters

__all__ = ["ShapeAndDtype", "Values"]


class ShapeAndDtype(NamedTuple):
    """What must agree between the normalized tensor and the residual."""

    shape: torch.Size
    dtype: torch.dtype


class Values:
    """Runs a module's graph in evaluation with what the module was called with, when something is asked for first.

    Args:
        module: whose graph it is; it is left as it was.
        graph: every value is looked at.
        calls: the arguments of the module's calls.
        additions: the layers' calls that wait for each addition.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        calls: Iterable[Arguments],
        additions: Mapping[fx.Node, Sequence[fx.Node]],
    ) -> None:
        self._module, self._graph, self._calls, self._additions = module, graph, calls, additions

    def shapes(self, node: fx.Node) -> set[ShapeAndDtype]:
        """The shapes and dtypes that a value has; none if the calls do not reach it."""
        return self._seen.shapes.get(node, set())

    def overwritten(self, call: fx.Node) -> bool:
        """Whether the input of a layer's call is something else by the time of the addition."""
        return call in self._seen.overwritten

    def shared(self, addition: fx.Node) -> bool:
        """Whether others read, after it, the memory into which an addition in place writes."""
        return addition in self._seen.shared

    @cached_property
    def _seen(self) -> _Run:
        twin, _ = copy_sharing_parameters(self._module)
        for part in twin.modules():
            part.training = False
        run = _Run(twin, self._graph, self._additions)
        parameters = inspect.signature(self._module.forward)
        with seeded(self._module), torch.no_grad(), using("aten"):
            for args, kwargs in self._calls:
                run.run(*parameters.bind(*args, **kwargs).args)
        return run


class _Run(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, additions: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
        super().__init__(module, graph=graph)
        self.shapes: dict[fx.Node, set[ShapeAndDtype]] = {}
        self.overwritten: set[fx.Node] = set()
        self.shared: set[fx.Node] = set()
        self._additions = additions
        self._waiting = {call for calls in additions.values() for call in calls}
        self._given: dict[fx.Node, list[tuple[Tensor, int]]] = {}
        self._outside: set[int] = set()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph with copies of the containers among the arguments, into which a forward may write."""
        given = tree_map(lambda value: value, args)
        self._outside = _memory((given, list(self.module.parameters()), list(self.module.buffers())))
        return super().run(*given, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._waiting:
            read = [self.env[a] for a in n.all_input_nodes]
            self._given[n] = [(t, _version(t)) for t in tree_leaves(read) if isinstance(t, Tensor)]
        for call in self._additions.get(n, ()):
            if any(_version(t) != version for t, version in self._given.pop(call, [])):
                self.overwritten.add(call)
            if self._read_later(n):
                self.shared.add(n)
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes.setdefault(n, set()).add(ShapeAndDtype(value.shape, value.dtype))
        return value

    def _read_later(self, addition: fx.Node) -> bool:
        """Whether what is live behind an addition, or was there before the graph, shares its first operand's memory."""
        target = addition.args[0]
        if not isinstance(target, fx.Node):
            return False
        ended = self.user_to_last_uses.get(addition, [])
        live = [value for node, value in self.env.items() if node not in ended]
        return bool(_memory(self.env[target]) & (self._outside | _memory(live)))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_mutable(a) for a in args), {name: _mutable(value) for name, value in kwargs.items()}


def _mutable(value: Any) -> Any:
    """Lists and dicts as the forward made them; a graph keeps them immutable."""
    if isinstance(value, dict):
        return {name: _mutable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_mutable(one) for one in value]
    return tuple(map(_mutable, value)) if type(value) is tuple else value


def _memory(values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor) and _is_plain(t)}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
