"""The store compared with an independent oracle: random commands, restarts, kills, and failures of any SQL statement.

`STORE_MODEL_EXAMPLES` and `STORE_MODEL_STEPS` make it longer; `STORE_MODEL_SHRINK=1` shrinks failing examples (slowly).
"""

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, event

from dspex_persist import clock
from dspex_persist.state.anchor import Head, parse
from dspex_persist.state.commands import (
    AddDependency,
    CleanupSession,
    Command,
    DeleteVariable,
    Heartbeat,
    InitializeSession,
    ListVariables,
    RegisterVariable,
    RemoveDependency,
    RollbackVariable,
    SetVariable,
    SetVariables,
    StartOptimization,
    StopOptimization,
    TouchSession,
)
from dspex_persist.state.errors import OutcomeUnknownError, SessionNotFoundError, StorageError
from dspex_persist.state.groups import Groups, Job, Outcome
from dspex_persist.state.model import Origin, PrunePolicy, Source, Value
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store.engine import open_readers, snapshot
from dspex_persist.state.store.history import prune_plan
from dspex_persist.state.store.log import LogWriter
from dspex_persist.state.store.session_store import FileGroups, StoreOptions, open_groups
from dspex_persist.state.store.verify import iter_problems, schema_problems
from dspex_persist.state.watch import Feed
from tests.property.store_oracle import LEASE_S, Entry, Oracle, Var

EXAMPLES = int(os.environ.get("STORE_MODEL_EXAMPLES", "35"))
STEPS = int(os.environ.get("STORE_MODEL_STEPS", "30"))
# Shrinking takes minutes, so it is only for debugging a failure.
PHASES = [
    phase for phase in Phase if phase not in (Phase.shrink, Phase.explain) or os.environ.get("STORE_MODEL_SHRINK")
]
START = datetime(2030, 1, 1, tzinfo=UTC)

SESSIONS = st.sampled_from(["alpha", "beta"])
NAMES = st.sampled_from(["a", "b", "c"])
IDENTIFIERS = st.sampled_from(["a", "b", "a", "b", "a", "b", "c", "#a", "#b", "ghost"])
"""`#a` stands for the id of the variable named a."""
CURRENT = 1_000_000
"""As an expected version: whatever the variable's version is."""
LARGE = json.dumps("x" * 1500)
VALUES = st.sampled_from(["1", "7", "49", "0", "-3", "12", "51", '"hi"', '"longer than eight"', LARGE]).map(Value)
METADATA: st.SearchStrategy[dict[str, str]] = st.sampled_from(
    [{}, {}, {"k": "1"}, {"k": "2", "j": "3"}, {"optimizer_id": "opt1"}, {"optimizer_id": "opt2"}, {"source": "python"}]
)
SESSION_METADATA: st.SearchStrategy[dict[str, str]] = st.sampled_from([{}, {"owner": "me"}, {"ttl_seconds": "100"}])
TYPES = st.sampled_from([("integer", ""), ("integer", ""), ("integer", '{"max": 50}'), ("string", '{"max_length": 8}')])
OPTIMIZERS = st.sampled_from(["opt1", "opt2"])
ORIGINS = st.builds(
    Origin,
    actor=st.sampled_from(["ann", "bob"]),
    cause=st.just("test"),
    source=st.sampled_from(Source),
    idempotency_key=st.sampled_from([None, None, None, "k1", "k2", "k3"]),
    optimizer_id=st.sampled_from([None, None, "opt1", "opt2"]),
)


def _register(session_id: str, name: str, kind: tuple[str, str], value: Value, metadata: dict[str, str]) -> Any:
    return RegisterVariable(session_id, name, kind[0], value, kind[1], metadata)


