"""Checking a whole file: does its log hold, and do its current-state tables say what the log adds up to?

Its walks: the log commit by commit (chain, sequences, versions, documents), what was pruned, the large contents, the
index of metadata, the sessions one by one, the documents in the other tables, the answers that are kept, the live
sessions as the engine loads them. Each reads in short snapshots, so that a file that a server writes to can be checked
without its WAL growing meanwhile. Memory holds the variables of one session, never the log.

Of a commit that was pruned nobody can work out the hash any more. That it is the one that it was, that it follows its
predecessor, and what is left of the commit: all of that is in its residue, the residues are in the digest of a marker,
and the chain covers the marker.
"""

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Final, TypeAlias, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dspex_persist.clock import EARLIEST, LATEST, from_micros, to_micros
from dspex_persist.state import commands, outcomes
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import NotADatabaseError, ReadFailedError, quote
from dspex_persist.state.events import (
    DependencyAdded,
    Event,
    ExecutionBegan,
    ExecutionEnded,
    MalformedEventError,
    OptimizationStarted,
    OptimizationStopped,
    Pruned,
    SessionEnded,
    SessionStarted,
    SessionUpdated,
    ToolsRegistered,
    VariableRegistered,
    event_in,
)
from dspex_persist.state.model import ChangeKind
from dspex_persist.state.store import log_reader, migrate, pruned, sessions
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.blobs import digest
from dspex_persist.state.store.chain import GENESIS, commit_text, link, residue, residue_entry
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.executions import spec_text
from dspex_persist.state.store.log import began_sequence, metadata_text
from dspex_persist.state.store.variables import KIND_CODES, lock_text
from dspex_persist.state.values.json_text import stored

_PAGE_COMMITS: Final = 10_000
_PAGE_ENTRIES: Final = 10_000
_SNAPSHOT_S: Final = 1.0
_MOST_REMEMBERED: Final = 200_000
_MOST_NAMED: Final = 3
_REGISTERED: Final = KIND_CODES[ChangeKind.REGISTERED]
_DELETED: Final = KIND_CODES[ChangeKind.DELETED]
_MERGING: Final = ", ".join(str(code) for kind, code in KIND_CODES.items() if kind.merges_metadata)
_FIRST_OR_LAST: Final = frozenset({_REGISTERED, _DELETED})
_AFTER_DELETION: Final = -2
"""In place of a deleted variable's newest version: none follows it."""
# Before and after every key that SQLite can hold, the negative ones that nobody should have included.
_BEFORE_ALL: Final = float("-inf")
_AFTER_ALL: Final = float("inf")
# What rows of a damaged file can make of the code that reads them.
_UNREADABLE: Final = (NotADatabaseError, ReadFailedError, TypeError, ValueError, LookupError, OverflowError)

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many commits are checked, of how many."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be: where (commit, session, variable), and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def _ignore(_done: int, _in_all: int) -> None:
    pass


def iter_problems(readers: Engine, anchor: Head | None = None, progress: Progress = _ignore) -> Iterator[Problem]:
    """What is wrong with the file, as far as its log can tell.

    `anchor`: the head that the file must have reached, read before this is called. Where there is none, commits that
    are gone from the end are not noticed. What cannot be read is a problem, too, and ends its walk, not the others.
    The answers kept under idempotency keys are forgotten after a while, and so not in the log: each has to be one that
    its command can give, to a session that there was.
    """
    strays = _StrayWalk()
    walks = (
        _LogWalk(anchor, progress),
        _PrunedWalk(),
        _BlobWalk(),
        strays,
        _IndexedWalk(strays),
        _SessionWalk(),
        _DocumentWalk(),
        _OutcomeWalk(),
        _LiveWalk(),
    )
    for walk in walks:
        try:
            yield from _walked(readers, walk)
        except _UNREADABLE as error:
            yield Problem(str(walk), f"it cannot be read any further: {getattr(error, 'reason', error)}")


def schema_problems(connection: Connection) -> Iterator[Problem]:
    """The triggers, views and indexes that are gone or changed, and triggers that are not ours.

    Somebody's own views and indexes change no answer, and may be there.
    """
    found = migrate.parts_of(connection)
    for part, sql in migrate.made_parts().items():
        if found.get(part) != sql:
            state = "changed" if part in found else "missing"
            yield Problem(_holder(part), f"the {part.kind} {part.name} is {state}")
    for part in found.keys() - migrate.made_parts().keys():
        if part.kind == "trigger":
            yield Problem(_holder(part), f"the {part.kind} {part.name} is not of this schema")


def _holder(part: migrate.Part) -> str:
    return f"{'view' if part.kind == 'view' else 'table'} {part.table}"


# Walks and their snapshots


class _Walk:
    """A part of the check, which can go on in another snapshot. `more`: whether it has not reached its end."""

    more = True

    def page(self, connection: Connection) -> Iterator[Problem]:
        """Go on from where it is, for a while."""
        raise NotImplementedError


def _walked(readers: Engine, walk: _Walk) -> Iterator[Problem]:
    lenient = False
    while walk.more:
        with snapshot(readers) as connection:
            # Reading text that is no UTF-8 makes every row take half as long again, so only where there is some.
            _driver(connection).text_factory = _decode_any if lenient else str
            try:
                yield from walk.page(connection)
            except sqlite3.OperationalError as error:
                if lenient or "decode" not in str(error):
                    raise
                lenient = True
            finally:
                _driver(connection).text_factory = str


_decode_any = partial(str, encoding="utf-8", errors="surrogateescape")


def _driver(connection: Connection) -> sqlite3.Connection:
    return cast(sqlite3.Connection, connection.connection.driver_connection)


