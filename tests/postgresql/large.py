"""A database with a long history, made by statements: writing it through a server would take minutes."""

from typing import Any

from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from tests.postgresql.hand_made import changing

# Commit i is of session i % s + 1, so that the commits of each of the s sessions are spread over the whole log. Of ten
# commits of a session, one begins an execution and the next one ends it; the others set one variable of ten.
_STATEMENTS = """
    INSERT INTO commits SELECT i, i % {s} + 1, 'ada',
        CASE (i / {s}) % 10 WHEN 0 THEN 'BeginExecution' WHEN 1 THEN 'exec_' || i - {s} || '_x' ELSE 'SetVariable' END,
        1700000000000000 + i * 1000, sha256(i::text::bytea)
    FROM generate_series(1, {n}) AS i;

    INSERT INTO sessions SELECT k, 's' || k, 1700000000000000, k, NULL, NULL, NULL, '{{"kind":"' || k % 3 || '"}}'
    FROM generate_series(1, {s}) AS k;

    INSERT INTO variables
    SELECT (k - 1) * 10 + j + 1, k, 'var_' || k || '_' || j, 'v' || j, 'integer', '', '{{}}', NULL, NULL
    FROM generate_series(1, {s}) AS k, generate_series(0, 9) AS j;

    INSERT INTO versions
    SELECT i % {s} * 10 + i / {s} % 10 + 1, i / {s} / 10, i, CASE WHEN i / {s} / 10 = 0 THEN 0 ELSE 1 END, 1, i::text,
        NULL, NULL, NULL, CASE i % 97 WHEN 0 THEN '{{"unit":"m"}}' END
    FROM generate_series(1, {n}) AS i;

    INSERT INTO metadata_entries
    SELECT 'unit', 'm', sequence, variable_key, version FROM versions WHERE metadata IS NOT NULL;

    INSERT INTO executions
    SELECT i, i % {s} + 1, 'exec_' || i || '_x', 'tool' || i % 7, 'committed', NULL, 1,
        CASE i % 11 WHEN 0 THEN 'key' || i END, '', i + {s}
    FROM generate_series(1, {n} - {s}) AS i WHERE (i / {s}) % 10 = 0;

    INSERT INTO events
    SELECT began_sequence, 0, 'execution_began', '{{"attempt":1,"execution_id":"' || execution_id
        || '","idempotency_key":null,"fingerprint":"","isolation":"serializable","metadata":{{}},"parameters":{{}},'
        || '"parent_id":null,"retry_of":null,"seed":"","tool":"' || tool || '","worker_id":""}}'
    FROM executions;

    INSERT INTO events
    SELECT ended_sequence, 0, 'execution_ended', '{{"conflicts":[],"duration_us":5,"execution_id":"' || execution_id
        || '","failure":null,"log":[],"patterns":[],"published":[],"reads":{{}},'
        || '"recorded":{{"lm":[{{"model":"m/1"}}]}},"result":null,"status":"committed","writes":[]}}'
    FROM executions;

    INSERT INTO lm_calls
    SELECT ended_sequence, 0, 0, began_sequence, 0, 'm/' || began_sequence % 5,
        1700000000000000 + began_sequence * 1000, 5, 1, 1, 2, 0.5, 0, 0
    FROM executions;

    UPDATE head SET sequence = {n}, hash = sha256('{n}'), last_at = 1700000000000000 + {n} * 1000,
        next_session_key = {s} + 1, next_variable_key = {s} * 10 + 1;
"""
COMMITS_OF_A_SESSION = 500


def fill(url: str, commits: int) -> None:
    """Make a new database with so many commits."""
    PostgresLog(url).close()
    statements = _STATEMENTS.format(n=commits, s=commits // COMMITS_OF_A_SESSION)
    with changing(url) as connection:
        for statement in statements.split(";\n"):
            connection.execute(statement)
        connection.execute("VACUUM ANALYZE")


def blocks_in(plan: dict[str, Any]) -> int:
    """How many blocks a statement has read, by the plan of EXPLAIN (ANALYZE, BUFFERS)."""
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def tables_read(plan: dict[str, Any]) -> set[str]:
    """The tables that were read from their beginning to their end."""
    below = (tables_read(each) for each in plan.get("Plans", ()))
    own = {plan["Relation Name"]} if plan["Node Type"] == "Seq Scan" else set()
    return own.union(*below)
