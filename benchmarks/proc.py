"""Counters that Linux keeps for a process."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int | None = None) -> int:
    """Return the resident memory of a process, by default of this one."""
    return int(Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Counts:
    """The counters of this process: the bytes and the number of its read and write calls, and how often its threads
    have waited for a disk or for another thread."""

    read_bytes: int
    written_bytes: int
    calls: int
    waits: int

    @classmethod
    def now(cls) -> Self:
        """Return the current counters."""
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        io = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
        waits = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        return cls(io["rchar"], io["wchar"], io["syscr"] + io["syscw"], waits)

    def since(self, before: Self) -> "Counts":
        """Return the difference from earlier counters."""
        return Counts(
            self.read_bytes - before.read_bytes,
            self.written_bytes - before.written_bytes,
            self.calls - before.calls,
            self.waits - before.waits,
        )
