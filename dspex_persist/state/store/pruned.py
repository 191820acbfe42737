"""Deleting pruned rows inside a commit, and checking what remains."""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.events import GoingEvent, GoingVersion, Pruned
from dspex_persist.state.model import EventKind
from dspex_persist.state.store import log_reader
from dspex_persist.state.store.chain import (
    GENESIS,
    commit_text,
    event_text,
    kept_residue,
    residue,
    residue_entry,
    version_text,
)
from dspex_persist.state.store.engine import driver_of

LOCK_KINDS: Final = frozenset({EventKind.OPTIMIZATION_STARTED, EventKind.OPTIMIZATION_STOPPED})
_WANTED: Final = "(SELECT CAST(wanted.value AS INTEGER) FROM json_each(?) AS wanted)"
_COMMITS: Final = f"""
    SELECT commits.sequence, commits.session_key, commits.actor, commits.cause, commits.created_at, commits.hash,
        previous.hash
    FROM commits LEFT JOIN commits AS previous ON previous.sequence = commits.sequence - 1
    WHERE commits.sequence IN {_WANTED} ORDER BY commits.sequence
"""
_LEFT_VERSIONS: Final = f"""
    SELECT sequence, variable_key, version, kind, source, value, metadata,
        value_blob IS NOT NULL OR binary_blob IS NOT NULL OR versions.binary IS NOT NULL
    FROM versions WHERE sequence IN {_WANTED} ORDER BY sequence, variable_key, version
"""
_LEFT_EVENTS: Final = f"""
    SELECT sequence, ordinal, kind, body FROM events WHERE sequence IN {_WANTED} ORDER BY sequence, ordinal
"""
_INSERT_PRUNED: Final = "INSERT INTO pruned (sequence, marker_sequence, residue) VALUES (?, ?, ?)"
_DELETE_VERSIONS: Final = "DELETE FROM versions WHERE variable_key = ? AND version BETWEEN ? AND ?"
_DELETE_EVENT: Final = "DELETE FROM events WHERE sequence = ? AND ordinal = ?"
_DELETE_BLOB: Final = """
    DELETE FROM blobs WHERE blob_key = ?1
        AND NOT EXISTS (SELECT 1 FROM versions WHERE value_blob = ?1)
        AND NOT EXISTS (SELECT 1 FROM versions WHERE binary_blob = ?1)
"""
_GOING: Final = """
    SELECT events.sequence, events.kind,
        CASE WHEN events.kind = 'variable_registered' THEN json_extract(events.body, '$.variable_key') END
    FROM json_each(?) AS going
    CROSS JOIN events ON events.sequence = CAST(json_extract(going.value, '$[0]') AS INTEGER)
        AND events.ordinal = CAST(json_extract(going.value, '$[1]') AS INTEGER)
"""
# Deletes the rows that an event of this kind created in this commit.
_HANGING: Final = {
    EventKind.DEPENDENCY_ADDED: "DELETE FROM dependencies WHERE session_key = ? AND since_sequence = ?",
    EventKind.RULE_ADDED: "DELETE FROM rules WHERE session_key = ? AND added_sequence = ?",
    EventKind.TOOLS_REGISTERED: "DELETE FROM tools WHERE session_key = ? AND registered_sequence = ?",
    EventKind.EXECUTION_BEGAN: "DELETE FROM executions WHERE session_key = ? AND began_sequence = ?",
}
_DELETE_CONSTRAINTS: Final = "DELETE FROM variable_constraints WHERE variable_key = ?"
_DELETE_VARIABLE: Final = "DELETE FROM variables WHERE session_key = ? AND variable_key = ?"
_DELETE_LOCKS: Final = """
    UPDATE variables SET optimization = NULL
    WHERE session_key = ? AND optimization IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM events WHERE json_extract(body, '$.variable_id') = variables.variable_id
            AND kind IN ('optimization_started', 'optimization_stopped')
    )
"""


def carry_out(connection: Connection, session_key: int, marker: int, planned: Pruned) -> Pruned:
    """Delete rows of a session, and record that in the table `pruned`.

    Args:
        connection: The writing connection.
        session_key: The session's key.
        marker: The number of the commit that records the pruning.
        planned: The rows to delete.

    Returns:
        The event for that commit.
    """
    execute = connection.exec_driver_sql
    versions, events = planned.going
    # The marker's commit is inserted later in the same transaction.
    execute("PRAGMA defer_foreign_keys = ON")
    residues = _residues(connection, versions, events)
    execute(_INSERT_PRUNED, [(sequence, marker, kept) for sequence, _, kept in residues])
    if versions:
        execute(_DELETE_VERSIONS, _runs(versions))
    if events:
        _delete_events(connection, session_key, events)
    digest = sha256(b"".join(residue_entry(sequence, full) for sequence, full, _ in residues)).hexdigest()
    return replace(planned, range=(residues[0][0], residues[-1][0]), digest=digest)


