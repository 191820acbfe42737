"""Reading the log of commits: its head, commits with the contents that their hashes cover, changes of a session."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import Connection, Row, select, text

from dspex_persist.clock import nearest_time, to_micros
from dspex_persist.state.anchor import Head
from dspex_persist.state.events import OptimizationStarted
from dspex_persist.state.fold import described
from dspex_persist.state.log_store import affected
from dspex_persist.state.model import (
    Change,
    CommitChanges,
    EventKind,
    Optimization,
    Variable,
    VariableVersion,
)
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.blobs import digest
from dspex_persist.state.store.chain import GENESIS, commit_text, event_text, link, version_text
from dspex_persist.state.store.engine import streamed_rows
from dspex_persist.state.store.schema import commits

_PAGE_BYTES = 4 * 1024 * 1024

# In the spelling of the index: SQLite uses it only for the same expression with the same literals.
_LOCK_AS_OF = text("""
    SELECT kind, body FROM events
    WHERE json_extract(body, '$.variable_id') = :variable_id AND sequence <= :sequence
        AND kind IN ('optimization_started', 'optimization_stopped')
    ORDER BY sequence DESC LIMIT 1
""")

_PRUNING_AFTER = text("""
    SELECT max(events.sequence) FROM commits JOIN events ON events.sequence = commits.sequence
    WHERE commits.session_key = :session_key AND commits.sequence > :after
        AND events.kind = 'pruned' AND CAST(json_extract(events.body, '$.range[1]') AS INTEGER) > :after
""")


def head(connection: Connection) -> Head:
    """Return the last commit."""
    query = select(commits.c.sequence, commits.c.hash).order_by(commits.c.sequence.desc()).limit(1)
    row = connection.execute(query).first()
    return Head(row.sequence, row.hash) if row is not None else Head(0, GENESIS)


def find_hash(connection: Connection, sequence: int) -> bytes | None:
    """Return the hash of a commit, or None."""
    if sequence == 0:
        return GENESIS
    return connection.execute(select(commits.c.hash).where(commits.c.sequence == sequence)).scalar()


_LAST_SEQUENCE = "SELECT coalesce(max(sequence), 0) FROM commits"
_CREATED_AT = "SELECT created_at FROM commits WHERE sequence = ?"
_IMPORTS = "SELECT first_sequence, last_sequence FROM imports ORDER BY first_sequence DESC"


def last_own_time(connection: Connection) -> int:
    """Return the time of the last commit that was not imported, in microseconds since 1970; 0 if there is none."""
    cursor = connection.connection.cursor()
    sequence = cursor.execute(_LAST_SEQUENCE).fetchone()[0]
    for first_imported, last_imported in cursor.execute(_IMPORTS).fetchall():
        if first_imported <= sequence <= last_imported:
            sequence = first_imported - 1
    row = cursor.execute(_CREATED_AT, (sequence,)).fetchone()
    return int(row[0]) if row is not None else 0


# A session's changes


def changes_after(connection: Connection, state: SessionState, after: int, most_commits: int) -> list[CommitChanges]:
    """Return the session's next commits, oldest first: at least one, if there is one.

    A page holds at most `most_commits`, and about `_PAGE_BYTES` of values. See `LogStore.changes_after`.
    """
    page = (
        select(commits.c.sequence)
        .where(commits.c.session_key == state.key, commits.c.sequence > after)
        .order_by(commits.c.sequence)
        .limit(most_commits)
    )
    sequences = list(connection.execute(page).scalars())
    if not sequences:
        return []
    by_commit: dict[int, list[Change]] = {sequence: [] for sequence in sequences}
    metadata: dict[int, Mapping[str, str]] = {}
    last_ones: dict[int, VariableVersion] = {}
    size_bytes, last = 0, sequences[-1]
    for row in stored_variables.iter_versions(connection, state.key, after, last):
        if size_bytes > _PAGE_BYTES and not by_commit[row.sequence]:
            last = row.sequence - 1
            break
        change = _change_of(connection, row, metadata, last_ones)
        by_commit[row.sequence].append(change)
        size_bytes += change.variable.value.size_bytes
    return [
        CommitChanges(sequence, tuple(changes), affected(state, sequence, changes))
        for sequence, changes in by_commit.items()
        if sequence <= last
    ]


def find_pruning(connection: Connection, session_key: int, after: int) -> int | None:
    """Return the last commit that pruned anything of the session's commits after number `after`, or None.

    A marker is younger than what it names, so only the commits that the watch reads anyway are looked at.
    """
    return connection.execute(_PRUNING_AFTER, {"session_key": session_key, "after": after}).scalar()


def _change_of(
    connection: Connection,
    row: Row[Any],
    metadata: dict[int, Mapping[str, str]],
    last_ones: dict[int, VariableVersion],
) -> Change:
    """Return the change in a row. `metadata` and `last_ones` have the variables' merged metadata and their versions of
    the rows before, by key; both are updated."""
    version = stored_variables.version_of(row)
    key = row.variable_key
    merged = metadata.get(key)
    if merged is None:
        merged = stored_variables.metadata_as_of(connection, key, version.version)
    elif version.metadata:
        merged = described(merged, version.kind, version.metadata)
    metadata[key] = merged
    last = last_ones.get(key)
    if version.version and (last is None or last.version != version.version - 1):
        last = stored_variables.find_version(connection, key, version.version - 1)
    previous = last.value if last is not None else None
    last_ones[key] = version
    constraints = stored_variables.constraints_as_of(connection, key, version.sequence, row.constraints)
    variable = stored_variables.variable_as_of(row, version, merged, constraints, previous)
    variable = variable._replace(optimization=_lock_as_of(connection, variable, version.sequence))
    return Change(version, variable, previous=previous)


def _lock_as_of(connection: Connection, variable: Variable, sequence: int) -> Optimization | None:
    """Return the lock that the variable had as of the commit of its version."""
    row = connection.execute(_LOCK_AS_OF, {"variable_id": variable.id, "sequence": sequence}).first()
    if row is None or row.kind == EventKind.OPTIMIZATION_STOPPED:
        return None
    started = OptimizationStarted.from_body(json.loads(row.body))
    # Clamped, because imports accepted times that some time zones cannot represent.
    started_at = nearest_time(to_micros(started.started_at))
    return replace(started.lock(variable.updated_at), started_at=started_at, renewed_at=variable.updated_at)


# The whole log

VersionRow: TypeAlias = tuple[int, int, int, int, int, str | None, str | None, int]
"""sequence, variable_key, version, kind, source, value, metadata, whether it has bytes or blobs."""

_NO_COMMIT: Final = -1
LARGEST: Final = (1 << 63) - 1
"""No sequence is larger."""
_END: Final = (LARGEST + 1,)
"""Sorts after every row."""
_UNCLEAR: Final = "unclear"
"""Used in place of an ambiguous digest, so that the hash cannot match."""

# SQL run on the driver: SQLAlchemy's rows and the general JSON encoder take three times as long.
_COMMITS = """
    SELECT sequence, session_key, actor, cause, created_at, hash
    FROM commits WHERE sequence > ? AND sequence <= ? ORDER BY sequence LIMIT ?
