"""What follows a batch normalization in a graph: an addition, an activation, or a reason why neither can be fused."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from batchnorm.activations import Activation, activation_of
from batchnorm.surgery.find import hooks_of

__all__ = ["LEAVES", "Chain", "Form", "Parts", "calls_of_layers", "chain_of", "described", "has_additions"]

LEAVES = "its output leaves the graph"


class Parts(dict[str, nn.Module]):
    """All submodules of a module, by name."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module.named_modules())
        self._prefix = f"{name}." if name else ""

    def full_name(self, name: str) -> str:
        """A submodule's name in the whole model."""
        return self._prefix + name


_IN_PLACE: dict[Any, Any] = {torch.relu_: F.relu, F.leaky_relu_: F.leaky_relu, F.elu_: F.elu}
_METHODS = {"relu": F.relu, "relu_": F.relu}
_PARAMETER = {"leaky_relu": "negative_slope", "elu": "alpha", "gelu": "approximate"}  # the second argument
_ADDS = (operator.add, operator.iadd, torch.add)
_ADDS_IN_PLACE = (operator.iadd, "add_")
_FRESH = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)  # their results are nobody else's


class Form(NamedTuple):
    """What must agree between the normalized tensor and the residual."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class Chain:
    """One call of a layer, and the nodes that can be fused into it."""

    call: fx.Node
    residual: fx.Node | None = None
    add: fx.Node | None = None
    activation: Activation | None = None
    act: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        """The node whose value the fused call will give."""
        return self.act or self.add or self.call

    def __str__(self) -> str:
        parts = ["add"] if self.add is not None else []
        if self.activation is not None:
            parts.append(self.activation.name)
        return " + ".join(parts)


def calls_of_layers(graph: fx.Graph, parts: Parts) -> dict[nn.Module, list[fx.Node]]:
    """All calls of every batch normalization layer in the graph, in order."""
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(parts[node.target], nn.modules.batchnorm._BatchNorm):
            calls.setdefault(parts[node.target], []).append(node)
    return calls


def chain_of(call: fx.Node, parts: Parts, forms: Mapping[fx.Node, set[Form]] | None) -> Chain | str:
    """Find what can be fused into a call.

    Args:
        call: of a layer without an activation.
        parts: of the module whose graph it is.
        forms: those that nodes had in example runs; None without examples.

    Returns:
        The chain, or the reason why there is none.
    """
    chain, end = Chain(call), _past_identities(call, parts)
    reason = _only_user(end, parts)
    if reason is not None:
        return reason
    user = next(iter(end.users))
    if _is_add(user):
        if len(call.args) + len(call.kwargs) > 1:
            return "it has a residual already"
        reason = _obstacle_to_adding(call, end, user, parts, forms)
        if reason is not None:
            return reason
        chain.add, chain.residual = user, _other(user, end)
        end = _past_identities(user, parts)
        if len(end.users) != 1:
            return chain
        user = next(iter(end.users))
    chain.activation = _activation(user, end, parts)
    if chain.activation is not None:
        chain.act = user
    if chain.act is None and chain.add is None:
        if user.op == "output":
            return LEAVES
        if user.kwargs.get("residual") is end:
            return f"it is the residual of {parts.full_name(str(user.target))}"
        return f"followed by {described(user, parts)}"
    return chain


def described(node: fx.Node, parts: Parts) -> str:
    """Name a node as its author would."""
    if node.op == "call_module":
        name = str(node.target)
        kind = type(parts[name]).__name__ + (" with hooks" if hooks_of(parts[name]) else "")
        return f"{parts.full_name(name)} ({kind})"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _only_user(end: fx.Node, parts: Parts) -> str | None:
    if len(end.users) > 1:
        return "its output is read by " + " and ".join(described(user, parts) for user in end.users)
    return None if end.users else "its output is not used"


def _past_identities(node: fx.Node, parts: Parts) -> fx.Node:
    while len(node.users) == 1:
        user = next(iter(node.users))
        module = parts[str(user.target)] if user.op == "call_module" else None
        if type(module) is not nn.Identity or hooks_of(module):
            break
        node = user
    return node


# --- activations ---


def _activation(node: fx.Node, argument: fx.Node, parts: Parts) -> Activation | None:
    if node.all_input_nodes != [argument]:
        return None
    try:
        if node.op == "call_module":
            module = parts[str(node.target)]
            return None if hooks_of(module) or "forward" in vars(module) else activation_of(module)
        if node.op == "call_method":
            return activation_of(_METHODS.get(str(node.target)))
        if node.op == "call_function":
            return _with_parameter(activation_of(_IN_PLACE.get(node.target, node.target)), node)
    except TypeError:
        pass
    return None


def _with_parameter(known: Activation | None, node: fx.Node) -> Activation | None:
    keyword = None if known is None else _PARAMETER.get(known.name)
    if known is None or keyword is None:
        return known
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get(keyword)
    if given is None:
        return known
    if known.name == "gelu":
        return Activation("gelu_tanh" if given == "tanh" else "gelu")
    return Activation(known.name, float(given))


# --- additions ---


def has_additions(graph: fx.Graph) -> bool:
    """Whether anything is added to anything."""
    return any(_is_add(node) for node in graph.nodes)


def _is_add(node: fx.Node) -> bool:
    if node.op == "call_function":
        known = node.target in _ADDS
    else:
        known = node.op == "call_method" and node.target in ("add", "add_")
    return known and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs


def _other(add: fx.Node, end: fx.Node) -> fx.Node:
    return next(a for a in add.args if a is not end)  # type: ignore[return-value]


def _obstacle_to_adding(
    call: fx.Node, end: fx.Node, add: fx.Node, parts: Parts, forms: Mapping[fx.Node, set[Form]] | None
) -> str | None:
    if add.args[0] is add.args[1]:
        return "it is added to itself"
    residual = _other(add, end)
    if forms is None:
        return "an addition needs example_inputs, which tell the shapes"
    ours, theirs = forms.get(end, set()), forms.get(residual, set())
    if not ours or not theirs:
        return "the example_inputs do not reach its addition"
    if len(ours) > 1 or ours != theirs:
        return f"its output and the residual differ: {_listed(ours)} and {_listed(theirs)}"
    if add.target in _ADDS_IN_PLACE and add.args[0] is residual:
        fresh = residual.op == "call_module" and isinstance(parts[str(residual.target)], _FRESH)
        if len(residual.users) > 1 or not fresh:
            return "it is added in place into a tensor that others may read"
    return _obstacle_to_waiting(call, add, parts)


def _listed(forms: set[Form]) -> str:
    return " or ".join(sorted(f"{tuple(form.shape)} {str(form.dtype).removeprefix('torch.')}" for form in forms))


def _obstacle_to_waiting(call: fx.Node, add: fx.Node, parts: Parts) -> str | None:
    """Why the call cannot be made where the addition is: what it reads may have been overwritten by then."""
    node = call.next
    while node is not add:
        target = _overwritten(node, parts)
        fresh = target is not None and target.op == "call_module" and isinstance(parts[str(target.target)], _FRESH)
        if target is not None and (not fresh or target in call.all_input_nodes):
            return f"{described(node, parts)} works in place between it and the addition"
        node = node.next
    return None


def _overwritten(node: fx.Node, parts: Parts) -> fx.Node | None:
    """What a node writes into, if anything."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else str(node.target)
    if node.op == "call_module":
        in_place = bool(getattr(parts[name], "inplace", False))
    elif node.op in ("call_function", "call_method"):
        ends_so = name.endswith("_") and not name.endswith("__")
        augmented = node.op == "call_function" and getattr(operator, name, None) is node.target and name.startswith("i")
        in_place = ends_so or name in ("setitem", "__setitem__") or augmented or bool(node.kwargs.get("inplace"))
        in_place = in_place or any(a is True for a in node.args)  # F.relu(x, True)
    else:
        in_place = False
    return next(iter(node.all_input_nodes), None) if in_place else None
