"""Find the commit for a time. There is no index over times, because commits are not sorted by their times.

A clock may have been set back, and imported commits keep their original times. So a time splits the log at the first
commit that is later. That commit and all that follow count as later, whatever their times are.
"""

from sqlalchemy import Connection

from dspex_persist.state.store.engine import driver_of

_HEAD = "SELECT coalesce(max(sequence), 0) FROM commits"
_YOUNGER = """
    SELECT sequence FROM commits WHERE created_at > ? AND NOT EXISTS (
        SELECT 1 FROM imports WHERE commits.sequence BETWEEN first_sequence AND last_sequence
    ) ORDER BY sequence LIMIT 1
"""
# The first commit after a number that was not imported, up to another one.
_NEXT_OWN = """
    SELECT sequence, created_at FROM commits WHERE sequence > coalesce((
        SELECT max(last_sequence) FROM imports WHERE first_sequence <= ? + 1 AND last_sequence > ?
    ), ?) AND sequence <= ? AND NOT EXISTS (
        SELECT 1 FROM imports WHERE commits.sequence BETWEEN first_sequence AND last_sequence
    ) ORDER BY sequence LIMIT 1
"""
_YOUNGER_OF_SESSION = """
    SELECT sequence FROM commits INDEXED BY commits_by_session
    WHERE session_key = ? AND created_at > ? ORDER BY sequence LIMIT 1
"""
_OF_SESSION = """
    SELECT coalesce(max(sequence), 0) FROM commits INDEXED BY commits_by_session WHERE session_key = ? AND sequence < ?
"""
_IS_IMPORTED = "SELECT 1 FROM imports WHERE ? BETWEEN first_sequence AND last_sequence"
_AFTER_ALL = 2**62


def _number(connection: Connection, statement: str, *parameters: object) -> int | None:
    row = driver_of(connection).execute(statement, parameters).fetchone()
    return None if row is None else int(row[0])


def last_until(connection: Connection, micros: int) -> int:
    """Return the last commit before the first that is later than `micros`; 0 if every commit is later.

    The times of imported commits are ignored: an imported commit counts as being as old as the one before the import.
    """
    return min(first_younger(connection, micros) - 1, _number(connection, _HEAD) or 0)


def first_younger(connection: Connection, micros: int) -> int:
    """Return the first commit later than `micros`, except for imported ones; a number past the log if no commit is."""
    if connection.dialect.name == "sqlite":
        return _number(connection, _YOUNGER, micros) or _AFTER_ALL
    return _first_younger_by_halves(connection, micros)


def _first_younger_by_halves(connection: Connection, micros: int) -> int:
    """Return the same for a log that servers share, whose own commits have the order of their times."""
    after, until = 0, _number(connection, _HEAD) or 0
    found = _AFTER_ALL
    while after < until:
        middle = (after + until) // 2
        row = driver_of(connection).execute(_NEXT_OWN, (middle, middle, middle, until)).fetchone()
        if row is None:
            until = middle
        elif row[1] > micros:
            found, until = int(row[0]), middle
        else:
            after = int(row[0])
    return found


def last_of_session_until(connection: Connection, session_key: int, micros: int) -> int:
    """Return the session's last commit before its first that is later than `micros`, by its own times; 0 if none is."""
    younger = _number(connection, _YOUNGER_OF_SESSION, session_key, micros)
    return _number(connection, _OF_SESSION, session_key, _AFTER_ALL if younger is None else younger) or 0


def first_younger_of_session(connection: Connection, session_key: int, started: int, micros: int, in_log: int) -> int:
    """Return the session's first commit that is later than `micros`, or that follows the log's first such, `in_log`.

    A commit after `in_log` with an earlier time was written while the clock was set back. An imported session is judged
    by its own times alone.
    """
    own = _number(connection, _YOUNGER_OF_SESSION, session_key, micros) or _AFTER_ALL
    return own if _number(connection, _IS_IMPORTED, started) is not None else min(own, in_log)
