"""Batch normalization folded into what is before it in a graph, which torch.export or torch.fx has made."""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from batchnorm.activations import module_of
from batchnorm.surgery.find import OURS, TORCHS, hooks_of, is_batch_norm, is_frozen
from batchnorm.surgery.line import TRANSPOSED, along_outputs, line

__all__ = ["fold_graph"]

_aten: Any = torch.ops.aten
_FIRST = ("input", "weight", "bias")
_NORM = (*_FIRST, "running_mean", "running_var", "training", "momentum", "eps")
_EVALUATION = tuple(name for name in _NORM if name != "training")
# Batch normalization as a function, and its arguments in order.
_NORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _NORM,
    _aten.batch_norm.default: _NORM,
    _aten.native_batch_norm.default: _NORM,
    _aten._native_batch_norm_legit.default: _NORM,
    _aten._native_batch_norm_legit.no_stats: (*_FIRST, "training", "momentum", "eps"),
    _aten._native_batch_norm_legit_functional.default: _NORM,
    _aten._native_batch_norm_legit_no_training.default: _EVALUATION,
    _aten._batch_norm_no_update.default: _EVALUATION,
}
_CONV = (*_FIRST, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_FIRST, "stride", "padding", "output_padding", "groups", "dilation")
_GENERAL = (*_FIRST, "stride", "padding", "dilation", "transposed", "output_padding", "groups")
# What may come before as a function, and its arguments in order.
_SOURCES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    **{op: _CONV for conv in (_aten.conv1d, _aten.conv2d, _aten.conv3d) for op in (conv.default, conv.padding)},
    _aten.conv_transpose1d.default: _TRANSPOSED,
    _aten.conv_transpose2d.input: _TRANSPOSED,
    _aten.conv_transpose3d.input: _TRANSPOSED,
    _aten.convolution.default: _GENERAL,
    torch.convolution: _GENERAL,
    F.linear: _FIRST,
    _aten.linear.default: _FIRST,
    # What torch.export's decompositions make of a linear layer; the weight is transposed before.
    _aten.addmm.default: ("bias", "input", "weight"),
    _aten.mm.default: ("input", "weight"),
}
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_PRODUCTS = (_aten.addmm.default, _aten.mm.default)


class _RefusalError(Exception):
    """Why a layer cannot be folded."""


class _Slot(NamedTuple):
    """Where a tensor lives: a module, and the name of its parameter or buffer; `node` reads it in the graph."""

    owner: nn.Module
    name: str
    path: str
    node: fx.Node | None = None

    @property
    def value(self) -> Tensor:
        found: Tensor = getattr(self.owner, self.name)
        return found

    def put(self, value: Tensor) -> None:
        """Put another tensor there: the one that was there may belong to somebody else, too."""
        if self.name in self.owner._buffers:
            self.owner._buffers[self.name] = value
        else:
            now = getattr(self.owner, self.name, None)
            learns = True if now is None else now.requires_grad
            setattr(self.owner, self.name, nn.Parameter(value, requires_grad=learns))


class _Norm(NamedTuple):
    """A batch normalization of the graph, whichever way it is written."""

    node: fx.Node
    name: str
    given: Any
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Any = None
    layer: Any = None


class _Source(NamedTuple):
    """A convolution or linear layer of the graph, whichever way it is written."""

    node: fx.Node
    name: str
    weight: _Slot
    bias: _Slot | None
    transposed: bool
    groups: int

    def reader(self, slot: _Slot) -> Any:
        """Which node reads one of its tensors: itself, or what transposes the weight for a product."""
        return self.node.args[-1] if slot is self.weight and self.node.target in _PRODUCTS else self.node


