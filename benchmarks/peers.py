"""dspex-persist beside comparable libraries on the same work, in process: `make peers`, or by hand

    .venv-peers/bin/python -m benchmarks.peers [--seconds 3] [--rounds 3] [--only NAME ...] [--json FILE]

The work: 64 callers, each on a session of its own that holds 20 small float variables, in one SQLite file.

- update: one variable is set per operation, durable when the call returns
- batch:  all 20 variables are set in one durable operation
- read:   the current values of all 20 variables, after a few updates of that session
- execute: code that sets one variable is executed durably: that it began, what came of it and that it ended are on
  record when the call returns. Of us a tool in its transaction; of DBOS a workflow of one step, which it is for.
  The others have nothing like it, and DBOS has no variables.

Each adapter gets every favour that its library's public interface offers: threads or asyncio tasks, whichever
is quicker, live objects kept between calls, history left out of reads, caches on. Each library runs in a
process of its own (what it imports would slow its neighbours' garbage collection; ours in the checkout's .venv,
because its requirements are others) and each measurement on a fresh file; afterwards that file is opened again
and every session read back, so that a number stands only for values that are really there.

Exit code: 0 when every installed library was measured, 1 when one failed (its row says why).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal
from uuid import NAMESPACE_URL, UUID, uuid5

from benchmarks.disk import filesystem_of

State = dict[str, float]
Work = Literal["update", "batch", "read", "execute"]

CALLERS = 64
WARM_UPDATES = 5
NAMES = tuple(f"v{index:02d}" for index in range(20))
ZEROES: State = dict.fromkeys(NAMES, 0.0)
SESSIONS = tuple(f"caller-{index:02d}" for index in range(CALLERS))
STATE_WORKS: tuple[Work, ...] = ("update", "batch", "read")
WORKS: tuple[Work, ...] = (*STATE_WORKS, "execute")
OURS = "ours"
ROOT = Path(__file__).resolve().parents[1]
NOT_INSTALLED = "not installed: make peers"


# ---- adapters: one class a library ----


SET_HERE = "WAL and synchronous=FULL set here"
SET_BY_ITSELF = "WAL and synchronous=FULL set by the engine itself"
FULL_NOT_SETTABLE = "WAL; synchronous cannot be set from outside, so it is this build's default ({build})"


class Adapter(ABC):
    """What a library is, in words; its subclasses say how it is called.

    `works` are those that it can do, `unit` names what one durable operation writes, `lacks` what the library leaves
    to its user, `durability` how it came to WAL and `PRAGMA synchronous`; `{build}` in it stands for what this build
    of SQLite starts with.
    """

    works: ClassVar[tuple[Work, ...]] = STATE_WORKS
    title: ClassVar[str]
    distribution: ClassVar[str]
    unit: ClassVar[str]
    lacks: ClassVar[str]
    durability: ClassVar[str]


class ThreadAdapter(Adapter):
    """A library that is quickest when each caller is a thread."""

    @abstractmethod
    def open(self, path: Path, sessions: Sequence[str]) -> None:
        """Open the file and create the sessions that it does not hold yet, with every variable at 0.0."""

    @abstractmethod
    def read(self, session: str) -> State:
        """Return the current value of every variable of the session."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""


class StateAdapter(ThreadAdapter):
    """One that keeps state."""

    @abstractmethod
    def update(self, session: str, name: str, value: float) -> None:
        """Set one variable; durable on return."""

    @abstractmethod
    def update_many(self, session: str, values: Mapping[str, float]) -> None:
        """Set several variables in one durable operation."""


class ExecutingAdapter(ThreadAdapter):
    """One that executes code durably."""

    @abstractmethod
    def execute(self, session: str, name: str, value: float) -> None:
        """Execute code that sets one variable; on record on return."""


