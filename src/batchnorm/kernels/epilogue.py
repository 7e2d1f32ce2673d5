"""What follows a normalization in the same pass over memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.activations import Activation, applied


class Epilogue(NamedTuple):
    """What follows a normalization in the same pass over memory."""

    activation: Activation | None = None
    residual: Tensor | None = None  # added before the activation
    inplace: bool = False  # y takes x's place

    @staticmethod
    def of(activation: Activation | None, residual: Tensor | None, inplace: bool = False) -> Epilogue:
        """Make one; ``NOTHING`` itself where nothing follows, so that ``is`` can tell."""
        return Epilogue(activation, residual, inplace) if activation or residual is not None or inplace else NOTHING

    def laid_like(self, x: Tensor) -> Epilogue:
        """The same with the residual as the loops want it: with the strides of x."""
        r = self.residual
        if r is None or (r.stride() == x.stride() and not r.is_neg()):
            return self
        return self._replace(residual=torch.empty_like(x).copy_(r))

    def applied(self, y: Tensor) -> Tensor:
        """Residual and activation by torch's own operators."""
        return applied(self.activation, y if self.residual is None else y + self.residual)


NOTHING = Epilogue()
