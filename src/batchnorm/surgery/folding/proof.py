"""Whether a folded model computes what the model computed, and which layers are to blame if it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.surgery.inspect.tensors import copy_sharing_parameters
from batchnorm.surgery.inspect.verify import comparable, evaluated, largest_difference
from batchnorm.surgery.report import summary

__all__ = ["Proof"]

Step = TypeVar("Step")
_COARSE = {torch.bfloat16: 0.1, torch.float16: 0.1}


class Proof(Generic[Step]):
    """A model's outputs on example inputs, in its own dtype and in float64, to compare folded copies with.

    Attributes:
        refused: the steps that were left out, and why.
        errors: the largest difference of the folded model's outputs, relative to their tensor's largest value; the
            same with both models in float64, None if the model cannot run in it.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, outputs: Any, folded: Callable[[nn.Module, Sequence[Step]], nn.Module]
    ) -> None:
        """Run the model in float64.

        Args:
            model: in evaluation mode; it is left as it was.
            inputs: as for ``forward``.
            outputs: what it gave for them.
            folded: makes a folded copy of the model, or of the model in float64, with the steps that are named.

        Raises:
            ValueError: if there is no output to compare.
        """
        self.refused: dict[Step, str] = {}
        self.errors: tuple[float, float | None] = 0.0, None
        self._model, self._inputs, self._folded = model, inputs, folded
        self._right = comparable(outputs)
        self._limit = max([1e-5, *(_COARSE.get(p.dtype, 0.0) for p in model.parameters())])
        self._wide: nn.Module | None = None
        try:
            wide = copy.deepcopy(model).double()
            self._wide_inputs = tree_map(_doubled, inputs)
            self._wide_right = evaluated(copy_sharing_parameters(wide)[0], self._wide_inputs, copy=False)
        except Exception:  # a dtype is written into the model, in whatever way
            return
        self._wide, self._limit = wide, 1e-9

    def sound(self, steps: Sequence[Step]) -> list[Step]:
        """Give the steps that change nothing but rounding; if some do, they are found by halving.

        Raises:
            RuntimeError: if the model differs from itself from run to run.
        """
        if self._reason(steps) is None:
            return self._measured(list(steps))
        reason = self._reason([])
        if reason is not None:
            raise RuntimeError(f"nothing can be verified, since the model does not repeat its outputs: {reason}")
        return self._measured(self._halved([], list(steps)))

    def _measured(self, steps: list[Step]) -> list[Step]:
        if self._wide is not None:
            self.errors = self._own_difference(steps), self.errors[1]
        return steps

    def _halved(self, kept: list[Step], steps: list[Step]) -> list[Step]:
        reason = self._reason([*kept, *steps])
        if reason is None:
            return [*kept, *steps]
        if len(steps) == 1:
            self.refused[steps[0]] = reason
            return kept
        half = len(steps) // 2
        return self._halved(self._halved(kept, steps[:half]), steps[half:])

    def _reason(self, steps: Sequence[Step]) -> str | None:
        """Why these steps are not exact; None if they are."""
        try:
            error = self._difference(steps)
        except Exception as failure:
            return f"without it a forward fails ({summary(failure)})"
        if error <= self._limit:
            return None
        return (
            f"without it outputs differ by {error:.1e} of their size (at most {self._limit:.0e} can be rounding): a "
            "forward does something that neither a graph nor a run showed"
        )

    def _difference(self, steps: Sequence[Step]) -> float:
        if self._wide is None:
            found = self._own_difference(steps)
            self.errors = (found, None) if found <= self._limit else self.errors
        else:
            outputs = evaluated(self._folded(self._wide, steps), self._wide_inputs, copy=False)
            found = largest_difference(outputs, self._wide_right)
            self.errors = (self.errors[0], found) if found <= self._limit else self.errors
        return found

    def _own_difference(self, steps: Sequence[Step]) -> float:
        """The difference in the model's own dtype."""
        outputs = evaluated(self._folded(self._model, steps), self._inputs, copy=False)
        return largest_difference(outputs, self._right)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
