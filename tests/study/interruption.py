"""A command that is stopped as from a terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from waiting import HANGS_AFTER, until


def interrupted(command: str, out: Path) -> tuple[int, str]:
    """Send Ctrl-C to a command that has begun to work: its exit code, and what it said of errors.

    It has when it shows on its terminal that a first run is done: its workers, too, are past their start then.
    """
    ours, its = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm.cli", command, "--out", str(out)],
        stdout=its, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(its)
    os.set_blocking(ours, False)
    shown = b""

    def works() -> bool:
        nonlocal shown
        assert process.poll() is None, "it ended by itself"
        with suppress(BlockingIOError):
            shown += os.read(ours, 65536)
        return re.search(rb"\b[1-9]\d*/\d", shown) is not None

    try:
        until(works, f"{command} shows that a run is done")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, errors = process.communicate(timeout=HANGS_AFTER)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ours)
    return process.returncode, errors
