"""What the benchmark ran on."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20}


def describe() -> dict[str, str]:
    """Describe processor, caches, memory, versions and how busy the machine is."""
    caches = _caches()
    baselines = [
        f"{name} {version(name)}" for name in ("jax", "onnxruntime") if importlib.util.find_spec(name) is not None
    ]
    return {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "caches": ", ".join(f"L{level} {_size(size)}" for level, size in caches.items()) or "unknown",
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver()) or 'libc unknown'}",
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                *(f"{name} {version(name)}" for name in ("torch", "numba")),
                *baselines,
            ]
        ),
        "load before": load(),
    }


def last_level() -> int:
    """The size of the last-level cache in bytes; 32 MiB if the system does not say."""
    return list(_caches().values())[-1] if _caches() else 32 * 2**20


def _caches() -> dict[int, int]:
    """Bytes of the first core's data caches by level, as far as the system says."""
    found: dict[int, int] = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind != "Instruction":
                found[int(level)] = int(size[:-1]) * _UNITS[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return dict(sorted(found.items()))


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
