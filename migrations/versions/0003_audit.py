"""What audits ask for: views with stable columns, indexes; what pruning needs: which commits lost rows, and to whom."""

from alembic import op

revision = "0003"
down_revision = "0002"

_TABLES = (
    # `residue`: the SHA-256 over the hashes of the commit and its predecessor and what is left of the commit's rows;
    # the beginning of it where nothing is left. The last marker's is the one that holds.
    """
    CREATE TABLE pruned (
        sequence INTEGER NOT NULL REFERENCES commits,
        marker_sequence INTEGER NOT NULL REFERENCES commits,
        residue BLOB NOT NULL,
        PRIMARY KEY (sequence, marker_sequence)
    ) STRICT, WITHOUT ROWID
    """,
    # Sessions that were imported: their commits have the times that were recorded, out of the order of the others'.
    """
    CREATE TABLE imports (
        first_sequence INTEGER PRIMARY KEY REFERENCES commits,
        last_sequence INTEGER NOT NULL REFERENCES commits
    ) STRICT
    """,
    # Kept by triggers; the metadata of the versions, to be searched by key and text.
    """
    CREATE TABLE metadata_entries (
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        variable_key INTEGER NOT NULL,
        version INTEGER NOT NULL,
        PRIMARY KEY (key, value, sequence, variable_key, version)
    ) STRICT, WITHOUT ROWID
    """,
)

_INDEXES = (
    "CREATE INDEX variables_by_id ON variables (variable_id)",
    "CREATE INDEX executions_by_tool ON executions (tool, began_sequence)",
    "CREATE INDEX executions_by_parent ON executions (parent_id) WHERE parent_id IS NOT NULL",
    "CREATE INDEX versions_by_value_blob ON versions (value_blob) WHERE value_blob IS NOT NULL",
    "CREATE INDEX versions_by_binary_blob ON versions (binary_blob) WHERE binary_blob IS NOT NULL",
)

_NEVER = "history is never rewritten"
_TRIGGERS = (
    # What a marker in the log accounts for may go, and contents that no version has any more.
    *(
        statement
        for table in ("versions", "events")
        for statement in (
            f"DROP TRIGGER {table}_no_delete",
            f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} "
            f"WHEN NOT EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = OLD.sequence) "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: {_NEVER}'); END",
        )
    ),
    "DROP TRIGGER blobs_no_delete",
    "CREATE TRIGGER blobs_no_delete BEFORE DELETE ON blobs "
    "WHEN EXISTS (SELECT 1 FROM versions WHERE value_blob = OLD.blob_key) "
    "OR EXISTS (SELECT 1 FROM versions WHERE binary_blob = OLD.blob_key) "
    f"BEGIN SELECT RAISE(ABORT, 'blobs is append-only: {_NEVER}'); END",
    *(
        f"CREATE TRIGGER pruned_no_{action.lower()} BEFORE {action} ON pruned "
        f"BEGIN SELECT RAISE(ABORT, 'pruned is append-only: {_NEVER}'); END"
        for action in ("UPDATE", "DELETE")
    ),
    """
    CREATE TRIGGER versions_metadata_in AFTER INSERT ON versions WHEN NEW.metadata IS NOT NULL
    BEGIN
        INSERT INTO metadata_entries
        SELECT entry.key, entry.value, NEW.sequence, NEW.variable_key, NEW.version
        FROM json_each(NEW.metadata) AS entry;
    END
    """,
    """
    CREATE TRIGGER versions_metadata_out AFTER DELETE ON versions WHEN OLD.metadata IS NOT NULL
    BEGIN
        DELETE FROM metadata_entries
        WHERE (key, value) IN (SELECT entry.key, entry.value FROM json_each(OLD.metadata) AS entry)
            AND sequence = OLD.sequence AND variable_key = OLD.variable_key AND version = OLD.version;
    END
    """,
)

# Keys that differ only behind a NUL are one for SQLite, and a damaged file may have what is no JSON.
_FILL = """
    INSERT OR IGNORE INTO metadata_entries
    SELECT entry.key, entry.value, versions.sequence, versions.variable_key, versions.version
    FROM versions, json_each(iif(json_valid(versions.metadata), versions.metadata, '{}')) AS entry
"""


