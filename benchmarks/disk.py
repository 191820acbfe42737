"""The disk that a run writes to: what it is, and how long it takes to sync."""

import os
import tempfile
import time
from pathlib import Path

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_PAGE = bytes(4096)


def filesystem_of(directory: Path) -> str:
    """The type of the file system that holds the directory, as Linux names it; "unknown" elsewhere."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    found = ("", "unknown")
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        if directory.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def sync_times_s(directory: Path, times: int) -> list[float]:
    """How long it takes, so many times, to append a page to a file and to sync it: the least that a commit waits."""
    # Where there is no fdatasync, SQLite uses fsync.
    sync = getattr(os, "fdatasync", os.fsync)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        taken: list[float] = []
        for _ in range(times):
            began = time.perf_counter()
            file.write(_PAGE)
            sync(file.fileno())
            taken.append(time.perf_counter() - began)
    return taken
