"""What batch normalization layers are given in a forward: its moments, taken while the model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.arguments import check_mask
from batchnorm.kernels import cpu, plans
from batchnorm.kernels.choice import which
from batchnorm.layers import _Ours
from batchnorm.moments import Moments, merge
from batchnorm.recurrent.base import Recurrent
from batchnorm.recurrent.steps import Norm
from batchnorm.surgery.inspect.find import is_known
from batchnorm.surgery.inspect.reading import following, read
from batchnorm.surgery.measuring.clusters import Clusters
from batchnorm.surgery.measuring.sites import Site, write

__all__ = ["Recorder", "Stop", "finite", "moments_of", "normalize_with_the_batch"]

_NUMBA_FROM = 2**20  # elements; below, copying to float64 costs little, and nothing need be compiled
_CHUNK = 2**22  # elements that are copied to float64 at once


class Stop(BaseException):
    """Ends a forward whose rest nobody needs; not an ``Exception``, which a model might catch."""


class Recorder:
    """Hooks on layers that take the moments of what they are called with; in recurrent ones, of every step.

    Works within ``preserved``, which takes the hooks away again. Nothing is recorded before the first ``start``.

    Args:
        sites: what to record.
        until: raise ``Stop`` as soon as a layer has been called so often in one forward.
        then: called with a site and its moments for the current batch, before the layer itself runs.

    Attributes:
        seen: of every site that the current batch has reached, the moments over all calls.
        unfit: sites that were called with something whose second dimension is not their channels.
        reached: how often each layer was called, for the current batch.
        samples: of the current batch; where it does not show them, what the first layer was called with has; or 0.
        before: what the batches before have given each site, for whoever keeps that.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        until: int | None = None,
        then: Callable[[Site, Moments], None] | None = None,
    ) -> None:
        self._until, self._then, self._recording = until, then, False
        self.seen: dict[Site, Moments] = {}
        self.unfit: dict[Site, str] = {}
        self.reached: dict[nn.Module, int] = {}
        self.samples = 0
        self.before: Mapping[Site, Clusters] = {}
        self._with_batch: set[nn.Module] = set()
        of_layer: dict[nn.Module, list[Site]] = {}
        for site in sites:
            of_layer.setdefault(site.layer, []).append(site)
        for layer, own in of_layer.items():
            if layer.training:
                self._with_batch.add(layer)
            if isinstance(layer, Recurrent):
                self._listen(layer, own)
            else:
                layer.register_forward_pre_hook(self._hook(own[0]), with_kwargs=True)

    def start(self, samples: int = 0) -> None:
        """Forget the batch before, and record the next one, of so many samples; 0 if it does not show how many."""
        self.seen, self.reached, self.samples, self._recording = {}, {}, samples, True

    def pause(self) -> None:
        """Record nothing until the next ``start``."""
        self._recording = False

    def _count(self, layer: nn.Module) -> None:
        self.reached[layer] = self.reached.get(layer, 0) + 1
        if self.reached[layer] == self._until:
            raise Stop

    def _hook(self, site: Site) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._recording:
                return
            x, mask = _input(layer, args, kwargs)
            channels = site.mean.shape[0]
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or x.shape[1] != channels:
                what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                self.unfit[site] = f"it was called with {what}, not with (N, {channels}, …)"
            elif x.numel() > 0:
                if mask is not None:
                    check_mask(mask, x)
                self.samples = self.samples or len(x)
                self._add(site, moments_of(x, mask))
                if self._then is not None:
                    self._then(site, self.seen[site])
            self._count(layer)
            if site not in self.unfit:
                self._rest(site, x)

        return record

    def _rest(self, site: Site, x: Tensor) -> None:
        """Let a layer that is given one value a channel, which has no variance, normalize with the batches before."""
        layer, single = site.layer, x.numel() == x.shape[1]
        if layer not in self._with_batch:
            return
        layer.training = not single
        if not single:
            return
        before = self.before.get(site)
        if before is None or not bool((before.total.count > 1).all()):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} in "
                f"{site.name or 'the model'}: begin with larger batches, or use method='layerwise', which takes any"
            )
        write(site, before)

    def _listen(self, layer: Recurrent, own: list[Site]) -> None:
        """Take the place of what moves a recurrent layer's running statistics."""
        sites = {id(site.mean): site for site in own}

        def learn(suffix: str, norms: dict[str, Norm], sizes: list[int]) -> None:
            for what, norm in norms.items():
                site = sites[id(layer._running(what, suffix)[0])]
                self._add(site, _of_steps(norm, sizes, site.mean.shape[0]))

        vars(layer)["_update_running"] = learn
        layer.register_forward_hook(lambda module, args, output: self._count(module))

    def _add(self, site: Site, moments: Moments) -> None:
        before = self.seen.get(site)
        self.seen[site] = moments if before is None else merge(before, moments)


