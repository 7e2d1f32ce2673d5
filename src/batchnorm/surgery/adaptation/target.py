"""What layers are given by data of another distribution, while they normalize with that and with what they know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.surgery.adaptation.predictions import Predictions, scores
from batchnorm.surgery.inspect.batches import Forward, call, moved, samples
from batchnorm.surgery.measuring.passes import PassResult, in_batch, in_evaluation
from batchnorm.surgery.measuring.recorder import Recorder
from batchnorm.surgery.measuring.sites import Site

__all__ = ["Share", "measure", "mixed"]

# The source's share in the statistics, where the target has so many samples.
Share = Callable[[int], float]


def mixed(site: Site, target: Moments, source: float) -> tuple[Tensor, Tensor]:
    """Give the mean and the variance of source and target at the source's share, linear in both.

    The variance is the unbiased one (biased where the layer keeps that), the source's where the target has one value.
    """
    variance = site.variance(target)
    variance = torch.where(target.count > 1, variance, site.var.to(variance.dtype))
    mean = torch.where(target.count > 0, target.mean, site.mean.to(variance.dtype))
    if source == 0:  # whatever it was: a source that is nan can be replaced
        return mean, variance
    return source * site.mean + (1 - source) * mean, source * site.var + (1 - source) * variance


def measure(
    model: nn.Module,
    data: Iterable[Any],
    sites: Sequence[Site],
    share: Share,
    forward: Forward | None,
    predictions: Predictions | None = None,
) -> PassResult:
    """Run the data through once, in evaluation; each batch is normalized by its own moments mixed with the source's.

    So the inputs of the second layer are those that the paper's adapted first layer makes.

    Args:
        model: what the layers belong to; afterwards it is what it was.
        data: batches.
        sites: the layers.
        share: the source's.
        forward: as in ``batches.call``.
        predictions: where to note what the model says before and after, which costs a second forward.

    Raises:
        ValueError: no batches, or none whose moments are finite.
    """
    source = {site: (site.mean.clone(), site.var.clone()) for site in sites}

    def put(site: Site, mean: Tensor, var: Tensor) -> None:
        site.mean.copy_(mean)
        site.var.copy_(var)

    def mix(site: Site, moments: Moments) -> None:
        put(site, *source[site])
        put(site, *mixed(site, moments, share(recorder.samples)))

    with in_evaluation(model):
        recorder = Recorder(sites, then=mix)
        found = PassResult.over(sites)
        for number, batch in enumerate(data, 1):
            batch = moved(batch, model)
            before = after = None
            for site in sites:
                put(site, *source[site])
            with in_batch(number):
                if predictions is not None and predictions.possible:
                    recorder.pause()
                    before = scores(call(model, batch, forward))
                    predictions.possible = before is not None
                recorder.start(samples(batch))
                after = scores(call(model, batch, forward))
            if found.add(recorder) and predictions is not None and before is not None and after is not None:
                predictions.add(before, after)
    if found.batches == 0:
        raise ValueError(
            f"none of the {found.dropped} batches has finite moments in every layer: look for nan or infinity in the "
            "data" if found.dropped else "the data has no batches: give a tensor, or an iterable of batches"
        )  # fmt: skip
    return found