class TaskAdapter(Adapter):
    """The same for a library that speaks asyncio: each caller is a task of one loop."""

    @abstractmethod
    async def open(self, path: Path, sessions: Sequence[str]) -> None:
        """See ThreadAdapter."""

    @abstractmethod
    async def update(self, session: str, name: str, value: float) -> None:
        """See StateAdapter."""

    @abstractmethod
    async def update_many(self, session: str, values: Mapping[str, float]) -> None:
        """See StateAdapter."""

    @abstractmethod
    async def read(self, session: str) -> State:
        """See ThreadAdapter."""

    @abstractmethod
    async def close(self) -> None:
        """See ThreadAdapter."""


AnyAdapter = ThreadAdapter | TaskAdapter


class DspexPersist(StateAdapter, ExecutingAdapter):
    works = WORKS
    title = "dspex-persist"
    distribution = "dspex-persist"
    unit = (
        "one commit per call, two per tool, callers share transactions; one history row for each variable that "
        "changed, one journal entry for each tool"
    )
    lacks = "one process owns the file, ten value types; does check types, constraints, versions, a hash chain"
    durability = SET_BY_ITSELF

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        tools = import_module("dspex_persist").Toolbox()
        tools.add(import_module("benchmarks.tools").set_variable)
        self._provider: Any = import_module("dspex_persist").connect(str(path), tools=tools)
        self._decode: Any = import_module("dspex_persist.state.values").decode
        for session in sessions:
            self._provider.initialize_session(session)
            for name in NAMES:
                self._provider.register_variable(session, name, "float", 0.0)

    def execute(self, session: str, name: str, value: float) -> None:
        outcome = self._provider.execute_tool(session, "set_variable", {"name": name, "value": value})
        if not outcome.success:
            raise RuntimeError(str(outcome.error))

    def update(self, session: str, name: str, value: float) -> None:
        self._provider.set_variable(session, name, value)

    def update_many(self, session: str, values: Mapping[str, float]) -> None:
        self._provider.set_variables(session, values, atomic=True)

    def read(self, session: str) -> State:
        found = self._provider.list_variables(session)
        return {variable.name: self._decode(variable.type, variable.value) for variable in found}

    def close(self) -> None:
        self._provider.close()


class LanggraphCheckpoint(StateAdapter):
    title = "langgraph-checkpoint-sqlite"
    distribution = "langgraph-checkpoint-sqlite"
    unit = "one checkpoint: the whole state of the session, serialized again for each update"
    lacks = "no validation or constraints, history of checkpoints not of variables, no conflict check"
    durability = SET_HERE

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        self._empty_checkpoint: Any = import_module("langgraph.checkpoint.base").empty_checkpoint
        saver = import_module("langgraph.checkpoint.sqlite").SqliteSaver
        self._connection = sqlite3.connect(path, check_same_thread=False)
        _set_wal_and_full(self._connection)
        self._saver: Any = saver(self._connection)
        self._configs: dict[str, Any] = {}
        self._states: dict[str, State] = {}
        for session in sessions:
            self._open_session(session)

    def _open_session(self, session: str) -> None:
        config = {"configurable": {"thread_id": session, "checkpoint_ns": ""}}
        found = self._saver.get_tuple(config)
        self._configs[session] = found.config if found else config
        self._states[session] = dict(found.checkpoint["channel_values"]) if found else {}
        if not found:
            self.update_many(session, ZEROES)

    def update(self, session: str, name: str, value: float) -> None:
        self.update_many(session, {name: value})

    def update_many(self, session: str, values: Mapping[str, float]) -> None:
        state = self._states[session]
        state.update(values)
        checkpoint = {**self._empty_checkpoint(), "channel_values": state}
        metadata = {"source": "update", "step": 0, "parents": {}}
        self._configs[session] = self._saver.put(self._configs[session], checkpoint, metadata, {})

    def read(self, session: str) -> State:
        found = self._saver.get_tuple({"configurable": {"thread_id": session}})
        return dict(found.checkpoint["channel_values"])

    def close(self) -> None:
        self._connection.close()