def _rows(connection: Connection, statement: str, *parameters: object) -> Iterator[Any]:
    """Rows as the driver has them: SQLAlchemy's own take several times as long."""
    return _driver(connection).execute(statement, parameters)


def _find(connection: Connection, statement: str, *parameters: object) -> Any:
    return next(_rows(connection, statement, *parameters), None)


# Documents and times

_UNSOUND: Final = {
    "its time is none that a calendar has": f"""
        SELECT sequence, session_key, NULL FROM commits WHERE sequence > ? AND sequence <= ?
            AND created_at NOT BETWEEN {to_micros(EARLIEST)} AND {to_micros(LATEST)}
    """,
    **{
        f"the {column} of a version is no JSON": f"""
            SELECT versions.sequence, variables.session_key, versions.variable_key FROM versions
            LEFT JOIN variables ON variables.variable_key = versions.variable_key
            WHERE versions.sequence > ? AND versions.sequence <= ? AND versions.{column} IS NOT NULL
                AND NOT json_valid(versions.{column})
        """
        for column in ("value", "metadata")
    },
    "the body of an event is no JSON": """
        SELECT sequence, (SELECT session_key FROM commits WHERE commits.sequence = events.sequence), NULL FROM events
        WHERE sequence > ? AND sequence <= ? AND NOT json_valid(body)
    """,
}
"""What is wrong, and which rows of some commits have that: commit, session, variable."""
# Empty constraints are none.
_DOCUMENTS: Final = {
    ("sessions", "metadata"): "SELECT session_id FROM sessions WHERE NOT json_valid(metadata)",
    ("tools", "spec"): "SELECT session_id FROM tools JOIN sessions USING (session_key) WHERE NOT json_valid(spec)",
    ("outcomes", "result"): "SELECT session_id FROM outcomes WHERE NOT json_valid(result)",
    **{
        ("variables", column): f"""
            SELECT session_id, name FROM variables JOIN sessions USING (session_key)
            WHERE variables.{column} {none} AND NOT json_valid(variables.{column})
        """
        for column, none in (("constraints", "<> ''"), ("metadata", "IS NOT NULL"), ("optimization", "IS NOT NULL"))
    },
}


def _unsound(connection: Connection, after: int, last: int) -> Iterator[Problem]:
    for what, statement in _UNSOUND.items():
        for sequence, session_key, variable_key in _rows(connection, statement, after, last):
            keys = [variable_key] if variable_key is not None else []
            yield Problem(_where(connection, sequence, session_key, keys), what)


class _DocumentWalk(_Walk):
    """What tables other than the log's keep as JSON is JSON."""

    def __str__(self) -> str:
        return "the documents in the tables of what is current"

    def page(self, connection: Connection) -> Iterator[Problem]:
        for (table, column), statement in _DOCUMENTS.items():
            for session_id, *names in _rows(connection, statement):
                where = ", ".join([f"session {quote(session_id)}", *(f"variable {quote(name)}" for name in names)])
                yield Problem(where, f"{table}.{column} is no JSON")
        for first, last in _rows(connection, _ODD_IMPORTS):
            yield Problem(_range(first, last), "imports says that they came with an import, but there are none such")
        self.more = False


_ODD_IMPORTS: Final = """
    SELECT first_sequence, last_sequence FROM imports
    WHERE first_sequence < 1 OR last_sequence < first_sequence OR last_sequence > (SELECT max(sequence) FROM commits)
"""
_OUTCOMES: Final = """
    SELECT session_id, idempotency_key, cause, fingerprint, iif(json_valid(result), result, NULL), created_at,
        EXISTS (SELECT 1 FROM sessions WHERE sessions.session_id = outcomes.session_id)
    FROM outcomes WHERE (session_id, idempotency_key) > (?, ?) ORDER BY session_id, idempotency_key
"""
_FINGERPRINT: Final = re.compile("[0-9a-f]{64}")


class _OutcomeWalk(_Walk):
    """Each answer kept under an idempotency key is one of its command's, and of a session: the end of one has answers,
    too."""

    def __init__(self) -> None:
        self._last = ("", "")

    def __str__(self) -> str:
        return f"the answers kept after those of session {quote(self._last[0])}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = time.monotonic() + _SNAPSHOT_S
        for session_id, key, cause, fingerprint, result, created_at, is_known in _rows(
            connection, _OUTCOMES, *self._last
        ):
            where = f"session {quote(session_id)}, answer under idempotency key {quote(key)}"
            if not key:
                yield Problem(where, "the key is empty")
            if not is_known:
                yield Problem(where, "no session has this id")
            if not _FINGERPRINT.fullmatch(fingerprint):
                yield Problem(where, "outcomes.fingerprint is no hash")
            if not to_micros(EARLIEST) <= created_at <= to_micros(LATEST):
                yield Problem(where, "its time is none that a calendar has")
            yield from self._look_at_result(where, cause, result)
            self._last = (session_id, key)
            if time.monotonic() > end:
                return
        self.more = False

    def _look_at_result(self, where: str, cause: str, result: str | None) -> Iterator[Problem]:
        command = _COMMANDS.get(cause)
        if command is None:
            yield Problem(where, f"outcomes.cause is {quote(cause)}, which is no command that writes")
        elif result is not None:
            try:
                outcomes.decode(command.returns, result)
            except ValueError:
                yield Problem(where, f"outcomes.result is not what {cause} answers")


def _writing_commands() -> dict[str, type[Command[Any]]]:
    named = {name: getattr(commands, name) for name in commands.__all__}
    return {
        name: each
        for name, each in named.items()
        if isinstance(each, type) and issubclass(each, Command) and each.writes
    }


