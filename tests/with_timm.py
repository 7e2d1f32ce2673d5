"""timm, imported beside a stand-in for torchvision where torchvision is not installed: ``from with_timm import timm``.

The stand-in can be seen while timm is imported, and not afterwards: transformers, lightning and torchmetrics ask
whether torchvision is there, and would import what the stand-in does not have.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

STANDINS = str(Path(__file__).with_name("standins"))


def _imported() -> Any:
    if find_spec("torchvision") is not None:
        return pytest.importorskip("timm", reason="timm is in the group 'timm'")
    sys.path.insert(0, STANDINS)
    try:
        return pytest.importorskip("timm", reason="timm is in the group 'timm'")
    finally:
        sys.path.remove(STANDINS)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


timm: Any = _imported()
