"""Adapt a model's batch normalization to unlabelled data from another distribution, in place, and take it back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.recurrent.base import Recurrent
from batchnorm.surgery.adaptation import tent
from batchnorm.surgery.adaptation.predictions import Predictions
from batchnorm.surgery.adaptation.target import Share, measure, mixed
from batchnorm.surgery.inspect.batches import Forward, force_eager, unwrapped
from batchnorm.surgery.inspect.preserve import Values
from batchnorm.surgery.inspect.restoring import Restoring, completely
from batchnorm.surgery.measuring.passes import PassResult
from batchnorm.surgery.measuring.sites import Site, sites_of
from batchnorm.surgery.report import Report, listed

__all__ = ["Adapted", "Shift", "adapt"]

Method = Literal["moments", "alpha", "tent"]
_Values = list[tuple[nn.Module, str, Tensor]]

# Both measured on digits, docs/adapting.md.
_FEW = 16  # samples
_NARROW = 0.5  # of the largest entropy that a histogram of predictions can have

_OPTIONS = {"moments": ("prior",), "alpha": ("alpha",), "tent": ("steps", "lr")}


@dataclass(frozen=True)
class Shift:
    """How what a layer is given differs from what its running statistics were.

    Attributes:
        count: values a channel.
        mean: (target mean − source mean) / source deviation, the root mean square over channels.
        scale: target deviation / source deviation − 1, likewise. Deviations are those that normalize, with eps.
        learned: the parameters that tent has changed: "weight and bias", or "".
    """

    count: float
    mean: float
    scale: float
    learned: str = ""


class Adapted(Report, Restoring):
    """What ``adapt`` has done to a model, and the way back; a context manager that takes it at the end.

    Attributes:
        method: "moments", "alpha" or "tent".
        layers: the shift of every layer that was adapted, by its qualified name.
        skipped: the name of every batch normalization layer that was skipped, and why.
        source_share: the source's part in the running statistics now; 0 where only the target's count.
        batches, samples: of the data.
        skipped_batches: those with moments that were not finite, which count nowhere.
        spread: how evenly the classes were predicted before, from 0 (one class) to 1; None where that is not known.
        entropy: of the predictions, in nats, with the source's statistics and with the target's; None likewise.
        warnings: what was warned of.
    """

    def __init__(
        self, method: Method, layers: dict[str, Shift], skipped: dict[str, str], source: float, seen: PassResult,
        predictions: Predictions, warned: list[str], before: _Values,
    ) -> None:  # fmt: skip
        known = predictions.samples > 0
        self.method, self.layers, self.skipped, self.source_share = method, layers, skipped, source
        self.batches, self.samples, self.skipped_batches = seen.batches, seen.samples, seen.dropped
        self.spread = predictions.spread if known else None
        self.entropy = (predictions.before, predictions.after) if known else None
        self.warnings = tuple(warned)
        self._before = before

    def undo(self) -> None:
        """Give the model the values that it had before ``adapt``, bit by bit; a second time it does nothing.

        Whatever has been written into the layers' running statistics since is lost; after tent, into their weights
        and biases, too.
        """
        completely(self.restore)

    def restore(self) -> None:
        """Do what ``undo`` does, where nothing interrupts it: at the end of a ``with`` block."""
        _write(self._before)
        self._before = []

    def __str__(self) -> str:
        dropped = f", {self.skipped_batches} batches skipped" if self.skipped_batches else ""
        lines = [
            f"{len(self.layers)} layers adapted by {self.method!r} to {self.samples} samples in {self.batches} "
            f"{'batch' if self.batches == 1 else 'batches'}{dropped}, {len(self.skipped)} skipped; "
            f"the source's share is {self.source_share:.0%}"
        ]
        width = max((len(name) for name in self.layers), default=0)
        for name, shift in self.layers.items():
            also = f", {shift.learned} learned" if shift.learned else ""
            lines.append(
                f"  {name or '(the model)':{width}}  mean off by {shift.mean:.2f} deviations, deviation by "
                f"{shift.scale:.0%}{also}"
            )
        return self._text(lines, {}, [f"  warning: {text}" for text in self.warnings])


def adapt(
    model: nn.Module,
    data: Any,
    *,
    method: Method = "moments",
    prior: float | None = None,
    alpha: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    forward: Forward | None = None,
) -> Adapted:
    """Fit a trained model's batch normalization to unlabelled data from another distribution than it was trained on.

    It works in place and needs one pass over the data, two where the model returns class scores, more for tent. Only
    running statistics change, and with tent weights and biases; the mode, the counters of batches, gradients, hooks
    and random generators stay. The model is to be used in evaluation.

    The methods:

    * ``"moments"``: the data's moments, merged exactly over all batches, take the place of the source's (AdaBN); with
      a prior, mean and variance are each ``N / (N + n) · source + n / (N + n) · target`` for n samples.
    * ``"alpha"``: ``alpha · source + (1 - alpha) · target``.
    * ``"tent"``: Adam minimises the entropy of the predictions over the layers' weights and biases, while they
      normalize with their batch; then the running statistics are the data's, measured with the new weights.

    While the data passes, each batch is normalized by its own moments, mixed with the source's as the result will be,
    so that for one batch the layers behind see what the adapted model gives them. Variances are the unbiased ones, in
    float64. Frozen layers and those held in evaluation in a training model stay, layers without running statistics
    take part in tent alone, and of a ``DomainBatchNorm`` only the domains that are called change. It adapts to the data
    of this process alone.

    Args:
        model: any module.
        data: a tensor or a dict is one batch; any other iterable is one of batches, such as a list, a ``DataLoader`` or
            what ``x.split(64)`` gives. Of a batch that is a tuple or list, as of inputs and targets, the first element
            is used, of a dict what the model names. The samples of a batch are the first dimension of its first tensor;
            of objects, such as graphs, that of what the first layer is given. For tent, an iterator is kept in memory
            as a list.
        method: see above.
        prior: for moments: N, how many samples the source's statistics count for; 0 by default.
        alpha: for alpha: the source's share, from 0 to 1; 0.5 by default, which is our choice and not the paper's.
        steps: for tent: steps for each batch; 1 by default.
        lr: for tent: Adam's learning rate; 1e-3 by default. Both are those of the authors' code for CIFAR-10-C.
        forward: how the model is called, ``forward(model, batch)``.

    Returns:
        What was changed and how far off it was; ``undo()`` takes it back, and so does the end of a ``with`` block.

    Raises:
        ValueError: unknown methods, options of another method or out of range, no data, only batches that are not
            finite, no layer that can be adapted, an entropy that is not finite.
        TypeError: for tent, a model that returns no class scores.
        After any error, whoever raised it, the model is as it was. One in the model's forward names the batch.

    Warns:
        UserWarning: where adapting tends to do harm: the source's and the data's samples together count for less than
            16, or the predictions were of few classes and the target's statistics made them less certain, as they
            do with data sorted by class.

    Example:
        >>> with batchnorm.adapt(model, x, prior=16):
        ...     y = model(x)
        >>> adapted = batchnorm.adapt(model, loader, method="tent")
        >>> print(adapted)
        >>> adapted.undo()

    Source: Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation", arXiv 1603.04779; prior:
    Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation", arXiv
    2006.16971; alpha: You et al. 2021, "Test-time Batch Statistics Calibration for Covariate Shift", arXiv 2110.04065;
    tent: Wang et al. 2021, arXiv 2006.10726.
    """
    given = {"prior": prior, "alpha": alpha, "steps": steps, "lr": lr}
    _check_options(method, {name: value for name, value in given.items() if value is not None})
    share = _share(method, prior or 0.0, 0.5 if alpha is None else alpha)
    batches = _batches(data, method)
    sites, skipped = _sites(model)
    learning = _learning(model, sites, skipped) if method == "tent" else {}
    parameters = [p for layer in learning.values() for p in tent.affine_of(layer).values()]
    predictions = Predictions()
    with Values(parameters), force_eager():
        inner = unwrapped(model)
        seen = final = measure(inner, batches, sites, share, forward, predictions)
        if method == "tent":
            tent.learn(inner, batches, list(learning.values()), steps or 1, lr or 1e-3, forward)
            final = measure(inner, batches, sites, share, forward)
        learned = [p.detach().clone() for p in parameters]
    source = share(seen.samples)
    layers, after = _moved(sites, seen, final, source, skipped)
    measured = {site.layer for site in sites}
    for name, layer in learning.items():
        names = list(tent.affine_of(layer))
        after += [(layer, own, learned.pop(0)) for own in names]
        if names and name in layers:
            layers[name] = replace(layers[name], learned=" and ".join(names))
        elif names and layer not in measured:
            skipped[name] += f"; its {' and '.join(names)} learned"
    warned = _warnings(seen, source, predictions)
    for text in warned:
        warnings.warn(text, UserWarning, stacklevel=2)
    before = [(layer, name, getattr(layer, name).detach().clone()) for layer, name, _ in after]
    adapted = Adapted(method, layers, skipped, source, seen, predictions, warned, before)
    try:
        _write(after)
        return adapted
    except BaseException:  # nobody would get the way back
        completely(adapted.restore)
        raise


def _check_options(method: str, given: dict[str, float]) -> None:
    if method not in _OPTIONS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _OPTIONS))}, got {method!r}")
    for name, value in given.items():
        if name not in _OPTIONS[method]:
            of = next(other for other, options in _OPTIONS.items() if name in options)
            raise ValueError(f"{name} is an option of method={of!r}, and the method is {method!r}")
        if name == "steps" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"steps counts Adam's steps for each batch and must be an int of at least 1, got {value!r}"
            )
        lowest, highest = (0, 1) if name == "alpha" else (0, math.inf)
        if not lowest <= value <= highest or math.isinf(value) or (name == "lr" and value == 0):
            wanted = {"prior": "0 or more, and finite", "alpha": "from 0 to 1"}.get(name, "above 0, and finite")
            raise ValueError(f"{name} must be {wanted}, got {value}")


def _share(method: Method, prior: float, alpha: float) -> Share:
    if method == "alpha":
        return lambda samples: alpha
    if method == "tent" or prior == 0:
        return lambda samples: 0.0
    return lambda samples: prior / (prior + samples)


def _batches(data: Any, method: Method) -> Iterable[Any]:
    if isinstance(data, (Tensor, Mapping)):
        return (data,)
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a tensor, a dict or an iterable of batches, got {type(data).__name__}")
    return list(data) if method == "tent" and iter(data) is data else data


def _sites(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    sites, skipped = sites_of(model, task="adapt")
    recurrent = {s.layer_name: s.layer for s in sites if isinstance(s.layer, Recurrent)}
    skipped |= dict.fromkeys(recurrent, "it is recurrent, with statistics for each step: batchnorm.recalibrate can")
    sites = [site for site in sites if site.layer_name not in recurrent]
    if not sites:
        raise ValueError(f"nothing to adapt: the model has no batch normalization layer that can be:{listed(skipped)}")
    return sites, skipped


def _learning(model: nn.Module, sites: Iterable[Site], skipped: dict[str, str]) -> dict[str, nn.Module]:
    """Give the layers that normalize with their batch in tent: also those that have no running statistics."""
    without = {name: model.get_submodule(name) for name in skipped}
    found = {site.name: site.layer for site in sites}
    found |= {n: m for n, m in without.items() if getattr(m, "running_mean", 0) is None}
    if not any(tent.affine_of(layer) for layer in found.values()):
        raise ValueError(f"tent learns weights and biases, and {len(found)} layers have none: use method='moments'")
    return found


def _moved(
    sites: Iterable[Site], seen: PassResult, final: PassResult, source: float, skipped: dict[str, str]
) -> tuple[dict[str, Shift], _Values]:
    """How far off each layer was at first, and its new statistics; the layers without join those that are skipped."""
    layers: dict[str, Shift] = {}
    after: _Values = []
    for site in sites:
        first, moments = seen.clusters[site].total, final.clusters[site].total
        if not bool((moments.count > 1).any()):
            none = not bool((moments.count > 0).any())
            skipped[site.name] = "the data gave it " + ("no values" if none else "one value a channel")
            continue
        mean, var = mixed(site, moments, source)
        after += [(site.layer, "running_mean", mean), (site.layer, "running_var", var)]
        layers[site.name] = _shift(site, first if bool((first.count > 0).any()) else moments)
    if not layers:
        raise ValueError(f"no batch normalization layer was given more than one value a channel:{listed(skipped)}")
    return layers, after


def _shift(site: Site, target: Moments) -> Shift:
    """Compare the target's moments with a layer's statistics, which must still be the source's."""
    mean, var = mixed(site, target, 0.0)
    deviation = (site.var.double() + site.eps).sqrt()
    off = ((mean - site.mean) / deviation).square().mean().sqrt()
    scale = ((var + site.eps).sqrt() / deviation - 1).square().mean().sqrt()
    return Shift(float(target.count.max()), float(off.nan_to_num(math.inf)), float(scale.nan_to_num(math.inf)))


def _warnings(seen: PassResult, source: float, predictions: Predictions) -> list[str]:
    texts = []
    behind = math.inf if source == 1 else seen.samples / (1 - source)
    if 0 < behind < _FEW:
        texts.append(
            f"adapted to {seen.samples} samples, which with the source's share of {source:.0%} leaves statistics as "
            f"noisy as those of {behind:.0f}: below {_FEW}, adapting tends to harm; give more data, or "
            f"method='moments' with prior={_FEW} or more"
        )
    narrow = predictions.samples >= _FEW and predictions.spread < _NARROW and predictions.after > predictions.before
    if narrow:
        commonest, part = predictions.commonest
        texts.append(
            f"before adapting, {part:.0%} of {predictions.samples} predictions were class {commonest}, and with these "
            f"data's statistics they are less certain (entropy {predictions.before:.2f} before, "
            f"{predictions.after:.2f} after): adapting to data of few classes, such as sorted ones, harms; mix the "
            "data, or use a large prior"
        )
    return texts


def _write(values: _Values) -> None:
    for layer, name, value in values:
        getattr(layer, name).detach().copy_(value)
