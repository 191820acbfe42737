"""Back up a file."""

import os
from dataclasses import dataclass
from pathlib import Path

from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.maintenance.checks import check_opened
from dspex_persist.state.store.maintenance.copies import copy_pages, not_written, partial_file, publish
from dspex_persist.state.store.maintenance.opening import (
    read_anchor,
    reading,
    refuse_files_of,
    refuse_older,
    size_of,
)
from dspex_persist.state.store.verify import Problem


@dataclass(frozen=True, slots=True)
class BackupReport:
    """A backup of `path`. If the copy has `problems`, `target` was not created."""

    path: Path
    target: Path
    size_bytes: int
    commits: int
    problems: tuple[Problem, ...]


def backup(path: Path, target: Path, progress: Progress = silent) -> BackupReport:
    """Copy the file, as of one moment, to `target`, and check the copy.

    The copy is a single file that can be read from read-only media. A server may write to `path` meanwhile.

    Args:
        path: The database.
        target: The name of the copy. It appears whole or not at all.
        progress: Called with the pages copied and the commits checked so far.

    Raises:
        InvalidArgumentError: `target` exists already or cannot be written.
    """
    refuse_files_of(path, target, "target")
    anchor = read_anchor(path)
    with reading(path) as readers:
        refuse_older(path)
        if os.path.lexists(target):
            raise not_written(target, "it exists already, and a backup overwrites nothing")
        with partial_file(target) as partial:
            with snapshot(readers) as connection:
                copy_pages(connection, partial, progress)
            with reading(partial) as copies:
                report = check_opened(partial, copies, anchor, progress)
            if not report.problems:
                publish(partial, target)
            return BackupReport(path, target, size_of(partial), report.commits, report.problems)