class AdkSessions(TaskAdapter):
    """google-adk: a state delta is appended to a session as one event. Subclasses choose the storage."""

    distribution = "google-adk"
    unit = "one event with its state delta, the whole state rewritten beside it; one transaction per call"
    lacks = "no validation or constraints, no version per variable (the event log holds the deltas)"

    @abstractmethod
    def _service(self, path: Path) -> Any:
        """Return the session service on that file."""

    async def open(self, path: Path, sessions: Sequence[str]) -> None:
        self._new_event: Any = import_module("google.adk.events.event").Event
        self._new_actions: Any = import_module("google.adk.events.event_actions").EventActions
        get_config = import_module("google.adk.sessions.base_session_service").GetSessionConfig
        self._state_only: Any = get_config(num_recent_events=0)
        self._sessions_service: Any = self._service(path)
        self._sessions: dict[str, Any] = {}
        for session in sessions:
            self._sessions[session] = await self._load(session) or await self._create(session)

    async def _load(self, session: str) -> Any:
        return await self._sessions_service.get_session(
            app_name="peers", user_id="peers", session_id=session, config=self._state_only
        )

    async def _create(self, session: str) -> Any:
        return await self._sessions_service.create_session(
            app_name="peers", user_id="peers", session_id=session, state=dict(ZEROES)
        )

    async def update(self, session: str, name: str, value: float) -> None:
        await self.update_many(session, {name: value})

    async def update_many(self, session: str, values: Mapping[str, float]) -> None:
        actions = self._new_actions(state_delta=dict(values))
        event = self._new_event(author="peers", invocation_id="peers", actions=actions)
        await self._sessions_service.append_event(self._sessions[session], event)

    async def read(self, session: str) -> State:
        return dict((await self._load(session)).state)

    async def close(self) -> None:
        await self._sessions_service.close()


class AdkDatabaseSessions(AdkSessions):
    title = "google-adk DatabaseSessionService"
    durability = SET_HERE

    def _service(self, path: Path) -> Any:
        # Two connections: with the default fifteen the callers wait for each other in SQLite's busy handler.
        service_class = import_module("google.adk.sessions.database_session_service").DatabaseSessionService
        service = service_class(f"sqlite+aiosqlite:///{path}", pool_size=2, max_overflow=0)
        engine = service.db_engine.sync_engine
        import_module("sqlalchemy").event.listen(engine, "connect", lambda opened, _: _set_wal_and_full(opened))
        return service


class AdkSqliteSessions(AdkSessions):
    """Each call opens a connection of its own: without a queue in front, 64 callers end in "database is locked"."""

    title = "google-adk SqliteSessionService"
    durability = FULL_NOT_SETTABLE

    def _service(self, path: Path) -> Any:
        self._turn = asyncio.Semaphore(2)
        _switch_file_to_wal(path)
        return import_module("google.adk.sessions.sqlite_session_service").SqliteSessionService(str(path))

    async def update_many(self, session: str, values: Mapping[str, float]) -> None:
        async with self._turn:
            await super().update_many(session, values)


class OpenaiAgentsSession(TaskAdapter):
    title = "openai-agents SQLiteSession"
    distribution = "openai-agents"
    unit = "one conversation item that carries the whole state; one transaction per call"
    lacks = "a log of items: no state of its own, no variables, versions, validation or constraints"
    durability = FULL_NOT_SETTABLE

    async def open(self, path: Path, sessions: Sequence[str]) -> None:
        session_class = import_module("agents").SQLiteSession
        self._logs: dict[str, Any] = {session: session_class(session, path) for session in sessions}
        self._states: dict[str, State] = {}
        for session, log in self._logs.items():
            found = bool(await log.get_items(limit=1))
            self._states[session] = await self.read(session) if found else {}
            if not found:
                await self.update_many(session, ZEROES)

    async def update(self, session: str, name: str, value: float) -> None:
        await self.update_many(session, {name: value})

    async def update_many(self, session: str, values: Mapping[str, float]) -> None:
        state = self._states[session]
        state.update(values)
        await self._logs[session].add_items([{"role": "developer", "content": json.dumps(state)}])

    async def read(self, session: str) -> State:
        (item,) = await self._logs[session].get_items(limit=1)
        state: State = json.loads(item["content"])
        return state

    async def close(self) -> None:
        for log in self._logs.values():
            log.close()


