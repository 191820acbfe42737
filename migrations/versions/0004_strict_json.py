"""Views and triggers that no row can break; who made a version, and who called that; why executions ended, and as what.

Releases before this one wrote JSON that SQLite does not read (a bare NaN in a log line), and metadata whose keys are
the same for SQLite (it ends a text at its first NUL). Rows are never rewritten, so what reads them has to bear it.
"""

from alembic import op

revision = "0004"
down_revision = "0003"


def _sound(column: str) -> str:
    """A document that SQLite can read: an empty one where the column's is no JSON."""
    return f"iif(json_valid({column}), {column}, '{{}}')"


def _readable(document: str, path: str) -> str:
    """A text in a document; as JSON where it is no text for programs: a lone surrogate is no character."""
    text = f"json_extract({document}, '{path}')"
    return f"CASE WHEN hex({text}) GLOB '*ED[AB]*' THEN {document} -> '{path}' ELSE {text} END"


_BEGINNING = _sound("beginning.body")
_ENDING = _sound("ending.body")

# One trigger for each way of changing `versions`. What is no JSON has no entries, and equal ones are one.
_TRIGGERS = (
    "DROP TRIGGER versions_metadata_in",
    """
    CREATE TRIGGER versions_metadata_in AFTER INSERT ON versions WHEN json_valid(NEW.metadata)
    BEGIN
        INSERT OR IGNORE INTO metadata_entries
        SELECT entry.key, entry.value, NEW.sequence, NEW.variable_key, NEW.version
        FROM json_each(NEW.metadata) AS entry;
    END
    """,
    "DROP TRIGGER versions_metadata_out",
    """
    CREATE TRIGGER versions_metadata_out AFTER DELETE ON versions WHEN json_valid(OLD.metadata)
    BEGIN
        DELETE FROM metadata_entries
        WHERE (key, value) IN (SELECT entry.key, entry.value FROM json_each(OLD.metadata) AS entry)
            AND sequence = OLD.sequence AND variable_key = OLD.variable_key AND version = OLD.version;
    END
    """,
)


def _time(column: str) -> str:
    seconds = f"strftime('%Y-%m-%dT%H:%M:%S', {column} / 1000000, 'unixepoch')"
    return f"printf('%s.%06dZ', {seconds}, {column} % 1000000)"


_KINDS = (
    "CASE versions.kind WHEN 0 THEN 'registered' WHEN 1 THEN 'set' WHEN 2 THEN 'rolled_back' WHEN 3 THEN 'deleted' "
    "WHEN 4 THEN 'lock_broken' WHEN 5 THEN 'published' END"
)
# Unreadable metadata might say that the variable is sensitive, so its values are masked.
_SENSITIVE = (
    "(CASE WHEN json_valid(variables.metadata) THEN lower(json_extract(variables.metadata, '$.sensitive')) IS 'true' "
    "ELSE 1 END)"
)
# A transaction's commit has what its executions made: each of them says at its end what it wrote. That is asked only
# where there are several; one that was published has a commit of its own, of the execution that wrote it.
_MAKER = f"""
    CASE WHEN commits.cause GLOB 'exec_[0-9]*' THEN coalesce(
        CASE WHEN EXISTS (SELECT 1 FROM executions AS called WHERE called.parent_id = commits.cause) THEN (
            SELECT CAST(substr(json_extract({_ENDING}, '$.execution_id'), 6) AS INTEGER)
            FROM events AS ending CROSS JOIN json_each({_ENDING}, '$.writes') AS written
            WHERE ending.sequence = versions.sequence AND ending.kind = 'execution_ended'
                AND json_extract(written.value, '$[0]') = variables.name
                AND json_extract(written.value, '$[1]') = versions.version
            LIMIT 1
        ) END,
        CAST(substr(commits.cause, 6) AS INTEGER)
    ) END
"""
_CALLER = "CAST(substr(executions.parent_id, 6) AS INTEGER)"

