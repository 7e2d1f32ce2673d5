"""What the callbacks share: recalibration in the middle of a training that must not notice it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchnorm.surgery.batches import Forward
from batchnorm.surgery.find import is_batch_norm
from batchnorm.surgery.recalibrate import Recalibrated, recalibrate

__all__ = ["Batches", "Recalibration", "check", "undisturbed"]


class Recalibration:
    """Recalibrates when a callback says so, and gives training its own running statistics back.

    Args:
        at: when; one or several of `moments`.
        moments: what the callback knows.
        data: batches; None for those of training.
        forward: as for :func:`batchnorm.recalibrate`.
        keep: let training go on with the recalibrated statistics.
        options: others of :func:`batchnorm.recalibrate`.

    Attributes:
        report: of the last recalibration; None before the first.
    """

    def __init__(
        self,
        at: str | Collection[str],
        moments: tuple[str, ...],
        data: Iterable[Any] | None,
        forward: Forward | None,
        keep: bool,
        options: dict[str, Any],
    ) -> None:
        self.at = {at} if isinstance(at, str) else set(at)
        if not self.at or not self.at <= set(moments):
            raise ValueError(f"at is {at!r}: it should be {' or '.join(map(repr, moments))}, or several of them")
        inspect.signature(recalibrate).bind(None, data, forward=forward, **options)  # a TypeError now, not after training
        self.data, self.forward, self.keep, self.options = data, forward, keep, options
        self.report: Recalibrated | None = None
        self._lent: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def run(self, model: nn.Module, data: Iterable[Any] | None, forward: Forward | None = None) -> None:
        """Recalibrate for good.

        Args:
            model: in place.
            data: the training's batches, where no other data was given.
            forward: the framework's way to call the model, where no other was given.
        """
        self._lent = []
        data = data if self.data is None else self.data
        if data is None:
            raise ValueError("there is no training data to recalibrate with: give the callback data=")
        with torch.inference_mode(False):  # which an evaluation may be in, and of which buffers would stay tensors
            self.report = recalibrate(model, data, forward=self.forward or forward, **self.options)

    def lend(self, model: nn.Module, data: Iterable[Any] | None, forward: Forward | None = None) -> None:
        """Recalibrate until :meth:`put_back`."""
        before = [[(b, b.detach().clone()) for b in layer] for layer in _statistics(model)]
        self.run(model, data, forward)
        if not self.keep:
            self._lent = [[(b, old, b.detach().clone()) for b, old in layer] for layer in before]

    def put_back(self) -> None:
        """Put the statistics of training back, layer by layer where nobody else has put other ones there.

        What averages weights may swap two models' values, statistics among them, between an evaluation's start and its
        end: then those of training are back already, and the recalibrated ones are where they belong, in the average.
        """
        with torch.no_grad():
            for layer in self._lent:
                if all(torch.equal(b, written) for b, _, written in layer):
                    for b, old, _ in layer:
                        b.copy_(old)
        self._lent = []


def check(model: nn.Module) -> None:
    """Say before training, and not after, that there is nothing to recalibrate.

    Raises:
        ValueError: if the model has no batch normalization with running statistics.
    """
    if not _statistics(model):
        raise ValueError(f"{type(model).__name__} has no batch normalization with running statistics to recalibrate")


def _statistics(model: nn.Module) -> list[list[Tensor]]:
    """The buffers of each batch normalization layer that has running statistics."""
    layers = [m for m in model.modules() if is_batch_norm(m) and getattr(m, "running_mean", None) is not None]
    return [list(m.buffers(recurse=False)) for m in layers]


class Batches:
    """Batches of a loader that training uses, as often as wanted, without training noticing.

    Args:
        loader: what training iterates over.
        limit: how many batches at most.
        prepare: what to do with each.
    """

    def __init__(self, loader: Iterable[Any], limit: int | None = None, prepare: Callable[[Any], Any] | None = None) -> None:
        self._loader, self._limit, self._prepare = loader, limit, prepare

    def __iter__(self) -> Iterator[Any]:
        batches = islice(undisturbed(self._loader), self._limit)
        return batches if self._prepare is None else map(self._prepare, batches)


def undisturbed(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of the same data whose iteration changes nothing in this one.

    A DataLoader's samplers and generators advance as it is iterated over, and persistent workers serve one iteration
    alone. The new one has its own; it shares the data set and the functions. The wrapper of `accelerate` is left out,
    since it tells gradient accumulation about every batch. What is no DataLoader is returned itself.
    """
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner, DataLoader):
        return loader
    shared = (inner.dataset, inner.collate_fn, inner.worker_init_fn)
    memo = {id(one): one for one in shared}
    memo[id(inner._iterator)] = None  # the persistent workers
    return copy.deepcopy(inner, memo)
