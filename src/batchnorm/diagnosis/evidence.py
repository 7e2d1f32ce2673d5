"""What can be seen of a model's batch normalization. No verdicts: `rules/` has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.diagnosis.gap import Gap
from batchnorm.surgery.inspect.find import is_batch_norm, is_frozen, kind_of

__all__ = ["Evidence", "Layer", "Source", "of_model", "of_state"]

# Where evidence comes from. A checkpoint has buffers alone; a model has structure besides, and may be run on data.
Source = Literal["buffers", "structure", "data"]
_MEAN, _VAR, _COUNT = "running_mean", "running_var", "num_batches_tracked"


@dataclass(frozen=True)
class Structure:
    """What a layer's object says besides its tensors.

    Attributes:
        kind: the name of its class.
        eps, momentum: its settings; momentum as in PyTorch, None for the cumulative average.
        training: whether it is in training mode.
        tracks: whether training moves running statistics.
        frozen: whether ``batchnorm.freeze`` holds it.
        learns: whether its weight or bias requires a gradient.
        on_cpu: whether its tensors are on the CPU.
    """

    kind: str
    eps: float
    momentum: float | None
    training: bool
    tracks: bool
    frozen: bool
    learns: bool
    on_cpu: bool


@dataclass(frozen=True, eq=False)
class Layer:
    """One batch normalization layer.

    Attributes:
        path: its qualified name; several names of one layer count once.
        mean, var: running statistics ``(C,)`` in float64 on the CPU; None where there are none.
        weight, bias: γ and β, the same.
        batches: ``num_batches_tracked``; None where there is none.
        dtype: in which the running statistics are stored.
        structure: None for a checkpoint.
    """

    path: str
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    batches: int | None
    dtype: torch.dtype | None
    structure: Structure | None = None

    @property
    def eps(self) -> float:
        """The layer's eps; torch.nn's default where it is not known."""
        return 1e-5 if self.structure is None else self.structure.eps

    @property
    def momentum(self) -> float | None:
        """The layer's momentum; torch.nn's default where it is not known."""
        return 0.1 if self.structure is None else self.structure.momentum

    @property
    def initial(self) -> bool:
        """Whether the running statistics are what a new layer has: mean 0, variance 1 in every channel."""
        return self.mean is not None and self.var is not None and not self.mean.any() and bool((self.var == 1).all())

    @property
    def residue(self) -> float:
        """Which share of the running statistics is still their initial values; 0 where that cannot be known.

        The cumulative average (momentum None) forgets them with the first batch.
        """
        known = self.batches and self.momentum is not None and 0 < self.momentum < 1
        return (1 - self.momentum) ** self.batches if known else 0.0  # type: ignore[operator]

    @property
    def unfit(self) -> int:
        """How many channels have a running mean or variance that is nan or infinite."""
        if self.mean is None or self.var is None:
            return 0
        return int((~(self.mean.isfinite() & self.var.isfinite())).sum())


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that was seen.

    Attributes:
        name: what was looked at, for the report's first line.
        layers: in the order in which they were found.
        sources: what was looked at; a rule that needs another source is not run.
        training: whether the model as a whole is in training mode; None for a checkpoint.
        gap: between training and evaluation, on data.
    """

    name: str
    layers: tuple[Layer, ...]
    sources: frozenset[Source]
    training: bool | None = None
    gap: Gap | None = None


def of_state(name: str, state: Mapping[str, Any]) -> Evidence:
    """See what a state_dict shows: every prefix with a running mean and variance is a layer.

    Args:
        name: of the checkpoint.
        state: weights by name; what is sparse, quantized, on the device meta or no tensor is passed over.
    """
    layers = []
    for key in state:
        prefix = key.removesuffix(_MEAN)
        if prefix == key or (prefix and not prefix.endswith(".")) or prefix + _VAR not in state:
            continue
        mean, var, weight, bias = (_values(state.get(prefix + what)) for what in (_MEAN, _VAR, "weight", "bias"))
        if mean is None or var is None or mean.shape != var.shape or mean.dim() != 1:
            continue
        affine = [t if t is not None and t.shape == mean.shape else None for t in (weight, bias)]
        count = _count(state.get(prefix + _COUNT))
        layers.append(Layer(prefix.removesuffix("."), mean, var, affine[0], affine[1], count, state[key].dtype))
    return Evidence(name, tuple(layers), frozenset({"buffers"}))


def of_model(model: nn.Module) -> Evidence:
    """See what a model shows without being run: its layers, their settings, modes and tensors."""
    layers = [_layer(path, m) for path, m in model.named_modules() if is_batch_norm(m)]
    return Evidence(type(model).__name__, tuple(layers), frozenset({"buffers", "structure"}), model.training)


def _layer(path: str, layer: Any) -> Layer:
    tensors = {name: getattr(layer, name, None) for name in (_MEAN, _VAR, "weight", "bias")}
    own = [t for t in tensors.values() if isinstance(t, Tensor)]
    mean, var = tensors[_MEAN], tensors[_VAR]
    tracks = isinstance(mean, Tensor) and bool(getattr(layer, "track_running_stats", True))
    structure = Structure(
        kind_of(layer).__name__, float(getattr(layer, "eps", 0.0)), _number(getattr(layer, "momentum", None)),
        layer.training and not is_frozen(layer), tracks,
        is_frozen(layer), any(t.requires_grad for t in own), all(t.device.type == "cpu" for t in own),
    )  # fmt: skip
    dtype = mean.dtype if isinstance(mean, Tensor) else None
    mean, var, weight, bias = map(_values, tensors.values())
    return Layer(path, mean, var, weight, bias, _count(getattr(layer, _COUNT, None)), dtype, structure)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _readable(value: Any) -> bool:
    """Whether something is a tensor whose values can be read."""
    return (
        isinstance(value, Tensor)
        and not is_lazy(value)
        and not value.is_meta
        and value.layout is torch.strided
        and not value.is_quantized
    )


def _values(value: Any) -> Tensor | None:
    """A tensor's values in float64 on the CPU; None for what has none that can be read."""
    return value.detach().to("cpu", torch.float64) if _readable(value) and value.is_floating_point() else None


def _count(value: Any) -> int | None:
    """A counter of batches, which is one number; a layer with one for each step gives the largest."""
    return int(value.max()) if _readable(value) and value.numel() and not value.is_complex() else None