_COMMANDS: Final = _writing_commands()


class _LiveWalk(_Walk):
    """Every live session can be loaded, as the engine does it when it is first used."""

    def __init__(self) -> None:
        self._last = 0

    def __str__(self) -> str:
        return f"the live sessions after number {self._last}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = time.monotonic() + _SNAPSHOT_S
        statement = "SELECT session_key, session_id FROM sessions WHERE session_key > ? AND ended_sequence IS NULL"
        for key, session_id in list(_rows(connection, f"{statement} ORDER BY session_key LIMIT 1000", self._last)):
            try:
                sessions.load(connection, session_id)
            except (*_UNREADABLE, DBAPIError, sqlite3.Error, AttributeError, AssertionError) as error:
                reason = f"{type(error).__name__} {getattr(error, 'orig', error)}"
                yield Problem(f"session {quote(session_id)}", f"it cannot be loaded: {reason}")
            self._last = key
            if time.monotonic() > end:
                return
        self.more = self._last != _last_live(connection)


def _last_live(connection: Connection) -> int:
    (last,) = _find(connection, "SELECT ifnull(max(session_key), 0) FROM sessions WHERE ended_sequence IS NULL")
    return int(last)


# The log

_FIND_VERSION_BEFORE: Final = """
    SELECT versions.version, versions.sequence, versions.kind, commits.session_key
    FROM versions LEFT JOIN commits ON commits.sequence = versions.sequence
    WHERE versions.variable_key = ? AND versions.version < ? ORDER BY versions.version DESC LIMIT 1
"""
_PRUNED_COMMITS: Final = "SELECT DISTINCT sequence FROM pruned WHERE sequence > ? ORDER BY sequence LIMIT ?"
_PRUNED_BETWEEN: Final = """
    SELECT 1 FROM pruned CROSS JOIN commits ON commits.sequence = pruned.sequence
    WHERE pruned.sequence >= ? AND pruned.sequence <= ? AND commits.session_key = ? LIMIT 1
"""
_BEFORE_THE_FIRST: Final = """
    SELECT sequence FROM commits WHERE sequence < 1
    UNION SELECT sequence FROM versions WHERE sequence < 1
    UNION SELECT sequence FROM events WHERE sequence < 1
"""


class _LogWalk(_Walk):
    """Commit by commit: numbers without gaps, hashes that fit, versions that each follow the one before."""

    def __init__(self, anchor: Head | None, progress: Progress) -> None:
        self._anchor = anchor or Head(0, GENESIS)
        self._progress = progress
        self._last = 0
        """The commit up to which all are checked."""
        self._hash = GENESIS
        """Its hash as it is stored."""
        self._suspect: bytes | None = None
        """What its hash should have been, where that is something else."""
        # The newest version, and the session, of the variables seen last; those of others are looked up.
        self._newest: dict[int, int] = {}
        self._homes: dict[int, int] = {}

    def __str__(self) -> str:
        return f"the log after commit {self._last}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        if self._last == 0:
            for (sequence,) in _rows(connection, _BEFORE_THE_FIRST):
                yield Problem(f"commit {sequence}", "commits are numbered from 1")
        first, newest, homes = self._last, self._newest, self._homes
        # Commits that are looked at whatever their hash is.
        special = {self._anchor.sequence}
        special.update(sequence for (sequence,) in _rows(connection, _PRUNED_COMMITS, self._last, _PAGE_COMMITS))
        if len(newest) > _MOST_REMEMBERED:
            newest.clear()
            homes.clear()
        (in_all,) = _find(connection, "SELECT ifnull(max(sequence), 0) FROM commits")
        read = 0
        for commit in log_reader.iter_commits(connection, self._last, _PAGE_COMMITS):
            sequence, session_key, stored, content, rows = commit
            # The hot loop: one hash a commit, two look-ups a version, and no call that can be spared.
            if sequence != self._last + 1 or sequence in special or link(self._hash, content) != stored:
                yield from self._look_at_commit(connection, commit)
                if not stored:
                    continue
            for row in rows:
                key = row[1]
                if newest.get(key) == row[2] - 1 and homes[key] == session_key and row[3] not in _FIRST_OR_LAST:
                    newest[key] = row[2]
                else:
                    yield from self._look_at_version(connection, row, session_key)
            read += 1
            self._last = sequence
            self._hash = stored
        yield from _unsound(connection, first, self._last)
        self._progress(self._last, max(in_all, self._last))
        if read < _PAGE_COMMITS:
            self.more = False
            yield from self._look_at_end()

    def _look_at_commit(self, connection: Connection, commit: log_reader.LoggedCommit) -> Iterator[Problem]:
        """What is wrong with a commit that is not simply the next one."""
        sequence, session_key, stored, _, rows = commit
        if not stored:
            yield Problem(f"commit {sequence}", "it is missing, but has versions or events")
            return
        problems: list[str] = []
        if sequence != self._last + 1:
            # Without the hash of its predecessor nothing can be said of its own.
            missing = _range(self._last + 1, sequence - 1)
            yield Problem(missing, f"missing: commit {self._last} is followed by commit {sequence}")
            self._suspect = None
        elif (fits := pruned.fits(connection, commit, self._hash, self._suspect or self._hash)) is not None:
            self._suspect = None
            if not fits:
                problems.append("it was pruned, and what is left of it is not what its last marker says")
        elif (hashed := commit.link(self._hash)) != stored:
            # Where the predecessor's hash was changed, that was told, and this commit is what it should be.
            if self._suspect is None or commit.link(self._suspect) != stored:
                problems.append("its rows are not those that its hash was made from")
            self._suspect = hashed
        if sequence == self._anchor.sequence and stored != self._anchor.hash:
            problems.append("it is not the commit that was acknowledged under this number (says the anchor)")
        for what in problems:
            yield Problem(_where(connection, sequence, session_key, [row[1] for row in rows]), what)

    def _look_at_version(
        self, connection: Connection, row: log_reader.VersionRow, session_key: int
    ) -> Iterator[Problem]:
        """What is wrong with a version that is the first, the last, or not simply the next one."""
        sequence, key, number, kind = row[:4]
        self._newest[key] = number if kind != _DELETED else _AFTER_DELETION
        self._homes[key] = session_key
        if (number == 0) != (kind == _REGISTERED):
            where = _where(connection, sequence, session_key, [key])
            yield Problem(where, f"version {number} is of kind {kind}, but version 0 alone is the registration")
        if number != 0:
            what = self._misplacement(connection, row, session_key)
            if what:
                yield Problem(_where(connection, sequence, session_key, [key]), f"version {number} {what}")

    def _misplacement(self, connection: Connection, row: log_reader.VersionRow, session_key: int) -> str | None:
        found = _find(connection, _FIND_VERSION_BEFORE, row[1], row[2])
        # Before the first one that is there: nothing, of no commit.
        number, sequence, kind, home = found if found is not None else (-1, 0, None, None)
        if number != row[2] - 1 and _find(connection, _PRUNED_BETWEEN, sequence, row[0], session_key) is None:
            return f"follows version {row[2] - 1}, which is missing"
        if sequence > row[0]:
            return f"comes before version {number}, which is of commit {sequence}"
        if kind == _DELETED:
            return "comes after the variable was deleted"
        if home not in (session_key, None):
            return "is of another session than the version before it"
        return None

    def _look_at_end(self) -> Iterator[Problem]:
        if self._last < self._anchor.sequence:
            gone = _range(self._last + 1, self._anchor.sequence)
            yield Problem(gone, f"acknowledged (says the anchor), but the log ends at commit {self._last}")


