"""Tool executions: their journal, and the tools that sessions' workers have registered."""

from alembic import op

revision = "0002"
down_revision = "0001"

# An execution's key is the commit that began it, which its id names as well: exec_<sequence>_<token>.
_TABLES = (
    """
    CREATE TABLE executions (
        began_sequence INTEGER PRIMARY KEY REFERENCES commits,
        session_key INTEGER NOT NULL REFERENCES sessions,
        execution_id TEXT NOT NULL,
        tool TEXT NOT NULL,
        status TEXT NOT NULL,
        parent_id TEXT,
        attempt INTEGER NOT NULL,
        idempotency_key TEXT,
        fingerprint TEXT NOT NULL,
        ended_sequence INTEGER
    ) STRICT
    """,
    """
    CREATE TABLE tools (
        session_key INTEGER NOT NULL REFERENCES sessions,
        name TEXT NOT NULL,
        worker_id TEXT NOT NULL,
        address TEXT NOT NULL,
        spec TEXT NOT NULL,
        registered_sequence INTEGER NOT NULL,
        PRIMARY KEY (session_key, name)
    ) STRICT, WITHOUT ROWID
    """,
)

_INDEXES = (
    "CREATE INDEX executions_running ON executions (session_key) WHERE ended_sequence IS NULL",
    "CREATE INDEX executions_by_session ON executions (session_key, began_sequence)",
    "CREATE INDEX executions_by_key ON executions (session_key, idempotency_key, began_sequence) "
    "WHERE idempotency_key IS NOT NULL",
)


def upgrade() -> None:
    """Create them."""
    if op.get_bind().dialect.name == "postgresql":
        # 0007 makes all of it.
        return
    for statement in (*_TABLES, *_INDEXES):
        op.execute(statement)
