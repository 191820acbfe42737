"""The reasons for changes in the views."""

from alembic import op

revision = "0006"
down_revision = "0005"

# Their columns are promised (docs/schema.md): later revisions may add some at the end, and change none.
_NAMES = ("v_variable_history", "v_current_variables")
_REASON = """
    , CASE WHEN json_valid(versions.metadata) THEN json_extract(versions.metadata, '$."dspex.reason"') END AS reason
"""
_LAST_COLUMN = "callers.tool AS caller_tool"


def upgrade() -> None:
    """Add a column to the views as they are: SQLite keeps their statements."""
    if op.get_bind().dialect.name == "postgresql":
        # 0007 makes all of it.
        return
    connection = op.get_bind()
    for name in _NAMES:
        statement = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).scalar_one()
        columns, last, tables = statement.partition(_LAST_COLUMN)
        op.execute(f"DROP VIEW {name}")
        # The driver would take a colon in the statement for a parameter of SQLAlchemy's.
        connection.exec_driver_sql(f"{columns}{last}{_REASON}{tables}")
