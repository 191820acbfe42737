"""The schema of a PostgreSQL database: created or upgraded by one server, while others that start wait for it."""

from pathlib import Path
from typing import Final

import psycopg
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import Connection, text

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import NewerSchemaError, NotADatabaseError, UpgradeError
from dspex_persist.state.errors.hints import Hint
from dspex_persist.state.store import migrate
from dspex_persist.state.store.postgres.connections import Database, lacks_right
from dspex_persist.state.store.schema import REVISION

LOCKS: Final = 0x64737065
"""The class of our advisory locks ("dspe"). The lock of a log is the oid of its table `head`; 0 is that of upgrades."""
_TABLES: Final = text("SELECT tablename FROM pg_tables WHERE schemaname = :schema ORDER BY tablename")
_HAS_SCHEMA: Final = text("SELECT 1 FROM pg_namespace WHERE nspname = :schema")
_REVISION: Final = text("SELECT version_num FROM alembic_version")
_MOST_NAMED: Final = 5
_logger: Final = get_logger(__name__)


def upgrade(database: Database) -> None:
    """Bring a database to the revision of this release, in one transaction.

    Raises:
        NewerSchemaError: A newer release wrote it.
        NotADatabaseError: The schema has tables of another program.
        UpgradeError: A migration failed; nothing has changed.
        psycopg.Error: The database cannot be reached.
        DBAPIError: The same.
    """
    writers = database.engine()
    try:
        with writers.connect().execution_options(isolation_level="READ COMMITTED") as connection:
            with connection.begin():
                if _revision(connection, database) == REVISION:
                    return
            with connection.begin():
                _lock(connection, database)
                # Another server may have upgraded it meanwhile.
                revision = _revision(connection, database)
                if revision != REVISION:
                    _migrate(connection, database, revision)
    finally:
        writers.dispose()


def check(connection: Connection, database: Database) -> None:
    """Raise `OpenError` unless a database has the revision of this release."""
    revision = _revision(connection, database)
    if revision is None:
        reason = f"there are no sessions in its schema {database.schema}"
        raise NotADatabaseError(database.name, reason).advising(Hint.BEGIN_DATABASE)
    if revision != REVISION:
        reason = f"an older release made it (schema {revision}): a server of this release upgrades it when it starts"
        raise NotADatabaseError(database.name, reason)


def _lock(connection: Connection, database: Database) -> None:
    if not connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({LOCKS}, 0)").scalar():
        _logger.info("waiting for another server to upgrade", db=database.name)
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCKS}, 0)")


def _revision(connection: Connection, database: Database) -> str | None:
    """Return the revision of the schema; None if there is nothing in it."""
    tables = list(connection.execute(_TABLES, {"schema": database.schema}).scalars())
    if migrate.are_ours(tables):
        revision: str | None = connection.execute(_REVISION).scalar()
        if revision is None:
            reason = "its table alembic_version is empty; see whether a copy was put back completely"
            raise NotADatabaseError(database.name, reason)
        if revision != REVISION and revision not in migrate.known_revisions():
            raise NewerSchemaError(database.name, revision, REVISION)
        return revision
    if tables:
        more = ", ..." if len(tables) > _MOST_NAMED else ""
        named = ", ".join(tables[:_MOST_NAMED])
        reason = f"its schema {database.schema} has tables of another program ({named}{more}); name one of its own"
        raise NotADatabaseError(database.name, f"{reason}, such as ?schema=dspex_persist")
    return None


def _create_schema(connection: Connection, name: str) -> None:
    # Not all who may write into a schema may create one.
    if connection.execute(_HAS_SCHEMA, {"schema": name}).scalar() is None:
        connection.exec_driver_sql(f"CREATE SCHEMA {sql.Identifier(name).as_string(None)}")


def _migrate(connection: Connection, database: Database, revision: str | None) -> None:
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, psycopg.Connection), "it is of psycopg"
    # Migrations are written in the dialect of PostgreSQL.
    driver.cursor_factory = psycopg.Cursor
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.migrations_path())).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        if revision is None and database.schema != "public":
            _create_schema(connection, database.schema)
        command.upgrade(config, "head")
    except Exception as error:
        failed = UpgradeError(database.name, REVISION, database.reason(error), "database")
        raise failed.advising(Hint.GRANT_CREATE if lacks_right(error) else None) from error
    _logger.info("upgraded" if revision else "created", db=database.name, revision=REVISION)
