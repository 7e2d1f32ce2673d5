"""What a batch normalization layer of another make computes, read from its own forward rather than from its name.

The forward is traced, so that nothing in it can depend on the values or the size of an input, and run on numbers: the
value that equals the normalized input shows where normalization ends, and what stands behind it is compared with the
activations that are known here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm.activations import Activation, module_of
from batchnorm.surgery.inspect.elementwise import is_identity, recognized
from batchnorm.surgery.inspect.find import hooks_of, is_known, kind_of
from batchnorm.surgery.inspect.paths import name_of
from batchnorm.surgery.inspect.trial import aside, close, mentions_processes, once, twin_of
from batchnorm.surgery.report import summary

__all__ = ["Reading", "following", "inputs_for", "read"]

_STANDARD = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_NEEDED = ("eps", "running_mean", "running_var", "weight", "bias")
_TOLERANCE = 1e-9
_seen: dict[Any, Reading | str] = {}


@dataclass(frozen=True)
class Reading:
    """What a layer computes.

    Attributes:
        activation: behind normalization; None if there is none.
        parts: the names of those of its own submodules that are called behind normalization, in order.
        left: of these, what evaluation applies if it is none of the activations that are known here.
        unfit: why training is not what a layer of ours with that activation does; None if it is.
        held: whether training, too, normalizes with the running statistics.
    """

    activation: Activation | None = None
    parts: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    unfit: str | None = None
    held: bool = False


class _UnreadableError(Exception):
    """The message says why."""


def read(layer: nn.Module) -> Reading | str:
    """Find out what a layer computes in evaluation, and whether training is batch normalization.

    Args:
        layer: any batch normalization layer but ours and torch.nn's own; it is left as it was.

    Returns:
        The reading; or why evaluation is not known to be weight · (x - running_mean) / √(running_var + eps) + bias with
        something behind it.
    """
    if any(hooks_of(part) for part in layer.modules() if part is not layer):
        return "a part of it has hooks"
    return once(layer, _seen, _read)


def following(layer: Any) -> nn.Module | None:
    """What a layer applies behind normalization in evaluation, whatever its make; None if it is nothing."""
    kind = kind_of(layer)
    found = Reading(getattr(layer, "activation", None)) if is_known(kind) else read(layer)
    if isinstance(found, str):
        raise ValueError(f"it is not known what {kind.__name__} computes: {found}")
    if found.activation is not None:
        return module_of(found.activation)
    parts = [layer.get_submodule(name) for name in found.left]
    return nn.Sequential(*parts) if len(parts) > 1 else parts[0] if parts else None


def inputs_for(layer: Any) -> Iterator[Tensor]:
    """Random inputs of the numbers of dimensions that a layer takes, in float64: of a 4-dimensional one if in doubt."""
    generator = torch.Generator().manual_seed(1)
    channels = (layer.running_mean if layer.running_mean is not None else layer.weight).numel()
    length = 5 if channels != 5 else 7  # so that dimensions cannot be mistaken for each other
    spaces: list[tuple[int, ...]] = [(length, length + 1)]
    if isinstance(layer, nn.BatchNorm1d):
        spaces = [(), (length,)]
    elif isinstance(layer, nn.BatchNorm3d):
        spaces = [(length, 2, 3)]
    for space in spaces:
        yield torch.randn(4, channels, *space, generator=generator, dtype=torch.float64, device="cpu") * 2 + 0.5


def _read(layer: nn.Module) -> Reading | str:
    try:
        with aside():
            return _Reader(layer).reading()
    except _UnreadableError as error:
        return str(error)
    except Exception as error:  # whatever a forward does on trial
        return f"its forward fails on trial: {summary(error)}"


class _Reader:
    def __init__(self, layer: Any) -> None:
        missing = [name for name in _NEEDED if not hasattr(layer, name)]
        if missing:
            raise _UnreadableError(f"it has no {' and no '.join(missing)}")
        self._layer, self._held = layer, False
        tensors = {n for n, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None}
        if tensors - _STANDARD:
            raise _UnreadableError(f"it has tensors of its own: {', '.join(sorted(tensors - _STANDARD))}")
        if not _takes_input_alone(layer):
            raise _UnreadableError("it takes more than its input")

    def reading(self) -> Reading:
        evaluated = [self._behind(x, training=False) for x in inputs_for(self._layer)]
        if len(set(evaluated)) > 1:
            raise _UnreadableError("it does something else for other numbers of dimensions")
        activation, parts, left = evaluated[0]
        return Reading(activation, parts, left, self._unfit(activation, left), self._held)

    def _unfit(self, activation: Activation | None, left: tuple[str, ...]) -> str | None:
        """Why training is not batch normalization with that activation."""
        try:
            trained = [self._behind(x, training=True) for x in inputs_for(self._layer)]
        except _UnreadableError as error:
            return f"in training {error}"
        if mentions_processes(type(self._layer)):
            return "its forward may ask for other processes (torch.distributed)"
        for name in (*left, *(name for behind in trained for name in behind[2])):
            return f"it applies {type(self._layer.get_submodule(name)).__name__}, which no layer of ours does"
        if any(behind[0] != activation for behind in trained):
            return "training applies another activation than evaluation"
        return None

    def _behind(self, x: Tensor, training: bool) -> tuple[Activation | None, tuple[str, ...], tuple[str, ...]]:
        """What is applied behind normalization: an activation, or else parts of the layer; and all parts called."""
        twin = twin_of(self._layer)
        for part in twin.modules():
            part.training = training
        with torch.set_grad_enabled(training):
            graph = _traced(twin, x)
        end, self._held = _where(twin, graph, x, training)
        if self._held:
            raise _UnreadableError("it normalizes with its running statistics, as in evaluation")
        tail = _tail(graph, end)
        run = fx.Interpreter(twin, graph=tail).run
        parts = tuple(str(node.target) for node in tail.nodes if node.op == "call_module")
        learns = any(True for name in parts for _ in twin.get_submodule(name).parameters())
        if is_identity(run):
            return None, parts, ()
        found = None if learns else recognized(run)
        if found is not None:
            return found, parts, ()
        functions = [node for node in tail.nodes if node.op not in ("placeholder", "call_module", "output")]
        if functions:
            raise _UnreadableError(f"it computes {name_of(functions[0])} behind normalization")
        return None, parts, tuple(name for name in parts if type(twin.get_submodule(name)) is not nn.Identity)


def _takes_input_alone(layer: nn.Module) -> bool:
    parameters = list(inspect.signature(layer.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 1 and parameters[0].kind in positional


def _normalized(twin: Any, x: Tensor, training: bool) -> Tensor:
    """What batch normalization gives, with the batch in training and the running statistics otherwise."""
    mean, var = twin.running_mean, twin.running_var
    if training or mean is None:
        return F.batch_norm(x, None, None, twin.weight, twin.bias, True, 0.0, twin.eps).detach()
    return F.batch_norm(x, mean, var, twin.weight, twin.bias, False, 0.0, twin.eps).detach()


# --- tracing ---


class _Input(fx.Proxy):
    """The input while a layer is traced: what is the same for all inputs of a layer is known, their values are not."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, example: Tensor) -> None:
        super().__init__(node, tracer)
        self._example: Any = example

    def dim(self) -> Any:
        return self._example.dim()

    def size(self, dim: int | None = None) -> Any:
        if dim == 1:
            return self._example.size(1)
        return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled()


