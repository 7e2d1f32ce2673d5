"""Trials: one layer run by itself, on numbers of its own, away from whatever surrounds the caller."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from batchnorm.kernels import using

__all__ = ["aside", "close", "mentions_processes", "once", "twin_of"]

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
_OF_MODULES = set(vars(nn.Module())) | {"training", "num_features"}
_PLAIN = (type(None), bool, int, float, str, type)
_DISTRIBUTED = "torch.distributed"
_Module = TypeVar("_Module", bound=nn.Module)
_Found = TypeVar("_Found")


@contextmanager
def aside() -> Iterator[None]:
    """Compute with gradients, without autocast or fake tensors, by torch's operators; leave the generators alone."""
    with (
        unset_fake_temporarily(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        using("aten"),
    ):
        yield


def twin_of(layer: nn.Module) -> nn.Module:
    """Copy a layer without its hooks, with other tensors of the same sizes: random ones, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def fresh(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.full(tensor.shape, 3, dtype=tensor.dtype, device="cpu")
        made = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
        return made + 0.5 if "var" in name else made * 6 - 3

    memo: dict[int, Any] = {
        id(vars(layer)[name]): OrderedDict() for name in _HOOKS if vars(layer).get(name) is not None
    }
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            memo[id(parameter)] = nn.Parameter(fresh(name, parameter))
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            memo[id(buffer)] = fresh(name, buffer)
    twin = copy.deepcopy(layer, memo)
    for part in twin.children():
        part.double()
    return twin


def once(module: _Module, found: dict[Any, _Found], find: Callable[[_Module], _Found]) -> _Found:
    """Find something out about a module, once for all modules that compute alike, as far as can be seen."""
    key = _plain_state(module)
    if key is None:
        return find(module)
    if key not in found:
        found[key] = find(module)
    return found[key]


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree in shape, dtype and, up to rounding, in values."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, tolerance, tolerance)


def _plain_state(module: nn.Module) -> Hashable | None:
    """What decides on how a module computes, as far as these are plain values: equal for layers that need one trial.

    Returns:
        None if it has attributes that cannot be compared at a glance.
    """
    own = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
    if not all(isinstance(value, _PLAIN) for value in own.values()):
        return None
    tensors = frozenset(n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None)
    parts = [(name, None if part is None else _plain_state(part)) for name, part in module._modules.items()]
    if any(module._modules[name] is not None and state is None for name, state in parts):
        return None
    return type(module), frozenset((n, type(v), v) for n, v in own.items()), tensors, tuple(parts)


def mentions_processes(kind: type[nn.Module]) -> bool:
    """Whether a class's forward, or what it calls outside torch, names anything of ``torch.distributed``.

    A trial in one process would not show what it does in several.
    """
    functions: list[Any] = [kind.forward]
    looked: set[Any] = set()
    while functions:
        function = inspect.unwrap(functions.pop())
        if function in looked:
            continue
        looked.add(function)
        found = inspect.getclosurevars(function)
        names = function.__code__.co_names
        values = [*found.globals.values(), *found.nonlocals.values(), *(getattr(kind, name, None) for name in names)]
        values += [getattr(value, name, None) for value in values if inspect.ismodule(value) for name in names]
        homes = [value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) for value in values]
        if any(str(home).startswith(_DISTRIBUTED) for home in (*homes, *names)):
            return True
        functions += [
            value
            for value, home in zip(values, homes, strict=True)
            if inspect.isfunction(value) and not str(home).startswith("torch.")
        ]
    return False
