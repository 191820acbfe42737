"""A fresh file has the tables that the code thinks it has, and its history cannot be rewritten by accident."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from dspex_persist.state.store import migrate, schema
from dspex_persist.state.store.schema import APPEND_ONLY
from dspex_persist.state.store.session_store import open_groups

_GENERATED = 2
"""What table_xinfo calls a virtual generated column."""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fresh") / "fresh.db"
    open_groups(path).close()
    return path


@pytest.fixture
def connection(fresh: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{fresh}?mode=ro", uri=True)) as connection:
        yield connection


def tables_of(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def test_tables_match_the_schema(connection: sqlite3.Connection) -> None:
    assert tables_of(connection) == {*schema.metadata.tables, "alembic_version"}


@pytest.mark.parametrize("name", schema.metadata.tables)
def test_columns_match_the_schema(connection: sqlite3.Connection, name: str) -> None:
    """Names in order, types, nullability, primary keys. A row whose column is NOT NULL or a key cannot be NULL."""
    rows = connection.execute(f"PRAGMA table_xinfo({name})").fetchall()
    actual = [
        (column, type_name, not (not_null or key), key > 0)
        for _, column, type_name, not_null, _, key, hidden in rows
        if hidden != _GENERATED
    ]
    expected = [
        (column.name, str(column.type), bool(column.nullable), column.primary_key)
        for column in schema.metadata.tables[name].columns
    ]
    assert actual == expected


def test_the_one_generated_column_is_the_number_of_a_version(connection: sqlite3.Connection) -> None:
    generated = [
        (table, row[1])
        for table in tables_of(connection)
        for row in connection.execute(f"PRAGMA table_xinfo({table})")
        if row[6] != 0
    ]
    assert generated == [("versions", "number")]


@pytest.mark.parametrize("name", schema.metadata.tables)
def test_tables_are_strict(connection: sqlite3.Connection, name: str) -> None:
    (strict,) = connection.execute("SELECT strict FROM pragma_table_list WHERE name = ?", (name,)).fetchone()
    assert strict == 1


def test_the_revision_is_the_head_of_the_migrations(connection: sqlite3.Connection) -> None:
    assert ScriptDirectory(str(migrate.migrations_path())).get_heads() == [schema.REVISION]
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema.REVISION,)]


CHANGES = [
    (table, statement)
    for table in APPEND_ONLY
    for statement in (
        *(f"UPDATE {table} SET {column.name} = {column.name}" for column in schema.metadata.tables[table].columns),
        f"DELETE FROM {table}",
    )
]


@pytest.mark.parametrize(("table", "statement"), CHANGES)
def test_history_refuses_to_be_changed(filled: Path, table: str, statement: str) -> None:
    with closing(sqlite3.connect(filled, isolation_level=None)) as connection:
        before = connection.execute(f"SELECT * FROM {table}").fetchall()
        assert before
        with pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"):
            connection.execute(statement)
        assert connection.execute(f"SELECT * FROM {table}").fetchall() == before
