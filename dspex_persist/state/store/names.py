"""The names in a database file, for shells that complete them while people type.

It needs neither SQLAlchemy nor an open engine, whose import takes longer than people wait. It changes no file, takes no
lock for longer than a statement, and answers nothing where the file cannot be read.
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

_WAIT_S: Final = 0.2
_MOST: Final = 200

_SESSIONS: Final = """
    SELECT session_id FROM sessions
    WHERE ended_sequence IS NULL AND substr(session_id, 1, length(?1)) = ?1
    ORDER BY session_key DESC LIMIT ?2
"""
_VARIABLES: Final = """
    SELECT name FROM variables JOIN sessions USING (session_key)
    WHERE session_id = ?3 AND ended_sequence IS NULL AND deleted_sequence IS NULL
        AND substr(name, 1, length(?1)) = ?1
    ORDER BY variable_key LIMIT ?2
"""
_TOOLS: Final = """
    SELECT tool FROM executions
    WHERE substr(tool, 1, length(?1)) = ?1
    GROUP BY tool ORDER BY max(began_sequence) DESC LIMIT ?2
"""


def live_sessions(path: Path, beginning: str) -> list[str]:
    """Return the ids of live sessions that begin so, newest first."""
    return _names(path, _SESSIONS, beginning)


def variables(path: Path, session_id: str, beginning: str) -> list[str]:
    """Return the names of a live session's variables that begin so, oldest first."""
    return _names(path, _VARIABLES, beginning, session_id)


def tools(path: Path, beginning: str) -> list[str]:
    """Return the names of tools that were executed and begin so, the latest first."""
    return _names(path, _TOOLS, beginning)


def _names(path: Path, statement: str, beginning: str, *more: str) -> list[str]:
    try:
        with closing(_open(path)) as connection:
            return [name for (name,) in connection.execute(statement, (beginning, _MOST, *more))]
    except (sqlite3.Error, OSError, ValueError):
        return []


def _open(path: Path) -> sqlite3.Connection:
    # SQLite would create the files of shared memory next to one that no program has open.
    is_open = all(os.path.lexists(f"{path}{suffix}") for suffix in ("-wal", "-shm"))
    mode = "mode=ro" if is_open else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=_WAIT_S)
