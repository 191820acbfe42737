"""From times to commits. No index over times is kept, and none would do: commits need not be in their order.

A clock may have been set back, and an import brings times of its own. So a time divides the log at the first commit
that is younger: what comes after that came later, whatever time it has.
"""

from sqlalchemy import Connection

_HEAD = "SELECT ifnull(max(sequence), 0) FROM commits"
_YOUNGER = """
    SELECT sequence FROM commits WHERE created_at > ? AND NOT EXISTS (
        SELECT 1 FROM imports WHERE commits.sequence BETWEEN first_sequence AND last_sequence
    ) ORDER BY sequence LIMIT 1
"""
_YOUNGER_OF_SESSION = """
    SELECT sequence FROM commits INDEXED BY commits_by_session
    WHERE session_key = ? AND created_at > ? ORDER BY sequence LIMIT 1
"""
_OF_SESSION = """
    SELECT ifnull(max(sequence), 0) FROM commits INDEXED BY commits_by_session WHERE session_key = ? AND sequence < ?
"""
_IS_IMPORTED = "SELECT 1 FROM imports WHERE ? BETWEEN first_sequence AND last_sequence"
_AFTER_ALL = 2**62


def _number(connection: Connection, statement: str, *parameters: object) -> int | None:
    row = connection.connection.cursor().execute(statement, parameters).fetchone()
    return None if row is None else int(row[0])


def last_until(connection: Connection, micros: int) -> int:
    """The last commit before the first that is younger than a time; 0 if there is none.

    Commits of imports have no say: each of them counts as what it came after.
    """
    return min(first_younger(connection, micros) - 1, _number(connection, _HEAD) or 0)


def first_younger(connection: Connection, micros: int) -> int:
    """The first commit, but for those of imports, that is younger than a time; past all where there is none."""
    return _number(connection, _YOUNGER, micros) or _AFTER_ALL


def last_of_session_until(connection: Connection, session_key: int, micros: int) -> int:
    """The session's last commit before its first that is younger than a time, by the times that they have; 0: none."""
    younger = _number(connection, _YOUNGER_OF_SESSION, session_key, micros)
    return _number(connection, _OF_SESSION, session_key, _AFTER_ALL if younger is None else younger) or 0


def first_younger_of_session(connection: Connection, session_key: int, started: int, micros: int, in_log: int) -> int:
    """The session's first commit that is younger than a time, or comes after the first such of the log, `in_log`.

    That one may say that it is older: then its time is what is wrong. An imported session has times of its own.
    """
    own = _number(connection, _YOUNGER_OF_SESSION, session_key, micros) or _AFTER_ALL
    return own if _number(connection, _IS_IMPORTED, started) is not None else min(own, in_log)
