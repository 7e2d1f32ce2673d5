"""Activations as people name them, and what they mean in torch's own operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["INVERTIBLE", "PIECEWISE", "Activation", "activation_of", "applied", "module_of"]

# Linear in pieces, with slope 1 on one of them: a bit an element says all that their gradient needs.
PIECEWISE = frozenset({"relu", "leaky_relu", "relu6"})
# Those whose argument can be found from their value.
INVERTIBLE = frozenset({"identity", "leaky_relu", "elu"})


class Activation(NamedTuple):
    """One of the activations known here, with its parameter: a slope (leaky_relu) or alpha (elu)."""

    name: str
    parameter: float = 0.0


class _Known(NamedTuple):
    function: Callable[..., Tensor]
    module: Callable[..., nn.Module]
    attribute: str | None = None  # where a module has the parameter
    default: float = 0.0  # of the parameter


_KNOWN = {
    "relu": _Known(F.relu, nn.ReLU),
    "leaky_relu": _Known(F.leaky_relu, nn.LeakyReLU, "negative_slope", 0.01),
    "relu6": _Known(F.relu6, nn.ReLU6),
    "silu": _Known(F.silu, nn.SiLU),
    "hardswish": _Known(F.hardswish, nn.Hardswish),
    "gelu": _Known(F.gelu, nn.GELU),
    "gelu_tanh": _Known(partial(F.gelu, approximate="tanh"), partial(nn.GELU, "tanh")),
    "elu": _Known(F.elu, nn.ELU, "alpha", 1.0),
}
_FUNCTIONS: dict[Any, str] = {known.function: name for name, known in _KNOWN.items()}
_FUNCTIONS |= dict.fromkeys((torch.relu, Tensor.relu), "relu")
_MODULES: dict[Any, str] = {known.module: name for name, known in _KNOWN.items()}


def activation_of(given: Any) -> Activation | None:
    """Find out which activation is meant.

    Args:
        given: None; a name ("relu", "leaky_relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "elu"), alone or
            in a pair with its parameter, as in ``("leaky_relu", 0.2)``; a torch function such as ``F.silu``; a module
            such as ``nn.LeakyReLU(0.2)``, or its class.

    Raises:
        ValueError: for a name that is none of these.
        TypeError: for anything else that is none of these.
    """
    if given is None or isinstance(given, Activation):
        return given
    if isinstance(given, str):
        return Activation(given, _known(given).default)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
        _known(given[0])
        return Activation(given[0], float(given[1]))
    if isinstance(given, type) and issubclass(given, nn.Module):
        given = given()
    if isinstance(given, nn.Module):
        return _from_module(given)
    try:
        name = _FUNCTIONS.get(given)
    except TypeError:  # not hashable
        name = None
    if name is None:
        raise TypeError(f"cannot fuse {given!r}: give one of {', '.join(_KNOWN)}, or the torch module or function")
    return Activation(name, _known(name).default)


def _known(name: str) -> _Known:
    if name not in _KNOWN:
        raise ValueError(f"unknown activation {name!r}: choose from {', '.join(_KNOWN)}")
    return _KNOWN[name]


def _from_module(module: nn.Module) -> Activation:
    kind = type(module)  # not a subclass, which may do anything
    if kind not in _MODULES:
        known = sorted(k.__name__ for k in _MODULES if isinstance(k, type))
        raise TypeError(f"cannot fuse {module}: the modules known are {', '.join(known)}")
    name = _MODULES[kind]
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        name = "gelu_tanh"
    attribute = _KNOWN[name].attribute
    return Activation(name, 0.0 if attribute is None else float(getattr(module, attribute)))


def applied(activation: Activation | None, z: Tensor) -> Tensor:
    """Apply an activation with torch's own operator."""
    return z if activation is None else _with_parameter(_KNOWN[activation.name].function, activation, z)


def module_of(activation: Activation) -> nn.Module:
    """Build the module of ``torch.nn`` that does the same."""
    made: nn.Module = _with_parameter(_KNOWN[activation.name].module, activation)
    return made


def _with_parameter(make: Callable[..., Any], activation: Activation, *args: Any) -> Any:
    return make(*args) if _KNOWN[activation.name].attribute is None else make(*args, activation.parameter)
