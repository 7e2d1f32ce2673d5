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
    from batchnorm.conditional import ConditionalBatchNorm as ConditionalBatchNorm
    from batchnorm.diagnosis.diagnose import diagnose as diagnose
    from batchnorm.domains import DomainBatchNorm as DomainBatchNorm
    from batchnorm.domains import domain as domain
    from batchnorm.layers import BatchNorm1d as BatchNorm1d
    from batchnorm.layers import BatchNorm2d as BatchNorm2d
    from batchnorm.layers import BatchNorm3d as BatchNorm3d
    from batchnorm.layers import LazyBatchNorm1d as LazyBatchNorm1d
    from batchnorm.layers import LazyBatchNorm2d as LazyBatchNorm2d
    from batchnorm.layers import LazyBatchNorm3d as LazyBatchNorm3d
    from batchnorm.masks import mask_from_lengths as mask_from_lengths
    from batchnorm.memory import keep_freed_memory as keep_freed_memory
    from batchnorm.moments import Moments as Moments
    from batchnorm.ports import ported as ported
    from batchnorm.statistics import Accumulated as Accumulated
    from batchnorm.statistics import Batch as Batch
    from batchnorm.statistics import Ghost as Ghost
    from batchnorm.statistics import Renorm as Renorm
    from batchnorm.statistics import Sync as Sync
    from batchnorm.statistics import Warmup as Warmup
    from batchnorm.study.compare import compare as compare
    from batchnorm.surgery.adaptation.adapt import adapt as adapt
    from batchnorm.surgery.convert import convert as convert
    from batchnorm.surgery.convert import revert as revert
    from batchnorm.surgery.domains import add_domain as add_domain
    from batchnorm.surgery.domains import split_domains as split_domains
    from batchnorm.surgery.folding.fold import fold as fold
    from batchnorm.surgery.freeze import freeze as freeze
    from batchnorm.surgery.freeze import frozen_statistics as frozen_statistics
    from batchnorm.surgery.freeze import unfreeze as unfreeze
    from batchnorm.surgery.fusing.fuse import fuse as fuse
    from batchnorm.surgery.inspect.preserve import preserved as preserved
    from batchnorm.surgery.recalibrate import recalibrate as recalibrate
    from batchnorm.surgery.replace import replace as replace

__version__ = "0.1.0"

_HOME = {
    "BatchNorm1d": "batchnorm.layers",
    "BatchNorm2d": "batchnorm.layers",
    "BatchNorm3d": "batchnorm.layers",
    "ConditionalBatchNorm": "batchnorm.conditional",
    "DomainBatchNorm": "batchnorm.domains",
    "LazyBatchNorm1d": "batchnorm.layers",
    "LazyBatchNorm2d": "batchnorm.layers",
    "LazyBatchNorm3d": "batchnorm.layers",
    "Moments": "batchnorm.moments",
    **dict.fromkeys(("Accumulated", "Batch", "Ghost", "Renorm", "Sync", "Warmup"), "batchnorm.statistics"),
    "mask_from_lengths": "batchnorm.masks",
    "ported": "batchnorm.ports",
    "compare": "batchnorm.study.compare",
    "diagnose": "batchnorm.diagnosis.diagnose",
    "keep_freed_memory": "batchnorm.memory",
    "adapt": "batchnorm.surgery.adaptation.adapt",
    "convert": "batchnorm.surgery.convert",
    "fold": "batchnorm.surgery.folding.fold",
    "freeze": "batchnorm.surgery.freeze",
    "frozen_statistics": "batchnorm.surgery.freeze",
    "add_domain": "batchnorm.surgery.domains",
    "domain": "batchnorm.domains",
    "fuse": "batchnorm.surgery.fusing.fuse",
    "preserved": "batchnorm.surgery.inspect.preserve",
    "recalibrate": "batchnorm.surgery.recalibrate",
    "replace": "batchnorm.surgery.replace",
    "revert": "batchnorm.surgery.convert",
    "unfreeze": "batchnorm.surgery.freeze",
    "split_domains": "batchnorm.surgery.domains",
}
_MODULES = ("functional", "kernels", "layers", "moments", "recurrent", "statistics")

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