_VERSION_COLUMNS = f"""
    sessions.session_id, variables.name, variables.variable_id, variables.type, versions.version,
    {_KINDS} AS kind,
    CASE versions.source WHEN 0 THEN 'elixir' ELSE 'python' END AS source,
    CASE WHEN NOT {_SENSITIVE} THEN coalesce(versions.value, CAST(of_value.content AS TEXT)) END AS value,
    CASE WHEN NOT {_SENSITIVE} THEN versions.number END AS number,
    length(coalesce(versions.binary, of_binary.content)) AS binary_size_bytes,
    {_SENSITIVE} AS sensitive
"""
_COMMIT_COLUMNS = f"""
    versions.sequence, {_time("commits.created_at")} AS created_at, commits.actor, commits.cause,
    executions.execution_id, executions.tool, callers.execution_id AS caller_id, callers.tool AS caller_tool
"""
_VERSION_TABLES = f"""
    JOIN variables ON variables.variable_key = versions.variable_key
    JOIN sessions ON sessions.session_key = variables.session_key
    JOIN commits ON commits.sequence = versions.sequence
    LEFT JOIN executions ON executions.began_sequence = {_MAKER}
        AND (executions.execution_id = commits.cause OR executions.parent_id IS NOT NULL)
    LEFT JOIN executions AS callers ON callers.began_sequence = {_CALLER}
        AND callers.execution_id = executions.parent_id
    LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
    LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
"""

# As the audit says it.
_CONFLICTS = f"""
    (SELECT group_concat(
        json_extract(met.value, '$.name') || CASE
            WHEN json_extract(met.value, '$.reason') <> '' THEN ': ' || json_extract(met.value, '$.reason')
            ELSE ' (was ' || coalesce('at version ' || json_extract(met.value, '$.expected'), 'not there')
                || ', is ' || coalesce('at version ' || json_extract(met.value, '$.actual'), 'not there') || ')'
        END, ', ')
    FROM json_each({_ENDING}, '$.conflicts') AS met)
"""
_IS_ITS_END = """
    CASE WHEN json_valid(ending.body) THEN json_extract(ending.body, '$.execution_id') = executions.execution_id
    ELSE instr(ending.body, executions.execution_id) > 0 END
"""
_WHY = """
    CASE WHEN NOT json_valid(ending.body) THEN 'its entry in the journal is no JSON; dspex-persist audit show reads it'
    WHEN ending.sequence IS NOT NULL THEN CASE executions.status
        WHEN 'interrupted' THEN 'the server ended while it ran'
        WHEN 'cancelled' THEN 'its client gave it up'
    END END
"""


def _is_next(first: str) -> str:
    """Behind `executions AS later`: it is the attempt that followed `first`."""
    return f"""
        CROSS JOIN events AS beginning
            ON beginning.sequence = later.began_sequence AND beginning.kind = 'execution_began'
        WHERE later.session_key = {first}.session_key AND later.began_sequence > {first}.began_sequence
            AND later.tool = {first}.tool AND later.attempt = {first}.attempt + 1
            AND json_extract({_BEGINNING}, '$.retry_of') = {first}.execution_id
    """


_RETRIED_BY = f"""
    CASE WHEN executions.status = 'conflict' THEN (
        SELECT later.execution_id FROM executions AS later {_is_next("executions")}
    ) END
"""
_ENDED_AS = f"""
    CASE WHEN executions.status <> 'conflict' THEN executions.status ELSE (
        WITH RECURSIVE attempts(session_key, began_sequence, tool, attempt, execution_id, status) AS (
            SELECT executions.session_key, executions.began_sequence, executions.tool, executions.attempt,
                executions.execution_id, executions.status
            UNION ALL
            SELECT later.session_key, later.began_sequence, later.tool, later.attempt, later.execution_id, later.status
            FROM attempts CROSS JOIN executions AS later {_is_next("attempts")}
        )
        SELECT status FROM attempts ORDER BY attempt DESC LIMIT 1
    ) END
"""

