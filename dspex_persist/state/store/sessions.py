"""Reading sessions."""

from datetime import datetime

from sqlalchemy import Connection, bindparam, exists, func, select

from dspex_persist.clock import nearest_time, to_micros
from dspex_persist.state.graph import Dependencies
from dspex_persist.state.model import Dependency, Session
from dspex_persist.state.session_state import Lease, SessionState, size_of_tool
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.schema import commits, dependencies, executions, is_unicode, sessions

# Built once: SQLAlchemy needs longer to build a statement than SQLite to run it.
_FIND = select(sessions).where(sessions.c.ended_sequence.is_(None), sessions.c.session_id == bindparam("session_id"))
_DEPENDENCIES = (
    select(dependencies)
    .where(dependencies.c.session_key == bindparam("session_key"))
    .order_by(dependencies.c.dependency_key)
)
_LAST_SEQUENCE = select(func.max(commits.c.sequence)).where(commits.c.session_key == bindparam("session_key"))


def load(connection: Connection, session_id: str) -> SessionState | None:
    """Return the live session's state as of the connection's snapshot, or None.

    This takes time in proportion to the session's current size, not to its history.
    """
    if not is_unicode(session_id):
        return None
    row = connection.execute(_FIND, {"session_id": session_id}).first()
    if row is None:
        return None
    session = Session(
        id=row.session_id,
        created_at=nearest_time(row.created_at),
        metadata=stored_variables.texts_in(row.metadata),
        ttl_s=row.ttl_s,
        sequence=row.started_sequence,
    )
    lease = None
    if row.ttl_s is not None:
        lease = Lease(row.ttl_s, nearest_time(row.expires_at))
        # Renewals are saved only now and then, so the last one may be missing.
        lease.expires_at += lease.slack
    state = SessionState(
        session=session,
        lease=lease,
        dependencies=load_dependencies(connection, row.session_key),
        sequence=last_sequence(connection, row.session_key),
        key=row.session_key,
        tools=stored_executions.registered(connection, row.session_key),
        executions=stored_executions.running(connection, row.session_key),
    )
    state.weight_bytes += sum(map(size_of_tool, state.tools.values()))
    for key, variable in stored_variables.live_variables(connection, row.session_key):
        state.put(variable)
        state.names[variable.id] = variable.name
        state.keys[variable.id] = key
    return state


def load_dependencies(connection: Connection, session_key: int) -> Dependencies:
    """Return every dependency that the session ever had."""
    return Dependencies(
        Dependency(row.from_id, row.to_id, row.type, row.since_sequence, row.until_sequence)
        for row in connection.execute(_DEPENDENCIES, {"session_key": session_key}).all()
    )


def last_sequence(connection: Connection, session_key: int) -> int:
    """Return the number of the session's last commit."""
    return connection.execute(_LAST_SEQUENCE, {"session_key": session_key}).scalar() or 0


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
