"""What tells one compiled kernel from another."""

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


class Key(NamedTuple):
    """Which machine code: a loop, for a dtype and a form."""

    name: str
    dtype: str  # "float32", "float64" or "bfloat16"
    form: Form = PLAIN

    @property
    def symbol(self) -> str:
        """The name of its C function."""
        return "_".join(("batchnorm", self.dtype, self.name, *(str(part) for part in self.form)))
