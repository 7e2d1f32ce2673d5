"""Batch normalization in plain PyTorch, as the paper writes it: the oracle of the tests and the fallback.

Slow but right: it is computed in float64 (see ``batchnorm.moments``), can be differentiated any number of times,
forwards and backwards, and goes through ``torch.func.vmap``. Nothing is changed in place.

Everywhere below, ``x`` has the shape ``(N, C, *space)`` and any floating dtype, everything per channel has the shape
``(C,)``, and what is per channel and computed here is float64. Arguments are expected to be right:
``batchnorm.functional`` checks them.

Source: Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", arXiv 1502.03167. For images, a channel's mini-batch holds the values at all places (their section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.moments import Moments, accumulate_dtype


def train_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize ``x`` by its own moments: the four steps of Algorithm 1.

    Args:
        x: ``(N, C, *space)``.
        weight: the paper's gamma, ``(C,)``; None for 1.
        bias: the paper's beta, ``(C,)``; None for 0.
        eps: added to the variance, in the unit of ``x`` squared.

    Returns:
        ``y`` in the shape and dtype of ``x``, and the mean and biased variance that normalized it, ``(C,)``.
    """
    wide = x.to(accumulate_dtype(x))  # once: autograd adds the gradients that meet here, and rounds their sum
    moments = Moments.of(wide, _all_but_channel(x))
    mean = moments.mean
    var = moments.biased_variance
    return inference(wide, mean, var, weight, bias, eps).to(x.dtype), mean, var


