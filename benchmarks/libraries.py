"""Adapters for the libraries that `make peers` compares: they open, write and read each.

Each adapter uses the fastest way that the public interface of its library offers: threads or asyncio tasks, live
objects kept between calls, reads without history, caches and snapshots.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal
from uuid import NAMESPACE_URL, UUID, uuid5

State = dict[str, float]
Operation = Literal["update", "batch", "read", "execute"]

MOST_SESSIONS = 64
NAMES = tuple(f"v{index:02d}" for index in range(20))
ZEROES: State = dict.fromkeys(NAMES, 0.0)
STATE_OPERATIONS: tuple[Operation, ...] = ("update", "batch", "read")
OPERATIONS: tuple[Operation, ...] = (*STATE_OPERATIONS, "execute")
OURS = "ours"

SET_HERE = "WAL and synchronous=FULL set here"
SET_BY_ITSELF = "WAL and synchronous=FULL set by the engine itself"
FULL_NOT_SETTABLE = "WAL; synchronous cannot be set from outside, so it is this build's default ({build})"


class Adapter(ABC):
    """The description of a library; subclasses define how it is called.

    Attributes:
        operations: The operations that it supports.
        unit: What one durable operation writes.
        lacks: What the library leaves to its user.
        durability: How WAL and `PRAGMA synchronous` are set; `{build}` stands for the default of this SQLite build.
    """

    operations: ClassVar[tuple[Operation, ...]] = STATE_OPERATIONS
    title: ClassVar[str]
    distribution: ClassVar[str]
    unit: ClassVar[str]
    lacks: ClassVar[str]
    durability: ClassVar[str]

    @classmethod
    def describe_durability(cls, path: Path) -> str:
        """Return how the file is synced, according to the file and to the defaults of a new connection to it."""
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
        return cls.durability.format(build=("OFF", "NORMAL", "FULL", "EXTRA")[synchronous])


class ThreadAdapter(Adapter):
    """A library that is fastest with a thread for each caller."""

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
    """An asyncio library, in which each caller is a task of one loop."""

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
    operations = OPERATIONS
    title = "dspex-persist"
    distribution = "dspex-persist"
    unit = (
        "one commit per call, two per tool, callers share transactions; one history row for each variable that "
        "changed, one journal entry for each tool"
    )
    lacks = "one process owns the file, ten value types; does check types, constraints, versions, a hash chain"
    durability = SET_BY_ITSELF

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        self._open(str(path), sessions)

    def _open(self, url: str, sessions: Sequence[str]) -> None:
        tools = import_module("dspex_persist").Toolbox()
        tools.add(import_module("benchmarks.tools").set_variable)
        self._provider: Any = import_module("dspex_persist").connect(url, tools=tools)
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
        variables = self._provider.list_variables(session)
        return {variable.name: self._decode(variable.type, variable.value) for variable in variables}

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
        last = self._saver_of(session).get_tuple(config)
        self._configs[session] = last.config if last else config
        self._states[session] = dict(last.checkpoint["channel_values"]) if last else {}
        if not last:
            self.update_many(session, ZEROES)

    def _saver_of(self, _session: str) -> Any:
        return self._saver

    def update(self, session: str, name: str, value: float) -> None:
        self.update_many(session, {name: value})

    def update_many(self, session: str, values: Mapping[str, float]) -> None:
        state = self._states[session]
        state.update(values)
        checkpoint = {**self._empty_checkpoint(), "channel_values": state}
        metadata = {"source": "update", "step": 0, "parents": {}}
        self._configs[session] = self._saver_of(session).put(self._configs[session], checkpoint, metadata, {})

    def read(self, session: str) -> State:
        last = self._saver_of(session).get_tuple({"configurable": {"thread_id": session}})
        return dict(last.checkpoint["channel_values"])

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
    """Each call opens a new connection: without a queue in front, 64 callers fail with "database is locked"."""

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
    lacks = "a log of items: no state, no variables, versions, validation or constraints"
    durability = FULL_NOT_SETTABLE

    async def open(self, path: Path, sessions: Sequence[str]) -> None:
        session_class = import_module("agents").SQLiteSession
        self._logs: dict[str, Any] = {session: session_class(session, path) for session in sessions}
        self._states: dict[str, State] = {}
        for session, log in self._logs.items():
            exists = bool(await log.get_items(limit=1))
            self._states[session] = await self.read(session) if exists else {}
            if not exists:
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


_SNAPSHOT_EVERY = 1_000
"""The number of events between two snapshots, so that an aggregate is not rebuilt from its whole history."""


class Eventsourcing(StateAdapter):
    title = "eventsourcing (SQLite)"
    distribution = "eventsourcing"
    unit = "one event of the session's aggregate; one transaction per call; reads come from its cache"
    lacks = "no types or constraints but those that the aggregate codes; versions of the aggregate, not of variables"
    durability = FULL_NOT_SETTABLE

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        application = import_module("eventsourcing.application")
        aggregate_class = _session_aggregate()
        sessions_class = type(
            "Sessions", (application.Application,), {"snapshotting_intervals": {aggregate_class: _SNAPSHOT_EVERY}}
        )
        # The only owner of the file need not look for others' events before it answers from its cache.
        self._application: Any = sessions_class(
            env={
                "PERSISTENCE_MODULE": "eventsourcing.sqlite",
                "SQLITE_DBNAME": str(path),
                "AGGREGATE_CACHE_MAXSIZE": str(2 * MOST_SESSIONS),
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
    """Return the aggregate class, created on demand because its base class exists only if the library is installed."""
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

    operations = ("execute",)
    title = "DBOS (SQLite)"
    distribution = "dbos"
    unit = "one workflow of one step: it with its input, who runs it, the step's result, its end; a transaction each"
    lacks = "no state: no variables, no transaction around what the code reads and writes, no conflict check"
    durability = SET_HERE

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        sqlalchemy: Any = import_module("sqlalchemy")
        if not sqlalchemy.event.contains(sqlalchemy.Engine, "connect", _set_wal_and_full_on_connect):
            sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _set_wal_and_full_on_connect)
        self._launch({"system_database_url": f"sqlite:///{path}", "sys_db_pool_size": 2})

    def _launch(self, database: Mapping[str, object]) -> None:
        self._set_id: Any = import_module("dbos").SetWorkflowID
        self._dbos: Any = import_module("dbos").DBOS
        self._set_variable = _dbos_workflow()
        config = {"name": "peers", "application_version": "1", "log_level": "ERROR", **database}
        self._dbos(config=config)
        self._dbos.launch()

    def execute(self, session: str, name: str, value: float) -> None:
        with self._set_id(f"{session}/{value:.0f}"):
            if self._set_variable(name, value) != {name: value}:
                raise RuntimeError("the workflow returned something else")

    def read(self, session: str) -> State:
        """Return the results of its workflows, oldest first."""
        workflows = self._dbos.list_workflows(workflow_id_prefix=f"{session}/", status="SUCCESS")
        state = dict(ZEROES)
        for workflow in sorted(workflows, key=lambda each: int(each.workflow_id.rpartition("/")[2])):
            state.update(workflow.output)
        return state

    def close(self) -> None:
        self._dbos.destroy()


@cache
def _dbos_workflow() -> Any:
    """Return the workflow, created on demand because its decorators exist only if the library is installed."""
    dbos: Any = import_module("dbos").DBOS

    @dbos.step()  # type: ignore[untyped-decorator]
    def set_variable(name: str, value: float) -> State:
        return {name: value}

    @dbos.workflow()  # type: ignore[untyped-decorator]
    def execute(name: str, value: float) -> State:
        state: State = set_variable(name, value)
        return state

    return execute


ON_SQLITE: dict[str, type[AnyAdapter]] = {
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
