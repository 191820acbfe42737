"""Rules of sessions, and the constraints that variables had before they got others."""

from alembic import op

revision = "0005"
down_revision = "0004"

_TABLES = (
    """
    CREATE TABLE rules (
        session_key INTEGER NOT NULL REFERENCES sessions,
        name TEXT NOT NULL,
        expression TEXT NOT NULL,
        description TEXT NOT NULL,
        added_sequence INTEGER NOT NULL,
        PRIMARY KEY (session_key, name)
    ) STRICT, WITHOUT ROWID
    """,
    # Only of variables whose constraints changed: those since each change, and since 0 the first ones.
    """
    CREATE TABLE variable_constraints (
        variable_key INTEGER NOT NULL REFERENCES variables,
        since_sequence INTEGER NOT NULL,
        constraints TEXT NOT NULL,
        PRIMARY KEY (variable_key, since_sequence)
    ) STRICT, WITHOUT ROWID
    """,
)

# Its columns are promised (docs/schema.md): later revisions may add some at the end, and change none.
_VIEWS = (
    """
    CREATE VIEW v_rules AS
    SELECT sessions.session_id, rules.name, rules.expression, rules.description, rules.added_sequence
    FROM rules JOIN sessions ON sessions.session_key = rules.session_key
    WHERE sessions.ended_sequence IS NULL
    """,
)


def upgrade() -> None:
    """Create them."""
    if op.get_bind().dialect.name == "postgresql":
        # 0007 makes all of it.
        return
    for statement in (*_TABLES, *_VIEWS):
        op.execute(statement)