def _range(first: int, last: int) -> str:
    return f"commit {first}" if first == last else f"commits {first} to {last}"


def _where(connection: Connection, sequence: int, session_key: int, variable_keys: Sequence[int]) -> str:
    """A commit in words: its number, its session, its variables (not all of many)."""
    keys = list(dict.fromkeys(variable_keys))
    parts = [f"commit {sequence}", _session_name(connection, session_key)]
    parts += [_variable_name(connection, key) for key in keys[:_MOST_NAMED]]
    more = len(keys) - _MOST_NAMED
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _session_name(connection: Connection, key: int) -> str:
    found = _find(connection, "SELECT session_id FROM sessions WHERE session_key = ?", key)
    return f"session {quote(found[0])}" if found else f"session key {key}"


def _variable_name(connection: Connection, key: int) -> str:
    found = _find(connection, "SELECT name FROM variables WHERE variable_key = ?", key)
    return f"variable {quote(found[0])}" if found else f"variable key {key}"


# What was pruned

_PRUNED: Final = """
    SELECT pruned.sequence, pruned.marker_sequence, pruned.residue,
        commits.session_key, commits.actor, commits.cause, commits.created_at, commits.hash, previous.hash
    FROM pruned
    LEFT JOIN commits ON commits.sequence = pruned.sequence
    LEFT JOIN commits AS previous ON previous.sequence = pruned.sequence - 1
    WHERE (pruned.sequence, pruned.marker_sequence) > (?, ?)
    ORDER BY pruned.sequence, pruned.marker_sequence
"""
_MARKER: Final = "SELECT body FROM events WHERE sequence = ? AND kind = 'pruned'"
_FULL_BYTES: Final = len(GENESIS)
_HAS_ROW: Final = "SELECT 1 FROM pruned WHERE sequence = ? AND marker_sequence = ?"


class _Marker:
    """A marker's rows as they go by; `last`: the commit of its last one."""

    def __init__(self, event: Pruned) -> None:
        self.last = event.range[1]
        self.digest = event.digest
        self.read = sha256()


class _PrunedWalk(_Walk):
    """Each marker has the rows that its digest was made from.

    Memory holds the markers whose rows have begun and not ended, which is little: each stands for up to a thousand.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float] = (_BEFORE_ALL, _BEFORE_ALL)
        self._markers: dict[int, _Marker | None] = {}

    def __str__(self) -> str:
        return f"what was pruned of commits after {max(self._last[0], 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = time.monotonic() + _SNAPSHOT_S
        markers = self._markers
        for sequence, marker_sequence, kept, *commit in _rows(connection, _PRUNED, *self._last):
            if marker_sequence not in markers:
                markers[marker_sequence] = _find_marker(connection, marker_sequence)
                if markers[marker_sequence] is None:
                    yield Problem(f"commit {marker_sequence}", f"it prunes commit {sequence}, but has no marker")
            marker = markers[marker_sequence]
            if marker is not None:
                full = kept if len(kept) == _FULL_BYTES else _residue_of_nothing(sequence, *commit)
                marker.read.update(residue_entry(sequence, full))
                if sequence == marker.last:
                    del markers[marker_sequence]
                    yield from self._compare(marker_sequence, marker)
            self._last = (sequence, marker_sequence)
            if time.monotonic() > end:
                return
        self.more = False
        for marker_sequence, marker in markers.items():
            if marker is not None:
                yield from self._compare(marker_sequence, marker)

    def _compare(self, sequence: int, marker: _Marker) -> Iterator[Problem]:
        if marker.read.hexdigest() != marker.digest:
            yield Problem(
                f"commit {sequence}", "its rows in pruned are not those that its marker's digest was made from"
            )


def _residue_of_nothing(
    sequence: int,
    session_key: int,
    actor: str,
    cause: str,
    created_at: int,
    stored: bytes | None,
    previous: bytes | None,
) -> bytes:
    """The residue of a commit of which its own row is left, and nothing else."""
    content = commit_text(sequence, session_key, actor, cause, created_at, (), ())
    return residue(previous or GENESIS, stored or GENESIS, content)


def _find_marker(connection: Connection, sequence: int) -> _Marker | None:
    row = _find(connection, _MARKER, sequence)
    try:
        return _Marker(Pruned.from_body(stored(row[0]))) if row is not None else None
    except (LookupError, TypeError, ValueError):
        return None


# Large contents

_BLOBS: Final = "SELECT blob_key, digest, content FROM blobs WHERE blob_key > ? ORDER BY blob_key"
_UNUSED_BLOBS: Final = """
    SELECT blob_key FROM blobs
    EXCEPT SELECT value_blob FROM versions
    EXCEPT SELECT binary_blob FROM versions
