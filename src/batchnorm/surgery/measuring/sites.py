"""Which running statistics a model has that a pass over data can renew, and which it must leave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.moments import Moments
from batchnorm.recurrent.base import Recurrent
from batchnorm.statistics import resolve
from batchnorm.surgery.inspect.find import NO_STATISTICS, is_batch_norm, is_frozen, is_known
from batchnorm.surgery.inspect.reading import read
from batchnorm.surgery.measuring.clusters import Clusters
from batchnorm.surgery.report import listed

__all__ = ["Site", "sites_of", "write"]


@dataclass(frozen=True, eq=False)
class Site:
    """One set of running statistics of a layer.

    Attributes:
        name: the layer's qualified name; a recurrent layer has several sets, ``lstm.hh_l0``.
        layer, layer_name: whose they are, and its name.
        mean, var: the buffers, ``(C,)``, or ``(max_steps, C)`` of a recurrent layer.
        batches: the counter, if there is one: 0-dimensional, or ``(max_steps,)``.
        eps: the layer's.
        biased: whether ``var`` holds the biased variance, as ``Renorm`` has it.
    """

    name: str
    layer: nn.Module
    layer_name: str
    mean: Tensor
    var: Tensor
    batches: Tensor | None
    eps: float
    biased: bool

    def variance(self, seen: Moments) -> Tensor:
        """The variance of what was seen, as ``var`` holds it."""
        return seen.biased_variance if self.biased else seen.unbiased_variance


def sites_of(
    model: nn.Module, layers: str | Iterable[str] | None = None, task: str = "recalibrate"
) -> tuple[list[Site], dict[str, str]]:
    """Find what can be recalibrated; a layer with several names is found under the first.

    Args:
        model: any module.
        layers: names of layers, or of modules that hold them; None for all.
        task: what an error says that there is nothing to do.

    Returns:
        The sites, and the name of every other batch normalization layer with the reason why it is skipped.

    Raises:
        ValueError: a name that no batch normalization layer has or lies under; a model without any that has running
            statistics; lazy layers that have seen no input.
    """
    wanted = None if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    found = [(name, m) for name, m in model.named_modules() if is_batch_norm(m) or isinstance(m, Recurrent)]
    for name in wanted or ():
        if not any(_under(own, name) for own, _ in found):
            raise ValueError(f"no batch normalization layer is called {name!r} or lies under it")
    for name, layer in found:
        if wanted is not None and not any(_under(name, prefix) for prefix in wanted):
            skipped[name] = "it is not among the layers that were named"
            continue
        reason = _obstacle(layer, model)
        if reason is not None:
            skipped[name] = reason
        else:
            sites += _sites(name, layer)
    if not sites:
        raise ValueError(
            f"nothing to {task}: the model has no batch normalization layer whose running statistics move"
            + listed(skipped)
        )
    lazy = next((n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)), None)
    if lazy is not None:
        raise ValueError(f"{lazy} has seen no input, and has no values yet: run the model once before")
    return sites, skipped


def write(site: Site, seen: Clusters) -> None:
    """Make what was seen the running statistics; where there were no two values, they stay."""
    total, enough = seen.total, seen.total.count > 1
    variance = site.variance(total)
    site.mean.copy_(torch.where(enough, total.mean, site.mean.to(total.mean.dtype)))
    site.var.copy_(torch.where(enough, variance, site.var.to(total.mean.dtype)))
    if site.batches is not None:  # the channels of one layer, or of one step, have seen the same batches
        batches = seen.batches[..., 0].to(site.batches.dtype)
        site.batches.copy_(torch.where(enough[..., 0], batches, site.batches))


def _under(name: str, prefix: str) -> bool:
    return prefix in ("", name) or name.startswith(prefix + ".")


def _obstacle(layer: Any, model: nn.Module) -> str | None:
    if is_frozen(layer):
        return "it is frozen: batchnorm.unfreeze(model) before, to change it"
    recurrent = isinstance(layer, Recurrent)
    if not recurrent and not is_known(type(layer)) and _never_moves(layer):
        return f"{type(layer).__name__} never moves its statistics"
    buffers = [getattr(layer, name, None) for name in ("running_mean", "running_var")]
    if not recurrent and not all(isinstance(t, Tensor) for t in buffers):
        return NO_STATISTICS
    if not getattr(layer, "track_running_stats", True):
        return (
            "its track_running_stats is False, as Lightning's freezing leaves it, and no training moves its "
            "statistics: set it to True before, to change them"
        )
    if model.training and not layer.training:
        return "it is held in evaluation while the model trains: call model.eval() before, to change it"
    return None


def _never_moves(layer: nn.Module) -> bool:
    """Whether another package's layer holds its statistics: by what it computes, or else by what it has."""
    found = read(layer)
    if not isinstance(found, str):
        return found.held
    return not isinstance(layer, nn.modules.batchnorm._BatchNorm) and not hasattr(layer, "momentum")


def _sites(name: str, layer: Any) -> list[Site]:
    if not isinstance(layer, Recurrent):
        batches = getattr(layer, "num_batches_tracked", None)
        biased = resolve(getattr(layer, "_statistics", None)).renorm is not None
        eps = float(getattr(layer, "eps", 0.0))
        return [Site(name, layer, name, layer.running_mean, layer.running_var, batches, eps, biased)]
    sites = []
    for suffix, whats in layer.normalized().items():
        for what in whats:
            mean, var = layer._running(what, suffix)
            batches = getattr(layer, "num_batches_tracked" + suffix)
            own = f"{name}.{what}{suffix}" if name else what + suffix
            sites.append(Site(own, layer, name, mean, var, batches, layer.eps, False))
    return sites
