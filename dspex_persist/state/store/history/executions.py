"""Answer queries for executions: pages of summaries, and one in full."""

from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection

from dspex_persist.clock import nearest_time
from dspex_persist.state import journal
from dspex_persist.state.audit import (
    Cursor,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    Page,
)
from dspex_persist.state.errors import NotInHistoryError
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, conflicts_in
from dspex_persist.state.journal import attempts_of, error_text
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import ExecutionStatus, Failure
from dspex_persist.state.store.history.execution_rows import IN_FULL, SUMMARIES, execution_row
from dspex_persist.state.store.history.points import of_session
from dspex_persist.state.store.history.rows import (
    BEGINNING,
    Bounds,
    Conditions,
    all_rows,
    first_row,
    of_tool,
    page_of,
    read_json,
    rows_of_page,
)
from dspex_persist.state.values.json_text import DAMAGED, stored_object

E = TypeVar("E", bound=Event)


def _summary_of(row: Any) -> ExecutionSummary:
    return ExecutionSummary(
        row.session_id,
        row.execution_id,
        row.tool,
        ExecutionStatus(row.status),
        row.attempt,
        row.actor,
        row.began_sequence,
        nearest_time(row.began_at),
        row.ended_sequence,
        None if row.ended_at is None else nearest_time(row.ended_at),
        read_json(row.duration_us),
        row.parent_id,
        row.idempotency_key,
        read_json(row.worker_id) or "",
        row.reads,
        row.writes,
        _error_text(row),
    )


def _error_text(row: Any) -> str:
    failure = read_json(row.failure)
    return error_text(
        row.status,
        Failure(failure["type"], failure["message"]) if failure else None,
        read_json(row.reason),
        conflicts_in(read_json(row.conflicts) or ()),
        has_end=bool(row.has_ending),
    )


def execution_page(
    connection: Connection, query: ExecutionQuery, bounds: Bounds, after: Cursor | None, most: int
) -> Page[ExecutionSummary]:
    conditions = Conditions()
    of_session(connection, conditions, query.session, "executions.session_key")
    of_tool(conditions, query.tool)
    conditions.add_equal("executions.status", query.status)
    conditions.add_equal("began.actor", query.actor)
    conditions.add_equal("executions.idempotency_key", query.idempotency_key)
    conditions.add_metadata(f"{BEGINNING} -> '$.metadata'", query.metadata.items())
    if not query.children:
        conditions.add("executions.parent_id IS NULL")
    rows = rows_of_page(connection, SUMMARIES, "executions.began_sequence", conditions, query, bounds, after, most)
    return page_of(rows, most, _summary_of, lambda row: (row.began_sequence,))


def detail_of(
    connection: Connection, execution_id: str, history: tuple[HistoryEntry, ...], secrets: Secrets
) -> ExecutionDetail:
    """Return an execution in full, with `secrets` masked in its LM calls and in those of the tools that it called."""
    row = execution_row(connection, execution_id)
    children = all_rows(
        connection, "SELECT execution_id FROM executions WHERE parent_id = ? ORDER BY began_sequence", row.execution_id
    )
    attempts = attempts_of(row, partial(_attempt_before, connection), partial(_attempt_after, connection))
    return journal.detail_of(
        _summary_of(row),
        _event_in(ExecutionBegan, row.beginning),
        _event_in(ExecutionEnded, row.ending),
        tuple(each.execution_id for each in attempts),
        tuple(detail_of(connection, each[0], (), secrets) for each in children),
        history,
        secrets,
    )


def _event_in(kind: type[E], text: str | None) -> E | None:
    """Return the event with this body; None if it is missing or is not valid JSON."""
    body = stored_object(text)
    return None if not body or DAMAGED in body else kind.from_body(body)


def _attempt_before(connection: Connection, row: Any) -> Any:
    began = _event_in(ExecutionBegan, row.beginning)
    if began is None or began.retry_of is None:
        return None
    try:
        before = execution_row(connection, began.retry_of)
    except NotInHistoryError:
        return None
    # Old releases imported recordings whose retries form a circle.
    return before if before.began_sequence < row.began_sequence else None


def _attempt_after(connection: Connection, row: Any) -> Any:
    if row.status != ExecutionStatus.CONFLICT.value:
        return None
    return first_row(
        connection,
        f"{IN_FULL} WHERE executions.session_key = ? AND executions.began_sequence > ? "
        f"AND executions.tool = ? AND executions.attempt = ? AND {BEGINNING} ->> '$.retry_of' = ? "
        "ORDER BY executions.began_sequence LIMIT 1",
        row.session_key,
        row.began_sequence,
        row.tool,
        row.attempt + 1,
        row.execution_id,
    )