"""
_BLOB_USER: Final = """
    SELECT commits.sequence, commits.session_key, versions.variable_key
    FROM versions JOIN commits ON commits.sequence = versions.sequence
    WHERE value_blob = ?1 OR binary_blob = ?1 ORDER BY versions.sequence LIMIT 1
"""


class _BlobWalk(_Walk):
    """Large contents: each is what its digest says, and belongs to a version."""

    def __init__(self) -> None:
        self._last: float = _BEFORE_ALL

    def __str__(self) -> str:
        return f"the large contents after number {max(self._last, 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = time.monotonic() + _SNAPSHOT_S
        for key, name, content in _rows(connection, _BLOBS, self._last):
            if digest(content) != name:
                yield Problem(self._where(connection, key), "the content is not the one that its digest was made from")
            self._last = key
            if time.monotonic() > end:
                return
        self.more = False
        for (key,) in _rows(connection, _UNUSED_BLOBS):
            yield Problem(f"large content {key}", "it belongs to no version")

    def _where(self, connection: Connection, key: int) -> str:
        user = _find(connection, _BLOB_USER, key)
        if user is None:
            return f"large content {key}"
        sequence, session_key, variable_key = user
        return f"large content {key}, first used by {_where(connection, sequence, session_key, [variable_key])}"


# The index of metadata

# What is no JSON was told of with its commit.
_SAID: Final = "json_each(iif(json_valid(versions.metadata), versions.metadata, '{}')) AS entry"
_PLACE: Final = "key, value, sequence, variable_key, version"
_NEXT_ENTRIES: Final = f"FROM metadata_entries WHERE ({_PLACE}) > (?, ?, ?, ?, ?) ORDER BY {_PLACE} LIMIT"
_LAST_OF_PAGE: Final = f"SELECT {_PLACE} {_NEXT_ENTRIES} 1 OFFSET {_PAGE_ENTRIES - 1}"
_STRAYS: Final = f"""
    SELECT key, sequence, variable_key, version FROM (SELECT {_PLACE} {_NEXT_ENTRIES} {_PAGE_ENTRIES}) AS listed
    WHERE NOT EXISTS (
        SELECT 1 FROM versions CROSS JOIN {_SAID}
        WHERE versions.variable_key = listed.variable_key AND versions.version = listed.version
            AND versions.sequence = listed.sequence AND entry.key = listed.key AND entry.value = listed.value
    )
"""
_COUNTS: Final = f"""
    SELECT (SELECT count(*) FROM metadata_entries),
        (SELECT count(*) FROM versions CROSS JOIN {_SAID} WHERE versions.metadata IS NOT NULL)
"""
_INDEXED: Final = f"""
    SELECT variable_key, version, sequence, NOT EXISTS (
        SELECT 1 FROM {_SAID} WHERE NOT EXISTS (
            SELECT 1 FROM metadata_entries AS found
            WHERE found.key = entry.key AND found.value = entry.value AND found.sequence = versions.sequence
                AND found.variable_key = versions.variable_key AND found.version = versions.version
        )
    )
    FROM versions WHERE metadata IS NOT NULL AND (variable_key, version) > (?, ?) ORDER BY variable_key, version
"""
_SESSION_OF: Final = "SELECT session_key FROM variables WHERE variable_key = ?"


class _StrayWalk(_Walk):
    """Whatever the index of metadata says, a version's metadata says. `found`: not so."""

    found = False

    def __init__(self) -> None:
        self._last: tuple[str, str, float, float, float] = ("", "", _BEFORE_ALL, _BEFORE_ALL, _BEFORE_ALL)

    def __str__(self) -> str:
        return f"metadata_entries after key {quote(self._last[0])}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = time.monotonic() + _SNAPSHOT_S
        while self.more:
            for key, sequence, variable_key, version in _rows(connection, _STRAYS, *self._last):
                self.found = True
                what = f"metadata_entries has {quote(key)} for version {version}, whose metadata does not say so"
                yield Problem(_where_of_entry(connection, sequence, variable_key), what)
            last = _find(connection, _LAST_OF_PAGE, *self._last)
            self.more = last is not None
            self._last = last or self._last
            if time.monotonic() > end:
                return


