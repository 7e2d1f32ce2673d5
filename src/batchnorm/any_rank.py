"""A layer of ours for input of any number of dimensions: what layers that are made of layers hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.layers import _BatchNorm

__all__ = ["BatchNormAnyRank", "SyncBatchNorm", "recorded"]


class BatchNormAnyRank(_BatchNorm):
    """Batch normalization of ``(N, C, *space)`` with 2 to 5 dimensions. See ``batchnorm.BatchNorm1d`` for the rest."""

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(
                f"expected 2D to 5D input (got {input.dim()}D input of size {tuple(input.shape)}): (N, C, *space)"
            )

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("TorchScript cannot compile a layer for any number of dimensions: use torch.export")


class SyncBatchNorm(BatchNormAnyRank):
    """What ``convert(model, statistics=Sync())`` makes of ``nn.SyncBatchNorm``, and ``revert`` makes that of again.

    It is no ``nn.SyncBatchNorm`` by isinstance: DistributedDataParallel refuses those on CPUs.
    """


def recorded(module: nn.Module, input: Proxy, **given: Any) -> Any:
    """Let torch.fx record one call of a module, as it does for torch.nn's, rather than what happens inside."""
    tracer: Any = input.tracer
    given = {name: value for name, value in given.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), given)
