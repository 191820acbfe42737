"""A fresh file has the tables that the code thinks it has, and its history cannot be rewritten by accident."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, StaticPool, create_engine

from dspex_persist.state.store import migrate, schema
from dspex_persist.state.store.schema import APPEND_ONLY
from dspex_persist.state.store.session_store import open_groups
from tests.assets import make_schema

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


def content_of(connection: Connection) -> tuple[list[tuple[str, ...]], dict[str, list[tuple[object, ...]]]]:
    """The schema, and all rows."""

    def rows(statement: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]

    parts = rows("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name")
    tables = [str(name) for kind, name, *_ in parts if kind == "table"]
    return parts, {name: rows(f"SELECT * FROM {name}") for name in tables}  # type: ignore[return-value]


def test_an_empty_file_gets_what_the_migrations_make() -> None:
    """If this fails after a new migration, run `python -m tests.assets.make_schema`."""
    assert make_schema.SCRIPT.read_text(encoding="utf-8") == make_schema.script()
    contents = []
    for make in (migrate._run_migrations, migrate._make_tables):
        memory = create_engine("sqlite://", poolclass=StaticPool)
        with memory.connect() as connection:
            make(connection)
            contents.append(content_of(connection))
        memory.dispose()
    assert contents[0] == contents[1]
