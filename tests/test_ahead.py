"""Kernels are compiled ahead in other processes; whatever happens to those, a kernel is there when it is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache as cache_of_calls
from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm
from batchnorm.kernels import ahead, cache, launch, operators
from batchnorm.kernels import compile as compilation
from batchnorm.kernels.key import Form, Key
from waiting import HANGS_AFTER

object_code = cache_of_calls(compilation.object_code)
KEYS = [Key("planes_forward", "float32"), Key("rows_evaluate", "float32", Form("relu"))]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("BATCHNORM_PROCESSES")
    monkeypatch.setattr(ahead, "_workers", [])
    yield
    ahead._end()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANGS_AFTER
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.01)


def test_workers_leave_in_the_cache_what_this_process_would_compile() -> None:
    ahead.expect([*KEYS, *KEYS], 2)
    assert [worker.keys for worker in ahead._workers] == [KEYS[:1], KEYS[1:]]
    ahead.expect(KEYS, 2)  # said before
    assert [worker.keys for worker in ahead._workers] == [KEYS[:1], KEYS[1:]]
    for key in KEYS:
        ahead.wait_for(key, 2)
        assert cache.find(key) == object_code(key)


def test_more_kernels_than_processes_are_compiled_in_order() -> None:
    ahead.expect(KEYS, 1)
    (worker,) = ahead._workers
    assert worker.at_work_on() == KEYS[0]
    ahead.wait_for(
        KEYS[1], 2
    )  # it is not at work on it, and one processor is free: whoever needs it had better compile it
    assert cache.find(KEYS[1]) is None
    ahead.wait_for(KEYS[1], 1)
    assert cache.find(KEYS[1]) is not None
    assert worker.at_work_on() is None
    until(lambda: worker.process.poll() is not None)  # without work it ends, and gives its memory back
    ahead.expect([KEYS[0]._replace(dtype="float64")], 1)
    assert len(ahead._workers) == 1
    assert ahead._workers[0] is not worker


@pytest.mark.parametrize("happens", ["killed", "stopped"])
def test_a_worker_that_gives_nothing_is_not_waited_for(happens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LIMIT", 1.0)
    ahead.expect(KEYS[:1], 1)
    (worker,) = ahead._workers
    worker.process.send_signal(signal.SIGKILL if happens == "killed" else signal.SIGSTOP)
    assert launch._object_code(KEYS[0]) == object_code(KEYS[0])
    assert cache.find(KEYS[0]) is not None
    worker.process.kill()


@pytest.mark.parametrize(
    "executable", ["/usr/bin/uwsgi", None, "", "/nowhere/python"], ids=["Python built in", "unknown", "empty", "gone"]
)
def test_where_no_python_can_be_started_none_is(executable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    ahead.expect(KEYS, 2)
    assert ahead._workers == []


def test_a_frozen_program_and_one_without_a_place_for_files_start_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as frozen:
        frozen.setattr(sys, "frozen", True, raising=False)
        ahead.expect(KEYS, 2)
    monkeypatch.setattr(cache, "build", lambda: None)
    ahead.expect(KEYS, 2)
    assert ahead._workers == []


def test_the_environment_can_allow_fewer_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_PROCESSES", "0")
    ahead.expect(KEYS, 2)
    assert ahead._workers == []
    monkeypatch.setenv("BATCHNORM_PROCESSES", "1")
    ahead.expect(KEYS, 2)
    assert [worker.keys for worker in ahead._workers] == [KEYS]


def test_no_worker_outlives_the_process_that_started_it() -> None:
    program = """
from batchnorm.kernels import ahead
from batchnorm.kernels.key import Key
ahead.expect([Key("planes_forward", "float32"), Key("planes_backward", "float32")], 2)
print(*(worker.process.pid for worker in ahead._workers))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=900)
    assert done.stderr == ""
    assert len(done.stdout.split()) == 2
    for pid in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_forward_that_is_compiled_has_its_backward_compiled_beside_it(threads: Callable[[int], None]) -> None:
    threads(2)
    forward = Key("rows_forward", "float32", Form("relu", residual=True, slope_bits=True))
    launch._object_code(forward)
    backward = Key("rows_backward", "float32", Form("relu", residual=False, slope_bits=True))
    until(lambda: cache.find(backward) is not None)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_what_is_expected_of_a_layer_is_what_its_training_step_runs(
    activation: str | None, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[Key] = []
    monkeypatch.setattr(launch, "expect", expected.extend)
    layer = batchnorm.BatchNorm2d(9, activation=activation)
    x, r = torch.randn(5, 9, 12, 15), torch.randn(5, 9, 12, 15, requires_grad=True) if residual else None
    operators.expect(x, layer.activation, residual)
    ran: list[Key] = []
    call = launch.Kernel.__call__

    def noted(self: launch.Kernel, *args: Any) -> None:
        ran.append(self.key)
        call(self, *args)

    monkeypatch.setattr(launch.Kernel, "__call__", noted)
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    layer(x, r).sum().backward()
    assert ran == expected
