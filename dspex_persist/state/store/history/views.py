"""SQL on the public views of a file (`v_*`), for programs that show them, such as the website of `audit web`."""

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Final

from dspex_persist.state.model import REASON

SqlError: Final = sqlite3.Error
"""The error that SQLite raises for an invalid query, for programs that accept queries from their users."""
_WITH_VALUES: Final = ("v_variable_history", "v_current_variables")


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open a read-only connection, usable from any thread, even while a server writes to the file."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)


def explain_commits(connection: sqlite3.Connection) -> None:
    """Add a column `reason` to the view of commits, on this connection only.

    It is not in the file's view, because every file would have to be upgraded for it.
    """
    columns = [row[1] for row in connection.execute("PRAGMA main.table_info(v_commits)")]
    connection.execute(f"""
        CREATE TEMP VIEW v_commits AS
        SELECT {", ".join(f"plain.{column}" for column in columns)}, (
            SELECT group_concat(reason, '; ') FROM (
                SELECT reason FROM (SELECT reason, row_number() OVER (ORDER BY variable_key, version) AS place FROM (
                    SELECT {_reason("versions.metadata", "$")} AS reason, variable_key, version
                    FROM main.versions WHERE versions.sequence = plain.sequence
                    UNION ALL
                    SELECT {_reason("events.body", "$.metadata")}, 9e18, 0
                    FROM main.events WHERE events.sequence = plain.sequence AND events.kind = 'execution_began'
                ) WHERE reason IS NOT NULL) GROUP BY reason ORDER BY min(place)
            )
        ) AS reason
        FROM main.v_commits AS plain
    """)


def _reason(column: str, path: str) -> str:
    return f"CASE WHEN json_valid({column}) THEN {column} ->> '{path}.\"{REASON}\"' END"


def reveal_values(connection: sqlite3.Connection) -> None:
    """Make the views show the values of sensitive variables, on this connection only."""
    for view in _WITH_VALUES:
        connection.execute(_revealing(view, _columns_of(connection, view)))
    calls = ", ".join(_columns_of(connection, "v_lm_calls"))
    connection.execute(f"CREATE TEMP VIEW v_lm_calls AS SELECT {calls} FROM main.lm_calls_in_full")


def _columns_of(connection: sqlite3.Connection, view: str) -> list[str]:
    return [row[1] for row in connection.execute(f"PRAGMA main.table_info({view})")]


def _revealing(view: str, columns: Sequence[str]) -> str:
    """A temporary view with the same columns that masks nothing. SQLite resolves its name before the file's view."""
    shown = {
        "value": "coalesce(stored.value, CAST(contents.content AS TEXT)) AS value",
        "number": "stored.number AS number",
    }
    return f"""
        CREATE TEMP VIEW {view} AS
        SELECT {", ".join(shown.get(column, f"masking.{column}") for column in columns)}
        FROM main.{view} AS masking
        JOIN main.variables AS owner ON owner.variable_id = masking.variable_id
        JOIN main.versions AS stored ON stored.variable_key = owner.variable_key
            AND stored.version = masking.version AND stored.sequence = masking.sequence
        LEFT JOIN main.blobs AS contents ON contents.blob_key = stored.value_blob
    """


def _statement(text: str) -> str:
    return dedent(text).strip()


QUESTIONS: Final[Mapping[str, str]] = {
    "who_changed": _statement("""
        select session_id, name, version, value, kind, coalesce(tool, actor) as writer, reason, execution_id,
            created_at, sequence, sensitive
        from v_variable_history where session_id = :session and name = :variable order by sequence desc
    """),
    "went_wrong": _statement("""
        select session_id, execution_id, tool, status, attempt, error_type, error,
            case when ended_as = 'committed' then 'no: retried with success'
                when retried_by is not null then 'yes: retried, and then ' || ended_as
                when status = 'conflict' then 'yes: a conflict'
                else 'yes: ' || status
            end as lost,
            retried_by, duration_us / 1000.0 as took_ms, began_at, actor
        from v_executions
        where status not in ('committed', 'running') and (:session = '' or session_id = :session)
        order by began_sequence desc
    """),
    "read_and_wrote": _statement("""
        select 'read' as did, session_id, name, version,
            (select value from v_variable_history as seen
                where seen.variable_id = reads.variable_id and seen.version = reads.version) as value
        from v_execution_reads as reads where execution_id = :execution
        union all
        select case when published then 'published' else 'wrote' end, writes.session_id, writes.name,
            writes.version, made.value
        from v_execution_writes as writes
        join v_executions as executions on executions.execution_id = writes.execution_id
        left join v_variable_history as made on made.session_id = writes.session_id and made.name = writes.name
            and made.version = writes.version
            and made.sequence between executions.began_sequence and executions.ended_sequence
        where writes.execution_id = :execution
    """),
    "state_as_of": _statement("""
        select session_id, name, type, value, version, kind, coalesce(tool, actor) as writer, execution_id,
            created_at, sensitive
        from (
            select *, row_number() over (partition by variable_id order by version desc) as place
            from v_variable_history where session_id = :session and sequence < ifnull(
                (select min(sequence) from v_commits where session_id = :session and created_at > :time), 1e18
            )
        )
        where place = 1 and kind <> 'deleted' order by name
    """),
    "stood_on": _statement("""
        select reads.session_id, reads.name, reads.version, reads.execution_id, reads.tool, executions.status,
            executions.began_at
        from v_execution_reads as reads
        join v_executions as executions on executions.execution_id = reads.execution_id
        where reads.session_id = :session and reads.name = :variable order by executions.began_sequence desc
    """),
    "slowest_tools": _statement("""
        select tool, count(*) as executions, round(avg(duration_us) / 1000.0, 1) as mean_ms,
            round(max(duration_us) / 1000.0, 1) as longest_ms, round(sum(duration_us) / 1000.0, 1) as all_ms
        from v_executions where duration_us is not null group by tool order by mean_ms desc
    """),
    "lm_costs": _statement("""
        select day, session_id, tool, model, calls, failed, cached, input_tokens, output_tokens,
            round(cost, 6) as cost_usd, priced, round(latency_us / 1000.0 / calls, 1) as mean_ms
        from v_lm_usage where (:session = '' or session_id = :session) order by day desc, cost desc
    """),
    "failed_lm_calls": _statement("""
        select session_id, execution_id, tool, model, predictor, error_type, error, latency_us / 1000.0 as took_ms,
            began_at
        from v_lm_calls where error_type is not null and (:session = '' or session_id = :session)
        order by sequence desc
    """),
    "most_conflicts": _statement("""
        select session_id, tool, sum(status = 'conflict') as conflicts, count(*) as executions,
            round(100.0 * sum(status = 'conflict') / count(*), 1) as percent, max(attempt) as most_attempts
        from v_executions group by session_id, tool having conflicts > 0 order by conflicts desc
    """),
}
"""Statements on the views, by question; their parameters: `:session`, `:variable`, `:execution`, `:time`."""
