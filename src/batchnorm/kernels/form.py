"""What a loop is compiled for besides the dtype: the ways in which z, the activation's argument, comes about."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """A kind of work; each has its own machine code."""

    activation: str | None = None
    residual: bool = False  # z = normalized + residual, and the loop reads the residual
    slope_bits: bool = False  # the forward writes, and the backward reads, a bit an element instead of z
    inplace: bool = False  # the backward finds y where x was
    fixed_moments: bool = False  # the moments do not depend on x, as in evaluation
    weighted: bool = False  # positions have weights; those of weight 0 are neither read nor anything but 0 in y and dx


PLAIN = Form()
WEIGHTED = Form(weighted=True)
