"""What happens beside a compilation: signal handlers and forked children that need kernels, errors, no more threads.

Everything waits for events. What hangs is ended by a limit that no busy machine reaches.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from batchnorm.kernels import launch
from batchnorm.kernels.key import Key

LIMIT = 900  # seconds
KEY = Key("planes_forward", "float32")

BEGIN = f"""
import faulthandler, os, signal, sys, threading
faulthandler.dump_traceback_later({LIMIT}, exit=True)
import torch, batchnorm
from batchnorm.kernels import launch
from numba.core.compiler_lock import global_compiler_lock

def is_right(*shape):
    x = torch.randn(shape)
    with torch.no_grad():
        y = batchnorm.functional.batch_norm(x, None, None, training=True)
    assert batchnorm.kernels.ran().forward == "numba"
    right = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    return torch.allclose(y.double(), right, rtol=1e-5, atol=1e-5)

PLANES, SMALL = (5, 9, 12, 15), (5, 9, 4, 4)  # two kernels
"""

SIGNALS = """
handled, inside = [], threading.Event()
object_code = launch._object_code

def handler(number, frame):  # evaluates, as a user's "save on SIGUSR1" may do
    inside.set()
    handled.append(is_right(*PLANES) and is_right(*SMALL))

def compile_and_be_interrupted(key):
    if not handled and not inside.is_set():
        with global_compiler_lock:
            os.kill(os.getpid(), signal.SIGUSR1)
            inside.wait()  # until the handler has begun, while this kernel is half compiled
    return object_code(key)

signal.signal(signal.SIGUSR1, handler)
launch._object_code = compile_and_be_interrupted
assert is_right(*PLANES)
assert handled == [True]
"""

INTERRUPTION = """
calls, go = [], threading.Event()
object_code = launch._object_code

def compile_and_be_stopped(key):
    calls.append(key)
    os.kill(os.getpid(), signal.SIGINT)
    go.wait()  # until the caller has been interrupted
    return object_code(key)

signal.signal(signal.SIGINT, signal.default_int_handler)
launch._object_code = compile_and_be_stopped
try:
    is_right(*PLANES)
except KeyboardInterrupt:
    calls.append("interrupted")
go.set()
launch._object_code = object_code
assert is_right(*PLANES)
assert [call for call in calls[1:]] == ["interrupted"]  # what was being compiled has been used
"""

FORK = """
entered, go = threading.Event(), threading.Event()
object_code = launch._object_code

def hold(key=None):
    with global_compiler_lock:
        entered.set()
        go.wait()  # until the fork has begun
        return object_code(key) if key else None

if sys.argv[1] == "ours":
    launch._object_code = hold
    other = threading.Thread(target=is_right, args=PLANES)
else:  # somebody else's compilation
    other = threading.Thread(target=hold)
os.register_at_fork(before=go.set)  # of several, the last to be registered is the first to be called
other.start()
entered.wait()
pid = os.fork()
launch._object_code = object_code
if pid == 0:
    try:
        torch.set_num_threads(1)  # the oracle's own threads did not survive the fork
        os._exit(0 if is_right(*PLANES) and is_right(*SMALL) else 1)
    except BaseException:
        faulthandler.dump_traceback()
        os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
other.join()
assert is_right(*PLANES) and is_right(*SMALL)

def fork_often():
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            os._exit(len(launch._forking.held))
        assert os.waitpid(pid, 0)[1] == 0

threads = [threading.Thread(target=fork_often) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
taken = []
thread = threading.Thread(target=lambda: taken.append([find().acquire(blocking=False) for find in (
    lambda: launch._compiling, launch._numbas_lock, launch._llvms_lock)]))
thread.start()
thread.join()
assert taken == [[True, True, True]], taken  # nobody holds any of them
"""


def run(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEGIN + program, *arguments],
        capture_output=True, text=True, check=False, timeout=LIMIT + 60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_signal_handler_runs_a_layer_while_its_kernel_is_being_compiled() -> None:
    run(SIGNALS)


def test_an_interrupted_call_leaves_a_compilation_that_the_next_call_uses() -> None:
    run(INTERRUPTION)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("whose", ["ours", "another"])
def test_a_child_that_is_forked_while_another_thread_compiles_runs_a_layer(whose: str) -> None:
    run(FORK, whose)


def test_an_error_of_the_compiler_reaches_the_caller_and_is_not_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def fail(key: Key) -> bytes:
        threads.append(threading.current_thread().name)
        raise NotImplementedError(f"no code for {key}")

    kernel = launch.Kernel(KEY)
    object_code = launch._object_code
    monkeypatch.setattr(launch, "_object_code", fail)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="no code for"):
            kernel(b"", 1, 1)
    assert threads == ["batchnorm-compile"] * 2
    monkeypatch.setattr(launch, "_object_code", object_code)
    kernel._find()
    assert kernel._address


def test_where_no_thread_can_be_started_the_caller_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    kernel = launch.Kernel(KEY)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    kernel._find()
    assert kernel._address


def test_the_locks_that_a_fork_waits_for_are_numbas_and_llvms() -> None:
    """They are found by private names, which another version may change."""
    from llvmlite.binding import ffi
    from numba.core.compiler_lock import global_compiler_lock

    assert launch._numbas_lock() is global_compiler_lock._lock
    assert launch._llvms_lock() is ffi.lib._lock._lock


@pytest.mark.parametrize("weighted", [False, True])
def test_what_a_form_never_does_is_not_compiled(weighted: bool) -> None:
    script = f"""
from batchnorm.kernels.compile import object_code
from batchnorm.kernels.key import Form, Key
from batchnorm.kernels.loops import planes
object_code(Key("planes_forward", "float32", Form(weighted={weighted})))
print(*(name for name, f in vars(planes).items() if getattr(f, "signatures", None)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    mine, others = {"weighted_group_sums", "weighted_run_sums"}, {"channel_sums", "group_sums", "run_sums"}
    if not weighted:
        mine, others = others, mine
    assert mine <= set(done.stdout.split())
    assert not others & set(done.stdout.split())
