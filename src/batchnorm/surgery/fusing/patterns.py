"""What follows a batch normalization in a graph: an addition, an activation, or a reason why neither can be fused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from batchnorm.activations import Activation
from batchnorm.surgery.fusing.formulas import Y, clamps, in_place, step
from batchnorm.surgery.fusing.values import ShapeAndDtype, Values
from batchnorm.surgery.inspect.find import hooks_of
from batchnorm.surgery.inspect.paths import SUMS, asks, is_sum, name_of

__all__ = [
    "LEAVES", "Chain", "Parts", "activation_behind", "additions_of", "calls_of_layers", "chain_of", "described",
    "has_zero_channels",
]  # fmt: skip

LEAVES = "its output leaves the graph"


class Parts(dict[str, nn.Module]):
    """All submodules of a module, by name."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module.named_modules())
        self._prefix = f"{name}." if name else ""

    def full_name(self, name: str) -> str:
        """A submodule's name in the whole model."""
        return self._prefix + name

    def called(self, node: fx.Node) -> Any:
        """What a node calls: a submodule, a function, or the name of a method."""
        return self[str(node.target)] if node.op == "call_module" else node.target


@dataclass
class Chain:
    """One call of a layer, and the nodes that can be fused into it.

    Attributes:
        call: of the layer.
        add: the addition, if there is one.
        activation: what is applied, if anything is.
        acts: the nodes that compute the activation.
        nodes: all that become one call: the layer's, those of the addition and the activation, identities between.
    """

    call: fx.Node
    add: fx.Node | None = None
    activation: Activation | None = None
    acts: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        """The node whose value the fused call will give."""
        return self.nodes[-1]

    @property
    def place(self) -> fx.Node:
        """The node before which all that the fused call reads is known."""
        return self.call if self.add is None else self.add

    @property
    def residual(self) -> Any:
        """What is added: the operand that is not the layer's; what it is may change while others are fused."""
        return None if self.add is None else next(a for a in self.add.args if a not in self.nodes)

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


def additions_of(calls: dict[nn.Module, list[fx.Node]], parts: Parts) -> dict[fx.Node, list[fx.Node]]:
    """The additions whose operands layers give, and the calls of these."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for call in (call for several in calls.values() for call in several):
        user = _only_user(_past_identities(call, parts)[-1])
        if user is not None and is_sum(user):
            found.setdefault(user, []).append(call)
    return found


def chain_of(call: fx.Node, parts: Parts, values: Values | None) -> Chain | str:
    """Find what can be fused into a call.

    Args:
        call: of a layer without an activation.
        parts: of the module whose graph it is.
        values: what the nodes are in example runs; None without examples.

    Returns:
        The chain, or the reason why there is none.
    """
    chain, nodes = Chain(call), _past_identities(call, parts)
    user = _only_user(nodes[-1])
    if user is not None and is_sum(user):
        if len(call.args) + len(call.kwargs) > 1:
            return "it has a residual already"
        reason = _obstacle_to_adding(call, nodes[-1], user, values)
        if reason is not None:
            return reason
        chain.add, chain.nodes = user, [*nodes, user]
        nodes += _past_identities(user, parts)
    chain.activation, chain.acts = activation_behind(nodes[-1], parts)
    if chain.acts:
        if any(clamps(parts.called(node)) for node in chain.acts) and has_zero_channels(parts[str(call.target)]):
            return "weight and bias of a channel are 0, where a clamp's gradient is 1 and that of an activation 0"
        chain.nodes = [*nodes, *chain.acts]
    return chain if chain.nodes else _nothing_behind(nodes[-1], parts)


def _nothing_behind(end: fx.Node, parts: Parts) -> str:
    """Why nothing that follows can be fused."""
    user = _only_user(end)
    if user is None:
        readers = " and ".join(described(user, parts) for user in _readers(end))
        return f"its output is read by {readers}" if readers else "its output is not used"
    if user.op == "output":
        return LEAVES
    if user.kwargs.get("residual") is end:
        return f"it is the residual of {parts.full_name(str(user.target))}"
    return f"followed by {described(user, parts)}"


def described(node: fx.Node, parts: Parts) -> str:
    """Name a node as its author would."""
    if node.op == "call_module":
        name = str(node.target)
        kind = type(parts[name]).__name__ + (" with hooks" if hooks_of(parts[name]) else "")
        return f"{parts.full_name(name)} ({kind})"
    return name_of(node)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value; others only ask for its shape and the like, which the fused call does not change."""
    return [user for user in node.users if not asks(user, node)]


