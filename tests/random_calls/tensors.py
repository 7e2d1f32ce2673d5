"""Tensors in any layout, alone in memory that is poisoned around them."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 64


def strides_of(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart neighbours lie."""
    t = torch.empty(shape, device="meta")
    if layout in ("channels_last", "odd_channels_last"):
        t = t.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "batch_last":
        t = t.movedim(0, -1).contiguous().movedim(-1, 0)
    elif layout == "reversed":
        order = tuple(reversed(range(len(shape))))
        t = t.permute(order).contiguous().permute(order)
    elif layout == "gaps":
        t = torch.empty((*shape[:-1], 2 * shape[-1]), device="meta")[..., ::2]
    elif layout == "sliced_channels":
        t = torch.empty((shape[0], shape[1] + 3, *shape[2:]), device="meta")[:, 2:-1]
    elif layout == "sliced_batch":
        t = torch.empty((2 * shape[0], *shape[1:]), device="meta")[::2]
    return t.stride()


class Memory:
    """Makes tensors whose surroundings are known, and says which surroundings changed."""

    def __init__(self) -> None:
        self._made: list[tuple[str, Tensor, Tensor, Tensor, bool]] = []

    def place(
        self, values: Tensor, dtype: torch.dtype, layout: str = "contiguous", name: str = "", writable: bool = False
    ) -> Tensor:
        """The values in a layout, between margins of ones in every bit (nan, or True).

        Args:
            name: to complain under; nothing is watched without one.
            writable: whether the values themselves may change.
        """
        neg, layout = layout == "neg", "contiguous" if layout == "neg" else layout
        shape = tuple(values.shape)
        strides = strides_of(layout, shape)
        span = sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1 if values.numel() else 0
        start = _MARGIN + layout.startswith("odd")
        item = dtype.itemsize
        bits = torch.full(((start + span + _MARGIN) * item,), 1 if dtype == torch.bool else 0xFF, dtype=torch.uint8)
        t = bits.view(dtype).as_strided(shape, strides, start)
        t.copy_(-values if neg else values)
        if name:
            self._made.append((name, t.detach(), bits, bits.clone(), writable))
        return torch._neg_view(t) if neg else t

    def touched(self) -> list[str]:
        """Complaints about what is not as it was, except for values that may change."""
        found = []
        for name, t, bits, before, writable in self._made:
            if writable and t.numel():
                now = t.clone()
                t.copy_(before.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset()))
                same = torch.equal(bits, before)
                t.copy_(now)
            else:
                same = torch.equal(bits, before)
            if not same:
                found.append(f"{name} or what lies beside it in memory was changed")
        return found


def expanded(values: Tensor, how: str) -> Tensor | None:
    """Values that are the same over some dimensions, with strides of 0 there; None for other layouts."""
    rest = (1,) * (values.dim() - 2)
    if values.numel() == 0:
        return None
    if how == "scalar":
        small = values.flatten()[0].reshape(1, 1, *rest)
    elif how == "per_sample":
        small = values.flatten(1)[:, :1].reshape(-1, 1, *rest)
    elif how == "per_channel":
        small = values[0].flatten(1)[:, 0].reshape(1, -1, *rest) if rest else values[:1]
    elif how in ("over_space", "expanded"):
        small = values.flatten(2)[..., :1].reshape(*values.shape[:2], *rest) if rest else values[:, :1]
    elif how == "over_last":
        small = values[..., :1]
    elif how == "over_batch":
        small = values[:1]
    elif how == "over_channels":
        small = values[:, :1]
    else:
        return None
    return small.contiguous()
