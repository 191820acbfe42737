"""An INSERT of many rows stores what so many INSERTs of one row store."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from dspex_persist.state.store.postgres import inserts
from dspex_persist.state.store.postgres.connections import Database
from dspex_persist.state.store.postgres.inserts import insert_of

_TEXTS = (
    "",
    "NULL",
    "null",
    "{}",
    '"',
    "\\",
    '\\"',
    "a,b",
    "{a}",
    " a ",
    "line\nline\ttab",
    "é\N{SNOWMAN}\U0001f600",
    "%s",
)
_ENTRY = "INSERT INTO metadata_entries (key, value, sequence, variable_key, version) VALUES (?, ?, ?, ?, ?)"
_BLOB = "INSERT INTO blobs (digest, content) VALUES (?, ?)"
_VARIABLE = """
    INSERT INTO variables (variable_key, session_key, variable_id, name, type, constraints, metadata, optimization,
        deleted_sequence) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


@pytest.fixture
def driver(filled: str) -> Iterator[Any]:
    with Database(filled).connect() as connection:
        yield connection


def rows_of(driver: Any, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in driver.execute(query).fetchall()]


@pytest.mark.parametrize("most", [inserts.MOST_CHARACTERS, 0])
@pytest.mark.parametrize("count", [0, 1, len(_TEXTS)])
def test_texts_and_numbers_come_back(driver: Any, monkeypatch: pytest.MonkeyPatch, most: int, count: int) -> None:
    monkeypatch.setattr(inserts, "MOST_CHARACTERS", most)
    driver.execute("DELETE FROM metadata_entries")
    rows = [(text, text[::-1], -(2**63), 2**63 - 1, number) for number, text in enumerate(_TEXTS[:count])]
    driver.executemany(_ENTRY, iter(rows))
    assert rows_of(driver, "SELECT * FROM metadata_entries ORDER BY version") == rows


def test_bytes_come_back(driver: Any) -> None:
    driver.execute("SET session_replication_role = replica")
    driver.execute("DELETE FROM blobs")
    rows = [(bytes([number]), content) for number, content in enumerate((b"", bytes(range(256)), b'\\x"{}'))]
    driver.executemany(_BLOB, rows)
    assert rows_of(driver, "SELECT digest, content FROM blobs ORDER BY digest") == rows


def test_nothing_comes_back_as_nothing(driver: Any) -> None:
    ((session_key,),) = rows_of(driver, "SELECT session_key FROM sessions")
    rows: Sequence[tuple[Any, ...]] = [
        (100 + number, session_key, f"id{number}", f"name{number}", "float", "{}", "{}", lock, deleted)
        for number, (lock, deleted) in enumerate([(None, None), ("NULL", 7), (None, 8), ("", None)])
    ]
    driver.executemany(_VARIABLE.strip().replace("\n        ", " "), rows)
    assert rows_of(driver, "SELECT * FROM variables WHERE variable_key >= 100 ORDER BY variable_key") == rows


def test_only_what_inserts_and_does_nothing_else_is_one_statement() -> None:
    assert insert_of(_ENTRY) is not None
    assert insert_of(f"{_ENTRY} ON CONFLICT DO NOTHING") is None
    assert insert_of("INSERT INTO others (key) VALUES (?)") is None
    assert insert_of("UPDATE blobs SET content = ?") is None
