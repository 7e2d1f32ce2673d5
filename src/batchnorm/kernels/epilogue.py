"""What follows a normalization in the same pass over memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.activations import Activation, applied
from batchnorm.kernels.reference import counted


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

    def applied(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """Residual and activation by torch's own operators; 0 at positions of weight 0, and nothing of the residual."""
        if self.residual is not None:  # an activation's slope at nan would make 0 · nan of it
            y = y + (self.residual if weights is None else counted(self.residual, weights))
        y = applied(self.activation, y)
        return y if weights is None else counted(y, weights)


NOTHING = Epilogue()
