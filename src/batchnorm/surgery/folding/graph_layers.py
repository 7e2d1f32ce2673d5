"""What batch normalization and the layers before it look like in a graph: modules, functions, ATen's operators."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm.surgery.inspect.affine import LINEAR_MAPS, TRANSPOSED
from batchnorm.surgery.inspect.find import (
    NO_STATISTICS,
    hooks_of,
    is_batch_norm,
    is_known,
    kind_of,
)
from batchnorm.surgery.inspect.ranks import rank_of

__all__ = ["GraphLayers", "NormCall", "RefusalError", "Slot", "SourceCall", "aten", "gives_several"]

aten: Any = torch.ops.aten
_FIRST = ("input", "weight", "bias")
_NORM = (*_FIRST, "running_mean", "running_var", "training", "momentum", "eps")
_EVALUATION = tuple(name for name in _NORM if name != "training")
# Batch normalization as a function, and its arguments in order.
NORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _NORM,
    aten.batch_norm.default: _NORM,
    aten.native_batch_norm.default: _NORM,
    aten._native_batch_norm_legit.default: _NORM,
    aten._native_batch_norm_legit.no_stats: (*_FIRST, "training", "momentum", "eps"),
    aten._native_batch_norm_legit_functional.default: _NORM,
    aten._native_batch_norm_legit_no_training.default: _EVALUATION,
    aten._batch_norm_no_update.default: _EVALUATION,
}
_CONV = (*_FIRST, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_FIRST, "stride", "padding", "output_padding", "groups", "dilation")
_GENERAL = (*_FIRST, "stride", "padding", "dilation", "transposed", "output_padding", "groups")
# What may come before as a function, and its arguments in order.
_SOURCES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    **{op: _CONV for conv in (aten.conv1d, aten.conv2d, aten.conv3d) for op in (conv.default, conv.padding)},
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
    aten.convolution.default: _GENERAL,
    torch.convolution: _GENERAL,
    F.linear: _FIRST,
    aten.linear.default: _FIRST,
    # What torch.export's decompositions make of a linear layer; the weight is transposed before.
    aten.addmm.default: ("bias", "input", "weight"),
    aten.mm.default: ("input", "weight"),
}
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints)
PRODUCTS = (aten.addmm.default, aten.mm.default)


class RefusalError(Exception):
    """Why a layer cannot be folded."""


class Slot(NamedTuple):
    """Where a tensor lives: a module, the name of its parameter or buffer there, and its path in the model."""

    owner: nn.Module
    name: str
    path: str

    @property
    def value(self) -> Tensor:
        found: Tensor = getattr(self.owner, self.name)
        return found

    def put(self, value: Tensor) -> None:
        """Put another tensor there: the one that was there may belong to somebody else, too."""
        if self.name in self.owner._buffers:
            self.owner._buffers[self.name] = value
        else:
            setattr(self.owner, self.name, nn.Parameter(value, requires_grad=self.value.requires_grad))


class NormCall(NamedTuple):
    """A batch normalization of the graph, whichever way it is written.

    Attributes:
        node: its call, and `input` the node that it normalizes.
        reads: the nodes that read its tensors, of a function.
        residual, layer: what it adds, and the layer itself, of a module.
    """

    node: fx.Node
    input: fx.Node
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    reads: tuple[fx.Node, ...] = ()
    residual: fx.Node | None = None
    layer: Any = None


class SourceCall(NamedTuple):
    """A convolution or linear layer of the graph, whichever way it is written."""

    node: fx.Node
    name: str
    weight: Slot
    bias: Slot | None
    transposed: bool
    groups: int

    def reader(self, slot: Slot) -> Any:
        """Which node reads one of its tensors: itself, or what transposes the weight for a product."""
        return self.node.args[-1] if slot is self.weight and self.node.target in PRODUCTS else self.node


class GraphLayers:
    """The layers of a graph module, and who reads their tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module, self._graph = module, module.graph
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._readers = self._find_readers()

    def is_norm(self, node: fx.Node) -> bool:
        """Whether a node is batch normalization of any make."""
        if node.op == "call_module":
            layer = self._modules.get(str(node.target))
            return layer is not None and is_batch_norm(layer)
        return node.op == "call_function" and node.target in NORMS

    def name_of(self, node: fx.Node) -> str:
        """The path of a batch normalization in the model, or its node's name where the graph does not know it."""
        if node.op == "call_module":
            return str(node.target)
        mean: Any = bound(node, NORMS[node.target]).get("running_mean")
        path, _, last = str(mean.target).rpartition(".") if is_read(mean) else ("", "", "")
        if last == "running_mean" and path:
            return path
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return stack[-1][0] if stack and "BatchNorm" in str(stack[-1][1]) else node.name

    def unseen(self) -> Iterator[str]:
        """The batch normalization that no node is, but that is in what a node calls: by its path in the model."""
        for name, part in self._modules.items():
            called = any(node.op == "call_module" and str(node.target) == name for node in self._graph.nodes)
            if is_batch_norm(part) and not called:
                yield name
            if isinstance(part, fx.GraphModule) and part is not self._module:
                functions = (node for node in part.graph.nodes if node.op == "call_function" and node.target in NORMS)
                yield from (f"{name}.{node.name}" for node in functions)

    def norm_of(self, node: fx.Node) -> NormCall:
        """Give what a batch normalization computes with, or refuse."""
        return self._norm_module(node) if node.op == "call_module" else self._norm_function(node)

    def slot(self, node: fx.Node) -> Slot:
        """Where a tensor lives that a node reads."""
        return Slot(*self._place(str(node.target)), str(node.target))

    def note(self, value: Tensor, reader: fx.Node) -> None:
        """Note who reads a new tensor."""
        self._readers[memory(value)] = {reader}

    def _find_readers(self) -> dict[int, set[fx.Node]]:
        """Which nodes read a tensor, by where it is in memory: it may have several names, or be part of another."""
        readers: dict[int, set[fx.Node]] = {}
        for node in self._graph.nodes:
            if is_read(node):
                value = getattr(*self._place(str(node.target)), None)
                if isinstance(value, Tensor):
                    readers.setdefault(memory(value), set()).update(node.users)
            elif node.op == "call_module":
                part = self._modules[str(node.target)]
                for t in (*part.parameters(), *part.buffers()):
                    readers.setdefault(memory(t), set()).add(node)
        return readers

    def _place(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        return self._module.get_submodule(owner), name

    # --- batch normalization ---

    def _norm_function(self, node: fx.Node) -> NormCall:
        given = bound(node, NORMS[node.target])
        if given.get("running_mean") is None or given.get("running_var") is None:
            raise RefusalError(NO_STATISTICS)
        if given.get("training", False) is not False:
            raise RefusalError(
                "it normalizes with the batch's statistics: trace or export the model in evaluation mode"
            )
        tensors = {what: self._constant(given.get(what), what) for what in _NORM[1:5]}
        if gives_several(node) and not all(_is_first(user) for user in node.users):
            raise RefusalError("other results of it than the normalized tensor are used")
        reads = tuple(given[what] for what, tensor in tensors.items() if tensor is not None)
        return NormCall(
            node, given["input"], tensors["running_mean"], tensors["running_var"], tensors["weight"], tensors["bias"],
            given.get("eps", 1e-5), reads,
        )  # fmt: skip

    def _constant(self, read: Any, what: str) -> Any:
        """A tensor that batch normalization is given, and that nothing in the graph can change."""
        if read is None:
            return None
        if not is_read(read):
            raise RefusalError(f"its {what} is computed, or an input")
        value = self.slot(read).value
        for reader in self._readers[memory(value)]:
            if not self.is_norm(reader) and reader.target not in _SOURCES:
                raise RefusalError(f"{reader.name} uses its {what}, too, and may change it")
        return value

    def _norm_module(self, node: fx.Node) -> NormCall:
        layer: Any = self._modules[str(node.target)]
        kind = kind_of(layer)
        if not is_known(kind):
            raise RefusalError(f"{kind.__name__} may compute something else than batch normalization")
        if layer.training:
            raise RefusalError("it is in training mode: call eval() before tracing")
        if layer.running_mean is None or layer.running_var is None:
            raise RefusalError(NO_STATISTICS)
        if "forward" in vars(layer) or hooks_of(layer):
            raise RefusalError("its forward has been replaced, or it has hooks")
        calls = [n for n in self._graph.nodes if n.op == "call_module" and self._modules[str(n.target)] is layer]
        if len(calls) > 1:
            raise RefusalError("it is called several times")
        given = bound(node, ("input", "residual", "mask"))
        if given.get("mask") is not None:
            raise RefusalError("it is called with a mask")
        for t in (*layer.parameters(), *layer.buffers()):
            if self._readers[memory(t)] != {node}:
                raise RefusalError("something else in the graph uses its parameters or statistics, and may change them")
        return NormCall(
            node, given["input"], layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps,
            residual=given.get("residual"), layer=layer,
        )  # fmt: skip

    # --- what is before it ---

    def source_of(self, norm: NormCall) -> SourceCall:
        """Give the convolution or linear layer that can take a batch normalization over, or refuse."""
        node, reader = _before_views(norm)
        part = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if type(part) in LINEAR_MAPS:
            source = self._source_module(node, part)
        elif node.op == "call_function" and node.target in _SOURCES:
            source = self._source_function(node)
        else:
            what = type(part).__name__ if part is not None else getattr(node.target, "__name__", node.target)
            raise RefusalError(f"it follows {what}, not a convolution or linear layer")
        if {user for user in node.users if not _asks_for_shape(user, node)} != {reader}:
            raise RefusalError(f"others read what {source.name} gives, too")
        self._check_alone(source)
        weight, channels = source.weight.value, norm.mean.numel()
        outputs = weight.shape[1] * source.groups if source.transposed else weight.shape[0]
        if outputs != channels:
            raise RefusalError(f"{source.name} has {outputs} channels, not {channels}")
        if reader is not norm.node and (source.transposed or weight.dim() != 2):
            raise RefusalError(f"it follows {reader.name}, not a convolution or linear layer")
        shape = _shape(norm.input)
        if shape is not None and len(shape) != weight.dim():
            raise RefusalError(f"{source.name} gives {tuple(shape)}, whose channels are not in dimension 1")
        if shape is None and weight.dim() == 2 and rank_of(self._module, norm.input) != 2:
            raise RefusalError(
                f"{source.name} may give (N, C) or (N, L, C), whose channels are not in dimension 1: example_inputs "
                "would tell"
            )
        return source

    def _check_alone(self, source: SourceCall) -> None:
        """Refuse tensors that somebody else reads, and so would find changed."""
        for slot in (source.weight, source.bias):
            if slot is None:
                continue
            if self._readers[memory(slot.value)] != {source.reader(slot)}:
                raise RefusalError(f"{slot.path} is used elsewhere, too")

    def _source_module(self, node: fx.Node, part: Any) -> SourceCall:
        name = str(node.target)
        if "forward" in vars(part) or hooks_of(part):
            raise RefusalError(f"the forward of {name} has been replaced, or it has hooks")
        slots = [None if getattr(part, t) is None else Slot(part, t, f"{name}.{t}") for t in ("weight", "bias")]
        assert slots[0] is not None
        return SourceCall(node, name, slots[0], slots[1], isinstance(part, TRANSPOSED), getattr(part, "groups", 1))

    def _source_function(self, node: fx.Node) -> SourceCall:
        given = bound(node, _SOURCES[node.target])
        weight = given["weight"]
        if node.target in PRODUCTS:
            if given.keys() - {"input", "weight", "bias"} or not _transposes(weight) or len(weight.users) > 1:
                raise RefusalError(f"it follows {node.target}, which is not the product of a linear layer")
            weight = weight.args[0]
        bias = given.get("bias")
        if not is_read(weight) or not (bias is None or is_read(bias)):
            raise RefusalError(f"the weight or bias of {node.name} is computed, or an input")
        slot = self.slot(weight)
        transposed = _SOURCES[node.target] is _TRANSPOSED or given.get("transposed", False)
        name = slot.path.removesuffix(".weight")
        return SourceCall(
            node, name, slot, None if bias is None else self.slot(bias), transposed, given.get("groups", 1)
        )


def is_read(node: Any) -> bool:
    """Whether a node reads a parameter, a buffer or a constant."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def memory(t: Tensor) -> int:
    """Where a tensor's values are."""
    return t.untyped_storage().data_ptr()


def bound(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name, as far as they are given."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def gives_several(node: fx.Node) -> bool:
    """Whether a batch normalization gives more than one tensor."""
    return isinstance(node.target, torch._ops.OpOverload) and len(node.target._schema.returns) > 1


def _before_views(norm: NormCall) -> tuple[Any, fx.Node]:
    """What is normalized, before it was seen in other shapes of as many features, and who reads it.

    A linear layer's (N, L, C) may be normalized as (N · L, C).
    """
    node, reader = norm.input, norm.node
    while node.target in _VIEWS and set(node.users) == {reader}:
        before: Any = node.args[0]
        shapes = _shape(before), _shape(node)
        if shapes[0] is None or shapes[1] is None or shapes[0][-1:] != shapes[1][-1:]:
            break
        node, reader = before, node
    return node, reader


def _shape(node: fx.Node) -> Any:
    """The shape of a node's value, if the graph knows it."""
    return getattr(node.meta.get("val", node.meta.get("tensor_meta")), "shape", None)


def _asks_for_shape(user: fx.Node, node: fx.Node) -> bool:
    return user.target is aten.reshape_as.default and user.args[0] is not node


def _is_first(user: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[1:] == (0,)


def _transposes(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.t.default:
        return True
    order: Any = node.args[1] if node.target is aten.permute.default else None
    return order is not None and list(order) == [1, 0]
