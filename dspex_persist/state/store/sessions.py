"""Reading sessions."""

from datetime import datetime
from typing import Final

from sqlalchemy import Connection, exists, select

from dspex_persist.clock import nearest_time, to_micros
from dspex_persist.state.access import ACCESS
from dspex_persist.state.graph import Dependencies
from dspex_persist.state.model import Dependency, Rule, Session
from dspex_persist.state.rules import Rules
from dspex_persist.state.session_state import Lease, SessionState, size_of_tool
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.engine import driver_of, raw_rows
from dspex_persist.state.store.schema import executions, is_unicode, sessions

# Run by the driver: each takes SQLAlchemy several times as long as SQLite, and all of them are needed for a session.
_FIND: Final = """
    SELECT session_key, session_id, created_at, metadata, ttl_s, started_sequence, expires_at
    FROM sessions WHERE ended_sequence IS NULL AND session_id = ?
"""
_DEPENDENCIES: Final = """
    SELECT from_id, to_id, type, since_sequence, until_sequence
    FROM dependencies WHERE session_key = ? ORDER BY dependency_key
"""
_RULES: Final = "SELECT name, expression, description FROM rules WHERE session_key = ?"
_LAST_SEQUENCE: Final = "SELECT coalesce(max(sequence), 0) FROM commits WHERE session_key = ?"


def load(connection: Connection, session_id: str) -> SessionState | None:
    """Return the live session's state as of the connection's snapshot, or None.

    This takes time in proportion to the session's current size, not to its history.
    """
    if not is_unicode(session_id):
        return None
    rows = list(raw_rows(connection, _FIND, session_id))
    if not rows:
        return None
    session_key, found_id, created_at, metadata, ttl_s, started_sequence, expires_at = rows[0]
    session = Session(
        id=found_id,
        created_at=nearest_time(created_at),
        metadata=stored_variables.texts_in(metadata),
        ttl_s=ttl_s,
        sequence=started_sequence,
    )
    lease = None
    if ttl_s is not None:
        lease = Lease(ttl_s, nearest_time(expires_at))
        # Renewals are saved only now and then, so the last one may be missing.
        lease.expires_at += lease.slack
    state = SessionState(
        session=session,
        lease=lease,
        dependencies=load_dependencies(connection, session_key),
        sequence=last_sequence(connection, session_key),
        key=session_key,
        tools=stored_executions.registered(connection, session_key),
        executions=stored_executions.running(connection, session_key),
        rules=load_rules(connection, session_key),
    )
    if state.rules is not None:
        state.weight_bytes += state.rules.weight_bytes
    state.weight_bytes += sum(map(size_of_tool, state.tools.values()))
    for key, variable in stored_variables.live_variables(connection, session_key):
        state.put(variable)
        state.names[variable.id] = variable.name
        state.keys[variable.id] = key
    return state


def load_dependencies(connection: Connection, session_key: int) -> Dependencies:
    """Return every dependency that the session ever had."""
    return Dependencies(Dependency(*row) for row in list(raw_rows(connection, _DEPENDENCIES, session_key)))


def load_rules(connection: Connection, session_key: int) -> Rules | None:
    """Return the session's rules; None if it has none."""
    rows = list(raw_rows(connection, _RULES, session_key))
    return Rules(Rule(*row) for row in rows) if rows else None


def last_sequence(connection: Connection, session_key: int) -> int:
    """Return the number of the session's last commit."""
    ((last,),) = raw_rows(connection, _LAST_SEQUENCE, session_key)
    return int(last)


def count_live(connection: Connection) -> int:
    """Return how many sessions have not ended."""
    ((count,),) = raw_rows(connection, "SELECT count(*) FROM sessions WHERE ended_sequence IS NULL")
    return int(count)


# The text is looked for first: to parse the metadata takes ten times as long.
_WITH_ACCESS: Final = f"""
    SELECT count(*) FROM sessions INDEXED BY sessions_live
    WHERE ended_sequence IS NULL AND instr(metadata, '"{ACCESS}"') > 0 AND json_extract(metadata, '$.{ACCESS}') <> ''
"""


def count_with_access(connection: Connection) -> int:
    """Return how many live sessions have rules of access."""
    ((count,),) = raw_rows(connection, _WITH_ACCESS)
    return int(count)


def expired(connection: Connection, now: datetime, limit: int) -> list[str]:
    """Return the ids of sessions whose saved expiry is past."""
    query = (
        select(sessions.c.session_id)
        .where(sessions.c.ended_sequence.is_(None), sessions.c.expires_at <= to_micros(now))
        # A session does not expire while a tool runs in it.
        .where(
            ~exists().where(executions.c.session_key == sessions.c.session_key, executions.c.ended_sequence.is_(None))
        )
        .order_by(sessions.c.expires_at)
        .limit(limit)
    )
    return list(connection.execute(query).scalars())


_ACTOR: Final = "SELECT actor FROM commits WHERE sequence = ?"
# The bytes as `db stats` counts them.
_STORED: Final = """
    SELECT sessions.started_sequence, (
        SELECT ifnull(sum(
            ifnull(length(CAST(versions.value AS BLOB)), 0) + ifnull(length(versions.binary), 0)
            + ifnull(length(CAST(versions.metadata AS BLOB)), 0)
            + ifnull((SELECT length(content) FROM blobs WHERE blob_key = value_blob), 0)
            + ifnull((SELECT length(content) FROM blobs WHERE blob_key = binary_blob), 0)
        ), 0)
        FROM variables INDEXED BY variables_by_session
        CROSS JOIN versions ON versions.variable_key = variables.variable_key
        WHERE variables.session_key = sessions.session_key
    )
    FROM sessions INDEXED BY sessions_live
    CROSS JOIN commits ON commits.sequence = sessions.started_sequence
    WHERE sessions.ended_sequence IS NULL AND (commits.actor = ?1 OR instr(commits.actor, ?1 || ' for ') = 1)
"""


def actor_of(connection: Connection, sequence: int) -> str:
    """Return who made a commit; "" if there is none."""
    row = driver_of(connection).execute(_ACTOR, (sequence,)).fetchone()
    return "" if row is None else str(row[0])


def stored_by(connection: Connection, identity: str) -> dict[int, int]:
    """Return the live sessions that an identity began, by their first commits, with their stored bytes."""
    return dict(driver_of(connection).execute(_STORED, (identity,)).fetchall())
