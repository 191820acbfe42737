"""The calls that a server refused because of who made them, and a view of them."""

from pathlib import Path

from alembic import op

revision = "0008"
down_revision = "0007"

_TABLES = (
    # Not a part of the log: nothing refers to it, and the hash chain does not cover it. A row counts the refusals of a
    # minute that differ in nothing but their time; times are microseconds since the epoch.
    """
    CREATE TABLE denials (
        denial_key INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        last_at INTEGER NOT NULL,
        identity TEXT NOT NULL,
        peer TEXT NOT NULL,
        rpc TEXT NOT NULL,
        session_id TEXT NOT NULL,
        missing TEXT NOT NULL,
        count INTEGER NOT NULL
    ) STRICT
    """,
)

_INDEXES = (
    "CREATE UNIQUE INDEX denials_by_minute ON denials (at / 60000000, identity, peer, rpc, session_id, missing)",
)

_REFUSE = "BEGIN SELECT RAISE(ABORT, 'denials is append-only: it only counts on, and loses its oldest rows'); END"
_FIXED = ("denial_key", "at", "identity", "peer", "rpc", "session_id", "missing")
_CHANGED = " OR ".join(f"NEW.{name} IS NOT OLD.{name}" for name in _FIXED)
_TRIGGERS = (
    f"""
    CREATE TRIGGER denials_no_update BEFORE UPDATE ON denials
    WHEN NEW.count <= OLD.count OR NEW.last_at < OLD.last_at OR {_CHANGED}
    {_REFUSE}
    """,
    f"""
    CREATE TRIGGER denials_no_delete BEFORE DELETE ON denials
    WHEN EXISTS (SELECT 1 FROM denials WHERE denial_key < OLD.denial_key)
        OR NOT EXISTS (SELECT 1 FROM denials WHERE denial_key > OLD.denial_key)
    {_REFUSE}
    """,
)


def _time(column: str) -> str:
    seconds = f"strftime('%Y-%m-%dT%H:%M:%S', {column} / 1000000, 'unixepoch')"
    return f"printf('%s.%06dZ', {seconds}, {column} % 1000000) AS {column}"


# Its columns are promised (docs/schema.md): later revisions may add some at the end, and change none.
_VIEWS = (
    f"""
    CREATE VIEW v_denials AS
    SELECT {_time("at")}, {_time("last_at")}, identity, peer, rpc, session_id, missing, count FROM denials
    """,
)


def upgrade() -> None:
    """Create them."""
    if op.get_bind().dialect.name == "postgresql":
        driver = op.get_bind().connection.driver_connection
        assert driver is not None, "it is connected"
        driver.execute((Path(__file__).parents[1] / "postgresql" / "denials.sql").read_text(encoding="utf-8"))
        return
    connection = op.get_bind()
    for statement in (*_TABLES, *_INDEXES, *_TRIGGERS, *_VIEWS):
        # The driver would take a colon in the statement for a parameter of SQLAlchemy's.
        connection.exec_driver_sql(statement)
