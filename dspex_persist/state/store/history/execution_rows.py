"""Read executions from the journal, and which execution called which."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.state.journal import find_execution
from dspex_persist.state.store.history.rows import BEGINNING, ENDING, all_rows, first_row
from dspex_persist.state.values.json_text import stored_object

# `->` returns JSON, which Python decodes: with `->>`, SQLite would cut a message at its first NUL.
_EXECUTIONS: Final = f"""
    SELECT sessions.session_id, executions.execution_id, executions.tool, executions.status, executions.attempt,
        began.actor, executions.began_sequence, began.created_at AS began_at, executions.ended_sequence,
        ended.created_at AS ended_at, {ENDING} -> '$.duration_us' AS duration_us,
        executions.parent_id, executions.idempotency_key,
        {BEGINNING} -> '$.worker_id' AS worker_id,
        (SELECT count(*) FROM json_each({ENDING}, '$.reads')) AS reads,
        (SELECT count(*) FROM json_each({ENDING}, '$.writes')) AS writes,
        {ENDING} -> '$.failure' AS failure, {ENDING} -> '$.reason' AS reason,
        {ENDING} -> '$.conflicts' AS conflicts, executions.session_key,
        ending.sequence IS NOT NULL AS has_ending{{bodies}}
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN commits AS began ON began.sequence = executions.began_sequence
    LEFT JOIN commits AS ended ON ended.sequence = executions.ended_sequence
    LEFT JOIN events AS beginning ON beginning.sequence = executions.began_sequence
        AND beginning.kind = 'execution_began'
    LEFT JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND {ENDING} ->> '$.execution_id' = executions.execution_id
"""
SUMMARIES: Final = _EXECUTIONS.format(bodies="")
IN_FULL: Final = _EXECUTIONS.format(bodies=", beginning.body AS beginning, ending.body AS ending")


def execution_row(connection: Connection, execution_id: str) -> Any:
    """Return the execution with this id; see `find_execution`."""
    statement = f"{IN_FULL} WHERE executions.began_sequence = ?"
    return find_execution(execution_id, lambda began: first_row(connection, statement, began))


def family_of(connection: Connection, row: Any) -> list[Any]:
    """Return the execution and every execution that it called, directly or indirectly."""
    statement = "SELECT execution_id FROM executions WHERE parent_id = ? ORDER BY began_sequence"
    called = [execution_row(connection, each[0]) for each in all_rows(connection, statement, row.execution_id)]
    return [row, *(member for each in called for member in family_of(connection, each))]


def end_of(row: Any) -> Mapping[str, Any]:
    """Return the second half of its journal entry, with defaults for an execution that is running or was pruned."""
    return {"writes": (), "published": (), **stored_object(row.ending)}


def pairs_in(entries: Iterable[Sequence[Any]]) -> tuple[tuple[str, int], ...]:
    return tuple((name, version) for name, version in entries)
