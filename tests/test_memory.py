"""Freed memory is kept where it is asked for: counted in page faults, in processes of their own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import batchnorm
from batchnorm import memory

FAULTS = """
import resource, sys, torch, batchnorm
if sys.argv[1] == "keep":
    assert batchnorm.keep_freed_memory()
torch.set_num_threads(1)
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def faults(mode: str) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, timeout=120, check=True
    )
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_large_tensor_finds_its_memory_warm() -> None:
    assert faults("keep") < 0.05 * faults("leave")


def test_elsewhere_it_says_that_nothing_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert batchnorm.keep_freed_memory() is False


@pytest.mark.parametrize("limit", [0, -1, 2**31])
def test_limits_out_of_range(limit: int) -> None:
    with pytest.raises(ValueError, match="limit must be from 1"):
        batchnorm.keep_freed_memory(limit)
