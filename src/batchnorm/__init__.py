"""Batch normalization for PyTorch: drop-in layers on fast kernels, and evidence of what they do for a model.

Names are imported when they are first used, so that ``batchnorm --help`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm import functional as functional
    from batchnorm import kernels as kernels
    from batchnorm import recurrent as recurrent
    from batchnorm.layers import BatchNorm1d as BatchNorm1d
    from batchnorm.layers import BatchNorm2d as BatchNorm2d
    from batchnorm.layers import BatchNorm3d as BatchNorm3d
    from batchnorm.layers import LazyBatchNorm1d as LazyBatchNorm1d
    from batchnorm.layers import LazyBatchNorm2d as LazyBatchNorm2d
    from batchnorm.layers import LazyBatchNorm3d as LazyBatchNorm3d
    from batchnorm.memory import keep_freed_memory as keep_freed_memory
    from batchnorm.moments import Moments as Moments
    from batchnorm.study.compare import compare as compare
    from batchnorm.surgery.convert import convert as convert
    from batchnorm.surgery.convert import revert as revert
    from batchnorm.surgery.fuse import fuse as fuse

__version__ = "0.1.0"

_HOME = {
    "BatchNorm1d": "batchnorm.layers",
    "BatchNorm2d": "batchnorm.layers",
    "BatchNorm3d": "batchnorm.layers",
    "LazyBatchNorm1d": "batchnorm.layers",
    "LazyBatchNorm2d": "batchnorm.layers",
    "LazyBatchNorm3d": "batchnorm.layers",
    "Moments": "batchnorm.moments",
    "compare": "batchnorm.study.compare",
    "keep_freed_memory": "batchnorm.memory",
    "convert": "batchnorm.surgery.convert",
    "fuse": "batchnorm.surgery.fuse",
    "revert": "batchnorm.surgery.convert",
}
_MODULES = ("functional", "kernels", "layers", "moments", "recurrent")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(f"batchnorm.{name}")
    else:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
