"""Put a model back as it was after something has been tried on it, whatever happened meanwhile."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.surgery.inspect.restoring import Restoring

__all__ = ["Values", "preserved"]


class preserved(Restoring):  # noqa: N801 - it is used like a function
    """Leave a model after the block bit-identical to what it was before, also after an exception or a signal.

    That is: modes, buffers (the tensors and their values), momenta and all other attributes, which parameters and
    submodules there are, hooks, classes, `requires_grad`, gradients, the random generators of torch, Python and NumPy,
    and whether torch records gradients. Within the block parameters have no gradient, so that a backward there adds to
    none.

    Not kept are the values of parameters, which no forward changes: name those that the block will change. Nor is what
    attributes hold, other than lists, dictionaries and sets.

    Args:
        model: any module; lazy layers stay what they are.
        tensors: parameters, or others, whose values come back, too.

    Example:
        >>> with preserved(model), torch.no_grad():
        ...     model.train()
        ...     model(x)  # moves running statistics: in the block only
    """

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor] = ()) -> None:
        self._model, self._tensors = model, tuple(tensors)

    def note(self) -> None:
        """Take down all that comes back."""
        model = self._model
        self._modules = [_Kept(module) for module in model.modules()]
        self._parameters = [(p, p.detach(), p.requires_grad, p.grad) for p in model.parameters() if not is_lazy(p)]
        self._values = Values((*model.buffers(), *self._tensors))
        self._generators = _Generators()
        self._gradients = torch.is_grad_enabled()

    def change(self) -> None:
        """Put the gradients aside."""
        for p, *_ in self._parameters:
            p.grad = None

    def restore(self) -> None:
        """Put all back."""
        torch.set_grad_enabled(self._gradients)
        for module in self._modules:
            module.restore()
        for p, data, learns, grad in self._parameters:
            if p.data_ptr() != data.data_ptr() or p.dtype != data.dtype:
                p.data = data  # the model was moved, or made another dtype
            p.requires_grad_(learns)
            p.grad = grad
        self._values.restore()
        self._generators.restore()


class Values(Restoring):
    """The values of some tensors, to be written back: at the end of a block, or by ``restore`` alone."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._values = [(t, t.detach().clone()) for t in tensors if not is_lazy(t)]

    def restore(self) -> None:
        """Write those back that are not what they were; may be broken off, and begun again."""
        for t, value in self._values:
            _restore(t, value)


class _Kept:
    """One module's class and attributes; of containers, such as those of hooks, also what is in them."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind = module, type(module)
        self._attributes = dict(vars(module))
        containers = (a for a in self._attributes.values() if type(a) in (list, dict, OrderedDict, set))
        self._contents: list[tuple[Any, Any]] = [(container, container.copy()) for container in containers]

    def restore(self) -> None:
        if type(self._module) is not self._kind:
            self._module.__class__ = self._kind
        attributes = vars(self._module)
        attributes.clear()
        attributes.update(self._attributes)
        for container, content in self._contents:  # the same container: handles of hooks know it
            container.clear()
            add = container.extend if type(container) is list else container.update
            add(content)


class _Generators:
    """The states of all random generators."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _restore(t: Tensor, value: Tensor) -> None:
    """Write values back where they differ: a tensor that nobody has touched keeps its version for autograd."""
    data = t.detach()
    if data.shape != value.shape or data.dtype != value.dtype or data.device != value.device:
        t.data = value  # as `buffer.data = …` or `resize_` had changed it
    elif not _same(data, value):
        data.copy_(value)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits agree, by which nan equals nan."""
    if a.is_meta or a.layout is not torch.strided or a.is_quantized:
        return a.is_meta
    return torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))
