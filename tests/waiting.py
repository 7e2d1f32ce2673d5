"""How tests wait for other processes: for what happens, not for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds. Nothing here takes so long: it only makes an end of what hangs. A process may have to compile loops first,
# each of which takes 3 to 5 s on an idle machine and ten times that on a slow one with other work.
HANGS_AFTER = 1200.0


def until(happened: Callable[[], bool], what: str) -> None:
    """Look again and again whether something has happened."""
    end = time.monotonic() + HANGS_AFTER
    while not happened():
        assert time.monotonic() < end, f"{what}: not after {HANGS_AFTER:.0f} s"
        time.sleep(0.02)
