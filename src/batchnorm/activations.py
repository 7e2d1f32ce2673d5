"""Activations as people name them, and what they mean in torch's own operators."""

from __future__ import annotations

from collections.abc import Callable
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


# name: (function of z and the parameter, the parameter where nobody gives one, torch.nn's module)
_KNOWN: dict[str, tuple[Callable[[Tensor, float], Tensor], float, Callable[[float], nn.Module]]] = {
    "relu": (lambda z, p: F.relu(z), 0.0, lambda p: nn.ReLU()),
    "leaky_relu": (lambda z, p: F.leaky_relu(z, p), 0.01, lambda p: nn.LeakyReLU(p)),
    "relu6": (lambda z, p: F.relu6(z), 0.0, lambda p: nn.ReLU6()),
    "silu": (lambda z, p: F.silu(z), 0.0, lambda p: nn.SiLU()),
    "hardswish": (lambda z, p: F.hardswish(z), 0.0, lambda p: nn.Hardswish()),
    "gelu": (lambda z, p: F.gelu(z), 0.0, lambda p: nn.GELU()),
    "gelu_tanh": (lambda z, p: F.gelu(z, approximate="tanh"), 0.0, lambda p: nn.GELU("tanh")),
    "elu": (lambda z, p: F.elu(z, p), 1.0, lambda p: nn.ELU(p)),
}
_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    F.relu: "relu",
    Tensor.relu: "relu",
    F.leaky_relu: "leaky_relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.elu: "elu",
}
_MODULES: dict[type[nn.Module], tuple[str, str | None]] = {  # the module's name here, and where its parameter is
    nn.ReLU: ("relu", None),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ReLU6: ("relu6", None),
    nn.SiLU: ("silu", None),
    nn.Hardswish: ("hardswish", None),
    nn.ELU: ("elu", "alpha"),
}


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
        return Activation(given, _known(given)[1])
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
    return Activation(name, _known(name)[1])


def _known(name: str) -> tuple[Callable[[Tensor, float], Tensor], float, Callable[[float], nn.Module]]:
    if name not in _KNOWN:
        raise ValueError(f"unknown activation {name!r}: choose from {', '.join(_KNOWN)}")
    return _KNOWN[name]


def _from_module(module: nn.Module) -> Activation:
    kind = type(module)  # not a subclass, which may do anything
    if kind is nn.GELU:
        return Activation("gelu_tanh" if module.approximate == "tanh" else "gelu")
    if kind not in _MODULES:
        raise TypeError(
            f"cannot fuse {module}: the modules known are {', '.join(sorted(k.__name__ for k in (*_MODULES, nn.GELU)))}"
        )
    name, attribute = _MODULES[kind]
    return Activation(name, 0.0 if attribute is None else float(getattr(module, attribute)))


def applied(activation: Activation | None, z: Tensor) -> Tensor:
    """Apply an activation with torch's own operator."""
    return z if activation is None else _KNOWN[activation.name][0](z, activation.parameter)


def module_of(activation: Activation) -> nn.Module:
    """Build the module of ``torch.nn`` that does the same."""
    return _KNOWN[activation.name][2](activation.parameter)
