"""The tensors in whatever a forward returns or a module keeps, and copies of models."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

__all__ = ["copied", "copy_sharing_parameters", "tensors_in"]


_EMPTY = (dict, OrderedDict, set)
_PLAIN = (type(None), bool, int, float, str)
_TENSORS = ("_parameters", "_buffers")


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in tuples, lists, dicts, dataclasses and plain objects, within each other, each once."""
    return list(_tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            for part in _parts(leaf):
                yield from _tensors(part, seen)


def _parts(value: Any) -> list[Any]:
    """What a value that is no tensor holds."""
    if isinstance(value, (str, bytes, type, nn.Module)) or callable(value):
        return []
    held = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if dataclasses.is_dataclass(value):
        held += [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return held + list(value.values())
    return held + (list(value) if isinstance(value, Collection) else [])


def copied(module: Any, memo: dict[int, Any] | None = None) -> Any:
    """Copy a module; tensors of a graph, which a forward has kept as attributes and torch does not copy, without it.

    Args:
        module: it is left as it was.
        memo: what stands for the objects with these ids in the copy.
    """
    # Every module has a dozen dicts for hooks, nearly all of them empty: to copy these would take most of the time.
    held = [value for part in module.modules() for value in vars(part).values() if type(value) in _EMPTY]
    memo = {id(value): type(value)() for value in held if not value} | (memo or {})
    try:
        return _copied(module, dict(memo))
    except RuntimeError:
        held = [value for part in module.modules() for value in vars(part).values() if not isinstance(value, nn.Module)]
        kept = {id(t): t.detach().clone() for t in tensors_in(held) if t.grad_fn is not None}
        if not kept:
            raise
        return _copied(module, kept | memo)


def copy_sharing_parameters(module: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Copy a module to try things on; it shares the parameters, which no forward changes, and nothing else.

    Returns:
        The copy, and for each of its parts the original part.
    """
    twin = copied(module, {id(p): p for p in module.parameters() if not is_lazy(p)})
    return twin, dict(zip(twin.modules(), module.modules(), strict=True))


def _copied(module: Any, memo: dict[int, Any]) -> Any:
    for part in module.modules():
        if part is not module and id(part) not in memo and _is_simple(part):
            memo[id(part)] = _simple_copy(part, memo)
    return copy.deepcopy(module, memo)


def _is_simple(part: nn.Module) -> bool:
    """Whether a module is one of torch's own, holds tensors and plain values alone, and nothing says how to copy it."""
    kind = type(part)
    if not kind.__module__.startswith("torch.nn.modules.") or part._modules or hasattr(kind, "__deepcopy__"):
        return False
    return kind.__reduce_ex__ is object.__reduce_ex__ and all(
        type(value) in _PLAIN
        or (type(value) in _EMPTY and (not value or name in _TENSORS))
        or (type(value) is tuple and all(type(v) in _PLAIN for v in value))
        for name, value in vars(part).items()
    )


def _simple_copy(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy`` makes of it, in a fifth of the time."""
    twin = type(part).__new__(type(part))
    for name, value in vars(part).items():
        if type(value) in _EMPTY:
            value = {key: copy.deepcopy(t, memo) for key, t in value.items()} if value else memo[id(value)]
        vars(twin)[name] = value
    return twin