class Eventsourcing(StateAdapter):
    title = "eventsourcing (SQLite)"
    distribution = "eventsourcing"
    unit = "one event of the session's aggregate; one transaction per call; reads come from its cache"
    lacks = "no types or constraints but those that the aggregate codes; versions of the aggregate, not of variables"
    durability = FULL_NOT_SETTABLE

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        application = import_module("eventsourcing.application")
        aggregate_class = _session_aggregate()
        # The only owner of the file need not look for others' events before it answers from its cache.
        self._application: Any = application.Application(
            env={
                "PERSISTENCE_MODULE": "eventsourcing.sqlite",
                "SQLITE_DBNAME": str(path),
                "AGGREGATE_CACHE_MAXSIZE": str(2 * CALLERS),
                "AGGREGATE_CACHE_FASTFORWARD": "n",
            }
        )
        self._aggregates: dict[str, Any] = {}
        for session in sessions:
            try:
                self._aggregates[session] = self._application.repository.get(_aggregate_id(session))
            except application.AggregateNotFoundError:
                self._aggregates[session] = aggregate_class(session, dict(ZEROES))
                self._application.save(self._aggregates[session])

    def update(self, session: str, name: str, value: float) -> None:
        aggregate = self._aggregates[session]
        aggregate.set_variable(name, value)
        self._application.save(aggregate)

    def update_many(self, session: str, values: Mapping[str, float]) -> None:
        aggregate = self._aggregates[session]
        aggregate.set_variables(dict(values))
        self._application.save(aggregate)

    def read(self, session: str) -> State:
        aggregate = self._application.repository.get(_aggregate_id(session), deepcopy_from_cache=False)
        return dict(aggregate.values)

    def close(self) -> None:
        self._application.close()


def _aggregate_id(session: str) -> UUID:
    return uuid5(NAMESPACE_URL, session)


@cache
def _session_aggregate() -> Any:
    """The aggregate class, built on demand: its base class is there only where the library is installed."""
    domain: Any = import_module("eventsourcing.domain")

    class SessionState(domain.Aggregate):  # type: ignore[misc]  # the base comes from an untyped import
        def __init__(self, session: str, values: State) -> None:
            self.session = session
            self.values = values

        @staticmethod
        def create_id(session: str) -> UUID:
            return _aggregate_id(session)

        @domain.event("VariableSet")  # type: ignore[untyped-decorator]
        def set_variable(self, name: str, value: float) -> None:
            self.values[name] = value

        @domain.event("VariablesSet")  # type: ignore[untyped-decorator]
        def set_variables(self, values: State) -> None:
            self.values.update(values)

    # Stored events name their class, and a class within a function is found only once its name is registered.
    import_module("eventsourcing.utils").get_topic(SessionState)
    return SessionState


class Dbos(ExecutingAdapter):
    """Two connections: with the default number the callers wait for each other in SQLite's busy handler."""

    works = ("execute",)
    title = "DBOS (SQLite)"
    distribution = "dbos"
    unit = "one workflow of one step: it with its input, who runs it, the step's result, its end; a transaction each"
    lacks = "no state of its own: no variables, no transaction around what the code reads and writes, no conflict check"
    durability = SET_HERE

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        sqlalchemy: Any = import_module("sqlalchemy")
        if not sqlalchemy.event.contains(sqlalchemy.Engine, "connect", _set_wal_and_full_on_connect):
            sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _set_wal_and_full_on_connect)
        self._set_id: Any = import_module("dbos").SetWorkflowID
        self._dbos: Any = import_module("dbos").DBOS
        self._set_variable = _dbos_workflow()
        config = {"system_database_url": f"sqlite:///{path}", "sys_db_pool_size": 2, "log_level": "ERROR"}
        self._dbos(config={"name": "peers", "application_version": "1", **config})
        self._dbos.launch()

    def execute(self, session: str, name: str, value: float) -> None:
        with self._set_id(f"{session}/{value:.0f}"):
            if self._set_variable(name, value) != {name: value}:
                raise RuntimeError("the workflow returned something else")

    def read(self, session: str) -> State:
        """What its workflows have on record, oldest first."""
        found = self._dbos.list_workflows(workflow_id_prefix=f"{session}/", status="SUCCESS")
        state = dict(ZEROES)
        for workflow in sorted(found, key=lambda each: int(each.workflow_id.rpartition("/")[2])):
            state.update(workflow.output)
        return state

    def close(self) -> None:
        self._dbos.destroy()


