"""What every test has: memory that is not zero by luck, and the library's caches as it found them."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from batchnorm.kernels import plans

SLOW = "BATCHNORM_SLOW"
os.environ.setdefault("BATCHNORM_PROCESSES", "0")  # the tests' own processes keep all processors at work
CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY")
if CAPABILITY:  # what inductor has compiled for wider vectors it takes from its cache, and then fails (torch 2.13)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_{CAPABILITY}")))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"slow: needs gigabytes or minutes; runs where {SLOW}=1 is set")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        # Shells start what runs in the background so, and children inherit it: no test of Ctrl-C could work.
        signal.signal(signal.SIGINT, signal.default_int_handler)


# What compiles loops comes before what runs them in several processes, which would each compile the same ones.
FOLDERS = ("tests", "surgery", "sync", "benchmark", "study", "integrations", "commands")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FOLDERS.index(item.path.parent.name) if item.path.parent.name in FOLDERS else 0)
    if os.environ.get(SLOW) == "1":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=f"slow: set {SLOW}=1 to run it"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, whoever asks for it, so that a value that a kernel forgot to write shows.

    It is torch's own mode, below Python: `empty`, `empty_like`, `new_empty` and `empty_strided` all obey.
    """
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor counts as larger than the cache, so that output is written around it wherever its shape allows."""
    monkeypatch.setattr(plans, "_beyond_cache", lambda: 0)
    caches = plans.plan, plans.inference_plan, plans.sets_plan, plans.planned
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()
