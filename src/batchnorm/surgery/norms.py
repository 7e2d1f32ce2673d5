"""Normalizations of single samples that can stand where batch normalization stood."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.activations import applied
from batchnorm.epilogue import WithEpilogue, recorded

__all__ = ["GroupNorm", "Identity", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "RMSNorm", "Zero"]


class _Following(WithEpilogue):
    """What our batch normalization does behind the normalization: adding a residual, applying an activation."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``(N, C, *space)``, add the residual, apply the activation."""
        if isinstance(input, Proxy):  # torch.fx: a leaf, as torch.nn's layers are
            leaf: Tensor = recorded(self, input, residual, None, self.activation)
            return leaf
        y: Tensor = super().forward(input)
        return applied(self.activation, y if residual is None else y + residual)

    def extra_repr(self) -> str:
        """Say what torch's layer says, and what follows."""
        said = super().extra_repr()
        if self.activation is None:
            return said
        name, parameter = self.activation
        return f"{said}, activation={name}({parameter:g})".removeprefix(", ")


class GroupNorm(_Following, nn.GroupNorm):
    """``nn.GroupNorm`` that takes a residual and applies an activation, as ``batchnorm.BatchNorm2d`` does."""


class InstanceNorm2d(_Following, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` that takes a residual and applies an activation."""


class InstanceNorm3d(_Following, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` that takes a residual and applies an activation."""


class InstanceNorm1d(_Following, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` of ``(N, C, L)`` alone; torch's takes ``(N, C)`` for one sample of N channels.

    Raises:
        ValueError: input of other dimensions.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 3:
            raise ValueError(
                f"expected 3D input (got {input.dim()}D input): instance normalization of (N, C) has one value per "
                "channel, and would make all of them 0; replace this layer by 'group' or 'layer'"
            )


class _ChannelRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over dimension 1 instead of the last ones."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square over the channels, at every position."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RMSNorm(_Following, _ChannelRMSNorm):
    """Divides ``(N, C, *space)`` by the root mean square over the channels, at every position; then scales.

    For ``(N, C)`` it is ``nn.RMSNorm(C)``. It takes a residual and applies an activation, as
    ``batchnorm.BatchNorm2d`` does.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """


class Identity(_Following, nn.Identity):
    """Nothing but the residual and the activation."""


class Zero(nn.Module):
    """Gives 0, to be added to something, where a layer was whose work is done beside it."""

    def forward(self, input: Tensor) -> Tensor:
        """Give one number, of the input's dtype."""
        return input.new_zeros(())