@cache
def _dbos_workflow() -> Any:
    """The workflow, made on demand: its decorators are there only where the library is installed."""
    dbos: Any = import_module("dbos").DBOS

    @dbos.step()  # type: ignore[untyped-decorator]
    def set_variable(name: str, value: float) -> State:
        return {name: value}

    @dbos.workflow()  # type: ignore[untyped-decorator]
    def execute(name: str, value: float) -> State:
        state: State = set_variable(name, value)
        return state

    return execute


ADAPTERS: dict[str, type[AnyAdapter]] = {
    OURS: DspexPersist,
    "langgraph": LanggraphCheckpoint,
    "adk-database": AdkDatabaseSessions,
    "adk-sqlite": AdkSqliteSessions,
    "openai-agents": OpenaiAgentsSession,
    "eventsourcing": Eventsourcing,
    "dbos": Dbos,
}


def _set_wal_and_full(connection: Any) -> None:
    """Ask for WAL and synchronous=FULL on one DB-API connection, and see that SQLite agreed."""
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode=WAL")
        (journal_mode,) = cursor.fetchone()
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA synchronous")
        (synchronous,) = cursor.fetchone()
    finally:
        cursor.close()
    if (journal_mode, synchronous) != ("wal", 2):
        raise RuntimeError(f"SQLite answered journal_mode={journal_mode}, synchronous={synchronous}")


def _set_wal_and_full_on_connect(connection: Any, _record: Any) -> None:
    _set_wal_and_full(connection)


