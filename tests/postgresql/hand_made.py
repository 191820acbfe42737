"""Databases that are made and changed by hand, past the servers and past what refuses that."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import select

from dspex_persist.state.store import log_reader, schema
from dspex_persist.state.store.engine import open_readers, snapshot
from dspex_persist.state.store.log import Keys
from dspex_persist.state.store.postgres.postgres_log import PostgresLog

_HEAD = "UPDATE head SET sequence = %s, hash = %s, last_at = %s, next_session_key = %s, next_variable_key = %s"


@contextmanager
def changing(url: str) -> Iterator[Any]:
    """A connection for which no trigger fires, and no reference is checked."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        yield connection


def copy_file(path: Path, url: str) -> None:
    """Have each row of a file in a new database."""
    PostgresLog(url).close()
    readers = open_readers(path, size=1)
    with changing(url) as connection, snapshot(readers) as file:
        for table in schema.metadata.sorted_tables:
            write_rows(connection, table.name, [tuple(row) for row in file.execute(select(table))])
        head, keys = log_reader.head(file), Keys.of(file)
        row = (head.sequence, head.hash, log_reader.last_own_time(file), keys.next_session, keys.next_variable)
        connection.execute(_HEAD, row)
    readers.dispose()


def write_rows(connection: Any, table: str, rows: Sequence[Sequence[Any]]) -> None:
    names = ", ".join(f'"{column.name}"' for column in schema.metadata.tables[table].columns)
    with connection.cursor() as cursor, cursor.copy(f"COPY {table} ({names}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def read_rows(connection: Any, table: str) -> list[dict[str, Any]]:
    names = [column.name for column in schema.metadata.tables[table].columns]
    selected = ", ".join(f'"{name}"' for name in names)
    return [dict(zip(names, row, strict=True)) for row in connection.execute(f"SELECT {selected} FROM {table}")]
