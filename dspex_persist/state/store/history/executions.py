"""Answer queries for executions: pages of summaries, and one in full."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from sqlalchemy import Connection

from dspex_persist.clock import nearest_time
from dspex_persist.state.audit import (
    Cursor,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    Page,
    ReadEntry,
)
from dspex_persist.state.errors import NotInHistoryError
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, conflicts_in
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import ExecutionStatus, Seen
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
from dspex_persist.state.values.json_text import DAMAGED, storable, stored_object

E = TypeVar("E", bound=Event)
_ENDINGS: Final[Mapping[str, str]] = {
    ExecutionStatus.INTERRUPTED: "the server ended while it ran",
    ExecutionStatus.CANCELLED: "its client cancelled it",
}
"""The reason to show for a status whose journal entry has neither a failure nor a reason."""


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
        row.duration_us,
        row.parent_id,
        row.idempotency_key,
        read_json(row.worker_id) or "",
        row.reads,
        row.writes,
        _error_text(row),
    )


def _error_text(row: Any) -> str:
    failure = read_json(row.failure)
    if failure:
        return f"{failure['type']}: {failure['message']}"
    conflicts = conflicts_in(read_json(row.conflicts) or ())
    # The default reason would be a guess if the end was pruned: the end of a session interrupts executions, too.
    ending = _ENDINGS.get(row.status, "") if row.has_ending else ""
    return read_json(row.reason) or ", ".join(map(str, conflicts)) or ending


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
    began, ended = _event_in(ExecutionBegan, row.beginning), _event_in(ExecutionEnded, row.ending)
    children = all_rows(
        connection, "SELECT execution_id FROM executions WHERE parent_id = ? ORDER BY began_sequence", row.execution_id
    )
    return ExecutionDetail(
        _summary_of(row),
        **(_fields_of_beginning(began) if began is not None else _NO_BEGINNING),
        **(_fields_of_end(ended, secrets) if ended is not None else {}),
        attempts=_attempts(connection, row, began),
        children=tuple(detail_of(connection, each[0], (), secrets) for each in children),
        history=history,
    )


_NO_BEGINNING: Final[Mapping[str, Any]] = {"isolation": "", "parameters": {}, "metadata": {}, "seed": ""}


def _event_in(kind: type[E], text: str | None) -> E | None:
    """Return the event with this body; None if it is missing or is not valid JSON."""
    body = stored_object(text)
    return None if not body or DAMAGED in body else kind.from_body(body)


def _fields_of_beginning(event: ExecutionBegan) -> dict[str, Any]:
    return {
        "isolation": event.isolation.value,
        "parameters": event.parameters,
        "metadata": event.metadata,
        "seed": event.seed,
    }


def _fields_of_end(event: ExecutionEnded, secrets: Secrets) -> dict[str, Any]:
    return {
        "result": event.result,
        "failure": event.failure,
        "reason": event.reason or "",
        "conflicts": event.conflicts,
        "reads": tuple(_read_entry(name, seen) for name, seen in event.reads.items()),
        "patterns": event.patterns,
        "writes": event.writes,
        "published": event.published,
        "log": tuple(replace(line, message=_text_of(line.message)) for line in event.log),
        "recorded": secrets.masked_recorded(event.recorded),
    }


def _read_entry(name: str, seen: Seen | None) -> ReadEntry:
    return ReadEntry(name, seen.name, seen.variable_id, seen.version) if seen else ReadEntry(name, None, None, None)


def _text_of(message: object) -> str:
    """Return the logged message as text: old releases logged any JSON value."""
    return message if isinstance(message, str) else storable(message)


def _attempts(connection: Connection, row: Any, began: ExecutionBegan | None) -> tuple[str, ...]:
    """Return the ids of all attempts at the same request, in order: the ones it retries, itself, its retries."""
    attempts, first = [row.execution_id], row
    while began is not None and began.retry_of is not None:
        try:
            before = execution_row(connection, began.retry_of)
        except NotInHistoryError:
            break
        if before.began_sequence >= first.began_sequence:
            # Old releases imported recordings whose retries form a circle.
            break
        attempts.insert(0, before.execution_id)
        first, began = before, _event_in(ExecutionBegan, before.beginning)
    last = row
    while last is not None and last.status == ExecutionStatus.CONFLICT.value:
        last = first_row(
            connection,
            f"{IN_FULL} WHERE executions.session_key = ? AND executions.began_sequence > ? "
            f"AND executions.tool = ? AND executions.attempt = ? AND {BEGINNING} ->> '$.retry_of' = ? "
            "ORDER BY executions.began_sequence LIMIT 1",
            last.session_key,
            last.began_sequence,
            last.tool,
            last.attempt + 1,
            last.execution_id,
        )
        attempts += [last.execution_id] if last is not None else []
    return tuple(attempts)