def _switch_file_to_wal(path: Path) -> None:
    """WAL is a property of the file, so it can be set for a library that opens its own connections."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


# ---- the work ----


@dataclass(frozen=True, slots=True)
class Tally:
    """What each caller completed after the warm-up, and the time until the last of them was done."""

    operations: tuple[int, ...]
    elapsed_s: float

    @property
    def operations_per_s(self) -> float:
        return sum(self.operations) / self.elapsed_s


def expected_state(work: Work, updates: int) -> State:
    """The state of a session after that many operations of `write_operation`, the warm-up included."""
    if work == "batch" and updates:
        return dict.fromkeys(NAMES, float(updates))
    state = dict(ZEROES)
    for count in range(max(1, updates - len(NAMES) + 1), updates + 1):
        state[NAMES[count % len(NAMES)]] = float(count)
    return state


def write_operation(adapter: Any, work: Work, session: str) -> Callable[[int], Any]:
    """The count-th write of a caller; for a TaskAdapter it returns an awaitable."""
    if work == "batch":
        return lambda count: adapter.update_many(session, dict.fromkeys(NAMES, float(count)))
    if work == "execute":
        return lambda count: adapter.execute(session, NAMES[count % len(NAMES)], float(count))
    return lambda count: adapter.update(session, NAMES[count % len(NAMES)], float(count))


def timed_operation(adapter: Any, work: Work, session: str) -> Callable[[int], Any]:
    """The operation that is counted: a read where reads are measured, else the next write."""
    if work == "read":
        return lambda _: adapter.read(session)
    return write_operation(adapter, work, session)


def run_threads(adapter: ThreadAdapter, work: Work, seconds: float) -> Tally:
    """Drive 64 threads for that long. Raises what the first failing caller raised."""

    def warm(session: str) -> None:
        write = write_operation(adapter, work, session)
        for count in range(1, WARM_UPDATES + 1):
            write(count)

    def call(session: str) -> int:
        operation, count = timed_operation(adapter, work, session), WARM_UPDATES
        while time.perf_counter() < deadline:
            count += 1
            operation(count)
        return count - WARM_UPDATES

    with ThreadPoolExecutor(CALLERS) as callers:
        list(callers.map(warm, SESSIONS))
        began = time.perf_counter()
        deadline = began + seconds
        operations = tuple(callers.map(call, SESSIONS))
        return Tally(operations, time.perf_counter() - began)


async def run_tasks(adapter: TaskAdapter, work: Work, seconds: float) -> Tally:
    """The same with 64 tasks."""

    async def warm(session: str) -> None:
        write = write_operation(adapter, work, session)
        for count in range(1, WARM_UPDATES + 1):
            await write(count)

    async def call(session: str) -> int:
        operation, count = timed_operation(adapter, work, session), WARM_UPDATES
        while time.perf_counter() < deadline:
            count += 1
            await operation(count)
        return count - WARM_UPDATES

    await asyncio.gather(*map(warm, SESSIONS))
    began = time.perf_counter()
    deadline = began + seconds
    operations = tuple(await asyncio.gather(*map(call, SESSIONS)))
    return Tally(operations, time.perf_counter() - began)


def measure_threads(adapter: ThreadAdapter, path: Path, work: Work, seconds: float) -> tuple[Tally, list[State]]:
    """Measure, close, open again, and return what the callers did and what the file holds of each session."""
    adapter.open(path, SESSIONS)
    try:
        tally = run_threads(adapter, work, seconds)
    finally:
        adapter.close()
    adapter.open(path, SESSIONS)
    try:
        return tally, [adapter.read(session) for session in SESSIONS]
    finally:
        adapter.close()


async def measure_tasks(adapter: TaskAdapter, path: Path, work: Work, seconds: float) -> tuple[Tally, list[State]]:
    """See measure_threads."""
    await adapter.open(path, SESSIONS)
    try:
        tally = await run_tasks(adapter, work, seconds)
    finally:
        await adapter.close()
    await adapter.open(path, SESSIONS)
    try:
        return tally, [await adapter.read(session) for session in SESSIONS]
    finally:
        await adapter.close()


def check_states(work: Work, tally: Tally, found: Sequence[State]) -> None:
    """Raise RuntimeError where the file does not hold the last value that each caller was told is durable."""
    for session, operations, state in zip(SESSIONS, tally.operations, found, strict=True):
        wanted = expected_state(work, WARM_UPDATES + (0 if work == "read" else operations))
        if state != wanted:
            raise RuntimeError(f"{session}: read back {state}, acknowledged was {wanted}")


# ---- one library, in a process of its own ----


def measure_work(adapter: AnyAdapter, path: Path, work: Work, seconds: float) -> float:
    """Operations a second, after the file was opened again and found to hold every acknowledged value."""
    if isinstance(adapter, TaskAdapter):
        tally, states = asyncio.run(measure_tasks(adapter, path, work, seconds))
    else:
        tally, states = measure_threads(adapter, path, work, seconds)
    check_states(work, tally, states)
    return tally.operations_per_s


def describe_durability(adapter: Adapter, path: Path) -> str:
    """How the file is synced: told by the file, and by what an untouched connection to it starts with."""
    connection = sqlite3.connect(path)
    try:
        (journal_mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        # A build may have another default for WAL, which shows only after the first access.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
    finally:
        connection.close()
    if journal_mode != "wal":
        return f"journal_mode is {journal_mode}, not WAL"
    return adapter.durability.format(build=("OFF", "NORMAL", "FULL", "EXTRA")[synchronous])


def measure_library(key: str, seconds: float, directory: Path) -> dict[str, Any]:
    """Measure the works of one library in this process; the answer fits JSON, errors are part of it."""
    adapter = ADAPTERS[key]()
    try:
        answer: dict[str, Any] = {"version": version(adapter.distribution), "rates": {}}
        for work in adapter.works:
            with tempfile.TemporaryDirectory(prefix="peers-", dir=directory) as folder:
                path = Path(folder, "sessions.db")
                answer["rates"][work] = measure_work(adapter, path, work, seconds)
                answer["durability"] = describe_durability(adapter, path)
    except (PackageNotFoundError, ImportError) as error:
        return {"status": NOT_INSTALLED, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # the edge of this process: the parent prints the reason
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {"status": "measured", **answer}


def raise_open_files_limit() -> None:
    """openai-agents holds a connection for each pair of session and worker thread: several hundred."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def python_of(key: str) -> str:
    """The interpreter with a library: this one, and for ours that of the checkout if there is one."""
    own = ROOT / ".venv" / "bin" / "python"
    return str(own) if key == OURS and own.exists() else sys.executable


