"""Alembic's environment: on a connection that the package hands in, or on a file that the command line names."""

import os

from alembic import context
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL


def _run(connection: Connection) -> None:
    context.configure(connection=connection, transactional_ddl=True, transaction_per_migration=False)
    with context.begin_transaction():
        context.run_migrations()


def _run_on_file(path: str) -> None:
    engine = create_engine(URL.create("sqlite", database=path))

    @event.listens_for(engine, "connect")
    def _explicit_transactions(connection: object, _record: object) -> None:
        # The driver must not guess when a transaction starts: DDL would then escape from it.
        connection.isolation_level = None  # type: ignore[attr-defined]
        connection.execute("PRAGMA journal_mode = WAL")  # type: ignore[attr-defined]

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.connect() as connection:
        _run(connection)
    engine.dispose()


if context.is_offline_mode():
    context.configure(dialect_name="sqlite", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    handed_in = context.config.attributes.get("connection")
    if handed_in is not None:
        _run(handed_in)
    else:
        named = context.get_x_argument(as_dictionary=True).get("db")
        _run_on_file(named or os.environ.get("DSPEX_PERSIST_DB") or "sessions.db")
