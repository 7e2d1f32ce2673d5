"""What a classifier says about data, in all: which classes, how evenly, how certainly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Predictions", "entropy", "scores"]


def scores(output: Any) -> Tensor | None:
    """Find class scores ``(N, classes, *space)`` in what a model returns: that or its ``.logits``; None if neither."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2 or found.shape[1] < 2:
        return None
    return found


def entropy(logits: Tensor) -> Tensor:
    """Give the mean entropy of predictions, -Σ p log p over dimension 1, in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


class Predictions:
    """Which classes a model predicts before it is adapted, and how uncertain it is before and after.

    Attributes:
        possible: False once the model has returned something that is not class scores.
        samples: predictions so far.
    """

    def __init__(self) -> None:
        self.possible = True
        self.samples = 0
        self._classes: Tensor | None = None
        self._before = self._after = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Note the scores of one batch."""
        chosen = before.argmax(1).flatten().cpu()
        histogram = torch.bincount(chosen, minlength=before.shape[1]).double()
        self._classes = histogram if self._classes is None else self._classes + histogram
        self.samples += len(chosen)
        self._before += float(entropy(before.double())) * len(chosen)
        self._after += float(entropy(after.double())) * len(chosen)

    @property
    def spread(self) -> float:
        """How evenly the classes are predicted before: the entropy of their histogram, as a share of the largest one.

        1 where all classes (or, with fewer samples than classes, all samples) are predicted equally often, 0 where
        there is one class only.
        """
        if self._classes is None or min(len(self._classes), self.samples) < 2:
            return 1.0
        p = self._classes[self._classes > 0] / self.samples
        return float(-(p * p.log()).sum()) / math.log(min(len(self._classes), self.samples))

    @property
    def commonest(self) -> tuple[int, float]:
        """The class that is predicted most often before, and its share."""
        assert self._classes is not None
        return int(self._classes.argmax()), float(self._classes.max()) / self.samples

    @property
    def before(self) -> float:
        """The mean entropy of the predictions before, in nats."""
        return self._before / max(self.samples, 1)

    @property
    def after(self) -> float:
        """The mean entropy of the predictions with the target's statistics, in nats."""
        return self._after / max(self.samples, 1)
