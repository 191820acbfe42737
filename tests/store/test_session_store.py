"""The store without threads: groups, errors of SQLite, the cache, opening, and time."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from freezegun import freeze_time
from freezegun.api import FrozenDateTimeFactory
from sqlalchemy import Connection, event

from dspex_persist import clock
from dspex_persist.state import anchor, errors
from dspex_persist.state.commands import (
    AddDependency,
    CleanupSession,
    Command,
    DeleteVariable,
    GetVariable,
    GetVariableHistory,
    Heartbeat,
    InitializeSession,
    ListVariables,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    SetVariables,
    StartOptimization,
    TouchSession,
)
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.model import Origin, Source, Value, Variable
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store import log
from dspex_persist.state.store.history import recordings
from dspex_persist.state.store.maintenance import transfer
from dspex_persist.state.store.session_store import FileGroups, StoreOptions, open_groups
from dspex_persist.state.unit_of_work import UnitOfWork
from tests.clocks import pass_s
from tests.deadline import within

ADA = Origin("ada", "test")
PLANTED = "SELECT RAISE(ABORT, 'planted')"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def store(path: Path) -> Iterator[FileGroups]:
    """A store in which session `s` has a variable `x` (0)."""
    store = open_groups(path)
    begin(store)
    yield store
    store.close()


def begin(store: FileGroups, session_id: str = "s", **metadata: str) -> None:
    run(store, InitializeSession(session_id, metadata))
    run(store, RegisterVariable(session_id, "x", "integer", Value("0")))


def group(store: FileGroups, *commands: Command[Any], key: str | None = None) -> list[Outcome]:
    return store.write_group([Job(command, replace(ADA, idempotency_key=key)) for command in commands])


def run(store: FileGroups, command: Command[Any], key: str | None = None) -> Any:
    """Carry one command out, as the only one of its group."""
    (outcome,) = group(store, command, key=key)
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def write(name: str, value: object, session_id: str = "s") -> SetVariable:
    return SetVariable(session_id, name, Value(str(value)))


def query(path: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(statement).fetchall()


def alter(path: Path, *statements: str) -> None:
    """Change a closed database behind the store's back."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def driver(store: FileGroups) -> sqlite3.Connection:
    """The store's own connection."""
    connection = store.log._connection.connection.dbapi_connection
    assert isinstance(connection, sqlite3.Connection)
    return connection


@dataclass(frozen=True)
class Everything:
    """All that must not change when a group fails."""

    head: anchor.Head
    anchor: bytes
    cached: dict[str, object]
    rows: list[Any]

    @classmethod
    def of(cls, store: FileGroups) -> "Everything":
        counts = ", ".join(
            f"(SELECT count(*) FROM {table})"
            for table in ("sessions", "variables", "commits", "versions", "events", "dependencies", "outcomes", "blobs")
        )
        return cls(
            store.log.head,
            store.log.path.with_name(store.log.path.name + ".anchor").read_bytes(),
            {session_id: store.find_loaded(session_id) for session_id in ("s", "new")},
            query(store.log.path, f"SELECT {counts}"),
        )


@dataclass(frozen=True)
class Failing(Command[None]):
    """Writes 13 to `x`, then fails."""

    error: Exception

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        SetVariable(self.session_id, "x", Value("13")).apply(uow)
        raise self.error


UNWRITABLE: dict[str, Callable[[UnitOfWork, Variable], object]] = {
    "no text": lambda uow, x: uow.write("s", x, Value("\ud800"), {}, Source.PYTHON),
    "too large a number": lambda uow, x: uow.write("s", x._replace(version=2**70), Value("9"), {}, Source.PYTHON),
    "no type of SQLite": lambda uow, x: uow.write("s", x, Value(["9"]), {}, Source.PYTHON),  # type: ignore[arg-type]
    "a version twice": lambda uow, x: uow.write("s", x._replace(version=-1), Value("9"), {}, Source.PYTHON),
    "no kind": lambda uow, x: uow.write("s", x, Value("9"), {}, Source.PYTHON, "odd"),  # type: ignore[arg-type]
}


@dataclass(frozen=True)
class Unwritable(Command[None]):
    """Stages a change that cannot be written."""

    what: str

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        UNWRITABLE[self.what](uow, uow.variable("s", "x"))


