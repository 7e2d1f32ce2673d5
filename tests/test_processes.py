"""Forked children, folders that cannot be written, and code that is compiled once: each in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import batchnorm
from batchnorm.kernels import ran
from waiting import HANGS_AFTER

PACKAGE = Path(batchnorm.__file__).parent

# Python warns of any fork beside threads; that such a child works is what is shown.
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks.*:DeprecationWarning")


def normalized(seed: int) -> Tensor:
    x = torch.randn(5, 9, 40, 45, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    y = batchnorm.BatchNorm2d(9)(x)
    y.backward(x.detach())
    assert x.grad is not None
    return torch.stack((y.detach(), x.grad))


def right(seed: int) -> Tensor:
    x = torch.randn(5, 9, 40, 45, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    y = torch.nn.BatchNorm2d(9).double()(x)
    y.backward(x.detach())
    assert x.grad is not None
    return torch.stack((y.detach(), x.grad))


def is_right(found: Tensor, seed: int) -> bool:
    return torch.allclose(found.double(), right(seed), rtol=1e-5, atol=1e-5)


def child_passes(seed: int, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    queue.put((is_right(normalized(seed), seed), tuple(ran())))


def wait_for(pid: int) -> int:
    end = time.monotonic() + HANGS_AFTER
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the forked child hangs")


@pytest.fixture
def used_parent() -> Iterator[None]:
    """The parent has run the kernels on more than one thread, so that its team exists."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert is_right(normalized(0), 0)
    yield
    assert is_right(normalized(1), 1)  # and the parent is none the worse for its children
    torch.set_num_threads(before)


@FORKS
@pytest.mark.usefixtures("used_parent")
def test_a_forked_child_normalizes() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the oracle's own threads did not survive the fork either
            os._exit(0 if is_right(normalized(2), 2) and ran() == ("numba", "numba") else 1)
        except BaseException:
            os._exit(2)
    assert wait_for(pid) == 0


@FORKS
@pytest.mark.usefixtures("used_parent")
def test_a_child_forked_while_a_kernel_is_being_compiled_normalizes() -> None:
    """A lock that another thread held at the fork is never released in the child."""
    from batchnorm.kernels import launch

    with launch._compiling:
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                launch.kernel.cache_clear()
                os._exit(0 if is_right(normalized(2), 2) else 1)
            except BaseException:
                os._exit(2)
        assert wait_for(pid) == 0


@FORKS
@pytest.mark.usefixtures("used_parent")
def test_multiprocessing_by_fork_normalizes() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    torch.set_num_threads(1)
    children = [context.Process(target=child_passes, args=(seed, queue)) for seed in (3, 4)]
    for child in children:
        child.start()
    for child in children:
        child.join(HANGS_AFTER)
        if child.is_alive():
            child.kill()
        assert child.exitcode == 0
    assert [queue.get(timeout=HANGS_AFTER) for _ in children] == [(True, ("numba", "numba"))] * 2


class Normalized(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return normalized(index)


def normalize_again(samples: list[Tensor]) -> Tensor:
    batch = torch.stack(samples)
    batchnorm.BatchNorm2d(9)(batch[:, 0].flatten(0, 1))
    return batch


@FORKS
@pytest.mark.usefixtures("used_parent")
def test_a_loaders_workers_normalize() -> None:
    loader = DataLoader(Normalized(), batch_size=3, num_workers=2, collate_fn=normalize_again, timeout=HANGS_AFTER,
                        multiprocessing_context="fork")  # fmt: skip
    found = torch.cat(list(loader))
    assert all(is_right(found[seed], seed) for seed in range(6))


# --- the cache on disk --------------------------------------------------------------------------------------

PROGRAM = """
import torch, batchnorm
x = torch.randn(5, 9, 12, 15)
with torch.no_grad():  # a backward would only be more to compile
    y = batchnorm.BatchNorm2d(9)(x)
assert batchnorm.kernels.ran().forward == "numba", batchnorm.kernels.ran()
right = torch.nn.functional.batch_norm(x.detach().double(), None, None, training=True)
assert torch.allclose(y.double(), right, rtol=1e-5, atol=1e-5)
print(batchnorm.__file__)
"""


ALONE = {"PATH": os.environ["PATH"], "BATCHNORM_PROCESSES": "0"}  # nothing is compiled that these programs do not need


@pytest.fixture
def copied_package() -> Iterator[Path]:
    """A copy of the package without compiled code, where anyone may look; the folder that it is imported from."""
    folder = Path(tempfile.mkdtemp(prefix="batchnorm-"))
    shutil.copytree(PACKAGE, folder / "batchnorm", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    shutil.rmtree(folder)


def run(folder: Path, program: str = PROGRAM, **options: object) -> None:
    environment = ALONE | {"PYTHONPATH": str(folder), "HOME": "/nonexistent", "OMP_NUM_THREADS": "2"}
    environment |= options.pop("env", {})  # type: ignore[arg-type]
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
        env=environment,
        cwd="/",
        **options,
    )  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(folder / "batchnorm" / "__init__.py")


def give_up_writing_anywhere() -> None:
    """Root, too, is bound by file modes from the next exec on: three capabilities leave the bounding set."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
            libc.prctl(24, capability, 0, 0, 0)


def test_nothing_can_be_written(copied_package: Path) -> None:
    for path in (copied_package, *copied_package.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    check = f"import os; assert not os.access({str(copied_package)!r}, os.W_OK)\n"
    nowhere = {"HOME": "/dev/null/home", "PYTHONDONTWRITEBYTECODE": "1"}
    run(copied_package, env=nowhere, program=check + PROGRAM, preexec_fn=give_up_writing_anywhere)
    assert not list(copied_package.rglob("*.o"))


def test_compiled_code_is_not_used_once_loops_have_changed(copied_package: Path) -> None:
    run(copied_package)
    files = set(copied_package.rglob("*.o"))
    assert files
    loops = copied_package / "batchnorm" / "kernels" / "loops" / "planes.py"
    loops.write_text(loops.read_text() + "\n# changed\n")
    run(copied_package)
    assert set(copied_package.rglob("*.o")) > files


def test_importing_compiles_nothing_and_loads_no_numba() -> None:
    program = "import sys, batchnorm; assert not {'numba', 'llvmlite', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=HANGS_AFTER)