def _time(column: str) -> str:
    seconds = f"strftime('%Y-%m-%dT%H:%M:%S', {column} / 1000000, 'unixepoch')"
    return f"printf('%s.%06dZ', {seconds}, {column} % 1000000)"


_KINDS = (
    "CASE versions.kind WHEN 0 THEN 'registered' WHEN 1 THEN 'set' WHEN 2 THEN 'rolled_back' WHEN 3 THEN 'deleted' "
    "WHEN 4 THEN 'lock_broken' WHEN 5 THEN 'published' END"
)
_SENSITIVE = "(lower(json_extract(variables.metadata, '$.sensitive')) IS 'true')"
_BEGAN = "CASE WHEN commits.cause GLOB 'exec_[0-9]*' THEN CAST(substr(commits.cause, 6) AS INTEGER) END"

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
    executions.execution_id, executions.tool
"""
_VERSION_TABLES = f"""
    JOIN variables ON variables.variable_key = versions.variable_key
    JOIN sessions ON sessions.session_key = variables.session_key
    JOIN commits ON commits.sequence = versions.sequence
    LEFT JOIN executions ON executions.began_sequence = {_BEGAN} AND executions.execution_id = commits.cause
    LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
    LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
"""

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
        json_extract(beginning.body, '$.isolation') AS isolation,
        json_extract(beginning.body, '$.worker_id') AS worker_id,
        began.actor, executions.began_sequence, {_time("began.created_at")} AS began_at,
        executions.ended_sequence,
        CASE WHEN ended.sequence IS NOT NULL THEN {_time("ended.created_at")} END AS ended_at,
        json_extract(ending.body, '$.duration_us') AS duration_us,
        json_extract(beginning.body, '$.parameters') AS parameters,
        json_extract(beginning.body, '$.metadata') AS metadata,
        json_extract(ending.body, '$.result.json') AS result,
        json_extract(ending.body, '$.failure.type') AS error_type,
        coalesce(json_extract(ending.body, '$.failure.message'), json_extract(ending.body, '$.reason')) AS error
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN commits AS began ON began.sequence = executions.began_sequence
    LEFT JOIN commits AS ended ON ended.sequence = executions.ended_sequence
    LEFT JOIN events AS beginning ON beginning.sequence = executions.began_sequence
        AND beginning.kind = 'execution_began'
    LEFT JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND json_extract(ending.body, '$.execution_id') = executions.execution_id
    """,
    """
    CREATE VIEW v_execution_reads AS
    SELECT sessions.session_id, executions.execution_id, executions.tool, seen.key AS asked,
        json_extract(seen.value, '$[0]') AS name, json_extract(seen.value, '$[1]') AS variable_id,
        json_extract(seen.value, '$[2]') AS version
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND json_extract(ending.body, '$.execution_id') = executions.execution_id
    JOIN json_each(ending.body, '$.reads') AS seen
    """,
    """
    CREATE VIEW v_execution_writes AS
    SELECT sessions.session_id, executions.execution_id, executions.tool,
        json_extract(written.value, '$[0]') AS name, json_extract(written.value, '$[1]') AS version,
        place.value = 'published' AS published
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND json_extract(ending.body, '$.execution_id') = executions.execution_id
    JOIN json_each('["writes", "published"]') AS place
    JOIN json_each(ending.body, '$.' || place.value) AS written
    """,
    f"""
    CREATE VIEW v_commits AS
    SELECT commits.sequence, sessions.session_id, commits.actor, commits.cause,
        {_time("commits.created_at")} AS created_at, lower(hex(commits.hash)) AS hash,
        (SELECT count(*) FROM versions WHERE versions.sequence = commits.sequence) AS versions,
        (SELECT json_group_array(events.kind) FROM events WHERE events.sequence = commits.sequence) AS events,
        EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = commits.sequence) AS pruned
    FROM commits JOIN sessions ON sessions.session_key = commits.session_key
    """,
)


def upgrade() -> None:
    """Create them, and index the metadata that is there."""
    if op.get_bind().dialect.name == "postgresql":
        # 0007 makes all of it.
        return
    for statement in (*_TABLES, _FILL, *_INDEXES, *_TRIGGERS, *_VIEWS):
        op.execute(statement)
