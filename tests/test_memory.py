"""Freed memory is kept where it is asked for: counted in page faults, in processes of their own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import batchnorm
from batchnorm import memory
from waiting import HANGS_AFTER

FAULTS = """
import resource, sys, torch, batchnorm
if sys.argv[1] == "keep":
    assert batchnorm.keep_freed_memory()
torch.set_num_threads(1)
net = torch.nn.Sequential(*(batchnorm.BatchNorm1d(4, affine=False) for _ in range(2)))
for step in range(10):
    if step == 7:  # the heap has found its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    net(torch.ones(3, 4, 2**20, requires_grad=True)).sum().backward()  # 48 MiB each
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS, mode]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_training_finds_its_memory_warm() -> None:
    assert faults("keep") < 0.25 * faults("leave")


def test_elsewhere_it_says_that_nothing_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert batchnorm.keep_freed_memory() is False


@pytest.mark.parametrize("limit", [0, -1, 2**31])
def test_limits_out_of_range(limit: int) -> None:
    with pytest.raises(ValueError, match="limit must be from 1"):
        batchnorm.keep_freed_memory(limit)
