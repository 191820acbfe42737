"""Reading executions and registered tools."""

import json
from typing import Any, Final

from sqlalchemy import Connection, bindparam, select

from dspex_persist.state.budgets import Spent
from dspex_persist.state.events import ExecutionEnded, spec_body, spec_in
from dspex_persist.state.model import (
    ExecutionStatus,
    JournalEntry,
    RegisteredTool,
    ToolSpec,
)
from dspex_persist.state.store.engine import raw_rows
from dspex_persist.state.store.schema import events, executions, sessions
from dspex_persist.state.values.json_text import storable, stored

# Run by the driver: each takes SQLAlchemy several times as long as SQLite, and both are needed for a session.
_RUNNING: Final = """
    SELECT execution_id, tool, began_sequence, parent_id, idempotency_key, fingerprint
    FROM executions WHERE session_key = ? AND ended_sequence IS NULL ORDER BY began_sequence
"""
# An answer of the cache costs nothing.
_SPENT: Final = """
    SELECT executions.tool, CAST(total(lm_calls.total_tokens) AS INTEGER), total(lm_calls.cost)
    FROM executions JOIN lm_calls ON lm_calls.began_sequence = executions.began_sequence
    WHERE executions.session_key = ? AND lm_calls.cached IS NOT 1 GROUP BY executions.tool
"""
_TOOLS: Final = "SELECT name, spec, worker_id, address FROM tools WHERE session_key = ? ORDER BY name"
# Built once: SQLAlchemy needs longer to build a statement than SQLite to run it.
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
    """Return the session's running executions, oldest first."""
    return {row[0]: JournalEntry(*row) for row in list(raw_rows(connection, _RUNNING, session_key))}


def unfinished(connection: Connection) -> dict[str, tuple[str, ...]]:
    """Return the ids of the running executions of live sessions by session id, oldest first."""
    by_session: dict[str, tuple[str, ...]] = {}
    for session_id, execution_id in connection.execute(_UNFINISHED):
        by_session[session_id] = (*by_session.get(session_id, ()), execution_id)
    return by_session


def spent(connection: Connection, session_key: int) -> tuple[int, dict[str, Spent]]:
    """Return what the LM calls of a session's ended executions have used, by tool, and the last commit of the file."""
    ((sequence,),) = raw_rows(connection, "SELECT coalesce(max(sequence), 0) FROM commits")
    rows = raw_rows(connection, _SPENT, session_key)
    return sequence, {tool: Spent(tokens, cost) for tool, tokens, cost in list(rows)}


def find_by_key(connection: Connection, session_key: int, key: str) -> JournalEntry | None:
    """Return the last execution with an idempotency key, if it has ended."""
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
        end.failure,
    )


def _end_of(connection: Connection, row: Any) -> ExecutionEnded:
    """Return the event that ended an execution."""
    bodies = connection.execute(_ENDS, {"sequence": row.ended_sequence}).scalars().all()
    ends = (ExecutionEnded.from_body(stored(body)) for body in bodies)
    return next(end for end in ends if end.execution_id == row.execution_id)


def registered(connection: Connection, session_key: int) -> dict[str, RegisteredTool]:
    """Return the tools that the session's workers registered, by name."""
    # Fetched before decoding, because an exception for a damaged row would leave the statement open.
    rows = list(raw_rows(connection, _TOOLS, session_key))
    return {name: RegisteredTool(spec_in(stored(spec)), worker_id, address) for name, spec, worker_id, address in rows}


def spec_text(spec: ToolSpec) -> str:
    """Return a tool's specification as text for the table."""
    # Converted through the form in the log, because `db check` compares the two.
    return json.dumps(stored(storable(spec_body(spec))), sort_keys=True)
