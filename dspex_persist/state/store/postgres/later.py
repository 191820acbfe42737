"""The later commits of sessions that were loaded before: of all these sessions at once."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import psycopg

from dspex_persist.clock import nearest_time
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, event_in
from dspex_persist.state.fold import LaterCommit, after_commits
from dspex_persist.state.model import EventKind, ExecutionStatus, Isolation
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import damage
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.postgres.connections import run
from dspex_persist.state.values.json_text import stored

MOST: Final = 50
"""After more commits, a session is loaded, which takes no longer then."""
_WANTED: Final = f"""
    unnest($1, $2) AS wanted (session_key, after) CROSS JOIN LATERAL (
        SELECT sequence, actor, cause, created_at FROM commits
        WHERE commits.session_key = wanted.session_key AND commits.sequence > wanted.after AND commits.sequence <= $3
        ORDER BY commits.sequence LIMIT {MOST + 1}
    ) AS later
"""
# In the order of `VersionRow`.
_VERSIONS: Final = f"""
    SELECT wanted.session_key, variables.variable_key, variables.variable_id, variables.name, variables.type,
        versions.version, versions.sequence, versions.kind, versions.source, versions.value, versions."binary",
        versions.metadata, of_value.content, of_binary.content, later.actor, later.cause, later.created_at
    FROM {_WANTED} JOIN versions ON versions.sequence = later.sequence
    JOIN variables ON variables.variable_key = versions.variable_key
    LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
    LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
    ORDER BY versions.sequence, versions.variable_key, versions.version
"""
# What an execution got, or returned, may be large, and is not a part of the session.
_EVENTS: Final = f"""
    SELECT wanted.session_key, later.sequence, later.created_at, events.kind,
        CASE WHEN events.kind NOT IN ('{EventKind.EXECUTION_BEGAN}', '{EventKind.EXECUTION_ENDED}')
            THEN events.body END,
        CASE WHEN events.kind = '{EventKind.EXECUTION_ENDED}'
            THEN json_extract(events.body, '$.execution_id') ELSE executions.execution_id END,
        executions.tool, executions.parent_id, executions.idempotency_key, executions.fingerprint, executions.attempt
    FROM {_WANTED} JOIN events ON events.sequence = later.sequence
    LEFT JOIN executions
        ON executions.began_sequence = later.sequence AND events.kind = '{EventKind.EXECUTION_BEGAN}'
    ORDER BY later.sequence, events.ordinal
"""
PREPARE: Final = f"""
    PREPARE dspex_later_versions (bigint[], bigint[], bigint) AS {_VERSIONS};
    PREPARE dspex_later_events (bigint[], bigint[], bigint) AS {_EVENTS}
"""


class _Rows:
    """What there is of one commit."""

    def __init__(self) -> None:
        self.versions: list[stored_variables.VersionRow] = []
        self.events: list[tuple[Any, ...]] = []

    def commit(self, sequence: int) -> LaterCommit:
        created_at = self.versions[0].created_at if self.versions else self.events[0][0]
        versions = [stored_variables.version_of(row) for row in self.versions]
        return LaterCommit(sequence, nearest_time(created_at), [_event_in(*row[1:]) for row in self.events], versions)


def _event_in(kind: str, body: str | None, execution_id: str, *began: Any) -> Event:
    if kind == EventKind.EXECUTION_ENDED:
        return ExecutionEnded(execution_id, ExecutionStatus.COMMITTED)
    if kind == EventKind.EXECUTION_BEGAN:
        tool, parent_id, key, fingerprint, attempt = began
        facts = (execution_id, tool, parent_id, key, fingerprint)
        return ExecutionBegan(*facts, {}, {}, Isolation.SERIALIZABLE, attempt, seed="", worker_id="")
    return event_in(kind, stored(body or ""))


def advance(
    connection: "psycopg.Connection[Any]", states: Sequence[SessionState], until: int
) -> list[SessionState | None]:
    """Return sessions as of a later commit; see `SharedLog.advance`. The connection has prepared the statements."""
    if not states:
        return []
    keys, after = ",".join(str(state.key) for state in states), ",".join(str(state.sequence) for state in states)
    wanted = f"('{{{keys}}}', '{{{after}}}', {until})"
    cursor = run(connection, f"EXECUTE dspex_later_versions {wanted}; EXECUTE dspex_later_events {wanted}")
    found: dict[int, dict[int, _Rows]] = defaultdict(lambda: defaultdict(_Rows))
    for session_key, *columns in cursor.fetchall():
        row = stored_variables.VersionRow(*columns)
        found[session_key][row.sequence].versions.append(row)
    cursor.nextset()
    for session_key, sequence, *event in cursor.fetchall():
        found[session_key][sequence].events.append(tuple(event))
    return [_advanced(state, found[state.key]) for state in states]


def _advanced(state: SessionState, commits: dict[int, _Rows]) -> SessionState | None:
    if not 0 < len(commits) <= MOST:
        return None
    try:
        return after_commits(state, _in_order(commits))
    except damage.own_errors():
        raise
    except Exception:  # noqa: BLE001 - of damaged rows; whoever loads the session says so
        return None


def _in_order(commits: dict[int, _Rows]) -> Iterator[LaterCommit]:
    return (commits[sequence].commit(sequence) for sequence in sorted(commits))
