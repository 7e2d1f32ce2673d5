"""Fold batch normalization into the convolution or linear layer next to it, for inference."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.surgery.find import is_batch_norm
from batchnorm.surgery.line import TRANSPOSED, along_outputs, line_of
from batchnorm.surgery.sources import Source, sources

__all__ = ["Folded", "fold"]


@dataclass(frozen=True)
class Folded:
    """A folded model, and what was done to it.

    Attributes:
        model: the new model, in evaluation mode.
        folded: for each layer that was folded, by its qualified name, into what.
        skipped: for every other batch normalization layer, why not.
        max_error: the largest difference of an output from the original model's on the example inputs, in the model's
            own dtype, relative to the largest value of its tensor; None without example inputs.
        max_error_float64: the same with both models in float64; None, too, if the model cannot run in it.
    """

    model: nn.Module
    folded: dict[str, str]
    skipped: dict[str, str]
    max_error: float | None = None
    max_error_float64: float | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} folded, {len(self.skipped)} left"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.folded.items()]
        lines += [f"  {name or '(the model)'}: left, {reason}" for name, reason in self.skipped.items()]
        if self.max_error is None:
            lines.append("not verified: give example_inputs")
        elif self.max_error_float64 is None:
            lines.append(f"verified: outputs within {self.max_error:.1e}; the model does not run in float64")
        else:
            lines.append(f"verified: outputs within {self.max_error:.1e}, in float64 {self.max_error_float64:.1e}")
        return "\n".join(lines)


def fold(model: Any, example_inputs: Any = None) -> Folded:
    """Make a copy of a model for inference in which convolutions and linear layers do their batch normalization."""
    made = copy.deepcopy(model).eval()
    layers: dict[str, Any] = {name: m for name, m in made.named_modules() if is_batch_norm(m)}
    found = sources(made, layers.values(), example_inputs)
    folded, skipped = {}, {}
    for name, layer in layers.items():
        source = found[layer]
        if isinstance(source, str) or not source.certain:
            skipped[name] = source if isinstance(source, str) else "example_inputs would show whether it can be folded"
            continue
        _into(layer, source)
        parent, _, key = name.rpartition(".")
        setattr(made.get_submodule(parent), key, nn.Identity())
        folded[name] = f"into {source.name}"
    return Folded(made, folded, skipped)


def _into(layer: Any, source: Source) -> None:
    before: Any = source.module
    scale, shift = line_of(layer)
    weight = along_outputs(before.weight, scale, getattr(before, "groups", 1), isinstance(before, TRANSPOSED))
    bias = shift if before.bias is None else shift + before.bias.detach().cpu().double() * scale
    before.weight = nn.Parameter(weight.to(before.weight), before.weight.requires_grad)
    before.bias = nn.Parameter(bias.to(before.weight), before.weight.requires_grad)