class _IndexedWalk(_Walk):
    """Whatever a version's metadata says is in the index.

    Where the index has no stray entry, and as many as there should be, none is missing: that is counted, as to look up
    each takes longer than all the rest of the check.
    """

    def __init__(self, strays: _StrayWalk) -> None:
        self._strays = strays
        self._last: tuple[float, float] = (_BEFORE_ALL, _BEFORE_ALL)

    def __str__(self) -> str:
        return f"the metadata of the versions after variable key {max(self._last[0], 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = time.monotonic() + _SNAPSHOT_S
        if not self._strays.found and self._last[0] == _BEFORE_ALL:
            entries, expected = _find(connection, _COUNTS)
            if entries == expected:
                self.more = False
                return
        for key, version, sequence, indexed in _rows(connection, _INDEXED, *self._last):
            if not indexed:
                where = _where_of_entry(connection, sequence, key)
                yield Problem(where, f"version {version} has metadata that is missing in metadata_entries")
            self._last = (key, version)
            if time.monotonic() > end:
                return
        self.more = False


def _where_of_entry(connection: Connection, sequence: int, variable_key: int) -> str:
    found = _find(connection, _SESSION_OF, variable_key)
    return _where(connection, sequence, found[0] if found else 0, [variable_key])


# Sessions

# Each begins with the session's key and is sorted by it, from an index: no statement here sorts anything itself.
_SESSIONS: Final = """
    SELECT session_key, session_id, created_at, started_sequence, ended_sequence, ttl_s, metadata, expires_at
    FROM sessions WHERE session_key > ? ORDER BY session_key
"""
_EVENTS: Final = """
    SELECT commits.session_key, events.sequence, events.ordinal, events.kind, events.body, commits.created_at
    FROM commits INDEXED BY commits_by_session CROSS JOIN events ON events.sequence = commits.sequence
    WHERE commits.session_key > ? ORDER BY commits.session_key, commits.sequence, events.ordinal
"""
_VARIABLES: Final = """
    SELECT session_key, variable_key, variable_id, name, type, constraints, metadata, optimization, deleted_sequence
    FROM variables INDEXED BY variables_by_session WHERE session_key > ? ORDER BY session_key, variable_key
"""
_TELLING_VERSIONS: Final = f"""
    SELECT variables.session_key, variables.variable_key, versions.version, versions.sequence, versions.kind,
        versions.metadata
    FROM variables INDEXED BY variables_by_session
    CROSS JOIN versions ON versions.variable_key = variables.variable_key
    WHERE variables.session_key > ? AND (
        versions.version = 0 OR versions.kind = {_DELETED}
        OR versions.metadata IS NOT NULL AND versions.kind IN ({_MERGING})
    )
    ORDER BY variables.session_key, variables.variable_key, versions.version
"""
_DEPENDENCIES: Final = """
    SELECT session_key, from_id, to_id, type, since_sequence, until_sequence
    FROM dependencies INDEXED BY dependencies_by_session WHERE session_key > ? ORDER BY session_key, dependency_key
"""
_EXECUTIONS: Final = """
    SELECT session_key, began_sequence, execution_id, tool, status, parent_id, attempt, idempotency_key, fingerprint,
        ended_sequence
    FROM executions INDEXED BY executions_by_session WHERE session_key > ? ORDER BY session_key, began_sequence
"""
_TOOLS: Final = """
    SELECT session_key, name, worker_id, address, spec, registered_sequence
    FROM tools WHERE session_key > ? ORDER BY session_key, name
"""
_EXECUTION_COLUMNS: Final = (
    "execution_id",
    "tool",
    "status",
    "parent_id",
    "attempt",
    "idempotency_key",
    "fingerprint",
    "ended_sequence",
)
_TOOL_COLUMNS: Final = ("worker_id", "address", "spec", "registered_sequence")
_SESSION_COLUMNS: Final = ("session_id", "created_at", "started_sequence", "ended_sequence", "ttl_s", "metadata")
_VARIABLE_COLUMNS: Final = (
    "variable_id",
    "name",
    "type",
    "constraints",
    "metadata",
    "optimization",
    "deleted_sequence",
)


class _SessionWalk(_Walk):
    """Session by session: its rows, and those of its variables and dependencies, are what its commits add up to."""

    def __init__(self) -> None:
        self._last: float = _BEFORE_ALL

    def __str__(self) -> str:
        return f"the sessions after number {max(self._last, 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = time.monotonic() + _SNAPSHOT_S
        statements = (_SESSIONS, _EVENTS, _TELLING_VERSIONS, _VARIABLES, _DEPENDENCIES, _EXECUTIONS, _TOOLS)
        streams = [_Stream(_rows(connection, statement, self._last)) for statement in statements]
        while (key := min(stream.key for stream in streams)) != _AFTER_ALL:
            rows, events, telling, variables, dependencies, executions, tools = (stream.take(key) for stream in streams)
            replay = _Replay(key)
            yield from replay.read_events(events)
            yield from replay.read_versions(telling)
            yield from replay.compare_session(next(rows, None))
            yield from replay.compare_markers(connection)
            yield from replay.compare_variables(variables, connection)
            yield from replay.compare_dependencies(dependencies)
            yield from replay.compare_keyed("executions", _EXECUTION_COLUMNS, executions)
            yield from replay.compare_keyed("tools", _TOOL_COLUMNS, tools)
            self._last = key
            if time.monotonic() > end:
                return
        self.more = False