_SET = st.builds(
    SetVariable,
    SESSIONS,
    IDENTIFIERS,
    VALUES,
    METADATA,
    st.sampled_from([None, None, None, CURRENT, CURRENT, 0, 1, 2, -1]),
)
_BATCH = st.builds(SetVariables, SESSIONS, st.dictionaries(IDENTIFIERS, VALUES, max_size=4), METADATA, st.booleans())
_FREQUENT: list[st.SearchStrategy[Any]] = [
    _SET,
    _SET,
    _SET,
    _BATCH,
    _BATCH,
    st.builds(_register, SESSIONS, NAMES, TYPES, VALUES, METADATA),
    st.builds(RollbackVariable, SESSIONS, IDENTIFIERS, st.integers(-1, 4)),
    st.builds(AddDependency, SESSIONS, IDENTIFIERS, IDENTIFIERS, st.sampled_from(["", "uses"])),
    st.builds(RemoveDependency, SESSIONS, IDENTIFIERS, IDENTIFIERS, st.sampled_from(["", "uses"])),
    st.builds(StartOptimization, SESSIONS, IDENTIFIERS, OPTIMIZERS),
    st.builds(StopOptimization, SESSIONS, IDENTIFIERS, st.booleans()),
]
_RARE: list[st.SearchStrategy[Any]] = [
    st.builds(InitializeSession, SESSIONS, SESSION_METADATA),
    st.builds(DeleteVariable, SESSIONS, IDENTIFIERS),
    st.builds(CleanupSession, SESSIONS),
]
COMMANDS: st.SearchStrategy[Command[Any]] = st.one_of(*_FREQUENT, *_FREQUENT, *_RARE)
Group: TypeAlias = list[tuple[Command[Any], Origin]]
GROUPS: st.SearchStrategy[Group] = st.lists(st.tuples(COMMANDS, ORIGINS), min_size=1, max_size=5)
ANN = Origin("ann", "test")
WORK: st.SearchStrategy[Group] = st.lists(st.tuples(st.one_of(_SET, _BATCH), st.just(ANN)), min_size=2, max_size=8)


