"""What a module's forward does, as a graph: torch.fx, with its silent mistakes turned into refusals."""

from __future__ import annotations

import inspect
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.surgery.inspect.affine import is_linear_map
from batchnorm.surgery.inspect.example import Calls
from batchnorm.surgery.inspect.find import NO_FORWARD, hooks_of, is_batch_norm, names_of
from batchnorm.surgery.inspect.tensors import copy_sharing_parameters
from batchnorm.surgery.report import summary

__all__ = ["Graphs", "Leaf", "UntraceableError", "paths_of", "refusing", "trace"]

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
        raise UntraceableError(summary(error)) from error


def trace(
    module: nn.Module,
    leaf: Leaf,
    modes: Sequence[bool] = (True, False),
    to_run: bool = False,
    copies: _Copies | None = None,
) -> fx.Graph:
    """Record what a module's forward does with its arguments.

    Tracing runs the forward once and believes what happened. So it runs twice, in training with gradients and in
    evaluation without; a forward that does not do the same both times, or has effects besides its result, is refused.

    Args:
        module: it is left as it was.
        leaf: whether to record a call of a submodule as a call, rather than what happens inside.
        modes: in which modes to run it, training (True) or evaluation, where one of them alone is asked about.
        to_run: whether the graph will be the module's forward, so that what is returned must be of its own class.
        copies: of a model with this module, if that has not changed since.

    Raises:
        UntraceableError: with the reason.
    """
    try:
        twin, parts = copy_sharing_parameters(module) if copies is None else copies.of(module)
    except Exception as error:
        raise UntraceableError(f"it cannot be copied: {str(error).splitlines()[0]}") from error
    try:
        with refusing():
            graphs = [_traced(twin, training, lambda part: leaf(parts[part]), to_run) for training in modes]
    except UntraceableError:
        if copies is not None:
            copies.spoil(module)
        raise
    if str(graphs[0]) != str(graphs[-1]):
        raise UntraceableError("training and evaluation, or two runs, differ in more than its layers")
    return graphs[0]


def _traced(module: nn.Module, training: bool, leaf: Leaf, to_run: bool) -> fx.Graph:
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    for part in module.modules():
        vars(part)["training"] = training  # nn.Module's own way takes ten times as long
    before = _Snapshot(parts)
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
    if not _Snapshot(parts).same(before):
        raise UntraceableError("its forward sets attributes")
    return graph


class _Snapshot:
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

    def same(self, other: _Snapshot) -> bool:
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


# --- all modules of a model ---


