"""Whether a changed model still computes the same: outputs, gradients and buffers, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.kernels import using
from batchnorm.surgery.inspect.example import copied_inputs, forward, in_mode, seeded
from batchnorm.surgery.inspect.tensors import copied, tensors_in

__all__ = ["Errors", "comparable", "evaluated", "largest_difference", "verify"]

_LIMIT = 1e-5  # of a tensor's size; more is not rounding, in float64 and mostly in float32
_ULPS = 10  # how many times the effect of the last bit of all weights may be rounding


class Errors(NamedTuple):
    """The largest differences, relative to the largest value of the tensor."""

    outputs: float
    gradients: float


class _Step(NamedTuple):
    """What a model gives in one step: outputs with buffers, and gradients."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def verify(before: nn.Module, after: nn.Module, inputs: Any) -> Errors:
    """Compare two models on example inputs, by torch's own operators; in float64 where that is needed to decide.

    Rounding may have been magnified: in float64 it is not. Where a dtype is written into the model, a difference may
    be as large as what the last bit of the weights makes of the model that was there before.

    Args:
        before, after: they are left as they were; parameters and buffers correspond by name.
        inputs: as for ``forward``.

    Raises:
        RuntimeError: if they differ by more than rounding.
        ValueError: if there is no output to compare.
    """
    errors = _errors(before, after, inputs, wide=False)
    if not max(errors) <= _LIMIT:
        try:
            errors = _errors(before, after, inputs, wide=True)
        except (RuntimeError, TypeError):  # a dtype is written into the model
            errors = _errors(before, after, inputs, wide=False, nudged=_nudged(before))
    for what, error in errors._asdict().items():
        if not error <= _LIMIT:
            raise RuntimeError(
                f"the fused model's {what} differ by {error:.1e} of their size (at most {_LIMIT:.0e} can be rounding): "
                "its forward does something that no graph showed; the model is unchanged"
            )
    return errors


def _errors(before: nn.Module, after: nn.Module, inputs: Any, wide: bool, nudged: nn.Module | None = None) -> Errors:
    outputs = gradients = 0.0
    for training in (True, False):
        right, found = (_run(model, inputs, training, wide) for model in (before, after))
        rounded = _Step([], []) if nudged is None else _run(nudged, inputs, training, wide)
        outputs = max(outputs, largest_difference(found.outputs, right.outputs, rounded.outputs))
        gradients = max(gradients, largest_difference(found.gradients, right.gradients, rounded.gradients))
    return Errors(outputs, gradients)


def evaluated(model: nn.Module, inputs: Any, copy: bool = True) -> list[Tensor]:
    """The floating-point outputs of a model in evaluation, by torch's own operators.

    Args:
        model: it is left as it was, unless it need not be copied.
        inputs: as for ``forward``.
        copy: False for a model that is used for nothing else.

    Raises:
        ValueError: if there is none.
    """
    twin = copied(model) if copy else model
    if not isinstance(twin, fx.GraphModule):
        in_mode(in_mode(twin, True), False)  # some keep what they computed last until they train again
    with seeded(model), using("aten"), torch.no_grad():
        return comparable(forward(twin, copied_inputs(inputs)))


def comparable(result: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned.

    Raises:
        ValueError: if there is none.
    """
    outputs = [t for t in tensors_in(result) if t.is_floating_point()]
    if not outputs:
        raise ValueError(
            f"the model returned no floating-point tensor that could be compared, but a "
            f"{type(result).__name__}: give a module whose forward returns tensors, or call without example_inputs"
        )
    return outputs


def _run(model: nn.Module, inputs: Any, training: bool, wide: bool) -> _Step:
    """One step of a copy."""
    twin = in_mode(copied(model), training)
    twin = twin.double() if wide else twin
    learns = any(p.requires_grad for p in twin.parameters())

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        # Some models require a gradient of their input themselves, which only a leaf allows.
        return (value.double() if wide else value).detach().clone().requires_grad_(value.requires_grad or not learns)

    given = tree_map(fresh, inputs)
    for parameter in twin.parameters():
        parameter.grad = None
    with seeded(model), using("aten"):
        _count_once(twin)
        outputs = comparable(forward(twin, given))
        losses = [(y * torch.randn_like(y)).sum() for y in outputs if y.requires_grad]
        if losses:
            torch.stack([loss.double() for loss in losses]).sum().backward()
    buffers = [b.detach() for b in twin.buffers() if b.is_floating_point()]
    sources = [*twin.parameters(), *(t for t in tree_leaves(given) if isinstance(t, Tensor))]
    gradients = [t.grad for t in sources if t.is_leaf and t.grad is not None]
    return _Step([*(y.detach() for y in outputs), *buffers], gradients)


def _count_once(model: nn.Module) -> None:
    """Let torch's layers leave their statistics alone while a backward computes anew what was not kept."""
    kept: list[dict[str, Tensor | None] | None] = []

    def keep(layer: nn.Module, args: Any) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        kept.append(dict(layer._buffers) if recomputing else None)
        if recomputing:
            layer._buffers.update({name: None if b is None else b.clone() for name, b in layer._buffers.items()})

    def put_back(layer: nn.Module, args: Any, result: Any) -> None:
        layer._buffers.update(kept.pop() or {})

    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.register_forward_pre_hook(keep)
            layer.register_forward_hook(put_back)


def _nudged(model: nn.Module) -> nn.Module:
    """A copy whose weights are off by their last bit, up or down."""
    twin: nn.Module = copied(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                sign = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
                p.mul_(1 + torch.finfo(p.dtype).eps * sign)
    return twin


def largest_difference(found: Sequence[Tensor], right: Sequence[Tensor], rounded: Sequence[Tensor] = ()) -> float:
    """The largest difference, relative to the tensor's largest value, or to a thousandth of all tensors' largest.

    Args:
        found: what is judged.
        right: what it should be.
        rounded: what it might be for rounding alone. Ten times as far off is no more than the limit of ``verify``.
    """
    if [t.shape for t in found] != [t.shape for t in right]:
        return float("inf")
    sizes = [_size(t) for t in right]
    floor = max([1e-3 * size for size in sizes] + [1e-300])
    worst = 0.0
    for ours, theirs, size, near in zip(found, right, sizes, rounded or right, strict=True):
        allowed = _ULPS * max(_distance(near, theirs), torch.finfo(theirs.dtype).eps * size) if rounded else 0.0
        worst = max(worst, _distance(ours, theirs) / max(size, floor, allowed / _LIMIT))
    return worst


def _size(tensor: Tensor) -> float:
    """The largest value, of those that are finite."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if largest < float("inf"):
        return largest
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _distance(ours: Tensor, theirs: Tensor) -> float:
    if torch.equal(ours, theirs):
        return 0.0
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference = torch.where(same, 0.0, (ours - theirs).abs()).nan_to_num(nan=float("inf"))
    return difference.max().item() if difference.numel() else 0.0