def fold_graph(model: ExportedProgram | fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str], dict[str, str]]:
    """Fold every batch normalization that follows a convolution or a linear layer into its weight and bias.

    With the running statistics normalization is ``scale · x + shift`` for each channel, and so is what a convolution of
    scaled weights gives. Scale and shift are computed in float64, and every folded tensor is rounded once.

    Layers may be modules or functions (``F.batch_norm`` with ``get_attr`` operands), a program may have been through
    ``run_decompositions``. An activation or a residual of our layers stays behind as an operation of its own.
    A linear layer's result is taken to be ``(N, C)``, and a convolution's to have its weight's dimensions, unless the
    graph says what they are.

    Args:
        model: a program that torch.export has made of a model in evaluation mode, or what ``torch.fx.symbolic_trace``
            gives. It is left as it was.

    Returns:
        The folded graph as a module; what was folded into what; and what was left, with the reason. A layer is named
        by its path in the model, or by its node where the graph does not say. The module made of a program
        shares the tensors that were not folded with it, as ``program.module()`` does.

    Raises:
        TypeError: for anything else.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.

    Example:
        >>> program = torch.export.export(model.eval(), (x,))
        >>> folded, done, left = fold_graph(program)
        >>> torch.onnx.export(folded, (x,), "model.onnx", dynamo=True)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's about its own trees, which are copied
        if isinstance(model, ExportedProgram):
            module: Any = model.module()
        elif isinstance(model, fx.GraphModule):
            module = copy.deepcopy(model)
        else:
            raise TypeError(
                f"cannot fold a {type(model).__name__} as a graph: give an ExportedProgram or a torch.fx.GraphModule"
            )
    folding = _Folding(module)
    for node in list(module.graph.nodes):
        folding.look_at(node)
    folding.sweep()
    module.graph.lint()
    module.recompile()
    return module, folding.folded, folding.skipped


class _Folding:
    def __init__(self, module: fx.GraphModule) -> None:
        self.folded: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._module, self._graph = module, module.graph
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._readers = self._find_readers()
        self._emptied: set[str] = set()

    def look_at(self, node: fx.Node) -> None:
        """Fold the node into what is before it if it is batch normalization and can be."""
        if not self._is_norm(node):
            return
        name = self._name(node)
        try:
            norm = self._norm_module(node, name) if node.op == "call_module" else self._norm_function(node, name)
            source = self._source(norm)
        except _RefusalError as refusal:
            self.skipped[name] = str(refusal)
            return
        self._fold(norm, source)
        self.folded[name] = f"into {source.name}"

    def sweep(self) -> None:
        """Remove the tensors of folded layers that nothing reads any more."""
        unread = [node for node in self._graph.nodes if node.op == "get_attr" and not node.users]
        for node in unread:
            if str(node.target).rpartition(".")[0] in self._emptied:
                self._graph.erase_node(node)
                slot = self._slot(node)
                if all(str(other.target) != slot.path for other in self._graph.nodes if other.op == "get_attr"):
                    delattr(slot.owner, slot.name)

    # --- what the graph says ---

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            layer = self._modules.get(str(node.target))
            return layer is not None and is_batch_norm(layer)
        return node.op == "call_function" and node.target in _NORMS

    def _name(self, node: fx.Node) -> str:
        """The layer's path in the model if the graph knows it; a second call of a layer is told by its node."""
        name = ""
        if node.op == "call_module":
            name = str(node.target)
        else:
            mean = _bound(node, _NORMS[node.target]).get("running_mean")
            path, _, last = str(mean.target).rpartition(".") if _is_read(mean) else ("", "", "")
            stack = list(node.meta.get("nn_module_stack", {}).values())
            if last == "running_mean":
                name = path
            elif stack and "BatchNorm" in str(stack[-1][1]):
                name = stack[-1][0]
        name = name or node.name
        return name if name not in self.folded and name not in self.skipped else f"{name} ({node.name})"

    def _find_readers(self) -> dict[int, set[fx.Node]]:
        """Which nodes read a tensor, by where it is in memory: it may have several names, or be part of another."""
        readers: dict[int, set[fx.Node]] = {}
        for node in self._graph.nodes:
            if _is_read(node):
                value = getattr(*self._place(str(node.target)), None)
                if isinstance(value, Tensor):
                    readers.setdefault(_memory(value), set()).update(node.users)
            elif node.op == "call_module":
                part = self._modules[str(node.target)]
                for t in (*part.parameters(), *part.buffers()):
                    readers.setdefault(_memory(t), set()).add(node)
        return readers

    def _place(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        return self._module.get_submodule(owner), name

    def _slot(self, node: fx.Node) -> _Slot:
        return _Slot(*self._place(str(node.target)), str(node.target), node)

    # --- batch normalization ---

    def _norm_function(self, node: fx.Node, name: str) -> _Norm:
        given = _bound(node, _NORMS[node.target])
        if given.get("running_mean") is None or given.get("running_var") is None:
            raise _RefusalError("it has no running statistics: it normalizes with the batch's in evaluation, too")
        if given.get("training", False) is not False:
            raise _RefusalError(
                "it normalizes with the batch's statistics: trace or export the model in evaluation mode"
            )
        tensors = {what: self._constant(given.get(what), what) for what in _NORM[1:5]}
        if any(_bound_index(user) != 0 for user in node.users) and _several(node):
            raise _RefusalError("other results of it than the normalized tensor are used")
        return _Norm(
            node, name, given["input"], tensors["running_mean"], tensors["running_var"], tensors["weight"],
            tensors["bias"], given.get("eps", 1e-5),
        )  # fmt: skip

    def _constant(self, read: Any, what: str) -> Any:
        """A tensor that batch normalization is given, and that nothing in the graph can change."""
        if read is None:
            return None
        if not _is_read(read):
            raise _RefusalError(f"its {what} is computed, or an input")
        value = self._slot(read).value
        for reader in self._readers[_memory(value)]:
            if not self._is_norm(reader) and reader.target not in _SOURCES:
                raise _RefusalError(f"{reader.name} uses its {what}, too, and may change it")
        return value

    def _norm_module(self, node: fx.Node, name: str) -> _Norm:
        layer: Any = self._modules[str(node.target)]
        kind = layer._frozen.kind if is_frozen(layer) else type(layer)
        if kind not in {*OURS, *TORCHS, nn.SyncBatchNorm}:
            raise _RefusalError(f"{kind.__name__} may compute something else than batch normalization")
        if layer.training:
            raise _RefusalError("it is in training mode: call eval() before tracing")
        if layer.running_mean is None or layer.running_var is None:
            raise _RefusalError("it has no running statistics: it normalizes with the batch's in evaluation, too")
        if "forward" in vars(layer) or hooks_of(layer):
            raise _RefusalError("its forward has been replaced, or it has hooks")
        calls = [n for n in self._graph.nodes if n.op == "call_module" and self._modules[str(n.target)] is layer]
        if len(calls) > 1:
            raise _RefusalError("it is called several times")
        given = _bound(node, ("input", "residual", "mask"))
        if given.get("mask") is not None:
            raise _RefusalError("it is called with a mask")
        for t in (*layer.parameters(), *layer.buffers()):
            if self._readers[_memory(t)] != {node}:
                raise _RefusalError(
                    "something else in the graph uses its parameters or statistics, and may change them"
                )
        return _Norm(
            node, name, given["input"], layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps,
            given.get("residual"), layer,
        )  # fmt: skip

    # --- what is before it ---

    def _source(self, norm: _Norm) -> _Source:
        node = norm.given
        part = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if type(part) in _KINDS:
            source = self._source_module(node, part)
        elif node.op == "call_function" and node.target in _SOURCES:
            source = self._source_function(node)
        else:
            what = type(part).__name__ if part is not None else getattr(node.target, "__name__", node.target)
            raise _RefusalError(f"it follows {what}, not a convolution or linear layer")
        if set(node.users) != {norm.node}:
            raise _RefusalError(f"others read what {source.name} gives, too")
        self._check_alone(source)
        weight, channels = source.weight.value, norm.mean.numel()
        outputs = weight.shape[1] * source.groups if source.transposed else weight.shape[0]
        if outputs != channels:
            raise _RefusalError(f"{source.name} has {outputs} channels, not {channels}")
        form = node.meta.get("val", node.meta.get("tensor_meta"))
        if form is not None and hasattr(form, "shape") and len(form.shape) != weight.dim():
            raise _RefusalError(f"{source.name} gives {tuple(form.shape)}, whose channels are not in dimension 1")
        return source

    def _check_alone(self, source: _Source) -> None:
        """Refuse tensors that somebody else reads, and so would find changed."""
        for slot in (source.weight, source.bias):
            if slot is None:
                continue
            if self._readers[_memory(slot.value)] != {source.reader(slot)}:
                raise _RefusalError(f"{slot.path} is used elsewhere, too")

    def _source_module(self, node: fx.Node, part: Any) -> _Source:
        name = str(node.target)
        if "forward" in vars(part) or hooks_of(part):
            raise _RefusalError(f"the forward of {name} has been replaced, or it has hooks")
        slots = [None if getattr(part, t) is None else _Slot(part, t, f"{name}.{t}") for t in ("weight", "bias")]
        assert slots[0] is not None
        return _Source(node, name, slots[0], slots[1], isinstance(part, TRANSPOSED), getattr(part, "groups", 1))

    def _source_function(self, node: fx.Node) -> _Source:
        given = _bound(node, _SOURCES[node.target])
        weight = given["weight"]
        if node.target in _PRODUCTS:
            if given.keys() - {"input", "weight", "bias"} or not _transposes(weight) or len(weight.users) > 1:
                raise _RefusalError(f"it follows {node.target}, which is not the product of a linear layer")
            weight = weight.args[0]
        bias = given.get("bias")
        if not _is_read(weight) or not (bias is None or _is_read(bias)):
            raise _RefusalError(f"the weight or bias of {node.name} is computed, or an input")
        slot = self._slot(weight)
        transposed = _SOURCES[node.target] is _TRANSPOSED or given.get("transposed", False)
        name = slot.path.removesuffix(".weight")
        return _Source(node, name, slot, None if bias is None else self._slot(bias), transposed, given.get("groups", 1))

    # --- the change ---

    def _fold(self, norm: _Norm, source: _Source) -> None:
        weight = source.weight.value.detach()
        scale, shift = line(norm.mean, norm.var, norm.weight, norm.bias, norm.eps, norm.mean.numel())
        scaled = along_outputs(weight, scale, source.groups, source.transposed)
        bias = shift if source.bias is None else source.bias.value.detach().cpu().double() * scale + shift
        self._put(source, source.weight, scaled.to(weight))
        if source.bias is None:
            self._add_bias(source, bias.to(weight))
        else:
            self._put(source, source.bias, bias.to(source.bias.value))
        if norm.layer is None:
            for what in ("running_mean", "running_var", "weight", "bias"):
                read = _bound(norm.node, _NORMS[norm.node.target]).get(what)
                if read is not None:
                    self._emptied.add(str(read.target).rpartition(".")[0])
        self._replace(norm, source.node)

    def _put(self, source: _Source, slot: _Slot, value: Tensor) -> None:
        slot.put(value)
        self._readers[_memory(value)] = {source.reader(slot)}  # another layer may follow

    def _add_bias(self, source: _Source, bias: Tensor) -> None:
        owner, node = source.weight.owner, source.node
        self._readers[_memory(bias)] = {node}
        if node.op == "call_module":
            _Slot(owner, "bias", "").put(bias)
            return
        prefix = source.weight.path.rpartition(".")[0]
        name = "bias" if source.weight.name == "weight" else f"{source.weight.name}_bias"
        while getattr(owner, name, None) is not None:
            name += "_"
        vars(owner).pop(name, None)
        owner._parameters[name] = nn.Parameter(bias, requires_grad=source.weight.value.requires_grad)
        with self._graph.inserting_before(node):
            read = self._graph.get_attr(f"{prefix}.{name}" if prefix else name)
        if node.target is _aten.mm.default:
            node.target, node.args = _aten.addmm.default, (read, *node.args)
        elif len(node.args) > 2:
            node.update_arg(2, read)
        else:
            node.update_kwarg("bias", read)

    def _replace(self, norm: _Norm, result: fx.Node) -> None:
        """Let the convolution's result go where the normalized tensor went."""
        node, layer = norm.node, norm.layer
        outputs = [user for user in node.users if user.target is operator.getitem] if _several(node) else [node]
        with self._graph.inserting_before(node):
            if norm.residual is not None:
                result = self._graph.call_function(operator.add, (result, norm.residual))
            activation = getattr(layer, "activation", None)
            if activation is not None:
                self._module.set_submodule(str(node.target), module_of(activation))
                result = self._graph.call_module(str(node.target), (result,))
        for output in outputs:
            output.replace_all_uses_with(result)
            self._graph.erase_node(output)
        if _several(node):
            self._graph.erase_node(node)
        if layer is not None and activation is None:
            self._module.delete_submodule(str(node.target))


def _is_read(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _bound(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _several(node: fx.Node) -> bool:
    """Whether a batch normalization gives more than one tensor."""
    return isinstance(node.target, torch._ops.OpOverload) and len(node.target._schema.returns) > 1


def _bound_index(user: fx.Node) -> Any:
    return user.args[1] if user.target is operator.getitem else None


def _transposes(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is _aten.t.default:
        return True
    return node.target is _aten.permute.default and list(node.args[1]) == [1, 0]