def _runs(versions: Sequence[GoingVersion]) -> list[tuple[int, int, int]]:
    """Group versions into runs (key, first, last): deleting runs takes half the time of deleting versions."""
    runs: list[tuple[int, int, int]] = []
    for key, number, *_ in sorted(versions):
        if runs and runs[-1][0] == key and runs[-1][2] == number - 1:
            runs[-1] = (key, runs[-1][1], number)
        else:
            runs.append((key, number, number))
    return runs


def blobs_of(versions: Sequence[GoingVersion]) -> set[int]:
    """Return the keys of the large contents of versions."""
    return {key for version in versions for key in version[3:] if key is not None}


def delete_unused(connection: Connection, blob_keys: set[int]) -> None:
    """Delete those of these large contents that no version has any more."""
    connection.exec_driver_sql(_DELETE_BLOB, [(key,) for key in blob_keys])


def _residues(
    connection: Connection, versions: Sequence[GoingVersion], events: Sequence[GoingEvent]
) -> list[tuple[int, bytes, bytes]]:
    """Return the affected commits in order, each with its residue, in full and as stored."""
    driver = connection.connection
    wanted = json.dumps(list({version[2] for version in versions} | {event[0] for event in events}))
    going_versions, going_events = {version[:2] for version in versions}, set(events)
    left_versions: dict[int, list[str]] = {}
    contents = driver.cursor()
    for row in driver.cursor().execute(_LEFT_VERSIONS, (wanted,)):
        if row[1:3] not in going_versions:
            text = log_reader.large_text(contents, row) if row[7] else version_text(*row[1:7])
            left_versions.setdefault(row[0], []).append(text)
    left_events: dict[int, list[str]] = {}
    for row in driver.cursor().execute(_LEFT_EVENTS, (wanted,)):
        if row[:2] not in going_events:
            left_events.setdefault(row[0], []).append(event_text(*row[1:]))
    residues: list[tuple[int, bytes, bytes]] = []
    for *facts, stored, previous in driver.cursor().execute(_COMMITS, (wanted,)):
        sequence, session_key, actor, cause, created_at = facts
        left = left_versions.get(sequence, ()), left_events.get(sequence, ())
        content = commit_text(sequence, session_key, actor, cause, created_at, *left)
        full = residue(previous or GENESIS, stored, content)
        residues.append((sequence, full, kept_residue(full, content)))
    return residues


def _delete_events(connection: Connection, session_key: int, events: Sequence[GoingEvent]) -> None:
    """Delete events, and the rows that they created."""
    execute = connection.exec_driver_sql
    going = execute(_GOING, (json.dumps(events),)).fetchall()
    execute(_DELETE_EVENT, list(events))
    for kind, statement in _HANGING.items():
        rows = [(session_key, sequence) for sequence, event_kind, _ in going if event_kind == kind]
        if rows:
            execute(statement, rows)
    # PostgreSQL extracts numbers as text.
    variables = [(session_key, int(key)) for _, kind, key in going if kind == EventKind.VARIABLE_REGISTERED]
    if variables:
        execute(_DELETE_CONSTRAINTS, [(key,) for _, key in variables])
        execute(_DELETE_VARIABLE, variables)
    if any(kind in LOCK_KINDS for _, kind, _ in going):
        execute(_DELETE_LOCKS, (session_key,))


_LAST_RESIDUE: Final = "SELECT residue FROM pruned WHERE sequence = ? ORDER BY marker_sequence DESC LIMIT 1"


def fits(connection: Connection, commit: log_reader.LoggedCommit, *previous: bytes) -> bool | None:
    """Whether the remaining rows of a pruned commit match its last marker; None if it was not pruned.

    `previous`: the hashes that its predecessor may have.
    """
    row = driver_of(connection).execute(_LAST_RESIDUE, (commit.sequence,)).fetchone()
    if row is None:
        return None
    content = commit.content
    return any(row[0] == kept_residue(residue(each, commit.hash, content), content) for each in previous)
