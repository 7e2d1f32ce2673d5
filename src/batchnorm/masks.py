"""Masks: which positions of a batch count."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mask_from_lengths"]


def mask_from_lengths(lengths: Tensor, size: int | None = None) -> Tensor:
    """Make the mask of padded sequences: True at the first ``lengths[n]`` places of sample n.

    Args:
        lengths: ``(N,)`` whole numbers, none negative.
        size: L, the length that all are padded to; the longest one's if not given.

    Returns:
        ``(N, L)`` bool, on the device of ``lengths``.

    Raises:
        TypeError: if ``lengths`` is not of whole numbers.
        ValueError: if it is not one-dimensional, or a length is negative or above ``size``.

    Example:
        >>> mask_from_lengths(torch.tensor([2, 0, 3])).int().tolist()
        [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    """
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be whole numbers, got {lengths.dtype}; use lengths.long()")
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have the shape (N,), got {tuple(lengths.shape)}")
    longest = int(lengths.max()) if lengths.numel() else 0
    size = longest if size is None else size
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    if longest > size:
        raise ValueError(f"a sequence of length {longest} does not fit into size {size}")
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)
