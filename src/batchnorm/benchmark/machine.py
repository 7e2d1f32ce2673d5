"""What the benchmark ran on."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

_CACHES = {"L1 data": "SC_LEVEL1_DCACHE_SIZE", "L2": "SC_LEVEL2_CACHE_SIZE", "L3": "SC_LEVEL3_CACHE_SIZE"}


def describe() -> dict[str, str]:
    """Describe processor, caches, memory, versions and how busy the machine is."""
    caches = {name: cache(key) for name, key in _CACHES.items()}
    rivals = [f"{name} {version(name)}" for name in ("jax",) if importlib.util.find_spec(name) is not None]
    return {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "caches": ", ".join(f"{name} {_size(size)}" for name, size in caches.items() if size) or "unknown",
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver()) or 'libc unknown'}",
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                *(f"{name} {version(name)}" for name in ("torch", "numba")),
                *rivals,
            ]
        ),
        "load before": load(),
    }


def cache(key: str) -> int:
    """The size of a cache in bytes, 0 if the system does not say."""
    try:
        return max(0, os.sysconf(key))
    except (ValueError, OSError, AttributeError):
        return 0


def last_level() -> int:
    """The size of the last-level cache in bytes; 32 MiB if the system does not say."""
    return cache("SC_LEVEL3_CACHE_SIZE") or 32 * 2**20


def load() -> str:
    """The load average of the last minute; above the run's own threads, something else was running."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"