class Graphs:
    """The graphs of those modules of a model that can be traced and have batch normalization inside.

    Every module is traced by itself: one that cannot be traced hides what it does itself, and no more.

    Attributes:
        model: the model.
        names: of all its modules.
        calls: with what they were called, if that is known.
        outwards: the modules with batch normalization inside, the innermost first.
        opaque: what cannot be traced, and why.
    """

    def __init__(self, model: nn.Module, calls: Calls | None = None, modes: Sequence[bool] = (True, False)) -> None:
        self.model, self.calls, self.names = model, calls, names_of(model)
        self.opaque: dict[nn.Module, str] = {}
        self._modes = modes
        self._blind: dict[nn.Module, str] = {}  # what can be traced from outside only
        self._stale: set[nn.Module] = set()  # whose graph was recorded before something in it changed
        self._looked: set[nn.Module] = set()  # into which one has looked
        self._known: dict[nn.Module, tuple[fx.Graph, Leaf]] = {}
        self._with_layers = {m for m in self.names if any(is_batch_norm(part) for part in m.modules())}
        self.outwards = [module for module in self.names if module in self._with_layers][::-1]

    @cached_property
    def _copies(self) -> _Copies:
        return _Copies(self.model)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._known

    def all(self) -> list[tuple[nn.Module, fx.Graph]]:
        """Trace all modules whose forward runs, from the innermost outwards."""
        self.look_into_parts(self.model)
        called = self._called()
        return [(m, self._known[m][0]) for m in self.outwards if m in called and m in self]

    def of(self, module: nn.Module) -> fx.Graph:
        """The graph of a module as it is now."""
        graph, leaf = self._known[module]
        return trace(module, leaf, self._modes[-1:]) if module in self._stale else graph

    def to_run(self, module: nn.Module, kept: set[nn.Module]) -> fx.Graph:
        """A graph that can be a module's forward, in which some parts are called rather than looked into."""
        leaf = self._known[module][1]
        return trace(module, lambda part: leaf(part) or part in kept, self._modes[-1:], to_run=True)

    def changed(self, module: nn.Module) -> None:
        """Note that graphs with this module inside tell no more what it does."""
        for name in self.names[module]:
            while name:
                name = name.rpartition(".")[0]
                self._stale.add(self.model.get_submodule(name))

    def look_into_parts(self, module: nn.Module) -> None:
        """Trace a module, and first all with layers inside it: what cannot be traced there is a call to the others."""
        for part in [*module.modules()][::-1]:
            if part in self._with_layers and part not in self._looked:
                self._looked.add(part)
                self._look_into(part)

    def blind_spot(self, module: nn.Module) -> str:
        """Which module around this one could not be traced, and why."""
        name = self.names[module][0]
        if hooks_of(module) and module is not self.model:
            return f"{name} has hooks, which see its output"
        while name:
            name = name.rpartition(".")[0]
            around = self.model.get_submodule(name)
            why = self.opaque.get(around) or self._blind.get(around)
            if why is not None:
                return f"{name or 'the model'} cannot be traced: {why}"
        return "no forward that could be traced calls it"

    def _look_into(self, module: nn.Module) -> None:
        if not _is_container(module) or type(module).forward is nn.Module.forward:
            return
        if "forward" in vars(module):
            self.opaque[module] = NO_FORWARD
            return
        if not _takes_fixed_arguments(module):  # its callers decide on them, and it is looked into from there
            self._blind[module] = "it takes optional arguments"
            return
        for leaf in self._leaves():
            try:
                copies = None if module in self._stale else self._copies
                self._known[module] = trace(module, leaf, self._modes, copies=copies), leaf
            except UntraceableError as error:
                self.opaque[module] = str(error)
            else:
                self.opaque.pop(module, None)
                self._stale.discard(module)
                return

    def _leaves(self) -> list[Leaf]:
        """What to look into: as much as possible; if that fails, only parts with layers; or nothing."""

        def closed(part: nn.Module) -> bool:
            return not _is_container(part) or part in self.opaque or hooks_of(part) or "forward" in vars(part)

        leaves: list[Leaf] = [closed, lambda part: closed(part) or part not in self._with_layers, lambda part: True]
        return [self._harmless(leaf) for leaf in leaves]

    def _harmless(self, leaf: Leaf) -> Leaf:
        """Refuse a graph that would not see what a call of a part does to a list or dict."""

        def checked(part: nn.Module) -> bool:
            found = leaf(part)
            if found and self.calls is not None and part in self.calls.writing:
                raise UntraceableError(f"{self.names[part][0]}, which cannot be traced, writes into what it is given")
            return found

        return checked

    def _called(self) -> set[nn.Module]:
        """Modules whose forward runs: a part of another one may also be used for its parts or its other methods."""
        called = {self.model}
        for module in self.outwards[::-1]:
            if module in called and module in self:
                paths = {path for node in self._known[module][0].nodes for path in paths_of(node)}
                called |= {module.get_submodule(path) for path in paths}
            elif module in called:  # nothing is known; but who writes a forward lets it be called
                called |= {part for part in module.children() if not isinstance(part, nn.Sequential)}
        return called


def paths_of(node: fx.Node) -> list[str]:
    """The names of the submodules within which a node was recorded, from the outermost inwards."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return [path for path, _ in stack.values() if path]


def _is_container(module: nn.Module) -> bool:
    """Whether a module is not a building block of torch.nn, and so may be looked into."""
    return isinstance(module, nn.Sequential) or not (
        type(module).__module__.startswith(("torch.nn", "torch.ao.nn", "torch.jit"))
        or is_batch_norm(module)
        or is_linear_map(module)
    )


def _takes_fixed_arguments(module: nn.Module) -> bool:
    """Whether every call has the same arguments; optional ones are cases, of which a graph knows one."""
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return all(p.kind in fixed and p.default is inspect.Parameter.empty for p in parameters)


class _Copies:
    """Copies of a model's modules to try things on: one of the whole model, as long as nothing has gone wrong in it."""

    def __init__(self, model: nn.Module) -> None:
        self._spoilt: set[nn.Module] = set()
        try:
            _, self._parts = copy_sharing_parameters(model)
        except Exception:  # some part does not copy
            self._parts = {}
        self._twins = {part: twin for twin, part in self._parts.items()}

    def of(self, module: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
        """A module's copy, and for each of its parts the original."""
        if module in self._twins and self._spoilt.isdisjoint(module.modules()):
            return self._twins[module], self._parts
        return copy_sharing_parameters(module)

    def spoil(self, module: nn.Module) -> None:
        """Do not use this copy again: a forward may have written into it."""
        self._spoilt.update(module.modules())
