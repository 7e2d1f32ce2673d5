"""Moments of sets of values: how many there are, their mean, and their summed squared deviation from it.

Every kind of normalization in this package answers one question: over which set of values are the mean and the
variance taken? ``Moments.of`` describes such sets, commonly one per channel, and ``merge`` joins disjoint ones.
Merging is associative and commutative, gives the same moments however the values were split, and has the empty set
as its identity. That is why micro-batches, ranks, groups and whole data sets can all go through it.

All is computed in float64 and in passes (the mean, what its rounding lost, the squared deviations from it), so that no
digits are lost where the mean is a million times the deviation, and a constant has no variance at all. No step in
Python depends on a tensor's values: all of it can be differentiated, mapped with ``torch.func.vmap`` and compiled, and
a GPU is never waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "accumulate_dtype", "merge", "merge_all"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and summed squared deviation of sets of values: one set per element of the three tensors.

    Args:
        count: how many values each set holds; with weights, their sum, so it need not be whole.
        mean: their mean, in the unit of the values; 0 for an empty set.
        m2: the sum of their squared deviations from the mean, in that unit squared; 0 for an empty set.

    The three share one shape, such as ``(C,)`` or ``(groups, C)``, and one dtype, float64 unless built otherwise.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> batch = Moments.of(x, dim=0)
        >>> batch.mean.tolist(), batch.biased_variance.tolist()
        ([2.0, 20.0], [1.0, 100.0])
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(
        cls, x: Tensor, dim: int | tuple[int, ...], mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Moments:
        """Take the moments of ``x`` over the dimensions ``dim``; the result has the shape of those that are left.

        Args:
            x: values of any shape and any floating dtype.
            dim: the dimensions that each set extends over.
            mask: bool, broadcastable to ``x``, True where a value counts. The others influence neither the moments
                nor any gradient, even where they are nan or infinite.
            weights: floating, not negative, broadcastable to ``x``. A value of weight 3 counts as if it were there
                three times, one of weight 0 as if it were not there. The sign is not checked: looking at values
                would make the program wait for the GPU.

        Raises:
            TypeError: if ``x`` or ``weights`` is not floating, or ``mask`` is not bool.
            ValueError: if ``dim`` is empty, or ``mask`` or ``weights`` does not broadcast to ``x``.

        Source: the corrected two-pass algorithm in Chan, Golub, LeVeque 1983, "Algorithms for computing the sample
        variance".
        """
        if not x.is_floating_point():
            raise TypeError(f"moments are taken of floating-point values, got {x.dtype}; convert with x.float()")
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        if not dims:
            raise ValueError(f"dim is empty: name at least one of the dimensions of x of shape {tuple(x.shape)}")
        x, weights = _apply(mask, weights, x.to(accumulate_dtype(x)))

        def total(values: Tensor) -> Tensor:
            return (values if weights is None else values * weights).sum(dims, keepdim=True)

        count = total(x.new_ones(()).expand(x.shape))
        mean = total(x) / _or_one(count)
        # 0 but for rounding, and so a constant to every gradient. Where the mean is not finite there is none to mend.
        mean = mean + (total(x - mean) / _or_one(count)).detach().nan_to_num(0.0, 0.0, 0.0)
        m2 = total((x - mean).square())
        return cls(count.squeeze(dims), mean.squeeze(dims), m2.squeeze(dims))

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Moments:
        """Make the moments of empty sets: merged with any others of that shape, they give exactly the others."""
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(3)))

    @property
    def biased_variance(self) -> Tensor:
        """The mean squared deviation, ``m2 / count``: what normalizes. 0 for an empty set."""
        return self.m2 / _or_one(self.count)

    @property
    def unbiased_variance(self) -> Tensor:
        """The estimate ``m2 / (count - 1)``: what running statistics store. nan where the count is 1 or less."""
        return self.m2 / torch.where(self.count > 1, self.count - 1, torch.nan)

    def merged(self, dim: int | tuple[int, ...] = 0) -> Moments:
        """Merge all sets along the dimensions ``dim``, for instance the groups of a ``(groups, C)`` shape.

        The spread of a union is the spread between its parts' means plus the spread within the parts.
        """
        between = Moments.of(self.mean, dim, weights=self.count)
        return Moments(between.count, between.mean, between.m2 + self.m2.sum(dim))


# A tree of tensors to torch.func, torch.compile and torch.export, like a tuple would be.
torch.export.register_dataclass(Moments)


def merge(a: Moments, b: Moments) -> Moments:
    """Give the moments of the union of disjoint sets, element by element (the shapes broadcast).

    Exactly the other one where one is empty, whatever the other holds; no nan comes of two empty ones.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Example:
        >>> x = torch.randn(100, 3)
        >>> both = merge(Moments.of(x[:10], dim=0), Moments.of(x[10:], dim=0))
        >>> torch.testing.assert_close(both.m2, Moments.of(x, dim=0).m2)
    """
    count = a.count + b.count
    share = b.count / _or_one(count)
    # Where one is empty there is nothing to interpolate, and inf - 0 or an overflowing square must not turn into nan.
    base = torch.where(a.count == 0, b.mean, a.mean)
    delta = torch.where((a.count == 0) | (b.count == 0), 0.0, b.mean - a.mean)
    return Moments(count, base + delta * share, a.m2 + b.m2 + delta.square() * a.count * share)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Merge any number of moments of one shape at once, for instance those of all batches of a data set.

    Raises:
        ValueError: if there are none; their shape would be unknown.
    """
    parts = tuple(parts)
    if not parts:
        raise ValueError("there are no moments to merge; if that may happen, include Moments.empty(shape)")
    counts, means, m2s = zip(*((part.count, part.mean, part.m2) for part in parts), strict=True)
    return Moments(torch.stack(counts), torch.stack(means), torch.stack(m2s)).merged(0)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Name the dtype that moments of ``x`` are computed in: float64, but float32 on Apple's GPUs, which lack it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _apply(mask: Tensor | None, weights: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Make the values that do not count harmless, and join mask and weights; None if every value counts once."""
    if weights is not None:
        if not weights.is_floating_point():
            raise TypeError(f"weights must be floating-point, got {weights.dtype}; use weights.float(), or mask=")
        weights = _expand("weights", weights, x).to(x.dtype)
        # Finite values stay, since the gradient of a weight depends on its value even where the weight is 0.
        x = torch.where((weights == 0) & ~x.isfinite(), 0.0, x)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True where a value counts, got {mask.dtype}; use mask.bool()")
        mask = _expand("mask", mask, x)
        x = torch.where(mask, x, 0.0)
        weights = mask.to(x.dtype) if weights is None else torch.where(mask, weights, 0.0)
    return x, weights


def _expand(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    try:
        return tensor.expand(x.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to x of shape {tuple(x.shape)}; "
            "give it the same number of dimensions, of size 1 where it does not vary"
        ) from error


def _or_one(count: Tensor) -> Tensor:
    """Replace 0 by 1: the divisor for sums over a set, which are 0 themselves where the set is empty."""
    return torch.where(count == 0, 1.0, count)