"""
_VERSIONS = """
    SELECT sequence, variable_key, version, kind, source, value, metadata,
        value_blob IS NOT NULL OR binary_blob IS NOT NULL OR versions.binary IS NOT NULL
    FROM versions WHERE sequence > ? ORDER BY sequence, variable_key, version
"""
_EVENTS = "SELECT sequence, ordinal, kind, body FROM events WHERE sequence > ? ORDER BY sequence, ordinal"
_CONTENTS = """
    SELECT versions.value_blob, of_value.digest, versions.binary, versions.binary_blob, of_binary.digest
    FROM versions
    LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
    LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
    WHERE versions.variable_key = ? AND versions.version = ?
"""


class LoggedCommit(NamedTuple):
    """A commit as it is in the tables: its hash, the content that the hash should cover, and its versions.

    If versions or events refer to a commit that is not in the log, its `hash` is empty.
    """

    sequence: int
    session_key: int
    hash: bytes
    content: str
    versions: list[VersionRow]

    def link(self, previous: bytes) -> bytes:
        """Return the hash that the commit should have after a commit with the hash `previous`."""
        return link(previous, self.content)


def iter_commits(
    connection: Connection, after: int = 0, most: int = -1, until: int = LARGEST
) -> Iterator[LoggedCommit]:
    """Iterate over the next `most` commits (-1 for all) after `after`, up to `until`, with the rows of one at a time
    in memory."""
    version_rows = streamed_rows(connection, _VERSIONS, after)
    event_rows = streamed_rows(connection, _EVENTS, after)
    contents = connection.connection.cursor()
    version: Any = next(version_rows, _END)
    event: Any = next(event_rows, _END)
    count = 0
    commit_rows = streamed_rows(connection, _COMMITS, after, until, most)
    for sequence, session_key, actor, cause, created_at, stored in commit_rows:
        count += 1
        while version[0] < sequence or event[0] < sequence:
            stray = min(version[0], event[0])
            version, event = _skip(version_rows, version, stray), _skip(event_rows, event, stray)
            yield _stray(stray)
        own: list[VersionRow] = []
        version_texts: list[str] = []
        while version[0] == sequence:
            own.append(version)
            version_texts.append(large_text(contents, version) if version[7] else version_text(*version[1:7]))
            version = next(version_rows, _END)
        event_texts: list[str] = []
        while event[0] == sequence:
            event_texts.append(event_text(*event[1:]))
            event = next(event_rows, _END)
        content = commit_text(sequence, session_key, actor, cause, created_at, version_texts, event_texts)
        yield LoggedCommit(sequence, session_key, stored, content, own)
    while count != most and (stray := min(version[0], event[0])) <= until:
        version, event = _skip(version_rows, version, stray), _skip(event_rows, event, stray)
        yield _stray(stray)


def _rows(cursor: Any, statement: str, *parameters: int) -> Iterator[Any]:
    rows: Iterator[Any] = cursor.execute(statement, parameters)
    return rows


def _skip(rows: Iterator[Any], row: Any, sequence: int) -> Any:
    """Return the first row, starting with `row`, of another commit."""
    while row[0] == sequence:
        row = next(rows, _END)
    return row


def _stray(sequence: int) -> LoggedCommit:
    return LoggedCommit(sequence, _NO_COMMIT, b"", "", [])


def large_text(cursor: Any, row: VersionRow) -> str:
    """Return a version with bytes or blobs in the form that its commit's hash covers."""
    value_blob, value_name, binary, binary_blob, binary_name = next(_rows(cursor, _CONTENTS, row[1], row[2]))
    value_digest = _digest_text(value_blob, value_name)
    binary_digest = _digest_text(binary_blob, binary_name)
    if binary is not None:
        binary_digest = digest(binary).hex() if binary_blob is None else _UNCLEAR
    return version_text(*row[1:7], value_digest, binary_digest)


def _digest_text(blob_key: int | None, name: bytes | None) -> str | None:
    if blob_key is None:
        return None
    return name.hex() if name is not None else _UNCLEAR