def _input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
    """Find the input and, of a layer of ours, the mask in the arguments that a layer is called with."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    mask = kwargs.get("mask", args[2] if len(args) > 2 else None) if isinstance(layer, _Ours) else None
    return x, mask


@torch.no_grad()
def moments_of(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Take the moments ``(C,)`` of ``(N, C, *space)``, in float64 and without a float64 copy of all of it.

    Args:
        x: floating, not empty.
        mask: as in ``batchnorm.functional.batch_norm``: ``(N, *space)`` or what broadcasts to it, bool or weights.
    """
    if mask is None and x.numel() >= _NUMBA_FROM and which(x) == "numba":
        x, plan = plans.laid_out(x.detach(), plans.inference_plan)
        C = x.shape[1]
        found = torch.zeros(1, 2, C, dtype=torch.float64, device="cpu")
        cpu.moments_of(x, plan, cpu.Sets(len(x), moments=found))
        count = torch.full((C,), float(x.numel() // C), dtype=torch.float64, device="cpu")
        return Moments(count, found[0, 0], found[0, 1] * count)
    dims = (0, *range(2, x.dim()))
    weights = None if mask is None else mask.expand(x.shape[:1] + x.shape[2:]).unsqueeze(1)
    name = "mask" if weights is not None and weights.dtype == torch.bool else "weights"
    samples = max(1, _CHUNK * len(x) // x.numel())
    total = Moments.empty((x.shape[1],), device=x.device)
    for first in range(0, len(x), samples):
        part = slice(first, first + samples)
        given: Any = {} if weights is None else {name: weights[part]}
        total = merge(total, Moments.of(x[part], dims, **given))
    return total


def _of_steps(norm: Norm, sizes: list[int], rows: int) -> Moments:
    """Give the moments ``(rows, C)`` of what a recurrent layer normalized, a row a step; the last row's steps merge."""
    T, C = len(sizes), norm.mean.shape[1]
    count = torch.tensor(sizes, dtype=torch.float64, device=norm.mean.device).unsqueeze(1).expand(T, C)
    # Normalization has written each step's mean and unbiased variance there, unless they were not finite.
    finite = torch.where(norm.good == norm.calls, 1.0, torch.nan)
    steps = Moments(count, norm.mean[:T].double() * finite, norm.var[:T].double() * (count - 1))
    found = Moments.empty((rows, C), device=norm.mean.device)
    own = min(T, rows - 1)
    for to, values in ((found.count, steps.count), (found.mean, steps.mean), (found.m2, steps.m2)):
        to[:own] = values[:own]
    if own < T:
        last = Moments(steps.count[own:], steps.mean[own:], steps.m2[own:]).merged(0)
        found.count[-1], found.mean[-1], found.m2[-1] = last.count, last.mean, last.m2
    return found


def normalize_with_the_batch(layer: Any) -> None:
    """Put one layer into training, where it takes the moments of the whole batch of this process.

    Policies of statistics, which would take others, do not hold meanwhile, and neither does a recurrent layer's
    dropout. Works within ``preserved``.
    """
    layer.training = True
    if isinstance(layer, Recurrent):
        layer.dropout = 0.0
    elif isinstance(layer, _Ours):
        layer.statistics = None
    elif isinstance(layer, nn.SyncBatchNorm) and (is_known(type(layer)) or not isinstance(read(layer), str)):
        behind = following(layer)  # it has no training on CPUs, and waits for the other processes elsewhere

        def forward(input: Tensor) -> Tensor:
            if input.dim() < 2:
                raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
            buffers = (None, None) if layer.training else (layer.running_mean, layer.running_var)
            y = F.batch_norm(input, *buffers, layer.weight, layer.bias, layer.training, 0.0, layer.eps)
            return y if behind is None else behind(y)

        vars(layer)["forward"] = forward


def finite(moments: Moments, site: Site) -> bool:
    """Whether a layer's running statistics, in their dtype, could hold these."""
    mean, var = moments.mean.to(site.mean.dtype), moments.biased_variance.to(site.var.dtype)
    return bool((mean.isfinite() & var.isfinite()).all()) and math.isfinite(float(moments.count.sum()))
