"""The disk that a run writes to: its file system, and how long it takes to sync."""

import os
import tempfile
import time
from pathlib import Path

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_PAGE = bytes(4096)


def filesystem_of(directory: Path) -> str:
    """Return the type of the directory's file system, as Linux names it; "unknown" on other systems."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    innermost = ("", "unknown")
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        if directory.is_relative_to(point) and len(point) >= len(innermost[0]):
            innermost = (point, kind)
    return innermost[1]


def sync_times_s(directory: Path, times: int) -> list[float]:
    """Measure how long it takes to append a page to a file and sync it, the least that a commit waits."""
    # Without fdatasync, SQLite uses fsync.
    sync = getattr(os, "fdatasync", os.fsync)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        times_s: list[float] = []
        for _ in range(times):
            began = time.perf_counter()
            file.write(_PAGE)
            sync(file.fileno())
            times_s.append(time.perf_counter() - began)
    return times_s
