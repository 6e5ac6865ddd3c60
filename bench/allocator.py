"""One heap for all that a benchmark runs: taken once, in large pages, and never given back.

glibc gives memory that was freed back to the system, and a virtual machine may give it back to its
host. Who takes it again seconds later, as rivals do that run one after the other, waits for it to
be found and cleared. How much a rival has to take again is a matter of what the others left lying
about, and not of the rival.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from pathlib import Path

__all__ = ["ALLOCATORS", "in_use", "set_up"]

ALLOCATORS = ("kept", "system")  # what a benchmark's --allocator knows
MOST = 4 * 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
PAGE = 2 * 2**20
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_in_use = "as the system has it"


def set_up(allocator: str = "kept") -> None:
    """Of this process, from here on: one of `ALLOCATORS`."""
    global _in_use
    if allocator not in ALLOCATORS:
        raise ValueError(f"allocator {allocator!r} is none of {', '.join(ALLOCATORS)}")
    if allocator == "kept":
        _in_use = _keep_memory()


def in_use() -> str:
    """What `set_up` did, in words for a results file."""
    return _in_use


def _keep_memory() -> str:
    if platform.libc_ver()[0] != "glibc" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return "as the system has it: no glibc on Linux"
    if preloaded := os.environ.get("LD_PRELOAD"):
        return f"as the system has it: {preloaded} is preloaded"
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
        return "as the system has it: mallopt refused"
    size = min(MOST, _free_memory() // 4)
    memory = libc.malloc(size)
    if not memory:
        return "glibc, freed memory kept"
    first = -(-memory // PAGE) * PAGE
    whole = (memory + size - first) // PAGE * PAGE
    large = libc.madvise(first, whole, mmap.MADV_HUGEPAGE) == 0
    ctypes.memset(memory, 0, size)
    libc.free(memory)
    pages = "large pages" if large else "pages"
    return f"glibc, freed memory kept, {size / 2**30:.1f} GiB taken in {pages} first"


def _free_memory() -> int:
    """Bytes, of the machine or, where that is less, all that a container may have."""
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    limits = [1024 * int(found["MemAvailable"].split()[0])]
    for path in map(Path, CGROUP_LIMITS):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits)
