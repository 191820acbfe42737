"""Groups that look at the head of the log only when they are stored, as others are probably not writing."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from dspex_persist.state.commands import GetVariable, SetVariable
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.errors import StateError, VersionConflictError
from dspex_persist.state.groups import Job
from dspex_persist.state.log_store import WouldWaitError
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.shared import shared_groups
from dspex_persist.state.store.postgres import heads
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from tests.deadline import within
from tests.engines import wait_until


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all groups be optimistic, but for those that are repeated."""
    monkeypatch.setattr(shared_groups, "QUIET", 0)


@pytest.fixture
def state(filled: str) -> Iterator[PostgresState]:
    with PostgresState(filled) as state:
        state.set_variable("s", "x", 2)
        yield state


@pytest.fixture
def other(filled: str) -> Iterator[PostgresState]:
    with PostgresState(filled) as other:
        yield other


def write(state: PostgresState, command: SetVariable | GetVariable, *, wait: bool = True) -> list[Any]:
    """Write a group on this thread, whatever the engine does; return the results."""
    with state._writer._turn:
        outcomes = state._groups.write_group([Job(command, Origin("tester", "test"))], wait=wait)
    return [outcome.error or outcome.result for outcome in outcomes]


def behind(state: PostgresState, other: PostgresState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have another server write what this one has not heard of."""
    monkeypatch.setattr(type(state._groups), "follow", lambda _: None)
    known = state._groups.known
    assert other.set_variable("s", "x", 7) == 2
    assert state._groups.known == known


# What others have written meanwhile


def test_a_write_is_repeated_on_what_others_have_written(
    state: PostgresState, other: PostgresState, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind(state, other, monkeypatch)
    assert write(state, SetVariable("s", "x", Value("3"))) == [3]
    assert write(state, SetVariable("s", "x", Value("4"))) == [4]


@pytest.mark.parametrize("expected", [1, 2])
def test_a_refusal_is_one_of_what_others_have_written(
    state: PostgresState, other: PostgresState, monkeypatch: pytest.MonkeyPatch, expected: int
) -> None:
    """Nothing is stored then, and so nothing compared unless that is done on purpose."""
    behind(state, other, monkeypatch)
    (result,) = write(state, SetVariable("s", "x", Value("3"), expected_version=expected))
    if expected == 1:
        assert isinstance(result, VersionConflictError)
        assert "2" in str(result)
    else:
        assert result == 3


def test_a_key_that_others_have_used_is_found(
    state: PostgresState, other: PostgresState, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind(state, other, monkeypatch)
    assert other.set_variable("s", "x", 8, idempotency_key="k") == 3
    assert state.set_variable("s", "x", 8, idempotency_key="k") == 3
    assert other.get_variable("s", "x").version == 3


def test_a_session_that_is_not_in_memory_is_loaded(
    state: PostgresState, other: PostgresState, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.initialize_session("later")
    other.register_variable("later", "y", "integer", 1)
    monkeypatch.setattr(type(state._groups), "follow", lambda _: None)
    assert state.set_variable("later", "y", 2) == 1
    state._groups._cache.clear()
    assert state.set_variable("later", "y", 3) == 2


def test_large_contents_are_stored_in_the_group(state: PostgresState, other: PostgresState) -> None:
    for text in ("a" * 5000, "b" * 5000, "a" * 5000):
        state.set_variable("s", "large", text)
        assert other.get_value("s", "large") == text
    other.set_variable("s", "large", "c" * 5000)
    state.set_variable("s", "large", "d" * 5000)
    assert other.get_variable("s", "large").version == 5


# What ends a group


def fenced(state: PostgresState, connection: Any) -> None:
    connection.execute("UPDATE servers SET epoch = epoch + 1, renewed_at = 'infinity'")


def upgraded(state: PostgresState, connection: Any) -> None:
    connection.execute("UPDATE alembic_version SET version_num = '9999'")


def replaced(state: PostgresState, connection: Any) -> None:
    connection.execute("UPDATE head SET database_id = 'another'")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (fenced, "other servers took this one for dead"),
        (upgraded, "has upgraded it to schema 9999"),
        (replaced, "another database"),
    ],
)
def test_what_a_group_has_to_notice_is_noticed(
    filled: str, state: PostgresState, change: Callable[[PostgresState, Any], None], says: str
) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        before = connection.execute("SELECT sequence FROM head").fetchone()
        change(state, connection)
        with pytest.raises(StateError, match=says):
            state.set_variable("s", "x", 3)
        assert connection.execute("SELECT sequence FROM head").fetchone() == before


def test_a_group_that_must_not_wait_does_not(filled: str, state: PostgresState) -> None:
    lock = f"SELECT pg_advisory_xact_lock({heads.LOCKS}, 'head'::regclass::oid::int)"
    with psycopg.connect(filled) as connection:
        connection.execute(lock)
        with pytest.raises(WouldWaitError):
            write(state, SetVariable("s", "x", Value("3")), wait=False)
        with pytest.raises(WouldWaitError):
            write(state, SetVariable("s", "x", Value("3"), expected_version=0), wait=False)
        connection.rollback()
        assert write(state, SetVariable("s", "x", Value("3")), wait=False) == [2]
        connection.execute(lock)
        threading.Timer(0.1, connection.rollback).start()
        assert write(state, SetVariable("s", "x", Value("4"))) == [3]


def test_a_group_looks_when_it_has_the_lock(filled: str, state: PostgresState) -> None:
    with psycopg.connect(filled) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(f"SELECT pg_advisory_xact_lock({heads.LOCKS}, 'head'::regclass::oid::int)")
        writing = pool.submit(state.set_variable, "s", "x", 3)
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objsubid = 2"
        wait_until(lambda: connection.execute(waits).fetchone() == (1,))
        connection.execute("UPDATE servers SET epoch = epoch + 1, renewed_at = 'infinity'")
        connection.commit()
        with pytest.raises(StateError, match="took this one for dead"):
            writing.result(within(10))


def test_what_has_not_arrived_is_refused_after_it_was_given_up(filled: str, state: PostgresState) -> None:
    """Else it would be stored although its caller was told that it was not."""
    log = state._store
    assert isinstance(log, PostgresLog)
    sent: list[str] = []

    def lost(end: str) -> None:
        sent.append(end)
        log._writing.driver.close()
        raise psycopg.OperationalError("lost")

    vars(log._writing)["_commit"] = lost
    with pytest.raises(StateError, match="the connection to the database was lost"):
        state.set_variable("s", "x", 3)
    del vars(log._writing)["_commit"]
    (late,) = sent
    assert late.startswith("BEGIN")
    with psycopg.connect(filled, autocommit=True) as connection:
        connection.execute(f"{heads.PREPARE.format(server=log._lease.server_id)}".encode())
        with pytest.raises(psycopg.DatabaseError) as raised:
            connection.execute(late.encode())
    assert raised.value.diag.sqlstate == heads.MOVED
    assert state.set_variable("s", "x", 4) == 2
