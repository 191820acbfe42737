"""Resolve points of the history (commits, times, executions), and sessions and variables by name."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.clock import nearest_time, to_micros
from dspex_persist.state.audit import PointLike, is_glob, suggestion
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError, VersionPrunedError, quote
from dspex_persist.state.points import Life, living_at, resolve_point
from dspex_persist.state.store.history import times
from dspex_persist.state.store.history.execution_rows import execution_row
from dspex_persist.state.store.history.rows import Conditions, all_rows, first_row, glob_pattern, searchable

_AT_OR_BELOW: Final = """
    SELECT version, sequence FROM versions WHERE variable_key = ? AND version <= ? ORDER BY version DESC LIMIT 1
"""
# For a variable (1) whose versions have a gap after a version (2): was one of them pruned from a commit up to (3)?
_REGISTERED: Final = """
    SELECT 1 FROM variables
    CROSS JOIN commits INDEXED BY commits_by_session ON commits.session_key = variables.session_key
    CROSS JOIN events ON events.sequence = commits.sequence AND events.kind = 'variable_registered'
        AND CAST(json_extract(events.body, '$.variable_key') AS INTEGER) = variables.variable_key
    WHERE variables.variable_key = ?1 AND ?2 = -1 AND commits.sequence <= ?3
"""
_LOST: Final = """
    SELECT 1 FROM variables
    CROSS JOIN commits INDEXED BY commits_by_session ON commits.session_key = variables.session_key
    CROSS JOIN pruned ON pruned.sequence = commits.sequence
    WHERE variables.variable_key = ?1 AND commits.sequence <= ?3 AND commits.sequence >= (
        SELECT sequence FROM versions WHERE versions.variable_key = ?1 AND versions.version = ?2
    ) LIMIT 1
"""
LAST_VERSION: Final = 2**62


def of_session(connection: Connection, conditions: Conditions, session: str, column: str) -> None:
    """Require the session with this id, or those that match the glob; "" requires nothing."""
    if is_glob(session):
        conditions.add("sessions.session_id GLOB ?", glob_pattern(session))
    elif session:
        conditions.add_among(column, session_keys(connection, session))


def head_of(connection: Connection) -> int:
    row = first_row(connection, "SELECT max(sequence) FROM commits")
    return row[0] or 0


def resolve(connection: Connection, point: PointLike, option: str, session: str) -> int:
    def of_execution(execution_id: str) -> int:
        row = execution_row(connection, execution_id)
        return int(row.began_sequence if row.ended_sequence is None else row.ended_sequence)

    def until(at: datetime) -> int:
        micros = to_micros(at)
        if not session:
            return times.last_until(connection, micros)
        return max(times.last_of_session_until(connection, key, micros) for key in session_keys(connection, session))

    return resolve_point(point, option, head_of(connection), of_execution, until)


def refuse_pruned(connection: Connection, session: str, key: int, sequence: int) -> None:
    """Raise for a session that was pruned as a whole: its variables are unknown."""
    statement = """
        SELECT 1 FROM commits INDEXED BY commits_by_session CROSS JOIN pruned ON pruned.sequence = commits.sequence
        WHERE commits.session_key = ? AND commits.sequence <= ? LIMIT 1
    """
    if first_row(connection, statement, key, sequence) is not None:
        raise InvalidArgumentError("at", f"the state of session {quote(session)} at commit {sequence} was pruned")


def refuse_gap(connection: Connection, key: int, name: str, version: int | None, sequence: int) -> None:
    """Raise if the version that was current at `sequence` was pruned, so that `version` is an older one."""
    after = -1 if version is None else version
    following = first_row(
        connection,
        "SELECT version FROM versions WHERE variable_key = ? AND version > ? ORDER BY version LIMIT 1",
        key,
        after,
    )
    if following is None or following[0] == after + 1:
        return
    lost = _REGISTERED if version is None else _LOST
    if first_row(connection, lost, key, after, sequence) is not None:
        raise VersionPrunedError(name, after + 1)


def version_at(connection: Connection, key: int, sequence: int) -> int | None:
    """Return the variable's newest version as of a commit, by binary search; None before its first."""
    cursor = connection.connection.cursor()
    newest = cursor.execute(_AT_OR_BELOW, (key, LAST_VERSION)).fetchone()
    if newest is None:
        return None
    if newest[1] <= sequence:
        return int(newest[0])
    version, low, high = None, 0, newest[0] - 1
    while low <= high:
        middle = (low + high) // 2
        row = cursor.execute(_AT_OR_BELOW, (key, middle)).fetchone()
        if row is None:
            low = middle + 1
        elif row[1] <= sequence:
            version, low = int(row[0]), middle + 1
        else:
            high = row[0] - 1
    return version


def session_keys(connection: Connection, session: str) -> list[int]:
    """Return the keys of all sessions that had this id, oldest first."""
    rows = all_rows(connection, "SELECT session_key FROM sessions WHERE session_id = ?", searchable(session))
    if not rows:
        raise NotInHistoryError("session", session, _similar(connection, session))
    return sorted(row[0] for row in rows)


def _similar(connection: Connection, session: str) -> str:
    rows = all_rows(connection, "SELECT session_id FROM sessions ORDER BY session_key DESC LIMIT 1000")
    return _suggestion(session, rows)


def session_at(connection: Connection, session: str, sequence: int) -> int:
    """Return the key of the session with this id that was live at a commit."""
    keys = session_keys(connection, session)
    statement = "SELECT started_sequence, ended_sequence, created_at FROM sessions WHERE session_key = ?"
    rows = [first_row(connection, statement, key) for key in keys]
    lives = [Life(began, ended, nearest_time(created_at)) for began, ended, created_at in rows]
    return keys[living_at(session, lives, sequence)]


def variable_keys(connection: Connection, sessions: Sequence[int], variable: str) -> list[int]:
    """Return the keys of all variables of the sessions that had this name, or have this id, oldest first."""
    conditions = Conditions()
    conditions.add_among("session_key", sessions)
    conditions.add("(name = ? OR variable_id = ?)", searchable(variable), searchable(variable))
    rows = all_rows(connection, f"SELECT variable_key FROM variables{conditions}", *conditions.parameters)
    if not rows:
        names = all_rows(
            connection,
            f"SELECT name FROM variables WHERE session_key IN ({', '.join('?' * len(sessions))}) "
            "ORDER BY variable_key DESC LIMIT 1000",
            *sessions,
        )
        raise NotInHistoryError("variable", variable, _suggestion(variable, names))
    return sorted(row[0] for row in rows)


def _suggestion(wanted: str, rows: Sequence[Any]) -> str:
    return suggestion(wanted, list(dict.fromkeys(row[0] for row in rows)))
