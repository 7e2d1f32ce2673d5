"""An error in the place of a layer that silently does less: layers refuse to be made another package's."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

__all__ = ["Guarded"]

if TYPE_CHECKING:
    _Base = nn.Module  # what it is mixed into
else:
    _Base = object


class _QConfig:
    """Has no setter, so that quantization can set an attribute of this name, and finds nothing until then."""

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        frame = sys._getframe(1)
        caller, package = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        reason = layer._obstacle_to_takeover(package) if "norm" in caller or "bn" in caller else None
        if reason is not None:
            raise RuntimeError(f"{caller} would make another layer of this {type(layer).__name__}, {reason}")
        raise AttributeError("qconfig")


class Guarded(_Base):
    """Raises when another layer is about to be made of this one that would do less.

    ``nn.SyncBatchNorm.convert_sync_batchnorm``, timm's function of this name, and those that were written after them
    make a new layer of whatever is a ``_BatchNorm``, and ask for its ``qconfig`` to take it along. Quantization asks,
    too, for other reasons, and is left alone.
    """

    qconfig = _QConfig()

    def _obstacle_to_takeover(self, by: str) -> str | None:
        """What would be lost, and what to do instead; None for nothing. ``by`` is the module of who asks."""
        return None

    def __dir__(self) -> Iterable[str]:
        """List what can be read; some look at every attribute."""
        return [name for name in super().__dir__() if name != "qconfig" or name in vars(self)]
