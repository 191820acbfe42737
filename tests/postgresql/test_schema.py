"""A fresh database has the tables that the code thinks it has, and its history cannot be rewritten by accident."""

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import BigInteger, Text

from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.errors import NewerSchemaError, NotADatabaseError, UpgradeError
from dspex_persist.state.store import schema
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from tests.engines import Databases

_OF_SERVERS = {"head", "servers", "execution_servers", "holds"}
_COLUMNS = """
    SELECT column_name, data_type, is_nullable = 'YES' FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name = %s ORDER BY ordinal_position
"""
_TYPES = {"bytea": "BYTES", "double precision": "DOUBLE", "bigint": "NUMBER", "integer": "NUMBER", "text": "TEXT"}


@pytest.fixture(scope="module")
def fresh(postgres: Databases) -> Iterator[Any]:
    url = postgres.create()
    PostgresLog(url).close()
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection
    postgres.drop(url)


def type_of(column: Any) -> str:
    if isinstance(column.type, Text):
        return "TEXT"
    name = str(column.type)
    return {"BLOB": "BYTES", "REAL": "DOUBLE", "INTEGER": "NUMBER"}[name]


def test_tables_match_the_schema(fresh: Any) -> None:
    rows = fresh.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert {name for (name,) in rows} == {*schema.metadata.tables, *_OF_SERVERS, "alembic_version"}


@pytest.mark.parametrize("name", schema.metadata.tables)
def test_columns_match_the_schema(fresh: Any, name: str) -> None:
    actual = [(column, _TYPES[kind], nullable) for column, kind, nullable in fresh.execute(_COLUMNS, (name,))]
    expected = [(column.name, type_of(column), column.nullable) for column in schema.metadata.tables[name].columns]
    assert actual == expected


def test_numbers_have_64_bits() -> None:
    columns = [column for table in schema.metadata.tables.values() for column in table.columns]
    dialect = psycopg_dialect()
    numbers = [column for column in columns if str(column.type) == "INTEGER"]
    assert numbers
    assert all(isinstance(column.type.dialect_impl(dialect), BigInteger) for column in numbers)


def psycopg_dialect() -> Any:
    from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

    return PGDialect_psycopg()


def test_the_revision_is_that_of_files(fresh: Any) -> None:
    assert fresh.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema.REVISION,)]


@pytest.mark.parametrize("change", ["UPDATE {0} SET {1} = {1}", "DELETE FROM {0}", "TRUNCATE {0} CASCADE"])
def test_history_refuses_to_be_changed(filled: str, change: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        for name in schema.APPEND_ONLY:
            table = schema.metadata.tables[name]
            before = connection.execute(f"SELECT * FROM {name}".encode()).fetchall()
            # What has no rows refuses to be truncated.
            if not before and "TRUNCATE" not in change:
                continue
            for column in table.columns:
                with pytest.raises(psycopg.errors.RaiseException, match="is append-only"):
                    connection.execute(change.format(name, f'"{column.name}"').encode())
            assert connection.execute(f"SELECT * FROM {name}".encode()).fetchall() == before


REFERRED_TO = {"sessions": "session_key", "variables": "variable_key"}


@pytest.mark.parametrize("change", ["UPDATE {0} SET {1} = {1} + 1000", "DELETE FROM {0}", "TRUNCATE {0} CASCADE"])
def test_rows_that_the_history_refers_to_stay(filled: str, change: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        for table, key in REFERRED_TO.items():
            before = connection.execute(f"SELECT * FROM {table} ORDER BY {key}".encode()).fetchall()
            assert before
            with pytest.raises(psycopg.errors.RaiseException, match="are referred to by the history"):
                connection.execute(change.format(table, key).encode())
            assert connection.execute(f"SELECT * FROM {table} ORDER BY {key}".encode()).fetchall() == before


# What a database may be when a server opens it


def test_several_servers_may_create_it_at_once(url: str) -> None:
    opened: list[PostgresState | BaseException] = []

    def open_one() -> None:
        try:
            opened.append(PostgresState(url))
        except BaseException as error:  # noqa: BLE001 - the test tells
            opened.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = [each for each in opened if isinstance(each, PostgresState)]
    assert states == opened
    states[0].initialize_session("s")
    assert [state.get_session("s").id for state in states] == ["s"] * 4
    for state in states:
        state.close()


def test_a_schema_of_its_own_beside_other_tables(url: str, connection: Any) -> None:
    connection.execute("CREATE TABLE sessions (of_another_program text)")
    with pytest.raises(NotADatabaseError, match=r"tables of another program \(sessions\).*\?schema=dspex_persist"):
        PostgresState(url)
    for name in ("dspex_persist", 'Two "words"'):
        own = f"{url}&schema={name.replace(' ', '%20').replace(chr(34), '%22')}"
        with PostgresState(own) as state, PostgresState(own) as other:
            state.initialize_session("s")
            assert other.get_session("s").id == "s"
            with other.audit() as past:
                assert past.head() == 1
    assert connection.execute("SELECT * FROM sessions").fetchall() == []


def test_a_newer_one_is_refused(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999_of_tomorrow'")
    with pytest.raises(NewerSchemaError) as refused:
        PostgresState(filled)
    assert refused.value.revision == "0999_of_tomorrow"


def test_an_upgrade_that_fails_changes_nothing(url: str, connection: Any) -> None:
    connection.execute("CREATE FUNCTION dspex_refuse() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    with pytest.raises(UpgradeError, match=r"failed, the database is unchanged: .*dspex_refuse"):
        PostgresState(url)
    assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
