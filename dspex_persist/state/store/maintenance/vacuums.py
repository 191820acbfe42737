"""Return a file's free pages to the disk."""

import time
from dataclasses import dataclass
from pathlib import Path

from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.store.maintenance.opening import (
    owning,
    refuse_missing,
    refuse_older,
    side_file,
    size_of,
    translated_errors,
)


@dataclass(frozen=True, slots=True)
class VacuumReport:
    """The size of the file with its WAL, before and after, and how long the vacuum took."""

    path: Path
    before_bytes: int
    after_bytes: int
    duration_s: float


def vacuum(path: Path, progress: Progress = silent) -> VacuumReport:
    """Rewrite the file without its free pages. Needs free disk space of up to twice the size of the file."""
    with translated_errors(path):
        refuse_missing(path)
        refuse_older(path)
        before = size_of(path) + size_of(side_file(path, "-wal"))
    started = time.monotonic()
    with owning(path) as writer:
        progress("rewriting the file", 0, 0)
        # Through the raw connection: VACUUM cannot run inside a transaction, and SQLAlchemy always begins one.
        raw = writer.raw_connection()
        try:
            raw.cursor().execute("VACUUM")
        finally:
            raw.close()
    after = size_of(path) + size_of(side_file(path, "-wal"))
    return VacuumReport(path, before, after, time.monotonic() - started)
