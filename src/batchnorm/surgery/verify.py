"""Whether a changed model still computes the same: outputs, gradients and buffers, in training and in evaluation."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.kernels import using
from batchnorm.surgery.example import forward, seeded

__all__ = ["Errors", "check", "evaluated", "largest_difference"]

_MAGNIFIED = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class Errors(NamedTuple):
    """The largest differences, relative to the largest value of the tensor."""

    outputs: float
    gradients: float


def check(before: nn.Module, after: nn.Module, inputs: Any) -> Errors:
    """Compare two models on example inputs, by torch's own operators; in float64 where that is needed to decide.

    Args:
        before, after: they are left as they were; parameters and buffers correspond by name.
        inputs: as for ``forward``.

    Raises:
        RuntimeError: if they differ by more than rounding.
        ValueError: if there is no output to compare.
    """
    errors, limit = _errors(before, after, inputs, wide=False), 1e-5
    if not max(errors) <= limit:  # rounding may have been magnified; in float64 it would not be
        try:
            errors = _errors(before, after, inputs, wide=True)
        except (RuntimeError, TypeError):  # a dtype is written into the model
            limit = max(_MAGNIFIED.get(p.dtype, limit) for p in before.parameters())
    for what, error in errors._asdict().items():
        if not error <= limit:
            raise RuntimeError(
                f"the fused model's {what} differ by {error:.1e} of their size (at most {limit:.0e} can be rounding): "
                "its forward does something that no graph showed; the model is unchanged"
            )
    return errors


def _errors(before: nn.Module, after: nn.Module, inputs: Any, wide: bool) -> Errors:
    outputs = gradients = 0.0
    for training in (True, False):
        right, found = (_run(model, inputs, training, wide) for model in (before, after))
        outputs = max(outputs, largest_difference(found[0], right[0]))
        gradients = max(gradients, largest_difference(found[1], right[1]))
    return Errors(outputs, gradients)


def evaluated(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point outputs of a copy of a model in evaluation, by torch's own operators.

    Raises:
        ValueError: if there is none.
    """
    twin = copy.deepcopy(model)
    if not isinstance(twin, fx.GraphModule):
        twin.train().eval()  # some keep what they computed last until they train again
    with seeded(model), using("aten"), torch.no_grad():
        outputs = [y for y in tree_leaves(forward(twin, inputs)) if isinstance(y, Tensor) and y.is_floating_point()]
    if not outputs:
        raise ValueError("the model returned no floating-point tensor that could be compared")
    return outputs


def _run(model: nn.Module, inputs: Any, training: bool, wide: bool) -> tuple[list[Tensor], list[Tensor]]:
    """One step of a copy: outputs with buffers, and gradients."""
    twin = copy.deepcopy(model).train(training)
    twin = twin.double() if wide else twin

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return (value.double() if wide else value).detach().clone().requires_grad_()

    given = tree_map(fresh, inputs)
    for parameter in twin.parameters():
        parameter.grad = None
    with seeded(model), using("aten"):
        outputs = [y for y in tree_leaves(forward(twin, given)) if isinstance(y, Tensor) and y.is_floating_point()]
        if not outputs:
            raise ValueError("the model returned no floating-point tensor that could be compared")
        losses = [(y * torch.randn_like(y)).sum() for y in outputs if y.requires_grad]
        if losses:
            torch.stack([loss.double() for loss in losses]).sum().backward()
    buffers = [b.detach() for b in twin.buffers() if b.is_floating_point()]
    sources = [*twin.parameters(), *(t for t in tree_leaves(given) if isinstance(t, Tensor))]
    gradients = [t.grad for t in sources if t.grad is not None]
    return [*(y.detach() for y in outputs), *buffers], gradients


def largest_difference(found: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference, relative to the tensor's largest value, or to a thousandth of all tensors' largest."""
    if [t.shape for t in found] != [t.shape for t in right]:
        return float("inf")
    sizes = [t.abs().max().item() if t.numel() else 0.0 for t in right]
    floor = max([1e-3 * size for size in sizes if size < float("inf")] + [1e-300])
    worst = 0.0
    for ours, theirs, size in zip(found, right, sizes, strict=True):
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        difference = torch.where(same, 0.0, (ours - theirs).abs()).nan_to_num(nan=float("inf"))
        worst = max(worst, difference.max().item() / max(size, floor) if difference.numel() else 0.0)
    return worst
