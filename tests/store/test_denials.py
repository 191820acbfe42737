"""The refused calls in a file: counted, bounded, never in the way of a commit."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time

import dspex_persist
from dspex_persist.audit import DenialQuery
from dspex_persist.state import served
from dspex_persist.state.denials import Denial
from dspex_persist.state.embedded import SqliteState
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.session_store import StoreOptions
from tests.refused import IN_TURN, QUERIES, REFUSED, START, STRANGER


def denials_in(path: Path, **conditions: Any) -> tuple[Denial, ...]:
    with dspex_persist.open_audit(path) as audit:
        return audit.denials(DenialQuery(**conditions))


def rows(path: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


def filled(path: Path) -> Path:
    for minute, refused in enumerate(IN_TURN):
        with freeze_time(START + timedelta(minutes=minute)), SqliteState(path) as state:
            for _ in range(minute + 1):
                state.denials.note(refused)
    return path


def test_an_audit_of_the_open_state_has_them_at_once_and_the_file_when_it_is_closed(tmp_path: Path) -> None:
    with SqliteState(tmp_path / "a.db") as state:
        state.denials.note(REFUSED)
        with state.audit() as audit:
            (first,) = audit.denials()
            state.denials.note(REFUSED)
            (second,) = audit.denials()
        assert state.head_sequence == 0
        state.denials.note(STRANGER)
    assert (first.refused, first.count, second.count) == (REFUSED, 1, 2)
    assert {denial.refused: denial.count for denial in denials_in(tmp_path / "a.db")} == {REFUSED: 2, STRANGER: 1}
    assert maintenance.check(tmp_path / "a.db").problems == ()


def test_a_file_that_has_moved_is_closed_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    state = SqliteState(path)
    state.denials.note(REFUSED)
    moved = path.rename(tmp_path / "b.db")
    state.close()
    moved.rename(path)
    assert denials_in(path) == ()
    with SqliteState(path) as state:
        assert state.head_sequence == 0


def test_queries(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.db")
    for conditions, counts in QUERIES:
        assert [denial.count for denial in denials_in(path, **conditions)] == counts, conditions
    with pytest.raises(InvalidArgumentError, match="not a point"):
        denials_in(path, since="then")
    assert rows(path, "SELECT at, identity, count FROM v_denials LIMIT 1") == [
        ("2026-03-01T12:00:30.000000Z", "ada", 1)
    ]


def test_the_oldest_go_beyond_the_setting(tmp_path: Path) -> None:
    with SqliteState(tmp_path / "a.db", StoreOptions(denials_kept=3)) as state:
        for number in range(10):
            state.denials.note(REFUSED._replace(peer=f"ipv6:{number}"))
    assert sorted(denial.peer for denial in denials_in(tmp_path / "a.db")) == ["ipv6:7", "ipv6:8", "ipv6:9"]


def test_pruning_by_age_deletes_the_older_ones(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.db")
    maintenance.prune(path, PrunePolicy(before=START + timedelta(minutes=1)), confirm=False)
    assert len(denials_in(path)) == 3
    maintenance.prune(path, PrunePolicy(before=START + timedelta(minutes=1)), confirm=True)
    assert [denial.count for denial in denials_in(path)] == [3, 2]
    with SqliteState(path) as state:
        state.prune(PrunePolicy(before=START + timedelta(hours=1)), confirm=True)
    # The newest row stays, so that no later one gets its key.
    assert [denial.count for denial in denials_in(path)] == [3]


def test_backups_have_them_and_bring_them_back(tmp_path: Path) -> None:
    path, backup = filled(tmp_path / "a.db"), tmp_path / "backup.db"
    maintenance.backup(path, backup)
    assert denials_in(backup) == denials_in(path)
    assert len(denials_in(backup)) == 3


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE denials SET count = count - 1",
        "UPDATE denials SET count = count + 1, identity = 'bob'",
        "UPDATE denials SET last_at = 0, count = count + 1",
        "DELETE FROM denials",
        "DELETE FROM denials WHERE denial_key = 2",
        "DELETE FROM denials WHERE denial_key = 3",
    ],
)
def test_the_table_refuses_to_be_changed(tmp_path: Path, statement: str) -> None:
    path = filled(tmp_path / "a.db")
    with pytest.raises(sqlite3.IntegrityError, match="denials is append-only"):
        rows(path, statement)


@pytest.mark.parametrize(
    "change",
    ["count = 0", "last_at = at - 1", "at = -9e18", "missing = ''", "rpc = ''", "denial_key = -1"],
)
def test_the_check_finds_impossible_rows(tmp_path: Path, change: str) -> None:
    path = filled(tmp_path / "a.db")
    trigger = rows(path, "SELECT sql FROM sqlite_schema WHERE name = 'denials_no_update'")[0][0]
    rows(path, "DROP TRIGGER denials_no_update")
    rows(path, f"UPDATE denials SET {change} WHERE denial_key = 2")
    rows(path, trigger)
    (problem,) = maintenance.check(path).problems
    assert "of denials" in problem.where


def test_a_file_that_cannot_be_written_keeps_the_state_open_and_gets_them_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denying: Callable[[SqliteState, bool], None]
) -> None:
    monkeypatch.setattr(served, "_DENIALS_EVERY_S", 0.0)
    with SqliteState(tmp_path / "a.db") as state, state.audit() as audit:
        denying(state, True)
        for _ in range(2):
            for number in range(200):
                state.denials.note(REFUSED._replace(peer=f"ipv6:{number}", session_id="s" * 255))
            assert audit.denials() == ()
        denying(state, False)
        state.initialize_session("s")
        assert {denial.count for denial in audit.denials()} == {2}


@pytest.fixture(params=["full", "read-only"])
def denying(request: pytest.FixtureRequest) -> Callable[[SqliteState, bool], None]:
    """Make SQLite refuse to write to the file, or let it write again, on the connection of its owner."""

    def set_to(state: SqliteState, denies: bool) -> None:
        def set_here() -> None:
            connection: Any = state._store._connection.connection.driver_connection
            if request.param == "full":
                count = connection.execute("PRAGMA page_count").fetchone()[0] if denies else 1_000_000
                connection.execute(f"PRAGMA max_page_count = {count}")
            else:
                connection.execute(f"PRAGMA query_only = {int(denies)}")

        state._on_writer(set_here)

    return set_to
