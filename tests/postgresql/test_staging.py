"""The statements of a group are sent at once, and store what they would have stored one by one."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from dspex_persist.state.commands import RegisterVariable
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.errors import InvalidArgumentError, StateError
from dspex_persist.state.model import Value
from dspex_persist.state.shared import shared_groups
from dspex_persist.state.store.postgres import contents, inserts, staging, writing
from dspex_persist.state.store.postgres.connections import Database, run
from dspex_persist.state.store.postgres.inserts import update_of
from dspex_persist.state.store.postgres.staging import Staged

_ENTRY = "INSERT INTO metadata_entries (key, value, sequence, variable_key, version) VALUES (?, ?, ?, ?, ?)"
_RULE = "UPDATE rules SET expression = ?, added_sequence = ? WHERE name = ?"
_SPECIAL = ("'", "''; DROP TABLE head; --", "\\'", "?", "%s", "%", "$1", "E'\\n'", "é\N{SNOWMAN}", "{}", '"')


@pytest.fixture
def driver(filled: str) -> Iterator[Any]:
    with Database(filled).connect() as connection:
        connection.execute("DELETE FROM metadata_entries")
        yield connection


def entries(driver: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in driver.execute("SELECT * FROM metadata_entries ORDER BY version").fetchall()]


@pytest.mark.parametrize("most", [inserts.MOST_CHARACTERS, 0])
@pytest.mark.parametrize("singly", [False, True])
def test_values_come_back(driver: Any, monkeypatch: pytest.MonkeyPatch, most: int, singly: bool) -> None:
    monkeypatch.setattr(inserts, "MOST_CHARACTERS", most)
    monkeypatch.setattr(staging, "MOST_CHARACTERS", most)
    staged = Staged(driver, set())
    rows = [(text, text[::-1], -(2**63), 2**63 - 1, number) for number, text in enumerate(_SPECIAL)]
    if singly:
        for row in rows:
            staged.execute(_ENTRY, row)
    else:
        staged.executemany(_ENTRY, iter(rows))
    if most:
        assert entries(driver) == []
    staged.send()
    assert entries(driver) == rows


def test_statements_keep_their_order(driver: Any) -> None:
    staged = Staged(driver, set())
    staged.executemany(_ENTRY, [("k", "v", 1, 1, 1), ("k", "v", 1, 1, 2)])
    staged.execute("DELETE FROM metadata_entries WHERE version = ?", (1,))
    staged.executemany(_ENTRY, [("k", "w", 1, 1, 1)])
    run(driver, staged.take())
    assert staged.take() == ""
    assert [row[1] for row in entries(driver)] == ["w", "v"]


def test_much_is_sent_without_being_asked(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MOST_CHARACTERS", 400)
    staged = Staged(driver, set())
    for number in range(11):
        staged.executemany(_ENTRY, [("k", "v" * 50, 1, 1, number)])
    assert 0 < len(entries(driver)) < 11


@pytest.mark.parametrize("singly", [False, True])
def test_no_text_has_nul(driver: Any, singly: bool) -> None:
    staged = Staged(driver, set())
    row = ("k\0", "v", 1, 1, 1)
    with pytest.raises(psycopg.DataError, match="NUL"):
        staged.execute(_ENTRY, row) if singly else staged.executemany(_ENTRY, [row])


def test_rows_are_changed_by_their_keys(driver: Any) -> None:
    ((key,),) = driver.execute("SELECT session_key FROM sessions").fetchall()
    driver.execute("INSERT INTO rules SELECT %s, 'r' || n, '', '', 0 FROM generate_series(0, 3) AS n", (key,))
    many = update_of(_RULE)
    assert many is not None
    staged = Staged(driver, set())
    staged.executemany(_RULE, [("x > 0", 7, "r1"), ("'", 8, "r3"), ("", 9, "none")])
    staged.send()
    rows = driver.execute("SELECT name, expression, added_sequence FROM rules ORDER BY name").fetchall()
    assert rows == [("r0", "", 0), ("r1", "x > 0", 7), ("r2", "", 0), ("r3", "'", 8)]


def test_only_what_sets_columns_of_one_row_is_one_update() -> None:
    assert update_of("UPDATE rules SET expression = ?, added_sequence = added_sequence + 1 WHERE name = ?") is None
    assert update_of("UPDATE rules SET expression = ? WHERE name = ? AND session_key = ?") is None
    assert update_of("UPDATE others SET expression = ? WHERE name = ?") is None


@pytest.mark.parametrize(("quiet", "trips"), [(shared_groups.QUIET, 1), (10_000, 2)])
def test_a_commit_takes_one_round_trip_unless_others_write(
    filled: str, monkeypatch: pytest.MonkeyPatch, quiet: int, trips: int
) -> None:
    monkeypatch.setattr(shared_groups, "QUIET", quiet)
    sent: list[str] = []
    with PostgresState(filled) as state:
        for value in range(shared_groups.QUIET if trips == 1 else 1):
            state.set_variable("s", "x", value)
        execute = psycopg.Cursor.execute
        writer = state._store._writing.driver

        def noted(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            if self.connection is writer:
                sent.append(str(query))
            return execute(self, query, *arguments, **options)

        monkeypatch.setattr(psycopg.Cursor, "execute", noted)
        state.set_variable("s", "x", 3)
        names = [f"n{number}" for number in range(3)]
        state.register_variables("s", [RegisterVariable("s", name, "integer", Value("1")) for name in names])
        monkeypatch.undo()
    # Each is prepared once for a connection; the writer asks for news every second.
    of_groups = [each for each in sent if not each.startswith("PREPARE") and each != "EXECUTE dspex_head"]
    assert [each.split(";")[0] for each in of_groups[::trips]] == ["BEGIN", "BEGIN"]
    assert len(of_groups) == 2 * trips
    assert all(each.endswith("COMMIT") for each in of_groups[trips - 1 :: trips])


def test_large_contents_are_stored_once_and_all_at_once(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_AT_ONCE_BYTES", 7000)
    texts = ["a" * 3000, "b" * 3000, "c" * 3000, "a" * 3000, "x" * 5000, "d"]
    names = [f"n{number}" for number in range(len(texts))]
    values = [Value(f'"{text}"') for text in texts]
    with PostgresState(filled) as state:
        state.register_variables(
            "s", [RegisterVariable("s", name, "string", value) for name, value in zip(names, values, strict=True)]
        )
        state.register_variable("s", "v", "embedding", [0.5] * 2000)
        state.set_variable("s", "v", [0.25] * 2000)
        state.set_variable("s", "v", [0.5] * 2000)
    with PostgresState(filled) as state, psycopg.connect(filled) as connection:
        assert [state.get_variable("s", name).value for name in names] == values
        assert [state.get_value("s", "v")[0]] == [0.5]
        kept = connection.execute("SELECT length(content), count(*) FROM blobs GROUP BY 1 ORDER BY 1").fetchall()
    # "x" * 5000 was there.
    assert kept[:2] == [(3002, 3), (5002, 1)]
    assert sum(count for _, count in kept) == 6


def test_prepared_statements_outlive_a_group_that_fails(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with PostgresState(filled) as state:
        # So often that psycopg has prepared statements of its own.
        for _ in range(8):
            state.get_variable_history("s", "x")
            state.set_variable("s", "x", 5)
            state.set_variable("s", "large", "y" * 5000)
        pid = state._store._writing.driver.info.backend_pid
        prepare = writing.heads.end_of_group
        monkeypatch.setattr(writing.heads, "end_of_group", lambda *facts: f"SELECT 1/0; {prepare(*facts)}")
        with pytest.raises(StateError, match="division by zero"):
            state.set_variable("s", "x", 6)
        monkeypatch.undo()
        for number in range(3):
            state.set_variable("s", "x", number)
            state.set_variable("s", "large", "z" * (5000 + number))
        assert state._store._writing.driver.info.backend_pid == pid
        with pytest.raises(InvalidArgumentError):
            state.register_variable("s", "nul\0", "integer", 1)
        assert state.get_value("s", "x") == 2
