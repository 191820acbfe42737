"""The base of all walks, their snapshots, and helpers that they share."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, Engine

from dspex_persist.state.errors import NotADatabaseError, ReadFailedError, quote
from dspex_persist.state.model import ChangeKind
from dspex_persist.state.store.engine import raw_rows, snapshot, sqlite_of, streamed_rows
from dspex_persist.state.store.variables import KIND_CODES

PAGE_ENTRIES: Final = 10_000
MOST_NAMED: Final = 3
SNAPSHOT_S: Final = 1.0
REGISTERED: Final = KIND_CODES[ChangeKind.REGISTERED]
DELETED: Final = KIND_CODES[ChangeKind.DELETED]
DESCRIBING: Final = ", ".join(
    str(code) for kind, code in KIND_CODES.items() if kind.merges_metadata or kind is ChangeKind.ROLLED_BACK
)
FIRST_OR_LAST: Final = frozenset({REGISTERED, DELETED})
AFTER_DELETION: Final = -2
"""Stands for a deleted variable's newest version, so that no number follows it."""
# Below and above every key that SQLite can store, even the negative ones of a damaged file.
BEFORE_ALL: Final = float("-inf")
AFTER_ALL: Final = float("inf")
# The errors that damaged rows can cause in the code that reads them.
UNREADABLE: Final = (NotADatabaseError, ReadFailedError, TypeError, ValueError, LookupError, OverflowError)
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of commits checked so far, and of all commits."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a file: where (commit, session, variable), and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Walk:
    """A part of the check that can be continued in another snapshot. `more`: whether it has not reached its end."""

    more = True

    def page(self, connection: Connection) -> Iterator[Problem]:
        """Continue for a while, and yield the problems found."""
        raise NotImplementedError


def walk_through(readers: Engine, walk: Walk) -> Iterator[Problem]:
    lenient = False
    while walk.more:
        with snapshot(readers) as connection:
            if not of_file(connection):
                yield from walk.page(connection)
                continue
            # Reading text that may not be UTF-8 takes half as long again, so only do it once there is such text.
            sqlite_of(connection).text_factory = _decode_any if lenient else str
            try:
                yield from walk.page(connection)
            except sqlite3.OperationalError as error:
                if lenient or "decode" not in str(error):
                    raise
                lenient = True
            finally:
                sqlite_of(connection).text_factory = str


_decode_any = partial(str, encoding="utf-8", errors="surrogateescape")


def of_file(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"


def rows_in(connection: Connection, statement: str, *parameters: object) -> Iterator[Any]:
    """Iterate over rows that may be too many for memory."""
    return streamed_rows(connection, statement, *_bounded(connection, parameters))


def find_row(connection: Connection, statement: str, *parameters: object) -> Any:
    return next(iter(raw_rows(connection, statement, *_bounded(connection, parameters))), None)


def _bounded(connection: Connection, parameters: Sequence[object]) -> Sequence[object]:
    """Return parameters of the types of their columns: another database would compare all rows with an infinity."""
    if of_file(connection):
        return parameters
    limits = {BEFORE_ALL: -(1 << 63), AFTER_ALL: (1 << 63) - 1}
    return [limits.get(each, each) if isinstance(each, float) else each for each in parameters]


def end_of_page(connection: Connection) -> float:
    """Return until when a walk may read in this snapshot, in terms of the monotonic clock.

    In a file, a long snapshot would let the WAL grow. Another database sorts what it reads anew for each snapshot.
    """
    return time.monotonic() + SNAPSHOT_S if of_file(connection) else AFTER_ALL


def range_text(first: int, last: int) -> str:
    return f"commit {first}" if first == last else f"commits {first} to {last}"


def place_of(connection: Connection, sequence: int, session_key: int, variable_keys: Sequence[int]) -> str:
    """Name a commit: its number, its session, its variables (the first few of many)."""
    keys = list(dict.fromkeys(variable_keys))
    parts = [f"commit {sequence}", _session_name(connection, session_key)]
    parts += [variable_name(connection, key) for key in keys[:MOST_NAMED]]
    more = len(keys) - MOST_NAMED
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _session_name(connection: Connection, key: int) -> str:
    row = find_row(connection, "SELECT session_id FROM sessions WHERE session_key = ?", key)
    return f"session {quote(row[0])}" if row else f"session key {key}"


def variable_name(connection: Connection, key: int) -> str:
    row = find_row(connection, "SELECT name FROM variables WHERE variable_key = ?", key)
    return f"variable {quote(row[0])}" if row else f"variable key {key}"


def is_pruned(connection: Connection, sequence: int) -> bool:
    return find_row(connection, "SELECT 1 FROM pruned WHERE sequence = ?", sequence) is not None


def shown(value: object) -> str:
    if value is None:
        return "empty"
    return quote(value) if isinstance(value, str) else str(value)
