"""Reports as JSON has them."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["for_json"]


def for_json(value: Any) -> Any:
    """Give the same without tuples and named tuples, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: for_json(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return for_json(value._asdict()) if hasattr(value, "_asdict") else [for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
