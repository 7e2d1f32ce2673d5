"""A run of a model on example inputs as a graph: which modules and functions read which tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.kernels import using
from batchnorm.surgery.inspect.affine import is_linear_map, is_plain
from batchnorm.surgery.inspect.example import copied_inputs, forward, in_mode, seeded
from batchnorm.surgery.inspect.find import hooks_of, is_batch_norm, names_of
from batchnorm.surgery.inspect.tensors import copy_sharing_parameters, tensors_in
from batchnorm.surgery.inspect.watched import read_besides_calls

__all__ = ["Hooks", "Run", "only_asks", "recorded"]

# Properties that hand out the tensor's values; the others (shape, dtype, …) only tell about it.
_VALUES = {getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real", "imag")}
_ASKING = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
     "is_signed", "element_size", "get_device", "storage_offset", "__len__", "__hash__")
)  # fmt: skip
_MARKING = frozenset(("type", "register_hook", "requires_grad_"))


def only_asks(function: Callable[..., Any]) -> bool:
    """Whether a call tells about a tensor without reading its values."""
    name = getattr(function, "__name__", "")
    return name in _ASKING or (name == "__get__" and function not in _VALUES)


class Run(NamedTuple):
    """What was seen.

    Attributes:
        graph: a call of a convolution, a linear layer or a batch normalization layer is a node "call_module", whatever
            else was done to their results or to the inputs is a "call_function"; `meta` has their "shape" and "dtype".
        outputs: what the model returned.
        parameters_read: the modules with parameters that something else computed with than the module itself.
        attributes_read: which attributes of layers were read besides calling them.
        called_with: arguments of the first call of what is a convolution or a linear layer with a forward of its own.
    """

    graph: fx.Graph
    outputs: Any
    parameters_read: set[nn.Module]
    attributes_read: dict[nn.Module, set[str]]
    called_with: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]


def recorded(model: nn.Module, inputs: Any, training: bool = False, parts: Collection[nn.Module] = ()) -> Run:
    """Run a copy of a model, with torch's own operators, and record what it does.

    Args:
        model: it is left as it was.
        inputs: as for ``forward``.
        training: in which mode to run; in evaluation without gradients.
        parts: the modules whose calls are nodes; what is read of these besides is not noted.
    """
    twin, original = copy_sharing_parameters(model)
    in_mode(in_mode(twin, True), training)  # some keep what they computed last until they train again
    recorder = _Recorder(twin, {part for part, its in original.items() if its in parts})
    with recorder.attached(), read_besides_calls(() if parts else recorder.parts) as asked, seeded(twin), using("aten"):
        with torch.set_grad_enabled(training), recorder:
            given = copied_inputs(inputs)
            recorder.begin(given)
            outputs = forward(twin, given)
        recorder.end(outputs)
    return Run(
        recorder.graph,
        outputs,
        {original[part] for part in recorder.parameters_read()},
        {original[part]: names for part, names in asked.items()},
        {original[part]: given for part, given in recorder.called_with.items()},
    )


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, parts: Collection[nn.Module]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.called_with: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._model, self._names = model, names_of(model)
        self.parts = [m for m in self._names if (m in parts if parts else is_batch_norm(m) or is_linear_map(m))]
        self._odd = {part for part in self.parts if is_linear_map(part) and not is_plain(part)}
        self._owners: dict[int, list[nn.Module]] = {}
        for part in self.parts:
            for p in part.parameters(recurse=False):
                self._owners.setdefault(id(p), []).append(part)
        self._read_ids: set[int] = set()
        self._nodes: Any = WeakTensorKeyDictionary()
        self._within: list[fx.Node | None] = []  # the parts that are running

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the calls of parts, and what hooks and scripted modules are shown, which no function call tells."""
        handles = []
        for part in self.parts:
            handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(part.register_forward_hook(self._leave, always_call=True))
        parts = set(self.parts)
        shown = {m for m in self._names if isinstance(m, torch.jit.ScriptModule) or (hooks_of(m) and m not in parts)}

        def show(module: nn.Module, *tensors: Any) -> None:
            if module in shown and not self._within:
                self._read(self._names[module][0], tensors)

        if shown:  # for all modules, since a scripted one takes no hooks of its own
            handles.append(nn.modules.module.register_module_forward_pre_hook(show))
            handles.append(nn.modules.module.register_module_forward_hook(show))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def parameters_read(self) -> set[nn.Module]:
        """The parts with parameters that something else computed with."""
        return {part for parameter in self._read_ids for part in self._owners[parameter]}

    def begin(self, inputs: Any) -> None:
        """Note the model's inputs."""
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                self._note(self.graph.placeholder("input"), tensor)

    def end(self, outputs: Any) -> None:
        """Note what the model returned, or keeps as an attribute, for others to read."""
        state = ("_parameters", "_buffers", "_modules")
        kept = [value for m in self._names for name, value in vars(m).items() if name not in state]
        given = [t for t in tensors_in([outputs, kept]) if t in self._nodes]
        self.graph.output([self._nodes[t] for t in given])

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = None if self._within else self._given(func, args, kwargs)
        result = func(*args, **kwargs)
        if before is not None:
            self._note(self.graph.create_node("call_function", func, *before), result)
        return result

    def _given(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """What a function is given, with nodes instead of tensors; None if it does not compute with what was seen."""
        if only_asks(func) or getattr(func, "__name__", "") in _MARKING:
            return None
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._read_ids.update(id(t) for t in tensors if id(t) in self._owners)
        return self._mapped((args, kwargs)) if any(t in self._nodes for t in tensors) else None

    def _enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        node = None
        if not self._within:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor not in self._nodes:
                    self._note(self.graph.placeholder("unseen"), tensor)
            node = self.graph.create_node("call_module", self._names[part][0], *self._mapped((args, kwargs)))
            if part in self._odd:
                self.called_with.setdefault(part, (args, kwargs))
        self._within.append(node)

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        node = self._within.pop()
        if node is not None:
            self._note(node, output)

    def _read(self, reader: str, tensors: Any) -> None:
        known = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t in self._nodes]
        if known:
            self.graph.create_node("call_function", Hooks(reader), tuple(self._nodes[t] for t in known))

    def _mapped(self, given: Any) -> Any:
        return tree_map(lambda t: self._nodes.get(t, t) if isinstance(t, Tensor) else t, given)

    def _note(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            node.meta |= {"shape": tuple(result.shape), "dtype": result.dtype}
            self._nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for place, tensor in enumerate(result):
                if isinstance(tensor, Tensor):
                    self._note(self.graph.create_node("call_function", operator.getitem, (node, place)), tensor)


class Hooks:
    """Stands in a graph for the hooks of a module, which read what it is given and gives."""

    def __init__(self, module: str) -> None:
        self.module, self.__name__ = module, f"hooks of {module}"

    def __call__(self, *tensors: Tensor) -> None:
        """Read, and give nothing."""
