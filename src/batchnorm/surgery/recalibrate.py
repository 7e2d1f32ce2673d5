"""Take the running statistics of batch normalization anew, over data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.surgery.inspect.batches import Forward, force_eager, unwrapped
from batchnorm.surgery.inspect.preserve import Values
from batchnorm.surgery.inspect.restoring import completely
from batchnorm.surgery.measuring.clusters import Clusters
from batchnorm.surgery.measuring.passes import (
    Options,
    PassResult,
    Stopped,
    batch_by_batch,
    in_evaluation,
    layer_by_layer,
)
from batchnorm.surgery.measuring.process_group import ProcessGroup
from batchnorm.surgery.measuring.sites import Site, sites_of, write
from batchnorm.surgery.report import Report, listed

__all__ = ["Change", "LayerChange", "Recalibrated", "recalibrate"]

Method = Literal["batch", "layerwise"]

_METHODS = {"batch": batch_by_batch, "layerwise": layer_by_layer}


class Change(NamedTuple):
    """The largest change of a channel, and the root of the mean square over channels."""

    max: float
    rms: float


@dataclass(frozen=True)
class LayerChange:
    """What recalibration has changed in one set of running statistics, and how sure it is of the new ones.

    Attributes:
        count: how many values a channel were seen; the sum of the weights where a mask had weights.
        mean_change: of the mean, in new standard deviations, ``√(variance + eps)``.
        scale_change: of the standard deviation, in new ones. Infinite where the old statistics were not finite.
        mean_error: the largest standard error of a channel's mean, in its standard deviations; infinite after fewer
            than two batches.
        variance_error: the largest standard error of a channel's variance, relative to ``variance + eps``.
    """

    count: float
    mean_change: Change
    scale_change: Change
    mean_error: float
    variance_error: float

    def __str__(self) -> str:
        return (
            f"mean moved by {self.mean_change.max:.2g} deviations at most, deviation by {self.scale_change.max:.1%}; "
            f"standard errors {self.mean_error:.2g}, {self.variance_error:.2g}"
        )


@dataclass(frozen=True)
class Recalibrated(Report):
    """What ``recalibrate`` has done.

    Attributes:
        layers: for every layer that has new statistics, by its qualified name, what changed; a recurrent layer has
            several sets, ``lstm.hh_l0``.
        skipped: the name of every batch normalization layer that was skipped, and why.
        batches, samples: that the statistics are of, from all processes.
        allowed: how many batches could have been taken, in every process; None for all.
        skipped_batches: that were skipped, since a layer's moments were not finite.
        stopped: what came first: the end of the "data", the number of "batches", or the "tolerance".
        metric_before, metric_after: in evaluation, if a metric was given.
    """

    layers: dict[str, LayerChange]
    skipped: dict[str, str]
    batches: int
    samples: int
    skipped_batches: int = 0
    allowed: int | None = None
    stopped: Stopped = "data"
    metric_before: float | None = None
    metric_after: float | None = None

    def __str__(self) -> str:
        short = self.stopped == "data" and self.allowed is not None
        ended = f"the data ended before the {self.allowed} that were allowed" if short else "the data ended"
        ends = {"data": ended, "batches": "as many as were allowed", "tolerance": "precise enough"}
        lines = [
            f"{len(self.layers)} recalibrated, {len(self.skipped)} skipped: "
            f"{self.batches} batches, {self.samples} samples ({ends[self.stopped]})"
        ]
        if self.skipped_batches:
            lines.append(f"  {self.skipped_batches} batches skipped: not finite")
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"  metric: {self.metric_before:.6g} before, {self.metric_after:.6g} after")
        return self._text(lines, {name: str(layer) for name, layer in self.layers.items()})


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    batches: int | None = None,
    tolerance: float | None = None,
    method: Method = "batch",
    metric: Callable[[nn.Module], float] | None = None,
    layers: str | Iterable[str] | None = None,
    process_group: Any = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Recalibrated:
    """Make all running statistics the mean and the unbiased variance of everything that the layers see in the data.

    In place. Every value counts once, however uneven the batches are, in float64. Only ``running_mean``,
    ``running_var`` and ``num_batches_tracked`` change, the last to the number of batches that were seen, with which
    ``momentum=None`` goes on averaging. After any error, Ctrl-C or other signal the model is bit-identical to before.

    Meanwhile only the layers to be recalibrated are in training: dropout is off, and layers that are frozen, or held
    in evaluation while the model trains, stay as they are. Masks count. Policies of statistics do not hold: every layer
    normalizes with the whole batch of its process. A batch in which any layer's moments are not finite is skipped.

    Args:
        model: any module; its layers may be torch.nn's, ours, their subclasses, or recurrent ones of ours.
        data: batches, of which a tensor is the model's input, of a tuple or list the first element is, and a dict holds
            keyword arguments.
        forward: how to call the model instead, ``forward(model, batch)``.
        batches: take no more than so many (in every process).
        tolerance: stop as soon as the standard errors of all layers are below, those of means in standard deviations,
            those of variances relative; after five batches at the earliest.
        method: "batch": one pass, in which every layer normalizes with its batch. "layerwise": a pass for each layer,
            in the order of the forward, on what the layers before it make in evaluation with their new statistics,
            after one pass to find that order. It does not depend on the size of the batches.
        metric: called with the model in evaluation, without gradients, before and after; of the report only.
        layers: names of layers, or of modules that hold them, to restrict this to.
        process_group: of ``torch.distributed``, whose processes merge what they see, each of its own data, which may
            differ in length; all must call this. None for the default group, where there is one.
        progress: called after each batch with how many are done and how many there are, None if that is not known.

    Raises:
        ValueError: no data, no layers, no batch with finite moments, unusable arguments.
        RuntimeError: in all other processes, if this fails in one.

    An error in the model's forward comes through with the number of the batch.

    Example:
        >>> print(batchnorm.recalibrate(model, loader, batches=100))
        20 recalibrated, 0 skipped: 100 batches, 6400 samples (as many as were allowed) …

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3 (precise BN); for
    "layerwise", the same section's remark that statistics of deeper layers depend on those before.
    """
    _check_arguments(data, batches, tolerance, method)
    options = Options(forward, batches, tolerance, progress)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with ProcessGroup(process_group, device) as group:
        sites, skipped = sites_of(model, layers)
        old = Values(t for site in sites for t in (site.mean, site.var, site.batches) if t is not None)
        with old, force_eager():
            before = None if metric is None else _measured(model, metric)
            seen = _METHODS[method](unwrapped(model), data, sites, options, group)
            renewed = _renewed(seen, skipped)
            after = None if metric is None else _measured(model, metric, renewed)
        changes = {site.name: _change(site, clusters) for site, clusters in renewed.items()}
        report = Recalibrated(
            changes, skipped, seen.batches, seen.samples, seen.dropped, batches, seen.stopped, before, after
        )
        group.barrier()
    try:
        _write(renewed)
        return report
    except BaseException:
        completely(old.restore)
        raise


def _check_arguments(data: Any, batches: int | None, tolerance: float | None, method: str) -> None:
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, such as a DataLoader or [x], got {type(data).__name__}")
    if batches is not None and batches < 1:
        raise ValueError(f"batches must be at least 1, or None for all, got {batches}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, or None, got {tolerance}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")


def _renewed(seen: PassResult, skipped: dict[str, str]) -> dict[Site, Clusters]:
    """Give what has been seen of which sites; the others join those that are skipped."""
    if seen.batches + seen.dropped == 0:
        raise ValueError("the data is empty: no batch came (a generator gives its batches only once)")
    if seen.batches == 0:
        where = "another process" if seen.culprit is None else f"the layer {seen.culprit!r}"
        raise ValueError(
            f"none of the batches ({seen.dropped}) could be used: in {where} the moments "
            "were not finite, or too large for the dtype of its running statistics"
        )
    renewed = {}
    for site, clusters in seen.clusters.items():
        if site in seen.unfit:
            skipped[site.name] = seen.unfit[site]
        elif not bool((clusters.batches > 0).any()):
            skipped[site.name] = "no forward called it"
        elif not bool((clusters.total.count > 1).any()):
            skipped[site.name] = "it saw one value a channel at most, which has no variance"
        else:
            renewed[site] = clusters
    if not renewed:
        raise ValueError("no layer saw anything to take statistics of" + listed(skipped))
    return renewed


def _change(site: Site, clusters: Clusters) -> LayerChange:
    """Compare a site's statistics, which are still the old ones, with what was seen."""
    total, enough = clusters.total, clusters.total.count > 1
    variance = site.variance(total)[enough]
    scale = (variance + site.eps).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    mean_change = (total.mean[enough] - site.mean[enough].double()).abs() / scale
    scale_change = ((site.var[enough].double() + site.eps).sqrt() / scale - 1).abs()
    mean_error, variance_error = clusters.errors(site.eps)
    count = total.count if total.count.dim() == 1 else total.count.sum(0)
    return LayerChange(
        float(count.max()), _over_channels(mean_change), _over_channels(scale_change),
        float(mean_error[enough].max()), float(variance_error[enough].max()),
    )  # fmt: skip


def _over_channels(change: Tensor) -> Change:
    change = change.nan_to_num(nan=math.inf, posinf=math.inf)
    return Change(float(change.max()), float(change.square().mean().sqrt()))


def _write(renewed: Mapping[Site, Clusters]) -> None:
    for site, clusters in renewed.items():
        write(site, clusters)


def _measured(
    model: nn.Module, metric: Callable[[nn.Module], float], renewed: Mapping[Site, Clusters] | None = None
) -> float:
    """What a metric says of the model, perhaps with new statistics."""
    with in_evaluation(model):
        _write(renewed or {})
        return float(metric(model))
