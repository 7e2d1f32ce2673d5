"""What layers are given by data of another distribution, while they normalize with that and with what they know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments, merge
from batchnorm.surgery.adaptation.predictions import Predictions, scores
from batchnorm.surgery.inspect.batches import Forward, call, moved, samples
from batchnorm.surgery.measuring.recorder import finite, given, moments_of
from batchnorm.surgery.measuring.sites import Site

__all__ = ["Share", "Target", "measure", "mixed"]

# The source's share in the statistics, where the target has so many samples.
Share = Callable[[int], float]


@dataclass
class Target:
    """What one pass has seen.

    Attributes:
        moments: of every layer that was reached, over all batches.
        batches, samples: that counted, and that were in them.
        skipped: batches that were skipped, since something in them was not finite.
    """

    moments: dict[Site, Moments] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    skipped: int = 0


def mixed(site: Site, target: Moments, source: float) -> tuple[Tensor, Tensor]:
    """Give the mean and the variance of source and target at the source's share, linear in both.

    The variance is the unbiased one (biased where the layer keeps that), the source's where the target has one value.
    """
    variance = target.biased_variance if site.biased else target.unbiased_variance
    variance = torch.where(target.count > 1, variance, site.var.to(variance.dtype))
    mean = torch.where(target.count > 0, target.mean, site.mean.to(variance.dtype))
    if source == 0:  # whatever it was: a source that is nan can be replaced
        return mean, variance
    return source * site.mean + (1 - source) * mean, source * site.var + (1 - source) * variance


@torch.no_grad()
def measure(
    model: nn.Module,
    data: Iterable[Any],
    sites: Sequence[Site],
    share: Share,
    forward: Forward | None,
    predictions: Predictions | None = None,
) -> Target:
    """Run the data through once, in evaluation; each batch is normalized by its own moments mixed with the source's.

    So the inputs of the second layer are those that the paper's adapted first layer makes. Works within ``preserved``,
    on a model in evaluation.

    Args:
        model: what the layers belong to.
        data: batches.
        sites: the layers.
        share: the source's.
        forward: as in ``batches.call``.
        predictions: where to note what the model says before and after, which costs a second forward.

    Raises:
        ValueError: no batches, or none whose moments are finite.
    """
    watch = _Watch(sites)
    target = Target()
    for batch in data:
        batch = moved(batch, model)
        before = None
        if predictions is not None and predictions.possible:
            watch.rest()
            before = scores(call(model, batch, forward))
            predictions.possible = before is not None
        watch.begin(share, samples(batch))
        after = scores(call(model, batch, forward))
        unfit = next((site for site, moments in watch.seen.items() if not finite(moments, site)), None)
        if unfit is not None:
            target.skipped += 1
            continue
        for site, moments in watch.seen.items():
            target.moments[site] = merge(target.moments[site], moments) if site in target.moments else moments
        target.batches, target.samples = target.batches + 1, target.samples + watch.size
        if predictions is not None and before is not None and after is not None:
            predictions.add(before, after)
    watch.rest()
    if target.batches == 0:
        raise ValueError(
            f"none of the {target.skipped} batches has finite moments in every layer: look for nan or infinity in the "
            "data" if target.skipped else "the data has no batches: give a tensor, or an iterable of batches"
        )  # fmt: skip
    return target


class _Watch:
    """Hooks that take the moments of a layer's input, and let the layer normalize with them and the source's."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.seen: dict[Site, Moments] = {}
        self.size = 0
        self._share: Share | None = None
        self._kept = {site: (site.mean.clone(), site.var.clone()) for site in sites}
        for site in sites:
            site.layer.register_forward_pre_hook(self._hook(site), with_kwargs=True)

    def rest(self) -> None:
        """Let the layers be what they were."""
        self._share = None
        for site, (mean, var) in self._kept.items():
            site.mean.copy_(mean)
            site.var.copy_(var)

    def begin(self, share: Share, size: int) -> None:
        """Forget the batch before; the next one, of so many samples, is mixed with the source's share.

        Of a batch that does not show how many it has, as objects do not, the first layer does.
        """
        self.rest()
        self.seen, self._share, self.size = {}, share, size

    def _hook(self, site: Site) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, mask = given(layer, args, kwargs)
            if self._share is None or not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
                return
            if x.dim() < 2 or x.shape[1] != len(site.mean):  # the layer will complain, or has a layout of its own
                return
            self.size = self.size or len(x)
            moments = moments_of(x, mask)
            if site in self.seen:
                moments = merge(self.seen[site], moments)
            self.seen[site] = moments
            mean, var = self._kept[site]
            site.mean.copy_(mean)
            site.var.copy_(var)
            mean, var = mixed(site, moments, self._share(self.size))
            site.mean.copy_(mean)
            site.var.copy_(var)

        return note
