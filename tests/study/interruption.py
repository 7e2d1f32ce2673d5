"""A command that is stopped as from a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def interrupted(command: str, out: Path) -> tuple[int, str]:
    """Send Ctrl-C to a command that has begun to work: its exit code, and what it said of errors."""
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm.cli", command, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while not out.exists():
            time.sleep(0.05)
        deadline = time.monotonic() + 60
        while len(started(process.pid)) < 3 and time.monotonic() < deadline:  # a worker that starts has no manners yet
            time.sleep(0.05)
        time.sleep(4)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def started(group: int) -> list[str]:
    """The processes of a group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,pid="], capture_output=True, text=True, check=True).stdout
    return [pid for found, pid in map(str.split, listed.splitlines()) if found == str(group)]