class TestGroups:
    def test_commands_take_effect_in_order_each_seeing_those_before(self, store: FileGroups) -> None:
        outcomes = group(
            store,
            write("x", 1),
            write("x", 2),
            GetVariable("s", "x"),
            RollbackVariable("s", "x", 1),
            RegisterVariable("s", "y", "integer", Value("5")),
            DeleteVariable("s", "x"),
            GetVariable("s", "x"),
            write("y", 6),
        )
        assert [outcome.result for outcome in outcomes[:2]] == [1, 2]
        assert outcomes[2].result.value == Value("2")
        assert (outcomes[3].result.version, outcomes[3].result.value) == (3, Value("1"))
        assert isinstance(outcomes[6].error, errors.VariableNotFoundError)
        assert outcomes[7].result == 1

    def test_is_one_transaction(self, store: FileGroups) -> None:
        statements: list[str] = []
        driver(store).set_trace_callback(statements.append)
        group(store, *(write("x", number) for number in range(50)))
        driver(store).set_trace_callback(None)
        assert statements.count("BEGIN IMMEDIATE") == 1
        assert statements.count("COMMIT") == 1

    def test_each_command_is_a_commit_with_the_next_number(self, store: FileGroups, path: Path) -> None:
        head = store.log.head.sequence
        group(store, write("x", 1), Heartbeat("s"), write("missing", 1), write("x", 2), GetVariable("s", "x"))
        assert store.log.head.sequence == head + 2
        assert query(path, "SELECT sequence FROM commits ORDER BY sequence") == [(n,) for n in range(1, head + 3)]

    def test_one_that_fails_its_checks_fails_alone(self, store: FileGroups) -> None:
        outcomes = group(
            store,
            write("x", 1),
            write("x", '"text"'),
            write("x", 1, "missing"),
            SetVariable("s", "x", Value("9"), expected_version=7),
            InitializeSession(""),
            write("x", 2),
        )
        assert [type(outcome.error).__name__ for outcome in outcomes] == [
            "NoneType",
            "InvalidValueError",
            "SessionNotFoundError",
            "VersionConflictError",
            "InvalidArgumentError",
            "NoneType",
        ]
        assert run(store, GetVariable("s", "x")).value == Value("2")
        assert len(run(store, GetVariableHistory("s", "x"))) == 3

    def test_one_that_fails_after_staging_changes_undoes_them(self, store: FileGroups, path: Path) -> None:
        error = errors.NotOptimizingError("x")
        outcomes = group(store, write("x", 1), Failing("s", error), GetVariable("s", "x"), write("x", 2))
        assert outcomes[1].error is error
        assert outcomes[2].result.value == Value("1")
        assert outcomes[3].result == 2
        assert query(path, "SELECT value FROM versions ORDER BY version") == [("0",), ("1",), ("2",)]

    def test_an_internal_error_fails_alone_and_hides_its_cause(self, store: FileGroups) -> None:
        first, faulty, last = group(store, write("x", 1), Failing("s", RuntimeError("secret")), write("x", 2))
        assert (first.result, last.result) == (1, 2)
        assert isinstance(faulty.error, errors.InternalError)
        assert "secret" not in str(faulty.error)
        assert "reference" in str(faulty.error)

    def test_a_session_begun_ended_and_begun_again_in_one_group(self, store: FileGroups, path: Path) -> None:
        outcomes = group(
            store,
            InitializeSession("t"),
            RegisterVariable("t", "x", "integer", Value("1")),
            CleanupSession("t"),
            write("x", 2, "t"),
            InitializeSession("t"),
            ListVariables("t"),
        )
        assert outcomes[2].result == 1
        assert isinstance(outcomes[3].error, errors.SessionNotFoundError)
        assert not outcomes[4].result.resumed
        assert outcomes[5].result == ()
        rows = query(path, "SELECT ended_sequence IS NULL FROM sessions WHERE session_id = 't' ORDER BY session_key")
        assert rows == [(0,), (1,)]

    def test_without_jobs_or_with_reads_only_it_writes_nothing(self, store: FileGroups) -> None:
        before = Everything.of(store)
        assert group(store) == []
        group(store, GetVariable("s", "x"), Heartbeat("s"), Heartbeat("missing"))
        assert Everything.of(store) == before

    def test_survives_being_closed_and_opened(self, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            group(store, write("x", 1), RegisterVariable("s", "y", "string", Value('"text"')))
        with closing(open_groups(path)) as again:
            assert again.log.head == store.log.head
            assert again.find_loaded("s") is None, "sessions are loaded on their first touch"
            assert run(again, GetVariable("s", "x")).version == 1
            assert again.find_loaded("s") is not None


class TestDamagedSessions:
    """Another program, or the disk, has changed the rows of one session."""

    DAMAGE = (
        "UPDATE sessions SET metadata = '{' WHERE session_id = 'bad'",
        "UPDATE variables SET metadata = '[' WHERE session_key = 1",
        "UPDATE variables SET optimization = '{}' WHERE session_key = 1",
    )

    @pytest.mark.parametrize("damage", DAMAGE, ids=["session", "variable", "lock"])
    def test_calls_on_it_alone_fail_and_name_it(
        self, path: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with closing(open_groups(path)) as store:
            begin(store, "bad")
            begin(store)
        alter(path, damage)
        with closing(open_groups(path)) as store:
            commands = (write("x", 1, "bad"), GetVariable("bad", "x"), InitializeSession("bad"), CleanupSession("bad"))
            outcomes = group(store, write("x", 1), *commands, write("x", 2), Heartbeat("bad"))
            assert [outcome.result for outcome in (outcomes[0], outcomes[5])] == [1, 2]
            for outcome in (*outcomes[1:5], outcomes[6]):
                assert isinstance(outcome.error, errors.DamagedSessionError)
                assert "'bad'" in str(outcome.error)
            with pytest.raises(errors.DamagedSessionError):
                store.read_stored(ListVariables("bad"), ADA)
            store.sweep()
            assert run(store, write("x", 3)) == 3
        assert "session_id='bad'" in caplog.text


class TestFailedGroups:
    @pytest.fixture
    def planted(self, path: Path) -> Iterator[FileGroups]:
        """A store whose file refuses the value 666."""
        with closing(open_groups(path)) as store:
            begin(store)
            run(store, write("x", 1))
        alter(path, f"CREATE TRIGGER planted BEFORE INSERT ON versions WHEN NEW.value = '666' BEGIN {PLANTED}; END")
        with closing(open_groups(path)) as store:
            run(store, Heartbeat("s"))
            yield store
        # The file is sound after every test.
        open_groups(path).close()

    def test_an_error_of_the_storage_fails_all_and_changes_nothing(
        self, planted: FileGroups, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = Everything.of(planted)
        feed = planted.hub.join(1, "watcher")
        woken: list[bool] = []
        feed.watching["watcher"] = lambda: woken.append(True)

        def fail(self: log.LogWriter) -> None:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        monkeypatch.setattr(log.LogWriter, "flush", fail)
        outcomes = group(
            planted,
            write("x", 2),
            InitializeSession("new", {"a": "b"}),
            RegisterVariable("new", "y", "string", Value(f'"{"large" * 1000}"')),
            write("x", "no value"),
            CleanupSession("s"),
        )
        assert {type(outcome.error) for outcome in outcomes} == {errors.StorageError}
        assert all("full" in str(outcome.error) for outcome in outcomes)
        assert Everything.of(planted) == before
        assert planted.find_loaded("s") is before.cached["s"]
        assert feed.after(before.head.sequence) == []
        assert not woken

    def test_the_next_group_is_not_affected(self, planted: FileGroups, path: Path) -> None:
        sequence = planted.log.head.sequence
        for _ in range(3):
            (outcome,) = group(planted, write("x", 666))
            assert isinstance(outcome.error, errors.StorageError)
        outcomes = group(planted, RegisterVariable("s", "y", "integer", Value("1")), write("x", 2), write("y", 2))
        assert [outcome.error for outcome in outcomes] == [None] * 3
        assert [outcome.result for outcome in outcomes[1:]] == [2, 1]
        assert planted.log.head.sequence == sequence + 3
        assert query(path, "SELECT count(*) FROM versions") == [(5,)]

    def test_a_command_that_sqlite_refuses_fails_alone(self, planted: FileGroups, path: Path) -> None:
        jobs = [write("x", number) for number in (2, 666, 3, 4, 666, 666, 5)]
        outcomes = group(planted, *jobs, RegisterVariable("s", "y", "integer", Value("666")))
        assert [outcome.result for outcome in outcomes] == [2, None, 3, 4, None, None, 5, None]
        assert all("planted" in str(outcome.error) for outcome in outcomes if outcome.result is None)
        assert [value for (value,) in query(path, "SELECT value FROM versions")] == ["0", "1", "2", "3", "4", "5"]
        assert [variable.name for variable in run(planted, ListVariables("s"))] == ["x"]

    @pytest.mark.parametrize("what", sorted(UNWRITABLE))
    def test_a_command_that_cannot_be_written_fails_alone(self, store: FileGroups, path: Path, what: str) -> None:
        begin(store, "t")
        unwritable = Unwritable("s", what)
        outcomes = group(store, write("x", 1), unwritable, write("x", 2, "t"), unwritable, write("x", 3))
        assert [outcome.result for outcome in outcomes] == [1, None, 1, None, 2]
        assert isinstance(outcomes[1].error, errors.InternalError | errors.StorageError)
        assert run(store, GetVariable("s", "x")).value == Value("3")
        assert query(path, "SELECT count(*) FROM versions") == [(5,)]
        assert run(store, write("x", 4)) == 3

    def test_its_keys_are_not_stored(self, planted: FileGroups) -> None:
        with pytest.raises(errors.StorageError):
            run(planted, write("x", 666), key="key")
        assert run(planted, write("x", 2), key="key") == 2

    @pytest.mark.parametrize("table", ["sessions", "variables", "commits", "versions", "events", "outcomes", "blobs"])
    def test_wherever_it_happens(self, path: Path, table: str) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
        alter(path, f"CREATE TRIGGER planted BEFORE INSERT ON {table} BEGIN {PLANTED}; END")
        large = Value(f'"{"large" * 1000}"')
        commands = (InitializeSession("new"), RegisterVariable("new", "y", "string", large), write("x", 1))
        jobs = [Job(command, replace(ADA, idempotency_key=command.cause)) for command in commands]
        with closing(open_groups(path)) as store:
            run(store, Heartbeat("s"))
            before = Everything.of(store)
            # Each alone, as each that has no row for this table is written.
            outcomes = [outcome for job in jobs for outcome in store.write_group([job]) if outcome.error is not None]
            assert {type(outcome.error) for outcome in outcomes} >= {errors.StorageError}
            if table == "commits":
                assert Everything.of(store) == before
        alter(path, "DROP TRIGGER planted")
        with closing(open_groups(path)) as store:
            outcomes = store.write_group(jobs)
            assert [outcome.error for outcome in outcomes] == [None] * 3

    def test_a_full_disk_is_a_certain_failure_and_passes(self, store: FileGroups, path: Path) -> None:
        (pages,) = driver(store).execute("PRAGMA page_count").fetchone()
        driver(store).execute(f"PRAGMA max_page_count = {pages + 4}")
        run(store, RegisterVariable("s", "text", "string", Value('""')))
        before = Everything.of(store)
        texts = [SetVariable("s", "text", Value(f'"{str(number) * 20_000}"')) for number in range(1, 9)]
        outcomes = group(store, write("x", 1), *texts, write("x", 2))
        assert {type(outcome.error) for outcome in outcomes} == {errors.StorageError}
        assert "full" in str(outcomes[0].error)
        assert Everything.of(store) == before
        assert run(store, write("x", 1)) == 1, "what still fits is written"
        driver(store).execute("PRAGMA max_page_count = 1000000")
        outcomes = group(store, write("x", 2), *texts)
        assert [outcome.result for outcome in outcomes] == [2, *range(1, 9)]

    def test_a_commit_that_fails_does_not_affect_the_next_group(self, store: FileGroups) -> None:
        def fail(_: Connection) -> None:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        # With a key, the group has statements of SQLAlchemy, which then commits.
        event.listen(store.log._writer, "commit", fail)
        with pytest.raises(errors.StorageError, match="full"):
            run(store, write("x", 1), key="key")
        event.remove(store.log._writer, "commit", fail)
        assert run(store, write("x", 2), key="key") == 1

    def test_an_unknown_outcome_is_raised_and_not_published(
        self, store: FileGroups, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = Everything.of(store)

        def fail(self: log.LogWriter) -> None:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error

        monkeypatch.setattr(log.LogWriter, "flush", fail)
        with pytest.raises(errors.OutcomeUnknownError, match="disk I/O error"):
            group(store, write("x", 1))
        assert store.log.head == before.head
        assert store.find_loaded("s") is before.cached["s"]


class TestIdempotency:
    def test_twice_in_one_group_is_once(self, store: FileGroups) -> None:
        head = store.log.head.sequence
        outcomes = group(store, write("x", 1), write("x", 1), key="key")
        assert [outcome.result for outcome in outcomes] == [1, 1]
        assert store.log.head.sequence == head + 1

    def test_another_request_in_the_same_group_is_refused(self, store: FileGroups) -> None:
        outcomes = group(store, write("x", 1), write("x", 2), key="key")
        assert outcomes[0].result == 1
        assert isinstance(outcomes[1].error, errors.IdempotencyConflictError)

    def test_the_answer_is_kept_in_the_commit_that_it_answers_for(self, store: FileGroups, path: Path) -> None:
        run(store, write("x", 1), key="key")
        assert query(path, "SELECT session_id, idempotency_key, cause, result FROM outcomes") == [
            ("s", "key", "SetVariable", "1")
        ]

    def test_outcomes_in_older_files_stay_valid(self, path: Path) -> None:
        command = SetVariable("s", "x", Value(" 5.0 "))
        with closing(open_groups(path)) as store:
            begin(store)
            assert run(store, command, key="key") == 1
        alter(path, f"UPDATE outcomes SET fingerprint = '{command.fingerprint()}'")
        with closing(open_groups(path)) as store:
            assert run(store, command, key="key") == 1
            with pytest.raises(errors.IdempotencyConflictError):
                run(store, write("x", 6), key="key")

    def test_a_failure_is_not_kept(self, store: FileGroups, path: Path) -> None:
        group(store, write("missing", 1), key="key")
        assert query(path, "SELECT count(*) FROM outcomes") == [(0,)]

    def test_a_read_needs_no_key(self, store: FileGroups, path: Path) -> None:
        assert run(store, GetVariable("s", "x"), key="key").version == 0
        assert run(store, write("x", 1), key="key") == 1

    @pytest.mark.parametrize("key", ["", "x" * 256, "a\0b", "\ud800"])
    def test_an_invalid_key(self, store: FileGroups, key: str) -> None:
        with pytest.raises((errors.InvalidArgumentError, errors.LimitExceededError), match="idempotency key"):
            run(store, write("x", 1), key=key)


class TestCache:
    def test_a_tiny_one_changes_nothing_but_speed(self, path: Path) -> None:
        with closing(open_groups(path, StoreOptions(cache_size_bytes=1))) as store:
            ids = [f"s{number}" for number in range(12)]
            for session_id in ids:
                begin(store, session_id, name=session_id)
                run(store, RegisterVariable(session_id, "y", "string", Value(f'"{session_id}"'), metadata={"a": "1"}))
                run(store, AddDependency(session_id, "y", "x"))
                run(store, StartOptimization(session_id, "y", "optimizer"))
            for number in range(1, 4):
                outcomes = group(store, *(write("x", number, session_id) for session_id in ids))
                assert [outcome.result for outcome in outcomes] == [number] * len(ids)
                loaded = [session_id for session_id in ids if store.find_loaded(session_id) is not None]
                assert len(loaded) <= 1
            for session_id in reversed(ids):
                x, y = run(store, ListVariables(session_id))
                assert (x.value, x.version) == (Value("3"), 3)
                assert (y.value, y.metadata) == (Value(f'"{session_id}"'), {"a": "1"})
                assert y.optimization.optimizer_id == "optimizer"
                with pytest.raises(errors.DependencyCycleError):
                    run(store, AddDependency(session_id, "x", "y"))
                assert run(store, RollbackVariable(session_id, "x", 1)).value == Value("1")

    def test_used_sessions_mostly_stay_and_others_are_evicted(self, path: Path) -> None:
        with closing(open_groups(path, StoreOptions(cache_size_bytes=20_000))) as store:
            begin(store, "used")
            there = 0
            for number in range(40):
                begin(store, f"once {number}")
                there += store.find_loaded("used") is not None
                run(store, GetVariable("used", "x"))
            # Not always: if every session was used since the last round, one of them is evicted.
            assert there >= 30
            kept = [number for number in range(40) if store.find_loaded(f"once {number}") is not None]
            assert 0 < len(kept) < 10
            assert store._cache.size_bytes <= 20_000

    def test_weighs_what_it_holds(self, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            run(store, RegisterVariable("s", "text", "string", Value('""')))
            light = store._cache.size_bytes
            run(store, SetVariable("s", "text", Value(f'"{"x" * 50_000}"')))
            assert store._cache.size_bytes == light + 50_000
            run(store, DeleteVariable("s", "text"))
            assert store._cache.size_bytes < light
            run(store, CleanupSession("s"))
            assert store._cache.size_bytes == 0
            assert len(store._cache) == 0

    def test_loading_restores_everything(self, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            run(
                store,
                RegisterVariable("s", "y", "string", Value(f'"{"large" * 1000}"'), '{"max_length":9999}', {"a": "1"}),
            )
            run(store, SetVariables("s", {"x": Value("1"), "y": Value('"short"')}, {"b": "2"}))
            run(store, AddDependency("s", "x", "y", "uses"))
            run(store, StartOptimization("s", "x", "optimizer", {"trials": "5"}))
            run(store, SetVariable("s", "x", Value("2"), {"optimizer_id": "optimizer"}))
            state = store.find_loaded("s")
        with closing(open_groups(path)) as again:
            run(again, Heartbeat("s"))
            assert again.find_loaded("s") == state


class TestLargeValues:
    def test_are_stored_once_however_many_versions_share_them(self, store: FileGroups, path: Path) -> None:
        text, other = (Value(f'"{letter * 5_000}"') for letter in "ab")
        run(store, RegisterVariable("s", "y", "string", text))
        for value in (other, text, other, text):
            run(store, SetVariable("s", "y", value))
        assert query(path, "SELECT count(*), sum(length(content)) FROM blobs") == [(2, 2 * 5_002)]
        assert run(store, RollbackVariable("s", "y", 1)).value == other
        assert query(path, "SELECT count(*) FROM blobs") == [(2,)]


class TestAppendOnly:
    @pytest.mark.parametrize("table", ["commits", "versions", "events", "blobs"])
    def test_the_file_itself_refuses_to_rewrite_history(self, path: Path, table: str) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            run(store, RegisterVariable("s", "y", "string", Value(f'"{"large" * 1000}"')))
        column = {"commits": "actor", "versions": "value", "events": "body", "blobs": "content"}[table]
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET {column} = {column}"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                alter(path, statement)


class TestAnchor:
    @pytest.fixture
    def closed(self, path: Path) -> Path:
        """A closed database with ten commits or more."""
        with closing(open_groups(path)) as store:
            begin(store)
            group(store, *(write("x", number) for number in range(10)))
        return path

    def anchor_of(self, path: Path) -> Path:
        return path.with_name(path.name + ".anchor")

    def test_remembers_the_head_after_each_group_and_at_the_end(self, store: FileGroups, path: Path) -> None:
        for number in range(3):
            run(store, write("x", number))
            assert anchor.parse(self.anchor_of(path).read_bytes()) == store.log.head

    def test_is_never_ahead_of_durable_data(self, path: Path) -> None:
        with closing(open_groups(path, StoreOptions(durability="normal"))) as store:
            before = self.anchor_of(path).read_bytes()
            begin(store)
            assert self.anchor_of(path).read_bytes() == before, "a power cut may still take what was written"
            head = store.log.head
        assert anchor.parse(self.anchor_of(path).read_bytes()) == head

    def test_a_database_behind_it_is_refused_with_the_lost_commits(self, closed: Path, tmp_path: Path) -> None:
        old = tmp_path / "old.db"
        shutil.copy(closed, old)
        with closing(open_groups(closed)) as store:
            group(store, *(write("x", number) for number in range(5)))
            head = store.log.head.sequence
        shutil.copy(old, closed)
        with pytest.raises(errors.LostCommitsError, match=f"commits {head - 4} to {head} are gone"):
            open_groups(closed)
        self.anchor_of(closed).unlink()
        with closing(open_groups(closed)) as store:
            assert store.log.head.sequence == head - 5, "as the message says: without the anchor the loss is accepted"

    def test_a_lost_wal_is_noticed(self, store: FileGroups, path: Path, tmp_path: Path) -> None:
        run(store, write("x", 1))
        copy = tmp_path / "copy" / path.name
        copy.parent.mkdir()
        for suffix in ("", ".anchor"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
        with pytest.raises((errors.LostCommitsError, errors.NotADatabaseError)):
            open_groups(copy)

    def test_another_history_of_the_same_length_is_refused(self, closed: Path, tmp_path: Path) -> None:
        with closing(open_groups(tmp_path / "other.db")) as store:
            begin(store)
            group(store, *(write("x", number) for number in range(10, 20)))
        shutil.copy(tmp_path / "other.db", closed)
        with pytest.raises(errors.LostCommitsError, match="not the one that was acknowledged"):
            open_groups(closed)

    @pytest.mark.parametrize("damage", [b"", b"torn", b"\0" * 48, b"\xff" * 48])
    def test_a_torn_one_is_ignored(self, closed: Path, damage: bytes) -> None:
        self.anchor_of(closed).write_bytes(damage)
        with closing(open_groups(closed)) as store:
            run(store, write("x", 1))
            assert anchor.parse(self.anchor_of(closed).read_bytes()) == store.log.head

    def test_a_flipped_bit_makes_it_a_torn_one(self, closed: Path) -> None:
        content = bytearray(self.anchor_of(closed).read_bytes())
        for position in range(len(content)):
            content[position] ^= 1
            assert anchor.parse(bytes(content)) is None
            content[position] ^= 1
        assert anchor.parse(bytes(content)) is not None

    def test_a_missing_one_is_accepted(self, closed: Path) -> None:
        self.anchor_of(closed).unlink()
        with closing(open_groups(closed)) as store:
            assert run(store, GetVariable("s", "x")).version == 10

    def test_one_that_is_behind_is_no_loss(self, closed: Path) -> None:
        """A power cut may take the anchor's last write: it is not synced."""
        behind = self.anchor_of(closed).read_bytes()
        with closing(open_groups(closed)) as store:
            run(store, write("x", 1))
        self.anchor_of(closed).write_bytes(behind)
        with closing(open_groups(closed)) as store:
            assert run(store, GetVariable("s", "x")).version == 11


class TestTheTailOfTheLog:
    @pytest.mark.parametrize("needle", [b"needle in a value", b"needle in metadata", b"needle of an actor"])
    def test_a_flipped_byte_is_refused(self, path: Path, needle: bytes) -> None:
        with closing(open_groups(path)) as store:
            run(store, InitializeSession("s"))
            run(store, RegisterVariable("s", "x", "string", Value('"needle in a value"')))
            actor = Origin("needle of an actor", "test")
            store.write_group([Job(SetVariable("s", "x", Value('""'), {"m": "needle in metadata"}), actor)])
        content = bytearray(path.read_bytes())
        places = [at for at in range(len(content)) if content.startswith(needle, at)]
        assert places
        for at in places:
            content[at] ^= 1
        path.write_bytes(content)
        assert query(path, "PRAGMA integrity_check") == [("ok",)], "SQLite itself does not see it"
        with pytest.raises(errors.LostCommitsError, match="does not fit its hash"):
            open_groups(path)

    @pytest.mark.parametrize(
        "statement",
        [
            "DELETE FROM versions WHERE version = 3",
            "UPDATE versions SET value = '99' WHERE version = 3",
            "UPDATE commits SET created_at = created_at + 1 WHERE sequence = 4",
            "UPDATE events SET body = '{}'",
            "DELETE FROM commits WHERE sequence = 4",
            "INSERT INTO versions SELECT variable_key, 99, sequence, kind, source, value, value_blob, binary, "
            "binary_blob, metadata FROM versions WHERE version = 3",
        ],
    )
    def test_so_is_a_rewritten_history(self, path: Path, statement: str) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            group(store, *(write("x", number) for number in range(5)))
        triggers = [name for (name,) in query(path, "SELECT name FROM sqlite_master WHERE type = 'trigger'")]
        alter(path, *(f"DROP TRIGGER {name}" for name in triggers), statement)
        with pytest.raises(errors.LostCommitsError):
            open_groups(path)


class TestOpening:
    def test_a_second_owner_is_refused_naming_the_first(self, store: FileGroups, path: Path) -> None:
        with pytest.raises(errors.DatabaseInUseError) as error:
            open_groups(path)
        assert error.value.pid == os.getpid()
        assert str(os.getpid()) in str(error.value)
        assert run(store, write("x", 1)) == 1, "the first one is not disturbed"

    def test_also_in_another_process(self, store: FileGroups, path: Path) -> None:
        program = (
            "import sys; from pathlib import Path; from dspex_persist.state.store.session_store import open_groups\n"
            "try: open_groups(Path(sys.argv[1]))\n"
            "except Exception as error: print(type(error).__name__, error)\n"
        )
        output = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=within(60), check=True
        ).stdout
        assert output.startswith("DatabaseInUseError")
        assert f"process {os.getpid()}" in output

    def test_once_closed_another_may_own_it(self, path: Path) -> None:
        for _ in range(3):
            open_groups(path).close()

    def test_a_failed_opening_releases_the_file(self, path: Path) -> None:
        path.write_bytes(b"no database at all" * 1000)
        for _ in range(2):
            with pytest.raises(errors.NotADatabaseError):
                open_groups(path)
        path.unlink()
        open_groups(path).close()

    def test_files_are_their_owner_s_alone(self, path: Path) -> None:
        previous = os.umask(0)
        try:
            with closing(open_groups(path)) as store:
                begin(store)
                modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        finally:
            os.umask(previous)
        suffixes = ("", "-wal", "-shm", ".lock", ".anchor")
        assert modes == {f"sessions.db{suffix}": 0o600 for suffix in suffixes}

    def test_a_missing_folder_is_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(errors.NotADatabaseError, match="mkdir -p"):
            open_groups(tmp_path / "no such folder" / "sessions.db")
        assert list(tmp_path.iterdir()) == []

    def test_another_program_s_database_is_refused_and_left_alone(self, path: Path) -> None:
        alter(path, "CREATE TABLE theirs (x)")
        with pytest.raises(errors.NotADatabaseError, match="theirs"):
            open_groups(path)
        assert query(path, "SELECT name FROM sqlite_master") == [("theirs",)]

    def test_a_newer_file_is_refused_and_left_alone(self, path: Path) -> None:
        open_groups(path).close()
        alter(path, "UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(errors.NewerSchemaError, match="9999"):
            open_groups(path)
        assert query(path, "SELECT version_num FROM alembic_version") == [("9999",)]

    def test_a_folder_is_no_database(self, tmp_path: Path) -> None:
        with pytest.raises(errors.NotADatabaseError):
            open_groups(tmp_path)

    @pytest.mark.parametrize(
        "name", ["with space.db", "per%20cent.db", "question?mode=memory.db", "#hash.db", "\u00fc.db"]
    )
    def test_odd_file_names_are_just_names(self, tmp_path: Path, name: str) -> None:
        with closing(open_groups(tmp_path / name)) as store:
            begin(store)
            assert store.read_stored(GetVariable("s", "x"), ADA, None).version == 0
        assert (tmp_path / name).stat().st_size > 0

    def test_readers_of_the_file_are_welcome_while_it_is_owned(self, store: FileGroups, path: Path) -> None:
        run(store, write("x", 1))
        assert query(path, "SELECT value FROM versions ORDER BY version") == [("0",), ("1",)]


class TestTime:
    def test_a_ttl_continues_across_a_restart(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store, ttl_seconds="100")
        pass_s(frozen, 99)
        with closing(open_groups(path)) as store:
            assert run(store, GetVariable("s", "x")).version == 0
        pass_s(frozen, 99)
        with closing(open_groups(path)) as store:
            assert run(store, Heartbeat("s")) is True, "the read of 99 s ago was a touch"

    def test_it_ends_at_most_a_twentieth_late_and_never_early(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store, ttl_seconds="100")
        pass_s(frozen, 100)
        with closing(open_groups(path)) as store:
            assert run(store, GetVariable("s", "x")).version == 0
        pass_s(frozen, 300)
        with closing(open_groups(path)) as store:
            assert run(store, Heartbeat("s")) is False
            with pytest.raises(errors.SessionNotFoundError):
                run(store, write("x", 1))

    @pytest.mark.parametrize("step_s", [0.7, 2.4, 30])
    def test_a_restart_or_an_eviction_never_shortens_a_ttl(
        self, frozen: FrozenDateTimeFactory, path: Path, step_s: float
    ) -> None:
        """Touches are written only now and then: a lost one must not shorten the session's life."""
        store = open_groups(path, StoreOptions(cache_size_bytes=1))
        begin(store, ttl_seconds="100")
        for number in range(60):
            pass_s(frozen, step_s)
            state = store.find_loaded("s")
            command = GetVariable("s", "x")
            if state is None:
                assert run(store, command).version == 0
                state = store.find_loaded("s")
            else:
                assert store.read_current(command, ADA, state).version == 0
            assert state is not None
            assert state.lease is not None
            if state.lease.is_unsaved():
                run(store, TouchSession("s"))
            begin(store, f"other {number}")
            if number % 7 == 0:
                store.close()
                store = open_groups(path, StoreOptions(cache_size_bytes=1))
        pass_s(frozen, 99.9)
        assert run(store, Heartbeat("s"))
        store.close()

    def test_a_lock_that_ended_while_the_file_was_closed_is_not_listed(
        self, frozen: FrozenDateTimeFactory, path: Path
    ) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            run(store, StartOptimization("s", "x", "optimizer"))
        for passed_s, is_locked in ((200, True), (101, False)):
            pass_s(frozen, passed_s)
            with closing(open_groups(path)) as store:
                (variable,) = run(store, ListVariables("s"))
                assert (variable.optimization is not None) == is_locked

    def test_a_touch_is_no_commit(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store, ttl_seconds="100")
            head = store.log.head
            pass_s(frozen, 50)
            run(store, TouchSession("s"))
            assert store.log.head == head
            ((expires_at,),) = query(path, "SELECT expires_at FROM sessions")
            assert expires_at == 1_893_456_000_000_000 + 150_000_000

    def test_sweeping_ends_what_has_expired_and_nothing_else(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        with closing(open_groups(path)) as store:
            group(store, *(InitializeSession(f"short {number}", {"ttl_seconds": "10"}) for number in range(250)))
            begin(store, "long", ttl_seconds="1000")
            begin(store, "ever")
            assert store.sweep() == 0
            pass_s(frozen, 10)
            assert store.sweep() == 250
            assert store.sweep() == 0
            assert query(path, "SELECT count(*) FROM sessions WHERE ended_sequence IS NULL") == [(2,)]
            assert query(path, "SELECT DISTINCT actor, cause FROM commits WHERE sequence > 254") == [
                ("dspex-persist", "expiry")
            ]
            assert run(store, Heartbeat("long"))
            assert store.find_loaded("short 1") is None

    def test_a_session_that_was_touched_in_memory_is_not_swept(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store, ttl_seconds="100")
            pass_s(frozen, 2)
            state = store.find_loaded("s")
            assert state is not None
            store.read_current(Heartbeat("s"), ADA, state)
            pass_s(frozen, 99)
            assert store.sweep() == 0, "the file does not know of the touch yet"
            assert run(store, Heartbeat("s"))

    def test_an_expired_session_is_ended_before_its_id_is_used_again(
        self, frozen: FrozenDateTimeFactory, path: Path
    ) -> None:
        with closing(open_groups(path)) as store:
            begin(store, ttl_seconds="10")
            pass_s(frozen, 10)
            assert not run(store, InitializeSession("s")).resumed
            rows = query(path, "SELECT started_sequence, ended_sequence FROM sessions ORDER BY session_key")
            assert rows == [(1, 3), (4, None)]

    def test_a_lease_continues_across_a_restart(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            run(store, StartOptimization("s", "x", "optimizer", {"trials": "5"}))
            pass_s(frozen, 200)
            run(store, SetVariable("s", "x", Value("1"), {"optimizer_id": "optimizer"}))
            lock = run(store, GetVariable("s", "x")).optimization
        pass_s(frozen, 299)
        with closing(open_groups(path)) as store:
            assert run(store, GetVariable("s", "x")).optimization == lock
            with pytest.raises(errors.VariableLockedError, match="'optimizer'"):
                run(store, write("x", 2))
        pass_s(frozen, 1)
        with closing(open_groups(path)) as store:
            assert run(store, GetVariable("s", "x")).optimization is None
            assert run(store, write("x", 2)) == 2

    def test_a_holder_that_only_asks_again_keeps_its_lease_over_a_restart(
        self, frozen: FrozenDateTimeFactory, path: Path
    ) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            first = run(store, StartOptimization("s", "x", "optimizer"))
            pass_s(frozen, 200)
            assert run(store, StartOptimization("s", "x", "optimizer")) == first
        pass_s(frozen, 299)
        with closing(open_groups(path)) as store:
            with pytest.raises(errors.VariableLockedError):
                run(store, write("x", 2))
            pass_s(frozen, 1)
            assert run(store, write("x", 2)) == 1

    def test_times_come_back_exactly(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        pass_s(frozen, 0.123456)
        with closing(open_groups(path)) as store:
            begin(store)
            before = run(store, GetVariable("s", "x"))
        with closing(open_groups(path)) as store:
            assert run(store, GetVariable("s", "x")) == before
            assert before.updated_at.microsecond == 123_456

    def test_answers_are_forgotten_after_the_retention(self, frozen: FrozenDateTimeFactory, path: Path) -> None:
        with closing(open_groups(path, StoreOptions(outcome_retention_s=100))) as store:
            begin(store)
            run(store, write("x", 1), key="old")
            pass_s(frozen, 60)
            run(store, write("x", 2), key="young")
            pass_s(frozen, 40)
            store.sweep()
            assert run(store, write("x", 1), key="old") == 1, "not older than the retention yet"
            pass_s(frozen, 1)
            store.sweep()
            assert run(store, write("x", 2), key="young") == 2
            assert run(store, write("x", 1), key="old") == 3, "forgotten: it counts as a new request"


class TestHousekeeping:
    def test_a_sweep_that_sqlite_refuses_for_certain_is_tried_again(self, path: Path) -> None:
        """A full disk must not end the engine because it was full while there was nothing to do but tidy up."""
        with closing(open_groups(path)) as store:
            begin(store)
            run(store, write("x", 1), key="key")
        alter(path, f"CREATE TRIGGER planted BEFORE DELETE ON outcomes BEGIN {PLANTED}; END")
        with closing(open_groups(path, StoreOptions(outcome_retention_s=1e-6))) as store:
            store.sweep()
            assert run(store, write("x", 2)) == 2


class TestTimeThatIsSet:
    """The wall clock jumps: an administrator, a machine without a battery, a virtual machine that was asleep."""

    @pytest.fixture
    def jump(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
        """Sets the wall clock, and nothing else, forward or back."""
        wall = clock._wall

        def by(distance: timedelta) -> None:
            monkeypatch.setattr(clock, "_wall", lambda: wall() + distance)

        return by

    def times(self, path: Path) -> list[int]:
        return [at for (at,) in query(path, "SELECT created_at FROM commits ORDER BY sequence")]

    def test_commits_never_go_back(self, path: Path, jump: Callable[[timedelta], None]) -> None:
        with closing(open_groups(path)) as store:
            begin(store)
            jump(timedelta(days=-20_000))
            run(store, write("x", 1))
            last = run(store, GetVariable("s", "x")).updated_at
        with closing(open_groups(path)) as store:
            run(store, write("x", 2))
            assert run(store, GetVariable("s", "x")).updated_at == last
            jump(timedelta(0))
            run(store, write("x", 3))
            assert run(store, GetVariable("s", "x")).updated_at > last
        assert self.times(path) == sorted(self.times(path))

    def test_an_imported_session_s_times_are_its_own(self, path: Path, tmp_path: Path) -> None:
        with freeze_time("2090-01-01"), closing(open_groups(tmp_path / "other.db")) as other:
            begin(other, "old")
            recorded = StringIO()
            write_recording(*recordings.read_session(other.log.readers, "old"), recorded)
        transfer.import_session(path, recorded.getvalue().splitlines(), options=StoreOptions())
        with closing(open_groups(path)) as store:
            begin(store)
            assert run(store, GetVariable("s", "x")).updated_at.year < 2090

    @pytest.mark.parametrize("distance", [timedelta(days=400), timedelta(days=-400)], ids=["forward", "back"])
    def test_it_ends_no_session(self, path: Path, jump: Callable[[timedelta], None], distance: timedelta) -> None:
        with closing(open_groups(path)) as store:
            begin(store, ttl_seconds="3600")
            assert run(store, write("x", 1), key="once") == 1
            jump(distance)
            assert store.sweep() == 0
            assert store.read_current(Heartbeat("s"), ADA, store.load("s") or pytest.fail("it has ended"))
            assert run(store, Heartbeat("s"))
            assert run(store, write("x", 1), key="once") == 1, "the outcome is kept for its full time"
            assert run(store, write("x", 2)) == 2

    def test_time_that_really_passes_ends_it(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        began = clock.steady()
        with closing(open_groups(path)) as store:
            begin(store, ttl_seconds="3600")
            monkeypatch.setattr(clock, "steady", lambda: began + timedelta(seconds=3_700))
            assert not run(store, Heartbeat("s"))
            assert store.sweep() == 1