def run_library(key: str, seconds: float, directory: Path) -> dict[str, Any]:
    """Measure one library in a fresh process and return its answer."""
    with tempfile.TemporaryDirectory(prefix="peers-", dir=directory) as folder:
        answer = Path(folder, "answer.json")
        command = [python_of(key), "-m", "benchmarks.peers", "--measure", key, "--seconds", str(seconds)]
        command += ["--directory", folder, "--json", str(answer)]
        try:
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            ended = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=180 + 8 * seconds, env=env, check=False)
        except subprocess.TimeoutExpired as error:
            return {"status": "failed", "reason": f"did not end within {error.timeout:.0f} s"}
        if not answer.exists():
            return {"status": "failed", "reason": f"its process ended with exit code {ended.returncode}"}
        loaded: dict[str, Any] = json.loads(answer.read_text())
        return loaded


# ---- all of them, and the report ----


@dataclass(slots=True)
class Result:
    """One library over all rounds. `rates` holds operations a second, one entry a round."""

    key: str
    status: str = NOT_INSTALLED
    reason: str = ""
    version: str = ""
    durability: str = ""
    rates: dict[Work, list[float]] = field(default_factory=lambda: {work: [] for work in WORKS})

    def add_round(self, answer: Mapping[str, Any]) -> None:
        self.status = answer["status"]
        self.reason = answer.get("reason", "")
        if self.status == "measured":
            self.version, self.durability = answer["version"], answer["durability"]
            for work, rate in answer["rates"].items():
                self.rates[work].append(rate)

    def median(self, work: Work) -> float | None:
        """Operations a second, or None where a round is missing or the library does no such work."""
        return statistics.median(self.rates[work]) if self.status == "measured" and self.rates[work] else None

    def ratio_to(self, ours: Result | None, work: Work) -> float | None:
        mine, reference = self.median(work), ours.median(work) if ours else None
        return mine / reference if mine is not None and reference else None


def run_rounds(keys: Sequence[str], rounds: int, seconds: float, directory: Path) -> list[Result]:
    """Round by round over all libraries, so that a change of the machine's mood meets them alike."""
    results = [Result(key) for key in keys]
    for number in range(1, rounds + 1):
        for result in results:
            if number > 1 and result.status != "measured":
                continue
            print(f"round {number} of {rounds}: {ADAPTERS[result.key].title}", file=sys.stderr, flush=True)
            result.add_round(run_library(result.key, seconds, directory))
    return results


def describe_run(rounds: int, seconds: float, directory: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "filesystem": filesystem_of(directory),
        "callers": CALLERS,
        "variables_per_session": len(NAMES),
        "updates_before_reads": WARM_UPDATES,
        "seconds": seconds,
        "rounds": rounds,
    }


def format_number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def table_row(result: Result, ours: Result | None) -> list[str]:
    """The cells of a measured library: rate and ratio for each work, values a second for batches."""
    cells = [f"{ADAPTERS[result.key].title} {result.version}"]
    for work in WORKS:
        rate = result.median(work)
        cells.append(format_number(rate, ",.0f"))
        if work == "batch":
            cells.append(format_number(rate and rate * len(NAMES), ",.0f"))
        cells.append(format_number(result.ratio_to(ours, work), ".3f"))
    return cells