def _known(name: str) -> property:
    return property(lambda self: getattr(self._example, name))


for _name in ("ndim", "dtype", "device", "is_cuda", "layout"):
    setattr(_Input, _name, _known(_name))


class _Tracer(fx.Tracer):
    """Records every submodule as a call, and reads of the layer's own tensors."""

    proxy_buffer_attributes = True

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self._example = example

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor) and not attr_val.is_floating_point():  # a counter, of which floats are made
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self, self._example) if node.op == "placeholder" else super().proxy(node)


def _traced(twin: nn.Module, x: Tensor) -> fx.Graph:
    before = dict(vars(twin))
    try:
        graph = _Tracer(x).trace(twin)
    except Exception as error:
        raise _UnreadableError(f"its forward cannot be traced: {summary(error)}") from error
    after = vars(twin)
    if after.keys() != before.keys() or any(after[name] is not value for name, value in before.items()):
        raise _UnreadableError("its forward sets attributes")
    return graph


class _Search(fx.Interpreter):
    """Runs a graph and notes which node has a given value first."""

    def __init__(self, module: nn.Module, graph: fx.Graph, wanted: Tensor) -> None:
        super().__init__(module, graph=graph)
        self._wanted = wanted
        self.found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.found is None and isinstance(value, Tensor):
            self.found = n if close(value, self._wanted, _TOLERANCE) else None
        return value


def _where(twin: Any, graph: fx.Graph, x: Tensor, training: bool) -> tuple[fx.Node, bool]:
    """The node whose value is the normalized input; whether it is by the running statistics though in training."""
    for batch in (True, False) if training else (False,):
        search = _Search(twin, graph, _normalized(twin, x, batch))
        search.run(x.clone())
        if search.found is not None:
            return search.found, training and not batch
    raise _UnreadableError("its forward computes something else than batch normalization")


def _tail(graph: fx.Graph, start: fx.Node) -> fx.Graph:
    """What the graph does with one node's value."""
    output = next(node for node in graph.nodes if node.op == "output")
    needed, open_ends = {start}, [output]
    while open_ends:
        node = open_ends.pop()
        if node not in needed:
            needed.add(node)
            open_ends += node.all_input_nodes
            if node.op in ("placeholder", "get_attr"):
                raise _UnreadableError(f"it computes with {node.target} behind normalization")
    made = fx.Graph()
    copies = {start: made.placeholder("normalized")}
    if not isinstance(output.args[0], fx.Node):
        raise _UnreadableError("it gives more than a tensor")
    for node in graph.nodes:
        if node in needed and node is not start:
            copies[node] = made.node_copy(node, lambda n: copies[n])
    return made
