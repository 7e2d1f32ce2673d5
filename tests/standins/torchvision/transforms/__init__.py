"""Names of image transforms that timm's own subclass or mention; none is called."""

from . import functional
from .functional import InterpolationMode

__all__ = ["InterpolationMode", "ToTensor", "functional"]


class ToTensor:
    """A base of timm's `MaybeToTensor`."""
