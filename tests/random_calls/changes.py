"""What may happen to tensors between a forward and its backward, to saved ones and to those of the user."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .cases import Case


def _gaps(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t.clone()
    wide = torch.zeros((*t.shape[:-1], 2 * t.shape[-1]), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def _relayout(t: Tensor) -> Tensor:
    if t.dim() < 3 or not t.is_contiguous():
        return t.contiguous().clone()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


_PACKED = {
    "clone": torch.clone,
    "relayout": _relayout,
    "numpy": lambda t: t.contiguous().clone(memory_format=torch.contiguous_format),
    "neg": lambda t: torch._neg_view(-t) if t.is_floating_point() else t.clone(),
    "gaps": _gaps,
    "double": lambda t: t.double() if t.is_floating_point() else t,
    "bfloat16": lambda t: t.bfloat16() if t.is_floating_point() else t,
}


def hooks(name: str, guard: Any) -> AbstractContextManager[Any]:
    """Let saved tensors come back in another form, in which they have the same values."""
    if not name:
        return nullcontext()

    def unpack(t: Tensor) -> Tensor:
        if guard is not None and not t.is_neg():
            guard.know(t)
        return t

    return torch.autograd.graph.saved_tensors_hooks(lambda t: _PACKED[name](t.detach()), unpack)


def changed(case: Case, subject: Any, x: Tensor, y: Tensor, residual: Tensor | None) -> None:
    """Do what the case does between the forward and the backward."""
    what, _, how = case.between.partition("_")
    with torch.no_grad():
        if how == "inplace":
            t = {"x": x, "y": y, "residual": residual, "weight": subject.weight, "bias": subject.bias}[what]
            if t is not None and 0 not in t.stride():
                t.mul_(2.0)
        elif what == "layer":
            subject.layer.half() if how == "half" else subject.layer.double()
        elif what == "moved":
            subject.layer.to("meta")
        elif what in ("weight", "bias"):
            t = getattr(subject, what)
            if t is not None:
                old = t.data.resolve_neg()
                t.data = {"double": old.double(), "half": old.half(), "short": old[1:], "strided": _gaps(old)}[how]


def refused_by_torch(case: Case, error: Exception) -> bool:
    """Whether torch, too, raises such an error there, or may: what it would compute with is not what it saved."""
    if not isinstance(error, RuntimeError):
        return False
    if case.hooks in ("double", "bfloat16"):
        return True
    if case.between == "weight_strided" or not case.between:
        return False
    # Normalization alone needs no bias in its backward; but autograd finds no leaf whose dtype has changed.
    lost = "appears to not have been used" in str(error)
    return lost or case.inplace or not (case.between.startswith("bias") and case.activation is None)
