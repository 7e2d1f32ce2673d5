"""Passes over data that take the moments of layers' inputs; nothing here changes a model for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm.surgery.inspect.batches import Forward, call, moved, samples
from batchnorm.surgery.inspect.preserve import preserved
from batchnorm.surgery.measuring.clusters import Clusters
from batchnorm.surgery.measuring.recorder import Enough, Watch, finite, normalize_with_the_batch
from batchnorm.surgery.measuring.sites import Site, write
from batchnorm.surgery.measuring.together import Processes

__all__ = ["How", "Seen", "Stopped", "batch_by_batch", "evaluation", "layer_by_layer"]

Progress = Callable[[int, int | None], None]
Stopped = Literal["data", "batches", "tolerance"]

_FEW = 5  # batches, whose spread is too unsure to stop by


@dataclass
class How:
    """What a pass needs to know; ``recalibrate`` explains it."""

    forward: Forward | None
    batches: int | None
    tolerance: float | None
    progress: Progress | None
    done: int = 0
    passes: int = 1

    def report(self, data: Iterable[Any]) -> None:
        """Say that one more batch is done."""
        self.done += 1
        if self.progress is None:
            return
        known = [n for n in (_length(data), self.batches) if n is not None]
        self.progress(self.done, min(known) * self.passes if known else None)


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset has a length that raises
        return None


@dataclass
class Seen:
    """What one pass, or all passes, have seen.

    Attributes:
        clusters: of every site.
        batches, samples, dropped: that counted, that were in them, that were skipped for not being finite.
        stopped: what ended it.
        unfit: for sites that cannot be measured, the reason.
        culprit: the first layer with moments that were not finite.
    """

    clusters: dict[Site, Clusters]
    batches: int = 0
    samples: int = 0
    dropped: int = 0
    stopped: Stopped = "data"
    unfit: dict[Site, str] = field(default_factory=dict)
    culprit: str | None = None

    def add(self, seen: dict[Site, Any], size: int) -> None:
        """Add one batch, unless anything in it is not finite."""
        culprit = next((site.name for site, moments in seen.items() if not finite(moments, site)), None)
        if culprit is not None:
            self.culprit = self.culprit or culprit
            self.dropped += 1
            return
        for site, moments in seen.items():
            self.clusters[site] = self.clusters[site].merged(Clusters.of(moments))
        self.batches += 1
        self.samples += size

    def precise(self, tolerance: float) -> bool:
        """Whether all that was reached has standard errors below the tolerance."""
        reached = [(site, c) for site, c in self.clusters.items() if bool((c.batches > 0).any())]
        if self.batches < _FEW or not reached:
            return False
        return all(
            float(error[c.batches > 0].max()) <= tolerance for site, c in reached for error in c.errors(site.eps)
        )

    def packed(self) -> Tensor:
        """Give all numbers as one vector."""
        unfit = [float(site in self.unfit) for site in self.clusters]
        first = torch.tensor([self.batches, self.samples, self.dropped, *unfit], dtype=torch.float64, device="cpu")
        return torch.cat([first, *(c.packed().flatten().cpu() for c in self.clusters.values())])

    def everybodys(self, processes: Processes) -> Seen:
        """Merge what all processes have seen: the same in all of them, to the last bit."""
        if processes.size == 1:
            return self
        heard = processes.gathered(self.packed()).cpu()
        counts = heard[:, :3].sum(0)
        whole = Seen({}, int(counts[0]), int(counts[1]), int(counts[2]), self.stopped, dict(self.unfit), self.culprit)
        at = 3 + len(self.clusters)
        for number, (site, own) in enumerate(self.clusters.items()):
            if heard[:, 3 + number].any():
                whole.unfit.setdefault(site, "another process called it with something else than (N, C, …)")
            shape = own.packed().shape
            parts = [Clusters.unpacked(row[at : at + shape.numel()].view(shape)) for row in heard]
            merged = parts[0]
            for part in parts[1:]:
                merged = merged.merged(part)
            whole.clusters[site] = Clusters.unpacked(merged.packed().to(own.weight.device))
            at += shape.numel()
        return whole


def batch_by_batch(
    model: nn.Module, data: Iterable[Any], sites: Sequence[Site], how: How, processes: Processes
) -> Seen:
    """Measure all sites in one pass, in which every layer normalizes with its batch."""
    with _measuring(model, sites, sites) as watch:
        return _pass(model, data, sites, watch, how, processes)


def layer_by_layer(
    model: nn.Module, data: Iterable[Any], sites: Sequence[Site], how: How, processes: Processes
) -> Seen:
    """Measure one layer after the other, in the order of first calls, on what the layers before make in evaluation.

    Running statistics are written as they are found: works within ``preserved``.

    Raises:
        ValueError: if the data can be run through once only.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a {type(data).__name__}, which ends after one pass, and method='layerwise' needs one for each "
            "layer: give a list of batches or a DataLoader"
        )
    own: dict[str, list[Site]] = {}
    for site in sites:
        own.setdefault(site.layer_name, []).append(site)
    how.passes = 1 + len(own)
    calls = _calls(model, data, sites, how)
    order = processes.agreed(list(calls))
    how.passes = 1 + len(order)
    whole = Seen({site: Clusters.empty(tuple(site.mean.shape), site.mean.device) for site in sites})
    left = list(own)
    for name in order:
        rest = [site for other in left for site in own[other]]
        with _measuring(model, own[name], rest, calls.get(name)) as watch:
            seen = _pass(model, data, own[name], watch, how, processes)
        if seen.batches == 0:
            return seen  # which is an error for whoever asked
        whole.clusters.update(seen.clusters)
        whole.unfit.update(seen.unfit)
        whole.batches, whole.samples = max(whole.batches, seen.batches), max(whole.samples, seen.samples)
        whole.dropped, whole.culprit = max(whole.dropped, seen.dropped), whole.culprit or seen.culprit
        whole.stopped = seen.stopped
        left.remove(name)
        for site in own[name]:
            write(site, seen.clusters[site])
    return whole


