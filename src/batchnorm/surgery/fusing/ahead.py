"""An activation computed by the layer before it, where no forward can be changed: what comes next finds it done.

The forward stays as it is written. The layer returns its activated output as an ``Activated``; the function, method or
product with which the forward activates it then gives that output as it is. Whatever else reads it raises. What does
not even ask (C++, an ``autograd.Function``, and so a reentrant checkpoint) finds nan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.activations import Activation
from batchnorm.surgery.fusing.formulas import Y, in_place, step
from batchnorm.surgery.inspect.recorded import only_asks

__all__ = ["Activated", "Ahead"]


@dataclass
class Ahead:
    """Makes a layer apply an activation, and hand on that this is done.

    Attributes:
        activation: the one that the forward around the layer asks for next.
        name: the layer's, for messages.
    """

    activation: Activation
    name: str

    def __call__(self, y: Tensor) -> Tensor:
        """Mark the layer's activated output."""
        return _marked(y, Y, self)


class Activated(Tensor):
    """A layer's output that is activated already, or something that the forward computes from it on the way to that."""

    _value: Tensor
    _formula: str
    _by: Ahead
    _done: bool = False  # after an activation in place, who reads this object reads the result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map(_plain_if_done, (tuple(args), kwargs))
            marked = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Activated)]
            if not marked or only_asks(func):
                return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            first = marked[0]
            if all(a._value is first._value for a in marked):
                found = step(func, *tree_map(_formula, (args, kwargs)))
                if found == first._by.activation:
                    first._done = in_place(func, args, kwargs)
                    return first._value
                if isinstance(found, str):
                    return _marked(first._value, found, first._by)
        raise RuntimeError(
            f"{getattr(func, '__name__', func)} reads the output of {first._by.name}, which did not happen when the "
            f"model was fused: {first._by.activation.name} has been applied to it. Call batchnorm.revert, or fuse with "
            "example_inputs that take this path"
        )


def _marked(y: Tensor, formula: str, by: Ahead) -> Activated:
    made = y.detach().new_full((), float("nan")).expand_as(y).as_subclass(Activated)
    made._value, made._formula, made._by = y, formula, by
    return made


def _formula(value: Any) -> Any:
    return value._formula if isinstance(value, Activated) else value


def _plain(value: Any) -> Any:
    return value._value if isinstance(value, Activated) else value


def _plain_if_done(value: Any) -> Any:
    return value._value if isinstance(value, Activated) and value._done else value
