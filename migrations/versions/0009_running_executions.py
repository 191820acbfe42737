"""No error of executions that run.

SQLite before 3.45 says of NULL that it is no JSON, and later ones that it is NULL. An execution that runs has no end
yet, so the view said that its entry in the journal is no JSON.
"""

from alembic import op

revision = "0009"
down_revision = "0008"

_NAME = "v_executions"
_BEFORE = "CASE WHEN NOT json_valid(ending.body) THEN"
_AFTER = "CASE WHEN ending.body IS NOT NULL AND NOT json_valid(ending.body) THEN"


def upgrade() -> None:
    """Change the view as it is: SQLite keeps its statement."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        # There, it is NULL.
        return
    statement = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = ?", (_NAME,)).scalar_one()
    assert statement.count(_BEFORE) == 1, "it is the view of 0004"
    op.execute(f"DROP VIEW {_NAME}")
    # The driver would take a colon in the statement for a parameter of SQLAlchemy's.
    connection.exec_driver_sql(statement.replace(_BEFORE, _AFTER))