def format_table(results: Sequence[Result], ours: Result | None) -> str:
    header = [
        "library",
        "update/s",
        "of ours",
        "batch/s",
        "values/s",
        "of ours",
        "read/s",
        "of ours",
        "execute/s",
        "of ours",
    ]
    measured = [table_row(result, ours) for result in results if result.status == "measured"]
    widths = [max(map(len, column)) for column in zip(header, *measured, strict=True)]
    lines = []
    for cells in [header, ["-" * width for width in widths], *measured]:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append("  ".join([cells[0].ljust(widths[0]), *numbers]))
    for result in results:
        if result.status != "measured":
            lines.append(f"{ADAPTERS[result.key].title}  {result.status} ({result.reason})")
    return "\n".join(lines)


def format_report(results: Sequence[Result], run: Mapping[str, Any]) -> str:
    ours = find_ours(results)
    lines = [
        f"Python {run['python']}, SQLite {run['sqlite']}, {run['cpus']} CPUs, files on {run['filesystem']}",
        f"{CALLERS} callers in one process, each on a session of its own with {len(NAMES)} float variables; "
        f"{run['seconds']:g} s a measurement, median of {run['rounds']}",
        "update: one variable; batch: all 20 in one durable operation; read: all 20 current values; execute: code that",
        "sets one variable, as a tool in its transaction (ours) or as a workflow of one step (DBOS)",
        'of ours: the rate beside it / the rate of dspex-persist in this run ("-": not measured, or not what it does)',
        "",
        format_table(results, ours),
        "",
        "What one durable operation writes; what is not done (and what is); how it is synced",
    ]
    if run["filesystem"] in ("tmpfs", "ramfs"):
        lines.insert(0, "WARNING: these files are in memory, nothing is durable; choose another --directory")
    for result in results:
        adapter = ADAPTERS[result.key]
        durability = result.durability or "not measured"
        lines.append(f"- {adapter.title}: {adapter.unit}; {adapter.lacks}. {durability}.")
    return "\n".join(lines)


def find_ours(results: Sequence[Result]) -> Result | None:
    return next((result for result in results if result.key == OURS), None)


def as_json(results: Sequence[Result], run: Mapping[str, Any]) -> dict[str, Any]:
    """The report for machines: rates are operations a second, ratios are to dspex-persist in the same run."""
    ours = find_ours(results)
    return {"run": dict(run), "libraries": [library_as_json(result, ours) for result in results]}


def library_as_json(result: Result, ours: Result | None) -> dict[str, Any]:
    adapter = ADAPTERS[result.key]
    words = {"title": adapter.title, "unit": adapter.unit, "lacks": adapter.lacks, "durability": result.durability}
    works = {
        work: {
            "operations_per_s": result.median(work),
            "values_per_operation": 1 if work in ("update", "execute") else len(NAMES),
            "ratio_to_ours": result.ratio_to(ours, work),
            "rounds": result.rates[work],
        }
        for work in adapter.works
    }
    state = {"status": result.status, "reason": result.reason, "version": result.version}
    return {"key": result.key, **words, **state, "works": works}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="dspex-persist beside comparable libraries on the same work")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="the table shows medians over them (default: 3)")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--only", action="append", choices=ADAPTERS, help="measure only this one (may be repeated)")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the database files are made"
    )
    parser.add_argument("--measure", choices=ADAPTERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.seconds <= 0 or chosen.rounds < 1:
        parser.error("--seconds must be above 0, and --rounds at least 1")
    return chosen


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    chosen = parse_arguments(arguments)
    directory: Path = chosen.directory.resolve()
    if chosen.measure:
        raise_open_files_limit()
        chosen.json.write_text(json.dumps(measure_library(chosen.measure, chosen.seconds, directory)))
        return 0
    results = run_rounds(chosen.only or list(ADAPTERS), chosen.rounds, chosen.seconds, directory)
    run = describe_run(chosen.rounds, chosen.seconds, directory)
    print(format_report(results, run))
    if chosen.json:
        chosen.json.write_text(json.dumps(as_json(results, run), indent=2) + "\n")
    return 1 if any(result.status == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
