"""Activations as forwards spell them: a function, a method, a module, a clamp, or a product with a gate."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.activations import Activation, activation_of

__all__ = ["Y", "clamps", "in_place", "step"]

Y = "y"  # what is activated; what is computed from it on the way has its formula for a name

# What an operation makes of y, or of something made of it. Howard et al. 2019 (arXiv 1905.02244) write hardswish so.
_STEPS: dict[tuple[str, ...], str | Activation] = {
    ("relu", Y): Activation("relu"),
    ("relu6", Y): Activation("relu6"),
    ("sigmoid", Y): "sigmoid(y)",
    ("*", Y, "sigmoid(y)"): Activation("silu"),
    ("hardsigmoid", Y): "hardsigmoid(y)",
    ("*", Y, "hardsigmoid(y)"): Activation("hardswish"),
    ("+ 3", Y): "y + 3",
    ("relu6", "y + 3"): "relu6(y + 3)",
    ("/ 6", "relu6(y + 3)"): "hardsigmoid(y)",
    ("*", Y, "relu6(y + 3)"): "y * relu6(y + 3)",
    ("/ 6", "y * relu6(y + 3)"): Activation("hardswish"),
}

_SPELLINGS = {
    "sigmoid": ("sigmoid", "sigmoid_"),
    "hardsigmoid": ("hardsigmoid",),
    "relu6": ("relu6",),
    "add": ("add", "add_", "iadd", "__add__", "__radd__", "__iadd__"),
    "mul": ("mul", "mul_", "multiply", "imul", "__mul__", "__rmul__", "__imul__"),
    "div": ("div", "div_", "divide", "true_divide", "truediv", "itruediv", "__truediv__", "__itruediv__"),
    "clamp": ("clamp", "clamp_", "clip", "clip_"),
    "clamp_min": ("clamp_min", "clamp_min_"),
    "hardtanh": ("hardtanh", "hardtanh_"),
}
_UNARY = ("sigmoid", "hardsigmoid", "relu6")
_MODULES: dict[type[nn.Module], str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid", nn.ReLU6: "relu6"}
_NAMES: dict[Any, str] = {
    spelled: name
    for name, spellings in _SPELLINGS.items()
    for spelling in spellings
    for spelled in (spelling, *(getattr(home, spelling, spelling) for home in (torch, F, Tensor, operator)))
}

_FUNCTIONS: dict[Any, Any] = {
    "relu": F.relu, "relu_": F.relu, Tensor.relu_: F.relu,
    torch.relu_: F.relu, F.leaky_relu_: F.leaky_relu, F.elu_: F.elu,
}  # fmt: skip
_PARAMETER = {"leaky_relu": "negative_slope", "elu": "alpha", "gelu": "approximate"}  # the second argument


def step(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | Activation | None:
    """What an operation makes of a normalized tensor.

    Args:
        operation: a function, the name of a method, or a module.
        args, kwargs: what it is given; in place of tensors, their formulas: ``Y``, or what an earlier step has given.

    Returns:
        An activation of y; the formula of something that may become one; or None.
    """
    known = _known(operation, args, kwargs) if args and args[0] == Y else None
    found = None if known is not None else _applied(operation, args, kwargs)
    return known if found is None else _STEPS.get(found)


def clamps(operation: Any) -> bool:
    """Whether an operation's gradient is 1 where its argument is exactly at a bound; that of ``relu`` is 0 there."""
    return _named(operation) in ("clamp", "clamp_min")


def in_place(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation writes into its first argument."""
    if isinstance(operation, nn.Module):
        return bool(getattr(operation, "inplace", False))
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", "")
    ends_so = name.endswith("_") and not name.endswith("__")
    augmented = name.strip("_") in ("setitem", "iadd", "isub", "imul", "itruediv")
    return ends_so or augmented or bool(kwargs.get("inplace")) or any(a is True for a in args)  # F.relu(x, True)


# --- torch's activations ---


def _known(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | None:
    """One of torch's activations, with the parameter that it is called with."""
    try:
        known = None if _strange(args, kwargs) else activation_of(_FUNCTIONS.get(operation, operation))
    except (TypeError, ValueError):
        return None
    keyword = None if known is None or isinstance(operation, nn.Module) else _PARAMETER.get(known.name)
    if known is None or keyword is None:
        return known
    given: Any = args[1] if len(args) > 1 else kwargs.get(keyword)
    if given is None:
        return known
    if known.name == "gelu":
        return Activation("gelu_tanh" if given == "tanh" else "gelu")
    return Activation(known.name, float(given))


def _strange(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether more than numbers and flags is given."""
    return any(isinstance(a, str) and a in _FORMULAS for a in (*args[1:], *kwargs.values()))


_FORMULAS = {Y, *(formula for formula in _STEPS.values() if isinstance(formula, str))}


# --- activations in several steps ---


def _applied(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...] | None:
    """An operation and what it works on, as the table of steps has it."""
    name = _named(operation)
    given = [a for a in args if isinstance(a, str)]
    if len(given) == 1 and given[0] == args[0]:
        if name in _UNARY:
            return name, given[0]
        if name in ("clamp", "clamp_min", "hardtanh"):
            return _clamped(operation, name, given[0], args, kwargs)
    if len(args) != 2 or kwargs:
        return None
    if name == "mul" and len(given) == 2:
        return "*", *sorted(given, key=len)  # y is the shortest
    number = next((a for a in args if isinstance(a, (int, float))), None)
    if name == "add" and number == 3:
        return "+ 3", given[0]
    sixth = name == "div" and number == 6 and args[1] == 6
    return ("/ 6", given[0]) if sixth or (name == "mul" and number == 1 / 6) else None


def _clamped(
    operation: Any, name: str, given: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, str] | None:
    if isinstance(operation, nn.Hardtanh):
        bounds: Any = operation.min_val, operation.max_val
    elif name == "hardtanh":
        low, high = (*args[1:3], None, None)[:2]
        bounds = kwargs.get("min_val", -1 if low is None else low), kwargs.get("max_val", 1 if high is None else high)
    else:
        low, high = (*args[1:3], None, None)[:2]
        bounds = kwargs.get("min", low), kwargs.get("max", high)
    if bounds == (0, None):
        return "relu", given
    return ("relu6", given) if bounds == (0, 6) else None


def _named(operation: Any) -> str | None:
    if isinstance(operation, nn.Module):
        return "hardtanh" if type(operation) is nn.Hardtanh else _MODULES.get(type(operation))
    return _NAMES.get(operation)
