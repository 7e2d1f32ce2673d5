"""Batches of data as users have them, and how a model is called with one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.surgery.inspect.restoring import Restoring

__all__ = ["Forward", "call", "force_eager", "inputs", "moved", "samples", "unwrapped"]

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Call a model with one batch.

    Args:
        model: any module.
        batch: what the data gives. A tensor, or a packed sequence, is the model's argument; of a tuple or list, as of
            inputs and targets, the first element is; a dict holds keyword arguments, of which those that the model's
            forward does not name are left out.
        forward: what to do instead, ``forward(model, batch)``.
    """
    if forward is not None:
        return forward(model, batch)
    given = inputs(model, batch)
    return model(**given) if isinstance(given, dict) else model(*given)


def inputs(model: nn.Module, batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    """Return what :func:`call` gives to a model: a tuple of one argument, or keyword arguments."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name in _arguments(model, batch)}
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):  # which is a tuple, too
        if not batch:
            raise ValueError("a batch is an empty tuple: the first element should be the model's input")
        return (batch[0],)
    return (batch,)


def moved(batch: Any, model: nn.Module) -> Any:
    """Bring the tensors of a batch to the device of the model, that of its first parameter or buffer."""
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    if first is None or first.is_meta:
        return batch
    batch = dict(batch) if isinstance(batch, Mapping) else batch

    def known(t: Any) -> bool:
        return isinstance(t, (Tensor, PackedSequence))

    return tree_map(lambda t: t.to(first.device) if known(t) else t, batch, is_leaf=known)


def samples(batch: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor that has one; 0 if there is none."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    return next((t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 0), 0)


def unwrapped(model: nn.Module) -> nn.Module:
    """Call a model itself rather than what makes it parallel, which would send buffers to other processes."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    inner: nn.Module = model.module if isinstance(model, wrappers) else model
    return inner


class force_eager(Restoring):  # noqa: N801 - it is used like a function
    """Let compiled models run as they are written: what was compiled does not know hooks that came later."""

    _stance: Any = None

    def change(self) -> None:
        """Let nothing that is compiled run."""
        if "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def restore(self) -> None:
        """Let it run again."""
        if self._stance is not None:
            self._stance.__exit__(None, None, None)


def _arguments(model: nn.Module, batch: Mapping[str, Any]) -> set[str]:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return set(batch)
    return set(parameters)
