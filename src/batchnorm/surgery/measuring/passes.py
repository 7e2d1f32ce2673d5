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
from batchnorm.surgery.measuring.process_group import ProcessGroup
from batchnorm.surgery.measuring.recorder import Recorder, Stop, finite, normalize_with_the_batch
from batchnorm.surgery.measuring.sites import Site, write

__all__ = [
    "Options",
    "PassResult",
    "Stopped",
    "as_evaluated",
    "batch_by_batch",
    "in_batch",
    "in_evaluation",
    "layer_by_layer",
]

Progress = Callable[[int, int | None], None]
Stopped = Literal["data", "batches", "tolerance"]

_FEW = 5  # batches, whose spread is too unsure to stop by


@dataclass
class Options:
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
class PassResult:
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

    @classmethod
    def over(cls, sites: Iterable[Site], unfit: dict[Site, str] | None = None) -> PassResult:
        """Begin with no batches."""
        clusters = {site: Clusters.empty(tuple(site.mean.shape), site.mean.device) for site in sites}
        return cls(clusters, unfit={} if unfit is None else unfit)

    def add(self, recorder: Recorder) -> bool:
        """Add the batch that was recorded, unless anything in it is not finite; whether it was added."""
        culprit = next((site.name for site, moments in recorder.seen.items() if not finite(moments, site)), None)
        if culprit is not None:
            self.culprit = self.culprit or culprit
            self.dropped += 1
            return False
        for site, moments in recorder.seen.items():
            self.clusters[site] = self.clusters[site].merged(Clusters.of(moments))
        self.batches += 1
        self.samples += recorder.samples
        return True

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

    def merged_over(self, group: ProcessGroup) -> PassResult:
        """Merge what all processes have seen: the same in all of them, to the last bit."""
        if group.size == 1:
            return self
        heard = group.gathered(self.packed()).cpu()
        counts = heard[:, :3].sum(0)
        whole = PassResult(
            {}, int(counts[0]), int(counts[1]), int(counts[2]), self.stopped, dict(self.unfit), self.culprit
        )
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
    model: nn.Module, data: Iterable[Any], sites: Sequence[Site], options: Options, group: ProcessGroup
) -> PassResult:
    """Measure all sites in one pass, in which every layer normalizes with its batch."""
    with _measuring(model, sites, sites) as recorder:
        return _pass(model, data, sites, recorder, options, group)


def layer_by_layer(
    model: nn.Module, data: Iterable[Any], sites: Sequence[Site], options: Options, group: ProcessGroup
) -> PassResult:
    """Measure one layer after the other, in the order of first calls, on what the layers before make in evaluation.

    Running statistics are written as they are found; who calls this puts the old ones back.

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
    options.passes = 1 + len(own)
    calls = _calls(model, data, sites, options)
    order = group.agreed(list(calls))
    options.passes = 1 + len(order)
    whole = PassResult.over(sites)
    left = list(own)
    for name in order:
        rest = [site for other in left for site in own[other]]
        with _measuring(model, own[name], rest, calls.get(name)) as recorder:
            seen = _pass(model, data, own[name], recorder, options, group)
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


def as_evaluated(
    model: nn.Module, data: Iterable[Any], sites: Sequence[Site], options: Options, group: ProcessGroup
) -> tuple[PassResult, dict[Site, int]]:
    """Measure all sites in one pass in evaluation, with the statistics as they are.

    Returns:
        What was seen; and how often each site's layer was called for the last batch, in the order of first calls.
    """
    with _measuring(model, sites, ()) as recorder:
        seen = _pass(model, data, sites, recorder, options, group)
        return seen, {site: recorder.reached[site.layer] for site in recorder.seen}


@contextmanager
def _measuring(
    model: nn.Module, recorded: Sequence[Site], with_batch: Sequence[Site], until: int | None = None
) -> Iterator[Recorder]:
    """Make some layers normalize with their batch, and record some; everything else is in evaluation."""
    with in_evaluation(model):
        for layer in {site.layer: None for site in with_batch}:
            normalize_with_the_batch(layer)
        yield Recorder(recorded, until)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation without gradients, for the block, after which the model is what it was.

    The modules are not asked: a ``train()`` of their own may do more than that.
    """
    with preserved(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def in_batch(number: int) -> Iterator[None]:
    """Run a forward for as long as somebody needs it, and give its error the number of the batch."""
    try:
        yield
    except Stop:
        pass
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (f"batch {number} of the data: {error.args[0]}", *error.args[1:])
        raise


def _calls(model: nn.Module, data: Iterable[Any], sites: Sequence[Site], options: Options) -> dict[str, int | None]:
    """Run the data through once, in evaluation: the layers in the order in which they are first called.

    Returns:
        How often each is called in one forward; None if batches do not agree on it.
    """
    calls: dict[str, int | None] = {}
    with _measuring(model, sites, ()) as recorder:
        names = {site.layer: site.layer_name for site in sites}
        for number, _ in enumerate(_forwards(model, data, recorder, options)):
            here = {names[layer]: count for layer, count in recorder.reached.items()}
            for name in {**calls, **here}:
                agreed = number == 0 or calls.get(name, 0) == here.get(name, 0)
                calls[name] = here.get(name) if agreed else None
    return calls


def _forwards(model: nn.Module, data: Iterable[Any], recorder: Recorder, options: Options) -> Iterator[int]:
    """Run batch after batch, each of which the recorder has seen when its number is given."""
    for number, batch in enumerate(islice(data, options.batches), 1):
        recorder.start(samples(batch))
        with in_batch(number):
            call(model, moved(batch, model), options.forward)
        options.report(data)
        yield number


def _pass(
    model: nn.Module, data: Iterable[Any], sites: Sequence[Site], recorder: Recorder, options: Options,
    group: ProcessGroup,
) -> PassResult:  # fmt: skip
    """Run through the data until it ends, or is enough; all processes stop together."""
    own = PassResult.over(sites, recorder.unfit)
    recorder.before, numbers = own.clusters, own.packed().numel()
    forwards = _forwards(model, data, recorder, options)
    whole, taken, all_ended = own, 0, False
    while not all_ended:
        ended = next(forwards, None) is None
        if ended:
            own.stopped = "batches" if taken == options.batches else "data"
        else:
            taken += 1
            own.add(recorder)
        if options.tolerance is None and not ended:
            continue
        all_ended = group.all_done(ended, numbers)  # where others have more, this one waits with what it has
        whole = own.merged_over(group)
        if options.tolerance is not None and whole.precise(options.tolerance):
            whole.stopped = "tolerance"
            break
    return whole
