"""Batch normalization folded into what is before it in a graph, which torch.export or torch.fx has made."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.shape_prop import ShapeProp

from batchnorm.activations import module_of
from batchnorm.epilogue import as_layers
from batchnorm.kernels import using
from batchnorm.surgery.folding.graph_layers import (
    GraphLayers,
    NormCall,
    RefusalError,
    Slot,
    SourceCall,
    aten,
    gives_several,
)
from batchnorm.surgery.inspect.affine import along_outputs, bias_behind, scale_and_shift

__all__ = ["fold_graph", "sized"]


def fold_graph(
    model: ExportedProgram | fx.GraphModule, only: Collection[str] | None = None
) -> tuple[fx.GraphModule, dict[str, str], dict[str, str]]:
    """Fold every batch normalization that follows a convolution or a linear layer into its weight and bias.

    With the running statistics normalization is ``scale · x + shift`` for each channel, and so is what a convolution of
    scaled weights gives. Scale and shift are computed in float64, and every folded tensor is rounded once.

    Layers may be modules or functions (``F.batch_norm`` with ``get_attr`` operands), a program may have been through
    ``run_decompositions``. An activation or a residual of our layers stays behind as an operation of its own.
    A linear layer's result must be ``(N, C)``, by the shapes that the graph knows (see ``sized``) or by what is
    computed. A convolution's is taken to have its weight's dimensions, unless the graph says otherwise.

    Args:
        model: a program that torch.export has made of a model in evaluation mode, or what ``torch.fx.symbolic_trace``
            gives. It is left as it was.
        only: the names of the layers to fold; all that can be by default.

    Returns:
        The folded graph as a module; what was folded into what; and what was skipped, and why. A layer is named
        by its path in the model, or by its node where the graph does not say. The module made of a program
        shares the tensors that were not folded with it, as ``program.module()`` does.

    Raises:
        TypeError: for anything else.

    SourceCall: Jacob et al. 2018, arXiv 1712.05877, section 3.2.

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
    as_layers(module)
    folding = _Folding(module, only)
    folding.skipped.update(dict.fromkeys(folding.layers.unseen(), "it is in a part that the graph does not look into"))
    for node in list(module.graph.nodes):
        folding.look_at(node)
    folding.sweep()
    module.graph.lint()
    module.recompile()
    return module, folding.folded, folding.skipped


def sized(module: fx.GraphModule, inputs: Any) -> None:
    """Note in a graph that was traced which shapes its values have for example inputs."""
    if any("val" in node.meta for node in module.graph.nodes):
        return
    places = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    if isinstance(inputs, Mapping):
        given = [inputs[place] for place in places if place in inputs]
    with torch.no_grad(), using("aten"):
        ShapeProp(module).propagate(*given)


class _Folding:
    def __init__(self, module: fx.GraphModule, only: Collection[str] | None) -> None:
        self._only = only
        self.folded: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._module, self._graph = module, module.graph
        self.layers = GraphLayers(module)
        self._emptied: set[str] = set()

    def look_at(self, node: fx.Node) -> None:
        """Fold the node into what is before it if it is batch normalization and can be."""
        if not self.layers.is_norm(node):
            return
        name = self.layers.name_of(node)
        if name in self.folded or name in self.skipped:
            name = f"{name} ({node.name})"  # another call of the same layer
        try:
            norm = self.layers.norm_of(node)
            source = self.layers.source_of(norm)
        except RefusalError as refusal:
            self.skipped[name] = str(refusal)
            return
        if self._only is not None and name not in self._only:
            return
        self._fold(norm, source)
        self.folded[name] = f"into {source.name}"

    def sweep(self) -> None:
        """Remove the tensors of folded layers that nothing reads any more."""
        unread = [node for node in self._graph.nodes if node.op == "get_attr" and not node.users]
        for node in unread:
            if str(node.target).rpartition(".")[0] in self._emptied:
                self._graph.erase_node(node)
                slot = self.layers.slot(node)
                if all(str(other.target) != slot.path for other in self._graph.nodes if other.op == "get_attr"):
                    delattr(slot.owner, slot.name)

    def _fold(self, norm: NormCall, source: SourceCall) -> None:
        weight = source.weight.value.detach()
        scale, shift = scale_and_shift(norm.mean, norm.var, norm.weight, norm.bias, norm.eps, norm.mean.numel())
        scaled = along_outputs(weight, scale, source.groups, source.transposed)
        bias = bias_behind(None if source.bias is None else source.bias.value, scale, shift)
        self._put(source, source.weight, scaled.to(weight))
        if source.bias is None:
            self._add_bias(source, bias.to(weight))
        else:
            self._put(source, source.bias, bias.to(source.bias.value))
        self._emptied |= {str(read.target).rpartition(".")[0] for read in norm.reads}
        self._replace(norm, source.node)

    def _put(self, source: SourceCall, slot: Slot, value: Tensor) -> None:
        slot.put(value)
        self.layers.note(value, source.reader(slot))  # another layer may follow

    def _add_bias(self, source: SourceCall, bias: Tensor) -> None:
        owner, node = source.weight.owner, source.node
        name = "bias" if source.weight.name == "weight" else f"{source.weight.name}_bias"
        while getattr(owner, name, None) is not None:
            name += "_"
        setattr(owner, name, nn.Parameter(bias, requires_grad=source.weight.value.requires_grad))
        self.layers.note(bias, node)
        if node.op == "call_module":
            return
        prefix = source.weight.path.rpartition(".")[0]
        with self._graph.inserting_before(node):
            read = self._graph.get_attr(f"{prefix}.{name}" if prefix else name)
        if node.target is aten.mm.default:
            node.target, node.args = aten.addmm.default, (read, *node.args)
        elif len(node.args) > 2:
            node.update_arg(2, read)
        else:
            node.update_kwarg("bias", read)

    def _replace(self, norm: NormCall, result: fx.Node) -> None:
        """Let the convolution's result go where the normalized tensor went."""
        node, layer = norm.node, norm.layer
        outputs = [user for user in node.users if user.target is operator.getitem] if gives_several(node) else [node]
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
        if gives_several(node):
            self._graph.erase_node(node)
        if layer is not None and activation is None:
            self._module.delete_submodule(str(node.target))
