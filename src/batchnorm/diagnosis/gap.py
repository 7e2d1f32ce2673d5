"""How far evaluation is from training, on the same data: layer by layer, and in the user's metric.

In training every layer normalizes with its batch, so that what a layer is given does not depend on the running
statistics of those before it. Its own gap is the distance between its running statistics and the moments of that. In
evaluation a layer whose own statistics are right is given something else, where those before it are wrong: it follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.surgery.inspect.batches import Forward, force_eager, unwrapped
from batchnorm.surgery.measuring.clusters import Clusters
from batchnorm.surgery.measuring.passes import Options, PassResult, as_evaluated, batch_by_batch, in_evaluation
from batchnorm.surgery.measuring.process_group import ProcessGroup
from batchnorm.surgery.measuring.recorder import normalize_with_the_batch
from batchnorm.surgery.measuring.sites import Site, sites_of, write

__all__ = ["Arms", "Gap", "measured"]

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Arms:
    """The metric of one model, evaluated in three ways.

    Attributes:
        running: by its running statistics, as it is evaluated.
        batch: by each batch's own moments, without moving anything.
        recalibrated: by the statistics of the data, as ``recalibrate`` would write them.
    """

    running: float
    batch: float
    recalibrated: float

    @property
    def closed(self) -> float | None:
        """Which share of the gap to the batch's moments recalibration closes; None where there is no gap."""
        gap = self.batch - self.running
        return None if abs(gap) < 1e-9 else (self.recalibrated - self.running) / gap


@dataclass(frozen=True)
class Gap:
    """The gap between training and evaluation.

    Attributes:
        batches, samples: that it was measured on.
        order: the layers in the order of their first calls.
        own: for each layer, how far its running statistics are from the moments of what it is given in training.
        given: the same of what it is given in evaluation.
        noise: how far they could be for chance alone: the standard error of the moments.
        values: how many values a channel of each layer had in a batch, in the mean.
        calls: how often each layer was called for one batch.
        arms: the metric, if one was given.

    Distances are in standard deviations for means, and in natural logarithms of standard deviations; the larger of
    both, as the root of the mean square over channels.
    """

    batches: int
    samples: int
    order: tuple[str, ...]
    own: dict[str, float]
    given: dict[str, float]
    noise: dict[str, float]
    values: dict[str, float]
    calls: dict[str, int]
    arms: Arms | None


def measured(
    model: nn.Module, data: Iterable[Any], metric: Metric | None, forward: Forward | None, batches: int | None
) -> Gap:
    """Measure the gap; the model is bit-identical afterwards.

    Args:
        model: in any mode.
        data: batches that can be run through twice, as for ``batchnorm.recalibrate``; so are ``forward``, ``batches``.
        metric: called with the model, without gradients.

    Raises:
        ValueError: if there is no layer to measure, no data, or data that ends after one pass.
    """
    if iter(data) is data:
        raise ValueError(
            f"data is a {type(data).__name__}, which ends after one pass, and two are needed: give a list of batches "
            "or a DataLoader"
        )
    sites, _ = sites_of(model, task="measure")
    options = Options(forward, batches, None, None)
    with ProcessGroup(None, sites[0].mean.device) as group, force_eager():
        inner = unwrapped(model)
        seen = batch_by_batch(inner, data, sites, options, group)
        if seen.batches == 0:
            raise ValueError("no batch of the data could be used: there is none, or their moments are not finite")
        evaluated, calls = as_evaluated(inner, data, sites, options, group)
        arms = None if metric is None else _arms(model, metric, seen)
    return Gap(
        seen.batches, seen.samples, tuple(site.name for site in calls),
        {site.name: _distance(site, seen.clusters[site]) for site in calls},
        {site.name: _distance(site, evaluated.clusters[site]) for site in calls},
        {site.name: _noise(site, seen.clusters[site]) for site in calls},
        {site.name: _values(seen.clusters[site]) / n for site, n in calls.items()},
        {site.name: n for site, n in calls.items()}, arms,
    )  # fmt: skip


def _arms(model: nn.Module, metric: Metric, seen: PassResult) -> Arms:
    with in_evaluation(model):
        running = float(metric(model))
    with in_evaluation(model):
        for layer in {site.layer: None for site in seen.clusters}:
            normalize_with_the_batch(layer)
        batch = float(metric(model))
    with in_evaluation(model):
        for site, clusters in seen.clusters.items():
            write(site, clusters)
        recalibrated = float(metric(model))
    return Arms(running, batch, recalibrated)


def _distance(site: Site, clusters: Clusters) -> float:
    total = clusters.total
    known = total.count > 1
    if not bool(known.any()):
        return 0.0
    variance = site.variance(total)[known] + site.eps
    shift = (site.mean.double()[known] - total.mean[known]) / variance.sqrt()
    scale = 0.5 * ((site.var.double()[known] + site.eps) / variance).log()
    return max(_size(shift), _size(scale))


def _values(clusters: Clusters) -> float:
    return float((clusters.total.count / clusters.batches.clamp(min=1)).max())


def _noise(site: Site, clusters: Clusters) -> float:
    """Standard errors of means, and of logarithms of deviations; 0 after one batch, whose spread is unknown."""
    means, variances = clusters.errors(site.eps)
    known = clusters.batches > 0
    return max(_size(means[known]), 0.5 * _size(variances[known])) if clusters.batches.max() > 1 else 0.0


def _size(values: Tensor) -> float:
    return float(values.nan_to_num(torch.inf, torch.inf, torch.inf).square().mean().sqrt()) if values.numel() else 0.0
