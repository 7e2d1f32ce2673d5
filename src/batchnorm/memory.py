"""Memory that stays warm: what the C library does with a large tensor's memory when the tensor is freed."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory(limit: int = 2**30) -> bool:
    """Ask glibc to keep freed memory for the next tensor instead of giving it back to the system.

    By default glibc maps memory afresh for each tensor of more than 32 MiB (and, at first, for smaller ones) and unmaps
    it when the tensor is freed. The next tensor then begins with a page fault for every 4 KiB, which costs more time
    than batch normalization itself. What the call sets is what the environment's
    ``GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483647`` would.

    It is for the whole process and cannot be undone: call it once, before the first large tensor. The process then
    holds on to its largest size, which is larger than it was, since what is free lies in pieces (half as much again in
    a small convolutional network). Memory that other threads than the main one allocate may still come from elsewhere.
    It does nothing where another allocator has been preloaded.

    Args:
        limit: bytes up to which a tensor's memory is kept, at most 2 GiB - 1.

    Returns:
        Whether it was done: False where there is no glibc (macOS, Windows, musl), or where it refused.

    Raises:
        ValueError: if the limit is not positive or above 2 GiB - 1.
    """
    if not 0 < limit <= _LARGEST:
        raise ValueError(f"limit must be from 1 to {_LARGEST} bytes, but got {limit}")
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Both always: setting either one stops glibc from moving the other by itself.
    done = [mallopt(option, value) for option, value in ((_M_MMAP_THRESHOLD, limit), (_M_TRIM_THRESHOLD, _LARGEST))]
    return all(done)
