"""Reports: reasons in lines, and values as JSON has them."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["for_json", "listed"]


def for_json(value: Any) -> Any:
    """Give the same without tuples and named tuples, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: for_json(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return for_json(value._asdict()) if hasattr(value, "_asdict") else [for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def listed(skipped: dict[str, str]) -> str:
    """Give layers and reasons, each in a line of its own behind a message."""
    return "".join(f"\n  {name or '(the model)'}: {reason}" for name, reason in skipped.items())