def _only_user(node: fx.Node) -> fx.Node | None:
    readers = _readers(node)
    return readers[0] if len(readers) == 1 else None


def _past_identities(node: fx.Node, parts: Parts) -> list[fx.Node]:
    """A node, and those behind it that hand its value on."""
    nodes = [node]
    while True:
        user = _only_user(nodes[-1])
        if user is None or not _is_identity(user, parts):
            return nodes
        nodes.append(user)


def _is_identity(node: fx.Node, parts: Parts) -> bool:
    if node.op == "call_function" and name_of(node) in SUMS and not node.kwargs:  # sum() begins with 0 + x
        return len(node.args) == 2 and any(type(a) in (int, float) and a == 0 for a in node.args)
    module = parts[str(node.target)] if node.op == "call_module" else None
    return type(module) is nn.Identity and not hooks_of(module)


# --- activations ---


def activation_behind(end: fx.Node, parts: Parts) -> tuple[Activation | None, list[fx.Node]]:
    """The activation of a node's value, if that is all that becomes of it, and the nodes that compute it."""
    formulas: dict[fx.Node, str] = {end: Y}
    grown = True
    while grown:
        grown = False
        for node in sorted({user for known in formulas for user in _readers(known)} - formulas.keys()):
            found = _step(node, formulas, parts)
            if isinstance(found, Activation):
                within = {*formulas, node}
                if all(user in within for known in formulas for user in _readers(known)):
                    return found, [*list(formulas)[1:], node]
            elif found is not None:
                formulas[node] = found
                grown = True
    return None, []


def _step(node: fx.Node, formulas: dict[fx.Node, str], parts: Parts) -> str | Activation | None:
    if node.op not in ("call_module", "call_function", "call_method") or not formulas.keys() >= {*node.all_input_nodes}:
        return None
    called = parts.called(node)
    if isinstance(called, nn.Module) and (hooks_of(called) or "forward" in vars(called)):
        return None
    target = node.all_input_nodes[0]
    if in_place(called, node.args, node.kwargs) and any(user > node for user in _readers(target)):
        return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda a: formulas[a])
    return step(called, args, kwargs)


def has_zero_channels(layer: Any) -> bool:
    """Whether the output is exactly 0 in a channel, as it is where training starts from zeros."""
    if layer.weight is None:
        return False
    return bool(((layer.weight == 0) & (True if layer.bias is None else layer.bias == 0)).any())


# --- additions ---


def _obstacle_to_adding(call: fx.Node, end: fx.Node, add: fx.Node, values: Values | None) -> str | None:
    if add.args[0] is add.args[1]:
        return "it is added to itself"
    if any(user < add and asks(user, node) for node in (call, end) for user in node.users):
        return "its shape is asked for before the addition"
    residual: Any = next(a for a in add.args if a is not end)
    if values is None:
        return "an addition needs example_inputs, which tell the shapes"
    ours, theirs = values.shapes(end), values.shapes(residual)
    if not ours or not theirs:
        return "the example_inputs do not reach its addition"
    if len(ours) > 1 or ours != theirs:
        return f"its output and the residual differ: {_listed(ours)} and {_listed(theirs)}"
    if values.overwritten(call):
        return "its input is overwritten between it and the addition"
    if add.args[0] is residual and in_place(add.target, add.args, add.kwargs) and values.shared(add):
        return "it is added in place into a tensor that others read"
    return None


def _listed(shapes: set[ShapeAndDtype]) -> str:
    return " or ".join(sorted(f"{tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in shapes))
