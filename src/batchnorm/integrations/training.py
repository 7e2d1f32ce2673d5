"""What the callbacks share: recalibration in the middle of a training that must not notice it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from batchnorm.surgery.inspect.batches import Forward
from batchnorm.surgery.inspect.restoring import completely
from batchnorm.surgery.measuring.sites import Site, sites_of
from batchnorm.surgery.recalibrate import Recalibrated, recalibrate

__all__ = ["Batches", "Recalibration", "undisturbed"]


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
        self._at = {at} if isinstance(at, str) else set(at)
        if not self._at or not self._at <= set(moments):
            raise ValueError(f"at is {at!r}: it should be {' or '.join(map(repr, moments))}, or several of them")
        inspect.signature(recalibrate).bind(None, data, **options)  # a TypeError now, not at the end
        self._data, self._forward, self._keep, self._options = data, forward, keep, options
        self.report: Recalibrated | None = None
        self._layers = options.get("layers")
        self._lent: list[tuple[_Values, _Values]] = []

    def at(self, moment: str) -> bool:
        """Whether this is a moment to recalibrate."""
        return moment in self._at

    def look(self, model: nn.Module, loader: Iterable[Any] | None) -> None:
        """Note, while a model trains, which layers do: an evaluation does not tell those that are held in evaluation.

        Raises:
            ValueError: if there is nothing to recalibrate, or the training's loader cannot be used.
        """
        if self._data is None and loader is not None:
            undisturbed(loader)
        sites, _ = sites_of(model, self._options.get("layers"))
        self._layers = sorted({site.layer_name for site in sites})

    def run(self, model: nn.Module, data: Iterable[Any] | None, forward: Forward | None = None) -> None:
        """Recalibrate for good.

        Args:
            model: in place.
            data: the training's batches, where no other data was given.
            forward: the framework's way to call the model, where no other was given.
        """
        self._lent = []
        data = data if self._data is None else self._data
        if data is None:
            raise ValueError("there is no training data to recalibrate with: give the callback data=")
        options = {**self._options, "layers": self._layers}
        with torch.inference_mode(False):  # in which an evaluation may be
            self.report = recalibrate(model, data, forward=self._forward or forward, **options)

    def lend(self, model: nn.Module, data: Iterable[Any] | None, forward: Forward | None = None) -> None:
        """Recalibrate until :meth:`put_back`."""
        self.put_back()
        with torch.inference_mode(False):
            sites, _ = sites_of(model, self._layers)
            before = [_Values(site) for site in sites]
            try:
                self.run(model, data, forward)
                if not self._keep:
                    self._lent = [(old, _Values(old.site)) for old in before]
            except BaseException:  # nobody would know what to put back
                for old in before:
                    completely(old.restore)
                raise

    def put_back(self) -> None:
        """Put the statistics of training back, layer by layer where nobody else has put other ones there.

        What averages weights may swap two models' values, statistics among them, between an evaluation's start and its
        end: then those of training are back already, and the recalibrated ones are where they belong, in the average.
        """
        completely(self._put_back)

    def _put_back(self) -> None:
        for before, written in self._lent:
            if written.still_there():
                before.restore()
        self._lent = []


class _Values:
    """What running statistics are at a time."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._values = [(t, t.detach().clone()) for t in (site.mean, site.var, site.batches) if t is not None]

    def still_there(self) -> bool:
        return all(torch.equal(t, value) for t, value in self._values)

    def restore(self) -> None:
        with torch.no_grad():
            for t, value in self._values:
                t.copy_(value)


class Batches:
    """Batches of a loader that training uses, as often as wanted, without training noticing.

    Args:
        loader: what training iterates over.
        limit: how many batches at most.
        prepare: what to do with each.
    """

    def __init__(
        self, loader: Iterable[Any], limit: int | None = None, prepare: Callable[[Any], Any] | None = None
    ) -> None:
        self._loader, self._limit, self._prepare = loader, limit, prepare

    def __iter__(self) -> Iterator[Any]:
        batches = islice(undisturbed(self._loader), self._limit)
        return batches if self._prepare is None else map(self._prepare, batches)


def undisturbed(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of the same data whose iteration changes nothing in this one.

    A DataLoader's samplers and generators advance as it is iterated over, and persistent workers serve one iteration
    alone. The new one has its own; it shares the data set and the functions. The wrapper of `accelerate` is left out,
    since it tells gradient accumulation about every batch. What is no DataLoader is returned itself.

    Raises:
        ValueError: if it cannot be copied, or is several loaders.
    """
    several = list(loader.values()) if isinstance(loader, Mapping) else loader if isinstance(loader, list) else []
    if any(isinstance(one, DataLoader) for one in several):
        raise ValueError("training reads several loaders at once: give the callback data=")
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner, DataLoader):
        return loader
    shared = (inner.dataset, inner.collate_fn, inner.worker_init_fn)
    memo = {id(one): one for one in shared}
    memo[id(inner._iterator)] = None  # the persistent workers
    try:
        return copy.deepcopy(inner, memo)
    except Exception as error:  # of a sampler of the user's, anything
        raise ValueError(
            f"the training's loader cannot be copied, to be read beside the training ({error}): give the callback data="
        ) from error
