"""Executions and registered tools, read from a given connection."""

import json
from typing import Any

from sqlalchemy import Connection, bindparam, select

from dspex_persist.state.events import ExecutionEnded, spec_body, spec_in
from dspex_persist.state.model import (
    ExecutionStatus,
    JournalEntry,
    RegisteredTool,
    ToolSpec,
)
from dspex_persist.state.store.schema import events, executions, sessions, tools
from dspex_persist.state.values.json_text import storable, stored

# Built once: to build a statement takes SQLAlchemy longer than SQLite needs to run it.
_RUNNING = (
    select(executions)
    .where(executions.c.session_key == bindparam("session_key"), executions.c.ended_sequence.is_(None))
    .order_by(executions.c.began_sequence)
)
_TOOLS = select(tools).where(tools.c.session_key == bindparam("session_key")).order_by(tools.c.name)
_LAST_OF_KEY = (
    select(executions)
    .where(
        executions.c.session_key == bindparam("session_key"),
        executions.c.idempotency_key == bindparam("idempotency_key"),
    )
    .order_by(executions.c.began_sequence.desc())
    .limit(1)
)
_ENDS = select(events.c.body).where(events.c.sequence == bindparam("sequence"), events.c.kind == "execution_ended")
_UNFINISHED = (
    select(sessions.c.session_id, executions.c.execution_id)
    .join(executions, executions.c.session_key == sessions.c.session_key)
    .where(executions.c.ended_sequence.is_(None), sessions.c.ended_sequence.is_(None))
    .order_by(executions.c.began_sequence)
)


def running(connection: Connection, session_key: int) -> dict[str, JournalEntry]:
    """The session's executions that have not ended, oldest first."""
    rows = connection.execute(_RUNNING, {"session_key": session_key}).all()
    return {
        row.execution_id: JournalEntry(
            row.execution_id, row.tool, row.began_sequence, row.parent_id, row.idempotency_key, row.fingerprint
        )
        for row in rows
    }


def unfinished(connection: Connection) -> dict[str, tuple[str, ...]]:
    """The executions of live sessions that have not ended, by the session's id; oldest first."""
    found: dict[str, tuple[str, ...]] = {}
    for session_id, execution_id in connection.execute(_UNFINISHED):
        found[session_id] = (*found.get(session_id, ()), execution_id)
    return found


def find_by_key(connection: Connection, session_key: int, key: str) -> JournalEntry | None:
    """The last execution under an idempotency key, if it has ended."""
    row = connection.execute(_LAST_OF_KEY, {"session_key": session_key, "idempotency_key": key}).first()
    if row is None or row.ended_sequence is None:
        return None
    end = _end_of(connection, row)
    return JournalEntry(
        row.execution_id,
        row.tool,
        row.began_sequence,
        row.parent_id,
        row.idempotency_key,
        row.fingerprint,
        ExecutionStatus(row.status),
        row.ended_sequence,
        row.attempt,
        end.result,
    )


def _end_of(connection: Connection, row: Any) -> ExecutionEnded:
    """The second half of an entry, from the commit that ended it."""
    bodies = connection.execute(_ENDS, {"sequence": row.ended_sequence}).scalars().all()
    ends = (ExecutionEnded.from_body(stored(body)) for body in bodies)
    return next(end for end in ends if end.execution_id == row.execution_id)


def registered(connection: Connection, session_key: int) -> dict[str, RegisteredTool]:
    """The tools that the session's workers have registered, by name."""
    rows = connection.execute(_TOOLS, {"session_key": session_key}).all()
    return {row.name: RegisteredTool(spec_in(stored(row.spec)), row.worker_id, row.address) for row in rows}


def spec_text(spec: ToolSpec) -> str:
    """A tool's specification as the table keeps it."""
    # Through what the log keeps of it: the two are compared.
    return json.dumps(stored(storable(spec_body(spec))), sort_keys=True)