def inference(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize ``x`` by the given moments and scale and shift it: the last two steps of Algorithm 1.

    Args:
        x: ``(N, C, *space)``.
        mean, var: ``(C,)``, from the batch or the running statistics.
        weight, bias, eps: as for ``train_forward``.

    Returns:
        ``y`` in the shape and dtype of ``x``.
    """
    y = _normalize(x, mean, var, eps)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y.to(x.dtype)


def sets_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    size: int,
    weights: Tensor | None = None,
    renorm: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None = None,
    merged: Callable[[Moments], Moments] | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize each ``size`` samples of ``x`` by their own moments, over positions that have weights.

    Args:
        x, weight, bias, eps: as for ``train_forward``; ``x`` may be empty.
        size: samples in a set; the last one may have fewer.
        weights: ``(N, space)``, none negative; None for 1. What is at positions of weight 0 influences nothing, and
            ``y`` is 0 there.
        renorm: gives (r, d), each ``(sets, C)`` and constant, for the sets' mean and biased variance; or None.
        merged: replaces the sets' moments, for instance by those of all processes.

    Returns:
        ``y``, and the sets' moments, ``(sets, C)``.

    Sources: Hoffer, Hubara & Soudry 2017, arXiv 1705.08741, Algorithm 1 (sets); Ioffe 2017, arXiv 1702.03275,
    Algorithm 1 (renormalization).
    """
    N, C = x.shape[:2]
    parts = max(-(-N // size) if size else 1, 1)
    rows = size if parts > 1 else N
    wide = _viewable(x, x).reshape(N, C, math.prod(x.shape[2:]))
    added = parts * rows - N
    if added and weights is None:
        weights = wide.new_ones(N, wide.shape[2])
    if weights is not None:
        weights = F.pad(weights.to(wide.dtype), (0, 0, 0, added)).reshape(parts, rows, 1, -1 if N else wide.shape[2])
    grouped = F.pad(wide, (0, 0, 0, 0, 0, added)).reshape(parts, rows, C, wide.shape[2])
    if weights is not None:
        grouped = torch.where(weights > 0, grouped, 0.0)
    moments = Moments.of(grouped, (1, 3), weights=weights)
    if merged is not None:
        moments = merged(moments)
    mean, var = moments.mean, moments.biased_variance
    y = (grouped - _apart(mean)) / (_apart(var) + eps).sqrt()
    corrections = None if renorm is None else renorm(mean.detach(), var.detach())
    if corrections is not None:
        y = y * _apart(corrections[0]) + _apart(corrections[1])
    y = y.reshape(parts * rows, *x.shape[1:])[:N]
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    y = y.to(x.dtype)
    if weights is not None:
        y = counted(y, weights.reshape(parts * rows, -1 if N else wide.shape[2])[:N])
    return y, moments


def counted(y: Tensor, weights: Tensor) -> Tensor:
    """Put 0 wherever the weight of the position, ``(N, space)``, is 0."""
    return torch.where(weights.reshape(y.shape[0], 1, *y.shape[2:]) > 0, y, 0.0)


def _apart(t: Tensor) -> Tensor:
    """Shape ``(sets, C)`` so that it broadcasts against ``(sets, size, C, space)``."""
    return t[:, None, :, None]


def train_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of ``train_forward``, in closed form.

    These are the six equations of the paper's section 3, put together: with m values per channel,
    ``grad_x = weight / sqrt(var + eps) * (grad_y - mean(grad_y) - x_hat * mean(grad_y * x_hat))``.
    So the batch takes out of the gradient what is constant over it, and what is proportional to ``x_hat``.

    To differentiate once more, ``mean`` and ``var`` must have been computed from ``x`` under autograd.

    Args:
        grad_y: the gradient with respect to ``y``, in the shape of ``x``.
        x, weight, eps: what ``train_forward`` was called with.
        mean, var: what it returned.

    Returns:
        The gradients with respect to ``x``, in its dtype, and with respect to weight and bias, ``(C,)``, the same
        whether or not there is a weight or bias to have them.
    """
    dims = _all_but_channel(x)
    grad_y = grad_y.to(accumulate_dtype(x))
    x_hat = _normalize(x, mean, var, eps)
    grad_bias = grad_y.sum(dims)
    grad_weight = (grad_y * x_hat).sum(dims)

    grad_x = grad_y - grad_y.mean(dims, keepdim=True) - x_hat * (grad_y * x_hat).mean(dims, keepdim=True)
    grad_x = grad_x / (_per_channel(var, x) + eps).sqrt()
    if weight is not None:
        grad_x = grad_x * _per_channel(weight, x)
    return grad_x.to(x.dtype), grad_weight, grad_bias


def running_update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | float | None,
    factor: Tensor | float,
    update: Tensor | None = None,
    renorm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Move the running statistics towards a batch's: ``(1 - factor) * running + factor * batch``.

    Nothing changes if the mean or variance of any channel would be stored as nan or infinite; and a channel stays as it
    is if it has one value or none, which has no unbiased variance.

    Args:
        running_mean, running_var: ``(C,)``, of any floating dtype; they are not changed.
        mean, var: the batch's mean and biased variance, ``(C,)``.
        count: values per channel, for all or each, a number or ``(C,)``; None where ``var`` is unbiased already.
        factor: the weight of the batch, from 0 to 1: PyTorch's momentum. A number or a tensor without dimensions.
        update: whether, or which, statistics move; as ``can_update`` says if not given.
        renorm_eps: average the deviation, with this eps in it, instead of the variance, as batch renormalization does.

    Returns:
        The new running mean and the new, unbiased running variance, in the old ones' dtypes.

    Source: the unbiased variance is that of Algorithm 2; the moving average, section 3.1.
    """
    new_var = unbiased(var, count)
    if update is None:
        update = can_update(mean, new_var, count, running_mean.dtype, running_var.dtype)
    new_mean = (1 - factor) * running_mean + factor * mean
    if renorm_eps is None:
        new_var = (1 - factor) * running_var + factor * new_var
    else:
        running_sigma, sigma = ((t.to(var.dtype) + renorm_eps).sqrt() for t in (running_var, var))
        new_var = (((1 - factor) * running_sigma + factor * sigma).square() - renorm_eps).clamp(min=0)
    return (
        torch.where(update, new_mean.to(running_mean.dtype), running_mean),
        torch.where(update, new_var.to(running_var.dtype), running_var),
    )


def can_update(
    mean: Tensor, unbiased: Tensor, count: Tensor | float | None, mean_dtype: torch.dtype, var_dtype: torch.dtype
) -> Tensor:
    """Say where running statistics of these dtypes can follow; what is finite in float64 may not be in float32."""
    finite = mean.to(mean_dtype).isfinite().all() & unbiased.to(var_dtype).isfinite().all()
    return finite if count is None else finite & (torch.zeros_like(unbiased) + count > 1)


def unbiased(var: Tensor, count: Tensor | float | None) -> Tensor:
    """Make biased variances of ``count`` values unbiased, those of more than one; None says that they are."""
    if count is None:
        return var
    count = torch.zeros_like(var) + count
    return var * torch.where(count > 1, count / (count - 1), 1.0)


def _normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The third step of Algorithm 1: the paper's x-hat, in float64."""
    return (x.to(accumulate_dtype(x)) - _per_channel(mean, x)) / (_per_channel(var, x) + eps).sqrt()


def _all_but_channel(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape ``(C,)`` so that it broadcasts against ``(N, C, *space)``, in the dtype that is computed in."""
    return _viewable(values, x).reshape(values.shape[0], *(1,) * (x.dim() - 2))


def _viewable(t: Tensor, x: Tensor) -> Tensor:
    """In the dtype that is computed in, and without a negative bit.

    torch (2.13) makes no view of a dual tensor whose primal has that bit and whose tangent has not.
    """
    return t.to(accumulate_dtype(x)).resolve_neg()