@contextmanager
def _measuring(
    model: nn.Module, watched: Sequence[Site], with_batch: Sequence[Site], until: int | None = None
) -> Iterator[Watch]:
    """Make some layers normalize with their batch, and watch some; everything else is in evaluation."""
    with preserved(model):
        evaluation(model)
        for layer in {site.layer: None for site in with_batch}:
            normalize_with_the_batch(layer)
        yield Watch(watched, until)


def evaluation(model: nn.Module) -> None:
    """Put all modules into evaluation, without asking them: a ``train()`` of their own may do more than that."""
    for module in model.modules():
        module.training = False


def _calls(model: nn.Module, data: Iterable[Any], sites: Sequence[Site], how: How) -> dict[str, int | None]:
    """Run the data through once, in evaluation: the layers in the order in which they are first called.

    Returns:
        How often each is called in one forward; None if batches do not agree on it.
    """
    calls: dict[str, int | None] = {}
    with _measuring(model, sites, ()) as watch:
        names = {site.layer: site.layer_name for site in sites}
        for number, _ in enumerate(_forwards(model, data, watch, how)):
            here = {names[layer]: count for layer, count in watch.reached.items()}
            for name in {**calls, **here}:
                agreed = number == 0 or calls.get(name, 0) == here.get(name, 0)
                calls[name] = here.get(name) if agreed else None
    return calls


def _forwards(model: nn.Module, data: Iterable[Any], watch: Watch, how: How) -> Iterator[int]:
    """Run batch after batch; yields how many samples each has, when the watch has seen it."""
    for number, batch in enumerate(islice(data, how.batches), 1):
        watch.start()
        try:
            call(model, moved(batch, model), how.forward)
        except Enough:
            pass
        except Exception as error:
            if error.args and isinstance(error.args[0], str):
                error.args = (f"batch {number} of the data: {error.args[0]}", *error.args[1:])
            raise
        how.report(data)
        yield samples(batch) or watch.rows


def _pass(
    model: nn.Module, data: Iterable[Any], sites: Sequence[Site], watch: Watch, how: How, processes: Processes
) -> Seen:
    """Run through the data until it ends, or is enough; all processes stop together."""
    own = Seen({site: Clusters.empty(tuple(site.mean.shape), site.mean.device) for site in sites}, unfit=watch.unfit)
    watch.before, numbers = own.clusters, own.packed().numel()
    forwards, taken, done = _forwards(model, data, watch, how), 0, False
    while not done:
        size = next(forwards, None)
        if size is None:
            done = True
            own.stopped = "batches" if taken == how.batches else "data"
        else:
            taken += 1
            own.add(watch.seen, size)
        if how.tolerance is not None:
            all_done = processes.all_done(done, numbers)
            whole = own.everybodys(processes)
            if whole.precise(how.tolerance):
                whole.stopped = "tolerance"
                return whole
            if all_done:
                return whole
            done = False  # the others may have more
    processes.all_done(True, numbers)
    return own.everybodys(processes)