class _Stream:
    """Rows sorted by their first column, taken key by key."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    @property
    def key(self) -> float:
        """The first column of the next row; larger than any where there is none."""
        return self._next[0] if self._next is not None else _AFTER_ALL

    def take(self, key: float) -> Iterator[Any]:
        """The rows of this key. To be read to the end before the next key is."""
        while self._next is not None and self._next[0] == key:
            row = self._next
            self._next = next(self._rows, None)
            yield row


@dataclass(slots=True)
class _Variable:
    """A variable as the log tells of it."""

    id: str
    name: str
    type: str
    constraints: str
    registered_sequence: int
    metadata: dict[str, str] = field(default_factory=dict)
    optimization: str | None = None
    deleted_sequence: int | None = None
    has_versions: bool = False

    def row(self) -> tuple[Any, ...]:
        """Its row in the table, without keys."""
        return (
            self.id,
            self.name,
            self.type,
            self.constraints,
            metadata_text(self.metadata),
            self.optimization if self.deleted_sequence is None else None,
            self.deleted_sequence,
        )


@dataclass(frozen=True, slots=True)
class _Commit:
    sequence: int
    created_at: int


class _Replay:
    """One session, worked out from its events and versions."""

    def __init__(self, key: float) -> None:
        self._key = key
        self._session: tuple[Any, ...] | None = None
        self._variables: dict[int, _Variable] = {}
        self._ids: dict[str, _Variable] = {}
        self._dependencies: list[tuple[str, str, str, int]] = []
        # What the log says of the tables that are compared row by row, by their key: the row, and its commit.
        self._keyed: dict[str, dict[Any, list[Any]]] = {"executions": {}, "tools": {}}
        # The markers, each with the last commit of which it took something.
        self._markers: list[tuple[int, int]] = []

    @property
    def _name(self) -> str:
        return f"session {quote(self._session[0])}" if self._session else f"session key {self._key}"

    def _variable_name(self, variable: _Variable) -> str:
        return f"{self._name}, variable {quote(variable.name)}"

    # The log

    def read_events(self, rows: Iterator[Any]) -> Iterator[Problem]:
        """Take in the session's events."""
        for _, sequence, ordinal, kind, text, created_at in rows:
            try:
                event = event_in(kind, stored(text))
                if (read := _READERS.get(type(event))) is not None:
                    read(self, _Commit(sequence, created_at), event)
            except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
                where = f"commit {sequence}, {self._name}"
                what = str(error) if isinstance(error, MalformedEventError) else f"{type(error).__name__} {error}"
                yield Problem(where, f"event {ordinal} ({quote(kind)}) makes no sense: {what}")

    def read_versions(self, rows: Iterator[Any]) -> Iterator[Problem]:
        """Take in those versions that say something of their variable: first, last, with metadata."""
        for _, key, number, sequence, kind, metadata in rows:
            variable = self._variables.get(key)
            if variable is None:
                continue
            if number == 0:
                variable.has_versions = variable.registered_sequence == sequence
            if kind == _DELETED:
                variable.deleted_sequence = sequence
            elif metadata is not None:
                try:
                    variable.metadata.update(stored(metadata))
                except (TypeError, ValueError) as error:
                    where = f"commit {sequence}, {self._variable_name(variable)}"
                    yield Problem(where, f"the metadata of version {number} makes no sense: {error}")

    def _session_started(self, commit: _Commit, event: SessionStarted) -> None:
        if self._session is not None or event.session_key != self._key:
            raise ValueError(f"it begins session {event.session_key}, in a commit of session {self._key}")
        facts = (event.session_id, commit.created_at, commit.sequence, None, event.ttl_s)
        self._session = (*facts, metadata_text(event.metadata))

    def _session_updated(self, _commit: _Commit, event: SessionUpdated) -> None:
        self._session = (*self._begun()[:4], event.ttl_s, metadata_text(event.metadata))

    def _session_ended(self, commit: _Commit, _event: SessionEnded) -> None:
        begun = self._begun()
        self._session = (*begun[:3], commit.sequence, *begun[4:])

    def _begun(self) -> tuple[Any, ...]:
        if self._session is None:
            raise ValueError("the session has not begun")
        return self._session

    def _variable_registered(self, commit: _Commit, event: VariableRegistered) -> None:
        variable = _Variable(event.variable_id, event.name, event.type, event.constraints, commit.sequence)
        if event.variable_key is None:
            raise ValueError("the variable has no key")
        if event.variable_key in self._variables:
            raise ValueError("the variable is registered already")
        self._variables[event.variable_key] = self._ids[variable.id] = variable

    def _dependency_added(self, commit: _Commit, event: DependencyAdded) -> None:
        self._dependencies.append((event.from_id, event.to_id, event.type, commit.sequence))

    def _optimization_started(self, commit: _Commit, event: OptimizationStarted) -> None:
        self._ids[event.variable_id].optimization = lock_text(event.lock(from_micros(commit.created_at)))

    def _optimization_stopped(self, _commit: _Commit, event: OptimizationStopped) -> None:
        self._ids[event.variable_id].optimization = None

    def _tools_registered(self, commit: _Commit, event: ToolsRegistered) -> None:
        for tool in event.tools:
            row = [tool.worker_id, tool.address, spec_text(tool.spec), commit.sequence]
            self._keyed["tools"][tool.spec.name] = row

    def _execution_began(self, commit: _Commit, event: ExecutionBegan) -> None:
        facts = (event.parent_id, event.attempt, event.idempotency_key, event.fingerprint)
        self._keyed["executions"][commit.sequence] = [event.execution_id, event.tool, "running", *facts, None]

    def _execution_ended(self, commit: _Commit, event: ExecutionEnded) -> None:
        row = self._keyed["executions"][began_sequence(event.execution_id)]
        if row[0] != event.execution_id or row[-1] is not None:
            raise ValueError("no such execution was running")
        row[2], row[-1] = event.status.value, commit.sequence

    def _pruned(self, commit: _Commit, event: Pruned) -> None:
        self._markers.append((commit.sequence, event.range[1]))

    # Against the tables

    def compare_markers(self, connection: Connection) -> Iterator[Problem]:
        """Each marker has rows; whether they are the right ones is looked at elsewhere."""
        for sequence, last in self._markers:
            if _find(connection, _HAS_ROW, last, sequence) is None:
                yield Problem(f"commit {sequence}, {self._name}", f"its row in pruned about commit {last} is missing")

    def compare_session(self, row: Sequence[Any] | None) -> Iterator[Problem]:
        """Hold the row of the session against the log."""
        if self._session is None:
            yield Problem(self._name, "no commit begins it")
            return
        where = f"commit {self._session[2]}, {self._name}"
        if row is None:
            yield Problem(where, "its row in sessions is missing")
            return
        *found, expires_at = row[1:]
        yield from _differences(where, "sessions", _SESSION_COLUMNS, self._session, found)
        _, _, _, ended_sequence, ttl_s, _ = self._session
        if (expires_at is None) != (ttl_s is None or ended_sequence is not None):
            wanted = "its time to live is over or unlimited" if expires_at is not None else "it has a time to live"
            yield Problem(where, f"sessions.expires_at is {_shown(expires_at)}, but {wanted}")
        elif expires_at is not None and not to_micros(EARLIEST) <= expires_at <= to_micros(LATEST):
            yield Problem(where, f"sessions.expires_at is {_shown(expires_at)}, which is no time that a calendar has")

    def compare_variables(self, rows: Iterator[Any], connection: Connection) -> Iterator[Problem]:
        """Hold the rows of the session's variables against the log."""
        missing = dict(self._variables)
        for row in rows:
            variable = missing.pop(row[1], None)
            if variable is None:
                yield Problem(f"{self._name}, variable {quote(row[3])}", "no commit of this session registers it")
                continue
            where = f"commit {variable.registered_sequence}, {self._variable_name(variable)}"
            yield from _differences(where, "variables", _VARIABLE_COLUMNS, variable.row(), row[2:])
            if not variable.has_versions and not _is_pruned(connection, variable.registered_sequence):
                yield Problem(where, "the commit that registers it has no version 0 of it")
        for variable in missing.values():
            where = f"commit {variable.registered_sequence}, {self._variable_name(variable)}"
            yield Problem(where, "its row in variables is missing")

    def compare_dependencies(self, rows: Iterator[Any]) -> Iterator[Problem]:
        """Hold the rows of the session's dependencies against the log; their order counts, their keys do not."""
        expected = [(*added, self._until(*added[:2])) for added in self._dependencies]
        found = [tuple(row[1:]) for row in rows]
        if found == expected:
            return
        for from_id, to_id, _, since, until in (Counter(expected) - Counter(found)).elements():
            where = f"commit {since}, {self._name}, dependency of {quote(from_id)} on {quote(to_id)}"
            yield Problem(where, f"its row in dependencies (until {_shown(until)}) is missing or changed")
        for from_id, to_id, *_ in (Counter(found) - Counter(expected)).elements():
            where = f"{self._name}, dependency of {quote(from_id)} on {quote(to_id)}"
            yield Problem(where, "no commit adds what its row in dependencies says")
        if Counter(found) == Counter(expected):
            yield Problem(self._name, "its rows in dependencies are not in the order of their commits")

    def compare_keyed(self, table: str, columns: Sequence[str], rows: Iterator[Any]) -> Iterator[Problem]:
        """Hold rows that have a key of their own (after the session's) against the log."""
        missing = dict(self._keyed[table])
        for _, key, *found in rows:
            expected = missing.pop(key, None)
            where = f"{self._name}, {table} {_shown(key)}"
            if expected is None:
                yield Problem(where, "no commit of this session makes it")
            else:
                yield from _differences(where, table, columns, expected, found)
        for key in missing:
            yield Problem(f"{self._name}, {table} {_shown(key)}", f"its row in {table} is missing")

    def _until(self, *ends: str) -> int | None:
        """The commit that ended a dependency: the first that deleted a variable at one of its ends."""
        variables = [self._ids[end] for end in ends if end in self._ids]
        deletions = [variable.deleted_sequence for variable in variables if variable.deleted_sequence is not None]
        return min(deletions, default=None)


_READERS: Final[Mapping[type[Event], Callable[[_Replay, _Commit, Any], None]]] = {
    SessionStarted: _Replay._session_started,
    SessionUpdated: _Replay._session_updated,
    SessionEnded: _Replay._session_ended,
    VariableRegistered: _Replay._variable_registered,
    DependencyAdded: _Replay._dependency_added,
    OptimizationStarted: _Replay._optimization_started,
    OptimizationStopped: _Replay._optimization_stopped,
    ToolsRegistered: _Replay._tools_registered,
    ExecutionBegan: _Replay._execution_began,
    ExecutionEnded: _Replay._execution_ended,
    Pruned: _Replay._pruned,
}


def _is_pruned(connection: Connection, sequence: int) -> bool:
    return _find(connection, "SELECT 1 FROM pruned WHERE sequence = ?", sequence) is not None


def _differences(
    where: str, table: str, columns: Sequence[str], expected: Sequence[Any], found: Sequence[Any]
) -> Iterator[Problem]:
    for column, right, actual in zip(columns, expected, found, strict=True):
        if actual != right:
            yield Problem(where, f"{table}.{column} is {_shown(actual)}, the log says {_shown(right)}")


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    return quote(value) if isinstance(value, str) else str(value)
