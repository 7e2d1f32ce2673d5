"""Batch normalization of other frameworks, as arguments and state of a layer of torch.nn's or ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Ported", "ported"]

# What torch.nn, Keras, Flax, Haiku and Paddle call it.
_NAMES = {
    "weight": ("weight", "gamma", "scale"),
    "bias": ("bias", "beta", "offset"),
    "running_mean": ("running_mean", "moving_mean", "mean", "_mean"),
    "running_var": ("running_var", "moving_variance", "var", "_variance"),
}


class Ported(NamedTuple):
    """What makes a layer that does the same.

    Attributes:
        options: for ``BatchNorm1d``, ``2d`` or ``3d``: num_features, eps, momentum, affine.
        state: for its ``load_state_dict``.
    """

    options: dict[str, Any]
    state: dict[str, Tensor]


def ported(arrays: Mapping[str, Any], *, decay: float, eps: float, count: float | None = None) -> Ported:
    """Convert the arrays and settings of a batch normalization layer of Keras, Flax, Haiku or Paddle.

    In evaluation the layer gives what the original does. docs/converting.md has each framework's names and defaults.

    Args:
        arrays: by their names there: gamma, beta, moving_mean, moving_variance; scale, bias, mean, var; and so on. The
            name may have a path before it and an index behind it, as in ``bn_conv1/gamma:0`` of tf.keras, and arrays
            may be in groups, as in files of HDF5. Each has C values, whatever its shape. A scale or an offset alone
            gets its missing partner, of ones or zeros.
        decay: the share of the old running statistics that a step keeps; Keras and the others call it momentum. The
            layer's momentum is ``1 - decay``.
        eps: what is added to the variance; with decay the two that checkpoints do not hold, and defaults differ.
        count: values a channel in a training batch, ``batch · height · width``, if training is to go on and the
            running variance is the biased one: it becomes the unbiased one, ``count / (count - 1)`` times as large, as
            torch's training goes on to average. Evaluation then differs from the original's by that factor. None to
            take the variance as it is.

    Returns:
        Options and state.

    Raises:
        ValueError: names that are unknown, missing or there twice; sizes that differ; negative variances; numbers out
            of range.

    Example:
        >>> layer = keras_model.get_layer("bn1")
        >>> arrays = {v.name: v.numpy() for v in layer.weights}
        >>> options, state = batchnorm.ported(arrays, decay=layer.momentum, eps=layer.epsilon)
        >>> bn = batchnorm.BatchNorm2d(**options)
        >>> bn.load_state_dict(state)
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1 (the share of the old value), got {decay}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    if count is not None and not count > 1:
        raise ValueError(f"count, the values a channel in a batch, must be above 1, got {count}: one has no variance")
    state = _renamed(arrays)
    C = len(state["running_mean"])
    sizes = {name: len(t) for name, t in state.items()}
    if set(sizes.values()) != {C}:
        raise ValueError(f"all arrays must have one value a channel, got {sizes}")
    if bool((state["running_var"] < 0).any()):
        raise ValueError(f"a running variance is negative, {state['running_var'].min():g}: is it another array?")
    affine = "weight" in state or "bias" in state
    if affine:
        state.setdefault("weight", torch.ones_like(state["running_mean"]))
        state.setdefault("bias", torch.zeros_like(state["running_mean"]))
    if count is not None:
        state["running_var"] *= count / (count - 1)
    state["num_batches_tracked"] = torch.tensor(0, device="cpu")
    # 1 - 0.99 is 0.010000000000000009
    return Ported({"num_features": C, "eps": eps, "momentum": round(1 - decay, 12), "affine": affine}, state)


def _renamed(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    arrays = dict(_flat(arrays))
    for given, array in arrays.items():
        last = given.rpartition("/")[2].partition(":")[0]
        name = next((name for name, names in _NAMES.items() if last in names), None)
        if name is None:
            known = "; ".join(" or ".join(names) for names in _NAMES.values())
            raise ValueError(f"unknown array {given!r}: the names are {known}")
        if name in found:
            raise ValueError(f"{given!r} is one more {name}: of each there is one, and got {', '.join(arrays)}")
        found[name] = _vector(array)
    for name in ("running_mean", "running_var"):
        if name not in found:
            raise ValueError(f"there is no {' or '.join(_NAMES[name])} among {', '.join(arrays) or 'no arrays'}")
    return found


def _flat(arrays: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of all groups, with the groups before their names."""
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}/")
        else:
            yield path + name, value


def _vector(array: Any) -> Tensor:
    """A copy, in float32 or float64."""
    array = array.detach().cpu() if isinstance(array, Tensor) else array
    if isinstance(array, Tensor) and array.dtype == torch.bfloat16:  # which NumPy does not have
        array = array.float()
    values = np.asarray(array)
    return torch.from_numpy(values.astype(np.float64 if values.dtype == np.float64 else np.float32).reshape(-1))