_NAMES = (
    "v_variable_history",
    "v_current_variables",
    "v_executions",
    "v_execution_reads",
    "v_execution_writes",
)

# Their columns are promised (docs/schema.md): later revisions may add some at the end, and change none.
_VIEWS = (
    f"""
    CREATE VIEW v_variable_history AS
    SELECT {_VERSION_COLUMNS}, versions.metadata, {_COMMIT_COLUMNS}
    FROM versions {_VERSION_TABLES}
    """,
    f"""
    CREATE VIEW v_current_variables AS
    SELECT {_VERSION_COLUMNS}, variables.constraints, variables.metadata, {_COMMIT_COLUMNS}
    FROM variables AS live
    JOIN versions ON versions.variable_key = live.variable_key AND versions.version = (
        SELECT max(newest.version) FROM versions AS newest WHERE newest.variable_key = live.variable_key
    )
    {_VERSION_TABLES}
    WHERE live.deleted_sequence IS NULL AND sessions.ended_sequence IS NULL
    """,
    f"""
    CREATE VIEW v_executions AS
    SELECT sessions.session_id, executions.execution_id, executions.tool, executions.status, executions.attempt,
        executions.parent_id, executions.idempotency_key,
        json_extract({_BEGINNING}, '$.isolation') AS isolation,
        json_extract({_BEGINNING}, '$.worker_id') AS worker_id,
        began.actor, executions.began_sequence, {_time("began.created_at")} AS began_at,
        executions.ended_sequence,
        CASE WHEN ended.sequence IS NOT NULL THEN {_time("ended.created_at")} END AS ended_at,
        json_extract({_ENDING}, '$.duration_us') AS duration_us,
        json_extract({_BEGINNING}, '$.parameters') AS parameters,
        json_extract({_BEGINNING}, '$.metadata') AS metadata,
        {_readable(_ENDING, "$.result.json")} AS result,
        {_readable(_ENDING, "$.failure.type")} AS error_type,
        coalesce({_readable(_ENDING, "$.failure.message")}, {_readable(_ENDING, "$.reason")}, {_CONFLICTS}, {_WHY})
            AS error,
        {_RETRIED_BY} AS retried_by,
        {_ENDED_AS} AS ended_as
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN commits AS began ON began.sequence = executions.began_sequence
    LEFT JOIN commits AS ended ON ended.sequence = executions.ended_sequence
    LEFT JOIN events AS beginning ON beginning.sequence = executions.began_sequence
        AND beginning.kind = 'execution_began'
    LEFT JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND {_IS_ITS_END}
    """,
    f"""
    CREATE VIEW v_execution_reads AS
    SELECT sessions.session_id, executions.execution_id, executions.tool,
        CASE WHEN hex(seen.key) GLOB '*ED[AB]*' THEN seen.fullkey || '' ELSE seen.key END AS asked,
        json_extract(seen.value, '$[0]') AS name, json_extract(seen.value, '$[1]') AS variable_id,
        json_extract(seen.value, '$[2]') AS version
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND {_IS_ITS_END}
    JOIN json_each({_ENDING}, '$.reads') AS seen
    """,
    f"""
    CREATE VIEW v_execution_writes AS
    SELECT sessions.session_id, executions.execution_id, executions.tool,
        json_extract(written.value, '$[0]') AS name, json_extract(written.value, '$[1]') AS version,
        place.value = 'published' AS published
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND {_IS_ITS_END}
    JOIN json_each('["writes", "published"]') AS place
    JOIN json_each({_ENDING}, '$.' || place.value) AS written
    """,
)


def upgrade() -> None:
    """Recreate the triggers and the views."""
    if op.get_bind().dialect.name == "postgresql":
        # 0007 makes all of it.
        return
    for statement in (*_TRIGGERS, *(f"DROP VIEW {name}" for name in _NAMES), *_VIEWS):
        # Without the indentation, which would be half of what the file keeps of them.
        op.execute(" ".join(statement.split()))
