"""Population moments from batches, and how far they can be trusted.

The batches of a data set are clusters: values within one resemble each other more than values of two, so that what is
unsure about the mean shows in how much batches differ, not in how many values there are. Batches need not be of one
size. The memory needed does not grow with their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.moments import Moments, merge

__all__ = ["Clusters"]


@dataclass(frozen=True, eq=False)
class Clusters:
    """The moments of all values of some batches, and how the batches' own moments are spread.

    All tensors are float64. Of a batch of n values with mean m and biased variance v, the pair ``(m, v + m²)`` counts
    with weight n²: that is what the standard errors need, see ``errors``.

    Attributes:
        total: the moments of all values, of any shape ``S``.
        batches: ``S``, how many batches had values.
        weight: ``S``, the sum of n².
        means: ``(2, *S)``, the weighted means of m and v + m².
        products: ``(3, *S)``, their weighted squared deviations from these and, between, the products of both.
    """

    total: Moments
    batches: Tensor
    weight: Tensor
    means: Tensor
    products: Tensor

    @classmethod
    def of(cls, batch: Moments) -> Clusters:
        """Take one batch by itself."""
        pair = torch.stack((batch.mean, batch.biased_variance + batch.mean.square()))
        there = (batch.count > 0).to(pair.dtype)
        return cls(batch, there, batch.count.square(), pair, pair.new_zeros(3, *batch.mean.shape))

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device | None = None) -> Clusters:
        """Take no batches: merged with any others, they give the others."""
        return cls.of(Moments.empty(shape, device=device))

    def merged(self, other: Clusters) -> Clusters:
        """Join disjoint sets of batches; as ``Moments.merge``, which it does for pairs."""
        weight = self.weight + other.weight
        share = other.weight / torch.where(weight == 0, 1.0, weight)
        base = torch.where(self.weight == 0, other.means, self.means)
        delta = torch.where((self.weight == 0) | (other.weight == 0), 0.0, other.means - self.means)
        between = torch.stack((delta[0].square(), delta[0] * delta[1], delta[1].square()))
        return Clusters(
            merge(self.total, other.total),
            self.batches + other.batches,
            weight,
            base + delta * share,
            self.products + other.products + self.weight * share * between,
        )

    def errors(self, eps: float) -> tuple[Tensor, Tensor]:
        """Give the standard errors of mean and variance, of shape ``S``; infinite with fewer than two batches.

        The mean is that of a ratio, all sums over all counts. Its standard error by linearization is
        ``√(B / (B − 1) · Σ (n_b (m_b − μ))²) / Σ n_b``, and likewise that of the variance, whose batches contribute
        ``v_b + (m_b − μ)²`` each: that the mean is estimated, too, changes it only in second order.

        Args:
            eps: the layer's; the unit of the first is ``√(variance + eps)``, of the second ``variance + eps``.

        Source: Cochran 1977, "Sampling Techniques", 3rd edition, section 6.3 and 9A.
        """
        mean, variance = self.total.mean, self.total.biased_variance
        of_mean = self.products[0] + self.weight * (self.means[0] - mean).square()
        of_variance = self.products[2] - 4 * mean * self.products[1] + 4 * mean.square() * self.products[0]
        centre = self.means[1] - 2 * mean * self.means[0] + mean.square() - variance
        of_variance = of_variance.clamp(min=0) + self.weight * centre.square()
        enough = self.batches > 1
        freedom = torch.where(enough, self.batches / (self.batches - 1).clamp(min=1), torch.inf)
        count = torch.where(self.total.count > 0, self.total.count, 1.0)
        scale = variance + eps
        scale = torch.where(scale > 0, scale, 1.0)
        mean_error = (of_mean / scale).sqrt() * (freedom.sqrt() / count)
        variance_error = of_variance.sqrt() / scale * (freedom.sqrt() / count)
        return torch.where(enough, mean_error, torch.inf), torch.where(enough, variance_error, torch.inf)

    def packed(self) -> Tensor:
        """Give all numbers as one tensor ``(10, *S)``."""
        total = torch.stack((self.total.count, self.total.mean, self.total.m2, self.batches, self.weight))
        return torch.cat((total, self.means, self.products))

    @classmethod
    def unpacked(cls, numbers: Tensor) -> Clusters:
        """Undo ``packed``."""
        count, mean, m2, batches, weight = numbers[:5]
        return cls(Moments(count, mean, m2), batches, weight, numbers[5:7], numbers[7:])
