"""Reports on what was done to a model's layers: as text, a layer a line, and as JSON has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

__all__ = ["Report", "listed", "summary"]


class Report:
    """What was done to the layers of a model, by their qualified names, and which were skipped, and why."""

    skipped: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Give the same for JSON, without the model, and with None for numbers that are not finite."""
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: _for_json(value) for name, value in shown.items() if not isinstance(value, nn.Module)}

    def _text(self, first: Iterable[str], done: Mapping[str, str], last: Iterable[str] = ()) -> str:
        """Join the lines of a report: the first, one for each layer, and the last."""
        skipped = {name: f"skipped, {reason}" for name, reason in self.skipped.items()}
        return "\n".join((*first, *_lines(done), *_lines(skipped), *last))


def listed(skipped: dict[str, str]) -> str:
    """Give layers and reasons, each in a line of its own behind a message."""
    return "".join(f"\n{line}" for line in _lines(skipped))


def summary(error: BaseException) -> str:
    """Give an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _lines(texts: Mapping[str, str]) -> list[str]:
    return [f"  {name or '(the model)'}: {text}" for name, text in texts.items()]


def _for_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _for_json(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return _for_json(value._asdict()) if hasattr(value, "_asdict") else [_for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