class StatementFaults:
    """Calls `act` with the cursor right before the n-th statement that the store's writer executes from now on.

    COMMIT counts as a statement, unless `commits` is false.
    """

    def __init__(self, store: FileGroups, nth: int, act: Callable[[Any], None], *, commits: bool = True) -> None:
        self._store = store
        self._left = nth
        self._act = act
        self._commits = commits
        self.happened = False

    def _statement(self, cursor: Any, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self.happened = True
            self._act(cursor)

    def _commit(self, connection: Connection) -> None:
        if self._commits:
            self._statement(connection.connection.cursor())

    @contextmanager
    def installed(self) -> Iterator[None]:
        engine = self._store.log._writer
        listeners: list[tuple[str, Callable[..., None]]] = [
            ("do_execute", self._statement),
            ("do_executemany", self._statement),
            ("do_execute_no_params", self._statement),
            ("commit", self._commit),
        ]
        for name, listener in listeners:
            event.listen(engine, name, listener)
        try:
            yield
        finally:
            for name, listener in listeners:
                event.remove(engine, name, listener)


def sqlite_error(code: int) -> sqlite3.OperationalError:
    """The driver's exception for `code`."""
    error = sqlite3.OperationalError(f"planted error {code}")
    error.sqlite_errorcode = code
    return error


def disk_full(cursor: Any) -> None:
    """SQLITE_FULL, which rolls back the transaction automatically."""
    if cursor.connection.in_transaction:
        cursor.connection.execute("ROLLBACK")
    raise sqlite_error(sqlite3.SQLITE_FULL)


def busy(_cursor: Any) -> None:
    """An error of one statement: the transaction stays open."""
    raise sqlite_error(sqlite3.SQLITE_BUSY)


def io_error(_cursor: Any) -> None:
    """An error after which the contents of the disk are unknown."""
    raise sqlite_error(sqlite3.SQLITE_IOERR)


@cache
def _empty_database() -> Path:
    """A database without sessions, to copy: migrating takes longer than a whole example."""
    folder = Path(tempfile.mkdtemp(prefix="store-model-"))
    open_groups(folder / "empty.db").close()
    return folder / "empty.db"


def copy_files(source: Path, folder: Path) -> Path:
    """The files that a killed process leaves: the database, its WAL, its anchor; not the -shm, which is memory."""
    target = folder / source.name
    for suffix in ("", "-wal", ".anchor"):
        if (part := source.with_name(source.name + suffix)).exists():
            shutil.copyfile(part, target.with_name(target.name + suffix))
    return target


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The file, over a separate connection."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        yield connection


@dataclass(slots=True)
class Watcher:
    """A watcher of a session, whose updates are compared with the oracle's commits."""

    session_id: str
    first_sequence: int
    feed: Feed
    position: int


class StoreModel(RuleBasedStateMachine):
    """A store and an oracle, which have to agree after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.now = START
        self.clock = patch.object(clock, "now", lambda: self.now)
        self.clock.start()
        self.oracle = Oracle(self.now)
        self.watchers: list[Watcher] = []
        self.generation = 0
        self.options = StoreOptions(optimization_lease_s=LEASE_S)
        self.store: FileGroups | None = None

    @initialize(cache_size_bytes=st.sampled_from([1, 1 << 20]))
    def open_first(self, cache_size_bytes: int) -> None:
        self.options = replace(self.options, cache_size_bytes=cache_size_bytes)
        path = self.folder / "store.db"
        shutil.copyfile(_empty_database(), path)
        self._open(path)
        self.write([], revive=True)

    def teardown(self) -> None:
        try:
            if self.store is not None:
                self.store.close()
                check_log(self.path, self.oracle)
        finally:
            self.clock.stop()
            shutil.rmtree(self.folder)

    # Rules

    @rule(group=GROUPS, revive=st.booleans())
    def write(self, group: Group, revive: bool) -> None:
        jobs = self._jobs(group, revive)
        self._accept(jobs, self._live().write_group(jobs))

    @rule(group=WORK)
    def work(self, group: Group) -> None:
        """Most groups: values set in existing sessions."""
        self.write(group, revive=True)

    @rule(group=GROUPS, revive=st.booleans())
    def write_twice(self, group: Group, revive: bool) -> None:
        """Repeated requests with the same idempotency keys, as after a lost answer."""
        jobs = [
            Job(job.command, replace(job.origin, idempotency_key=f"twice {self.oracle.sequence} {index}"))
            for index, job in enumerate(self._jobs(group, revive))
        ]
        for _ in range(2):
            self._accept(jobs, self._live().write_group(jobs))

    @rule(group=GROUPS, nth=st.integers(1, 14), fault=st.sampled_from([disk_full, busy, io_error, None]))
    def fail_inside(self, group: Group, nth: int, fault: Callable[[Any], None] | None) -> None:
        """The n-th statement of the group's transaction, including COMMIT, fails, or the process dies before it."""
        jobs = self._jobs(group, revive=False)
        copies: list[Path] = []
        # With one writer, COMMIT is never busy.
        die = fault or (lambda _: copies.append(self._copy()))
        faults = StatementFaults(self._live(), nth, die, commits=fault is not busy)
        try:
            with faults.installed():
                outcomes = self._live().write_group(jobs)
        except OutcomeUnknownError:
            assert fault is io_error
            self._reopen_copy(self._copy())
            return
        if copies:
            self._reopen_copy(copies[0])
        elif faults.happened:
            assert fault is not io_error
            assert [type(outcome.error) for outcome in outcomes] == [StorageError] * len(jobs)
            self._touch_all()
        else:
            self._accept(jobs, outcomes)

    @rule(group=GROUPS, revive=st.booleans())
    def die_after_commit(self, group: Group, revive: bool) -> None:
        """The process dies right after COMMIT: the group is stored, though its callers got no answers."""
        jobs = self._jobs(group, revive)
        copies: list[Path] = []
        live = self._live()
        remember = live.log._anchor.write

        def copy_first(head: Head) -> None:
            copies.append(self._copy())
            remember(head)

        with patch.object(live.log._anchor, "write", copy_first):
            outcomes = live.write_group(jobs)
        self._accept(jobs, outcomes)
        if copies:
            self._reopen_copy(copies[0])

    @rule(
        seconds=st.sampled_from([0, 0, 40, 40, 40, 1000]), then=st.sampled_from(["sweep", "close", "kill", "", "", ""])
    )
    def pass_time(self, seconds: int, then: str) -> None:
        """Time passes; then perhaps a sweep, or a restart after closing or a kill."""
        self.now += timedelta(seconds=seconds)
        self.oracle.now = self.now
        if then == "kill":
            self._reopen_copy(self._copy())
        elif then == "close":
            self._live().close()
            self._open(self.path)
        elif then == "sweep":
            swept = sum(self.oracle.reclaim(session_id) for session_id in list(self.oracle.sessions))
            assert self._live().sweep() == swept

    @rule(session_id=SESSIONS, command=st.sampled_from([Heartbeat, ListVariables]))
    def read(self, session_id: str, command: type[Command[Any]]) -> None:
        """Reading renews the session's TTL, as in the oracle; an expired session is not found."""
        alive = self.oracle.session(session_id)
        if alive is not None:
            alive.touch(self.now)
        [outcome] = self._live().write_group([Job(command(session_id), ANN)])
        if command is Heartbeat:
            assert outcome == Outcome(alive is not None)
        elif alive is None:
            assert isinstance(outcome.error, SessionNotFoundError)
        else:
            assert [variable.name for variable in outcome.result] == list(alive.variables)
        self._save_touch(session_id)

    @precondition(lambda self: len(self.watchers) < 3)
    @rule(session_id=SESSIONS, back=st.integers(0, 6))
    def watch(self, session_id: str, back: int) -> None:
        """Begin to watch a session, perhaps from an earlier commit, as a resuming watcher does."""
        session = self.oracle.sessions.get(session_id)
        if session is not None:
            self._join(session_id, session.first_sequence, max(0, self.oracle.sequence - back))

    # Invariants after every step

    @invariant()
    def agrees(self) -> None:
        if self.store is None:
            return
        store = self.store
        assert (store.log.head.sequence, self.oracle.sequence) == (self.oracle.sequence, store.log.head.sequence)
        with reading(self.path) as connection:
            file = FileView(connection)
            assert file.head() == (store.log.head.sequence, store.log.head.hash)
            for session_id in ("alpha", "beta"):
                expected = self._expected_session(session_id)
                assert file.session(session_id) == expected
                if (state := store.find_loaded(session_id)) is not None:
                    assert _memory_view(state) == expected
                self._check_locks(session_id)
            assert file.new_versions(self.checked) == _rows_of(self.oracle.log[self.checked :])
        self.checked = len(self.oracle.log)
        for watcher in self.watchers:
            self._check_watcher(watcher)

    checked = 0

    def _expected_session(self, session_id: str) -> Any:
        session = self.oracle.sessions.get(session_id)
        if session is None:
            return None
        variables = [
            (v.id, v.name, v.type, v.value, v.version, dict(v.metadata), v.source) for v in session.variables.values()
        ]
        return (dict(session.metadata), session.ttl_s, session.first_sequence, variables, sorted(session.dependencies))

    def _check_locks(self, session_id: str) -> None:
        session = self.oracle.sessions.get(session_id)
        state = self._live().find_loaded(session_id)
        if session is None or state is None:
            return
        for variable in session.variables.values():
            kept = state.variables[variable.name].optimization
            live = (kept.id, kept.optimizer_id) if kept is not None and kept.expires_at() > self.now else None
            assert live == _live_lock(variable, self.now)

    def _check_watcher(self, watcher: Watcher) -> None:
        """Memory and file deliver all commits since the last check: whole, in order, each exactly once."""
        session = self.oracle.sessions.get(watcher.session_id)
        after = watcher.position
        if session is None or session.first_sequence != watcher.first_sequence or after == self.oracle.sequence:
            return
        expected = [
            (sequence, [_change_of(entry) for entry in sorted(entries, key=Entry.place)])
            for sequence, entries in session.commits
            if sequence > after
        ]
        remembered = watcher.feed.after(after)
        if remembered is not None:
            assert [_commit_of(commit) for commit in remembered] == expected
        if remembered is None or self.oracle.sequence % 4 == 0:
            filed = self._live().log.changes_after(self._state(watcher.session_id), after, 1000)
            assert [_commit_of(commit) for commit in filed] == expected
        watcher.position = self.oracle.sequence

    # Implementation of the rules

    @property
    def path(self) -> Path:
        return self._live().log.path

    def _live(self) -> FileGroups:
        assert self.store is not None
        return self.store

    def _open(self, path: Path) -> None:
        self.store = open_groups(path, self.options)
        followed, self.watchers = self.watchers, []
        for watcher in followed:
            session = self.oracle.sessions.get(watcher.session_id)
            if session is not None and session.first_sequence == watcher.first_sequence:
                self._join(watcher.session_id, watcher.first_sequence, watcher.position)

    def _join(self, session_id: str, first_sequence: int, position: int) -> None:
        feed = self._live().hub.join(first_sequence, object())
        self.watchers.append(Watcher(session_id, first_sequence, feed, position))

    def _state(self, session_id: str) -> SessionState:
        loaded = self._live().find_loaded(session_id)
        if loaded is None:
            with snapshot(self._live().log.readers) as connection:
                loaded = stored_sessions.load(connection, session_id)
        assert loaded is not None
        return loaded

    def _copy(self) -> Path:
        self.generation += 1
        folder = self.folder / str(self.generation)
        folder.mkdir()
        return copy_files(self.path, folder)

    def _reopen_copy(self, copy: Path) -> None:
        """Continue with the copy, without the old process's memory."""
        self._live().close()
        self._open(copy)

    def _jobs(self, group: Group, revive: bool) -> list[Job]:
        """The group as jobs; with `revive`, missing sessions and variables are created first."""
        jobs = [Job(self._resolve(command), origin) for command, origin in group]
        return [*self._missing(), *jobs] if revive else jobs

    def _missing(self) -> Iterator[Job]:
        for session_id in ("alpha", "beta"):
            session = self.oracle.session(session_id)
            if session is None:
                yield Job(InitializeSession(session_id), ANN)
            for name in ("a", "b"):
                if session is None or name not in session.variables:
                    yield Job(RegisterVariable(session_id, name, "integer", Value("0")), ANN)

    def _resolve(self, command: Any) -> Any:
        """The command with `#a` replaced by the current id of variable a."""
        changes: dict[str, Any] = {
            name: self._id_of(command.session_id, getattr(command, name))
            for name in ("identifier", "from_variable", "to_variable")
            if hasattr(command, name)
        }
        if hasattr(command, "updates"):
            changes["updates"] = {
                self._id_of(command.session_id, identifier): value for identifier, value in command.updates.items()
            }
        if isinstance(command, SetVariable) and command.expected_version == CURRENT:
            changes["expected_version"] = self._version_of(command.session_id, changes["identifier"])
        return replace(command, **changes)

    def _version_of(self, session_id: str, identifier: str) -> int:
        session = self.oracle.sessions.get(session_id)
        variable = session.find(identifier) if session is not None else None
        return variable.version if variable is not None else 1

    def _id_of(self, session_id: str, identifier: str) -> str:
        session = self.oracle.sessions.get(session_id)
        if not identifier.startswith("#") or session is None or identifier[1:] not in session.variables:
            return identifier
        return session.variables[identifier[1:]].id

    def _accept(self, jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
        for job, outcome in zip(jobs, outcomes, strict=True):
            self.oracle.check(job.command, job.origin, outcome)

    def _touch_all(self) -> None:
        """Renew the TTL of all sessions, because a failed group may have done so for any of them."""
        self.oracle.touch_all()
        for session_id in ("alpha", "beta"):
            self._live().write_group([Job(Heartbeat(session_id), ANN)])
            self._save_touch(session_id)

    def _save_touch(self, session_id: str) -> None:
        """Save the renewed expiry, as a provider does after a read."""
        state = self._live().find_loaded(session_id)
        if state is not None and state.lease is not None and state.lease.is_unsaved():
            self._live().write_group([Job(TouchSession(session_id), ANN)])
            assert self.oracle.reclaim(session_id) or not state.lease.is_unsaved()


class FileView:
    """Reads the file with SQL that is independent of the store's."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def _rows(self, sql: str, *parameters: Any) -> list[Any]:
        return self._connection.execute(sql, parameters).fetchall()

    def head(self) -> Any:
        rows = self._rows("SELECT sequence, hash FROM commits ORDER BY sequence DESC LIMIT 1")
        return rows[0] if rows else (0, bytes(32))

    def commits(self) -> list[Any]:
        return self._rows("SELECT sequence, actor, cause FROM commits ORDER BY sequence")

    def session(self, session_id: str) -> Any:
        sessions = self._rows(
            "SELECT session_key, metadata, ttl_s, started_sequence FROM sessions"
            " WHERE session_id = ? AND ended_sequence IS NULL",
            session_id,
        )
        if not sessions:
            return None
        [(key, metadata, ttl_s, started)] = sessions
        rows = self._rows(
            "SELECT v.variable_id, v.name, v.type, coalesce(n.value, CAST(b.content AS TEXT)), n.version, v.metadata,"
            " n.source FROM variables v JOIN versions n USING (variable_key)"
            " LEFT JOIN blobs b ON b.blob_key = n.value_blob WHERE v.session_key = ? AND v.deleted_sequence IS NULL"
            " AND n.version = (SELECT max(version) FROM versions WHERE variable_key = v.variable_key)"
            " ORDER BY v.variable_key",
            key,
        )
        variables = [(*row[:5], json.loads(row[5]), ("elixir", "python")[row[6]]) for row in rows]
        edges = self._rows(
            "SELECT from_id, to_id, type FROM dependencies WHERE session_key = ? AND until_sequence IS NULL", key
        )
        return (json.loads(metadata), ttl_s, started, variables, sorted(edges))

    def new_versions(self, known: int) -> list[Any]:
        """All versions except the first `known` ones, as rows in the order of the log."""
        rows = self._rows(
            "SELECT v.variable_id, n.version, n.kind, coalesce(n.value, CAST(b.content AS TEXT)),"
            " coalesce(n.metadata, '{}'), n.source, c.actor, c.cause, c.created_at, n.sequence FROM versions n"
            " JOIN variables v USING (variable_key) JOIN commits c USING (sequence)"
            " LEFT JOIN blobs b ON b.blob_key = n.value_blob"
            " ORDER BY n.sequence, n.variable_key, n.version LIMIT -1 OFFSET ?",
            known,
        )
        return [(*row[:4], json.loads(row[4]), *row[5:]) for row in rows]


KINDS = ("registered", "set", "rolled_back", "deleted", "lock_broken")


def _rows_of(log: Sequence[Entry]) -> list[Any]:
    return [_row_of(entry) for entry in sorted(log, key=Entry.place)]


def _row_of(entry: Entry) -> Any:
    return (
        entry.variable_id,
        entry.version,
        KINDS.index(entry.kind),
        entry.value,
        dict(entry.metadata),
        ("elixir", "python").index(entry.source),
        entry.actor,
        entry.cause,
        clock.to_micros(entry.created_at),
        entry.sequence,
    )


def _memory_view(state: Any) -> Any:
    variables = [
        (v.id, v.name, v.type, v.value.json, v.version, dict(v.metadata), v.source.value)
        for v in state.variables.values()
    ]
    edges = sorted((edge.from_id, edge.to_id, edge.type) for edge in state.dependencies if edge.until is None)
    return (dict(state.session.metadata), state.session.ttl_s, state.session.sequence, variables, edges)


def _live_lock(variable: Var, now: datetime) -> tuple[str, str] | None:
    lock = variable.lock
    return (lock.id, lock.optimizer_id) if lock is not None and lock.until > now else None


def _change_of(entry: Entry) -> Any:
    return (entry.variable_id, entry.version, entry.kind, entry.value)


def _commit_of(commit: Any) -> Any:
    changes = [
        (c.version.variable_id, c.version.version, c.version.kind.value, c.version.value and c.version.value.json)
        for c in commit.changes
    ]
    return (commit.sequence, changes)


def check_log(path: Path, oracle: Oracle) -> None:
    """Check the closed file at the end: it has exactly the expected commits and versions, with the right hashes."""
    assert_sound(path)
    with reading(path) as connection:
        file = FileView(connection)
        assert file.commits() == oracle.commits
        assert file.new_versions(0) == _rows_of(oracle.log)


def assert_sound(path: Path) -> None:
    """Check that `db check` finds nothing in a closed file."""
    anchor = parse(path.with_name(path.name + ".anchor").read_bytes())
    readers = open_readers(path, 1)
    try:
        with snapshot(readers) as checked:
            assert list(schema_problems(checked)) == []
        assert [str(problem) for problem in iter_problems(readers, anchor)] == []
    finally:
        readers.dispose()
    with reading(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


class PruningModel(StoreModel):
    """The same model; once in each run, a copy of the file is pruned."""

    has_pruned = False

    @precondition(lambda self: not self.has_pruned)
    @rule(
        keep_versions=st.sampled_from([None, 1, 1, 2, 3]),
        age_s=st.sampled_from([None, 0, 40]),
        ended_age_s=st.sampled_from([None, 0, 40]),
    )
    def prune_a_copy(self, keep_versions: int | None, age_s: int | None, ended_age_s: int | None) -> None:
        """Check that a pruned file is sound, and has the same current state and a part of the history."""
        ages = [None if age is None else self.now - timedelta(seconds=age) for age in (age_s, ended_age_s)]
        policy = PrunePolicy(keep_versions, *ages)
        if policy == PrunePolicy():
            return
        self.has_pruned = True
        store = open_groups(self._copy(), self.options)

        def carry_out(jobs: list[Job]) -> None:
            assert [outcome.error for outcome in store.write_group(jobs)] == [None] * len(jobs)

        prune_plan.run(store.log.readers, policy, carry_out, lambda *_: None)
        store.close()
        assert_sound(store.log.path)
        with reading(store.log.path) as connection:
            file = FileView(connection)
            for session_id, session in self.oracle.sessions.items():
                # An expired session ends with the first job that writes to it.
                if not session.has_expired(self.now):
                    assert file.session(session_id) == self._expected_session(session_id)
            written = {row[:2]: row for row in _rows_of(self.oracle.log)}
            assert all(row == written[row[:2]] for row in file.new_versions(0))


def run_model(examples: int, model: type[StoreModel] = StoreModel, **more: Any) -> None:
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            phases=PHASES,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            **more,
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.thorough)])
def test_store_agrees_with_the_oracle(times: int) -> None:
    run_model(times * EXAMPLES, PruningModel)


# A model that never finds a bug proves nothing


_apply = Groups._apply
_flush = LogWriter.flush


def publish_before_commit(self: FileGroups, jobs: Any, drafts: Any, at: Any) -> Any:
    """Publish the drafts of a failed group, which the file does not have."""
    applied = _apply(self, jobs, drafts, at)
    for session_id, state in drafts.states.items():
        if state is not None:
            self._cache.put(session_id, state)
    return applied


def commit_in_two(self: LogWriter) -> None:
    """Commit the first part of the transaction before the rest."""
    raw = self._connection.connection.cursor()
    raw.execute("COMMIT")
    raw.execute("BEGIN IMMEDIATE")
    _flush(self)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "planted"),
    [
        pytest.param(Groups, "_apply", publish_before_commit, marks=pytest.mark.thorough),
        pytest.param(LogWriter, "flush", commit_in_two, marks=pytest.mark.thorough),
    ],
)
def test_planted_bugs_are_found(owner: type, name: str, planted: Callable[..., Any]) -> None:
    # If it fails in several ways, the failures are raised as a group.
    with patch.object(owner, name, planted), pytest.raises((AssertionError, ExceptionGroup)):
        # The same examples each time, so that finding the bug does not depend on luck.
        run_model(200, database=None, derandomize=True)
