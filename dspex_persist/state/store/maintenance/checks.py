"""Check a file: its pages, references, schema, chain and current state."""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dspex_persist.state import arguments
from dspex_persist.state.anchor import Head
from dspex_persist.state.errors import InvalidArgumentError, NotADatabaseError, ReadFailedError
from dspex_persist.state.events import Pruned
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.store import log_reader, verify
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.maintenance.opening import read_anchor, reading, refuse_older
from dspex_persist.state.store.maintenance.sizes import find_scalar
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.verify import MOST_PROBLEMS, Problem

MOST_JOBS: Final = 64


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of a check. `complete` is false if it stopped after `MOST_PROBLEMS`.

    `path` is the file, or the URL of a database without its password. `pruned_commits` of the `commits` have lost rows:
    `pruned_versions` and `pruned_events` in total, according to the markers in the log. `anchored`: whether there was
    an anchor file, and so a known last commit.
    """

    path: Path | str
    revision: str
    commits: int
    pruned_commits: int
    pruned_versions: int
    pruned_events: int
    anchored: bool
    problems: tuple[Problem, ...]
    complete: bool


def check(path: Path, progress: Progress = silent, jobs: int | None = None) -> CheckReport:
    """Check pages, foreign keys, triggers, views and indexes, the hash chain, and the current state against the log.

    A copy without its anchor file is checked without one, so commits missing from its end go unnoticed.

    `jobs` is the number of processes that share the work, at most `MOST_JOBS`. By default it is one for each core, but
    at most 4, and a single one for a small file. Neither the problems nor their order depend on it. Raises
    `InvalidArgumentError` if it is out of range.
    """
    check_jobs(jobs)
    # Read the anchor before the file: a server that writes meanwhile can then only be ahead of it.
    anchor = read_anchor(path)
    with reading(path) as readers:
        refuse_older(path)
        return check_opened(path, readers, anchor, progress, jobs)


def check_jobs(jobs: int | None) -> None:
    """Raise `InvalidArgumentError` for a number of processes that cannot be."""
    if jobs is not None and not 1 <= arguments.number("jobs", jobs) <= MOST_JOBS:
        raise InvalidArgumentError("jobs", f"it must be from 1 to {MOST_JOBS}, not {jobs}")


def check_opened(
    path: Path, readers: Engine, anchor: Head | None, progress: Progress, jobs: int | None = None
) -> CheckReport:
    own = _file_problems(readers, progress)
    return checked(path, readers, anchor, own, progress, jobs or verify.jobs_for(verify.size_of(path)))


def checked(
    path: Path | str,
    readers: Engine,
    anchor: Head | None,
    own: Iterator[Problem],
    progress: Progress,
    jobs: int,
    opening: verify.Opening | None = None,
) -> CheckReport:
    """Check what is the same everywhere.

    `own`: problems of another kind, which are reported first. `opening`: what helpers open, if it is no file.
    """

    def report(done: int, in_all: int) -> None:
        progress("checking commits", done, in_all)

    with verify.checking(readers, anchor, report, jobs, opening) as rest:
        problems = tuple(islice(chain(own, rest), MOST_PROBLEMS))
    with snapshot(readers) as connection:
        commits = log_reader.head(connection).sequence
        pruned = _count_pruned(connection)
    return CheckReport(path, REVISION, commits, *pruned, anchor is not None, problems, len(problems) < MOST_PROBLEMS)


_PRUNED_COMMITS: Final = "SELECT count(DISTINCT sequence) FROM pruned"
_MARKERS: Final = """
    SELECT body FROM events WHERE kind = 'pruned' AND sequence IN (SELECT DISTINCT marker_sequence FROM pruned)
"""


def _count_pruned(connection: Connection) -> tuple[int, int, int]:
    """Count the commits that lost rows, and the versions and events they lost; zeros if the markers are damaged."""
    try:
        markers = [Pruned.from_body(json.loads(body)) for (body,) in connection.exec_driver_sql(_MARKERS)]
        versions, events = sum(each.versions for each in markers), sum(each.events for each in markers)
        return find_scalar(connection, _PRUNED_COMMITS), versions, events
    except (DBAPIError, sqlite3.Error, LookupError, TypeError, ValueError):
        return 0, 0, 0


def _file_problems(readers: Engine, progress: Progress) -> Iterator[Problem]:
    progress("checking the pages of the file", 0, 0)
    for problems_in in (_integrity_problems, _reference_problems, verify.schema_problems):
        try:
            with snapshot(readers) as connection:
                yield from problems_in(connection)
        except (NotADatabaseError, ReadFailedError) as error:
            yield Problem("file", error.reason)
        except UnicodeDecodeError as error:
            yield Problem("file", str(error))


def _integrity_problems(connection: Connection) -> Iterator[Problem]:
    for (message,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if message != "ok":
            yield Problem("file", message)


def _reference_problems(connection: Connection) -> Iterator[Problem]:
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        where = f"table {table}" + (f", row {row}" if row is not None else "")
        yield Problem(where, f"it refers to a row of {parent} that does not exist")
