"""Sessions, variables and their history; the chained, append-only log of commits."""

from alembic import op

revision = "0001"
down_revision = None

# Times are microseconds since the epoch, UTC. Keys are integers of this file; ids are what clients know.
_TABLES = (
    """
    CREATE TABLE sessions (
        session_key INTEGER PRIMARY KEY,
        session_id TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        started_sequence INTEGER NOT NULL,
        ended_sequence INTEGER,
        ttl_s REAL,
        expires_at INTEGER,
        metadata TEXT NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE variables (
        variable_key INTEGER PRIMARY KEY,
        session_key INTEGER NOT NULL REFERENCES sessions,
        variable_id TEXT NOT NULL,
        name TEXT NOT NULL,
        type TEXT NOT NULL,
        constraints TEXT NOT NULL,
        metadata TEXT NOT NULL,
        optimization TEXT,
        deleted_sequence INTEGER
    ) STRICT
    """,
    """
    CREATE TABLE commits (
        sequence INTEGER PRIMARY KEY,
        session_key INTEGER NOT NULL REFERENCES sessions,
        actor TEXT NOT NULL,
        cause TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        hash BLOB NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE blobs (
        blob_key INTEGER PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,
        content BLOB NOT NULL
    ) STRICT
    """,
    # The numeric column costs no space: it is computed when it is read, for charts and range queries.
    """
    CREATE TABLE versions (
        variable_key INTEGER NOT NULL REFERENCES variables,
        version INTEGER NOT NULL,
        sequence INTEGER NOT NULL REFERENCES commits,
        kind INTEGER NOT NULL,
        source INTEGER NOT NULL,
        value TEXT,
        value_blob INTEGER REFERENCES blobs,
        binary BLOB,
        binary_blob INTEGER REFERENCES blobs,
        metadata TEXT,
        number REAL GENERATED ALWAYS AS (
            CASE WHEN value GLOB '[0-9]*' OR value GLOB '-[0-9]*' THEN CAST(value AS REAL) END
        ) VIRTUAL,
        PRIMARY KEY (variable_key, version)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE events (
        sequence INTEGER NOT NULL REFERENCES commits,
        ordinal INTEGER NOT NULL,
        kind TEXT NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (sequence, ordinal)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE dependencies (
        dependency_key INTEGER PRIMARY KEY,
        session_key INTEGER NOT NULL REFERENCES sessions,
        from_id TEXT NOT NULL,
        to_id TEXT NOT NULL,
        type TEXT NOT NULL,
        since_sequence INTEGER NOT NULL,
        until_sequence INTEGER
    ) STRICT
    """,
    """
    CREATE TABLE outcomes (
        session_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        cause TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        result TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (session_id, idempotency_key)
    ) STRICT, WITHOUT ROWID
    """,
)

_INDEXES = (
    "CREATE UNIQUE INDEX sessions_live ON sessions (session_id) WHERE ended_sequence IS NULL",
    "CREATE INDEX sessions_by_id ON sessions (session_id)",
    "CREATE INDEX sessions_by_expiry ON sessions (expires_at) WHERE ended_sequence IS NULL AND expires_at IS NOT NULL",
    "CREATE UNIQUE INDEX variables_live ON variables (session_key, name) WHERE deleted_sequence IS NULL",
    "CREATE INDEX variables_by_session ON variables (session_key)",
    "CREATE INDEX commits_by_session ON commits (session_key, sequence)",
    "CREATE INDEX versions_by_sequence ON versions (sequence)",
    "CREATE INDEX dependencies_by_session ON dependencies (session_key)",
    "CREATE INDEX events_of_locks ON events (json_extract(body, '$.variable_id'), sequence) "
    "WHERE kind IN ('optimization_started', 'optimization_stopped')",
    "CREATE INDEX outcomes_by_age ON outcomes (created_at)",
)

_APPEND_ONLY = ("commits", "versions", "events", "blobs")


def upgrade() -> None:
    """Create everything."""
    if op.get_bind().dialect.name == "postgresql":
        # 0007 makes all of it.
        return
    for statement in (*_TABLES, *_INDEXES):
        op.execute(statement)
    for table in _APPEND_ONLY:
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: history is never rewritten'); END"
            )
