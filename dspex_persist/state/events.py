"""What a commit says besides new versions: a class for each kind of event.

A class has the facts of its event as fields, from which the body follows that the log keeps (see `bodies`), and `fold`,
which says what the event does to its session. Nothing else knows the keys of a body. docs/architecture.md says how to
add an event.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, NamedTuple, Self, TypeAlias, cast

from dspex_persist.clock import from_micros
from dspex_persist.state import bodies
from dspex_persist.state.bodies import MalformedEventError as MalformedEventError
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.model import (
    Conflict,
    Dependency,
    EventKind,
    ExecutionStatus,
    Failure,
    Isolation,
    JournalEntry,
    LogEntry,
    Optimization,
    PrunePolicy,
    RegisteredTool,
    Seen,
    Session,
    ToolSpec,
    Value,
)
from dspex_persist.state.session_state import Lease, SessionState, Undo, size_of_tool


class Moment(NamedTuple):
    """When a commit happens: its number, its time, and the steady clock's, with which TTLs are measured.

    `steady` is None where a session is rebuilt that is long over: it gets no TTL then.
    """

    sequence: int
    at: datetime
    steady: datetime | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A fact that a commit states besides new versions."""

    kind: ClassVar[EventKind]

    def to_body(self) -> dict[str, Any]:
        """What the log keeps of it, as JSON has it."""
        return cast(dict[str, Any], bodies.written(self))

    @classmethod
    def from_body(cls, body: object) -> Self:
        """The event that the log has with this body; `MalformedEventError` if it cannot be read."""
        return cast(Self, bodies.read(cls, body))

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState | None:
        """Bring the session's state up to date, and note in `undo` what takes that back; None if the session ends."""
        return state


# Sessions


@dataclass(frozen=True, slots=True)
class SessionStarted(Event):
    """A session began. `config`: what its client said when it did. `session_key`: the file's own name for it."""

    session_id: str
    metadata: Mapping[str, str]
    ttl_s: float | None
    config: Mapping[str, Any] = field(default_factory=dict)
    session_key: int | None = bodies.sparse()

    kind: ClassVar = EventKind.SESSION_STARTED

    def start(self, moment: Moment) -> SessionState:
        """The state of the session that begins."""
        ttl_s, lease = _time_to_live(self.ttl_s, moment)
        session = Session(self.session_id, moment.at, self.metadata, ttl_s, moment.sequence)
        return SessionState(session, lease=lease, sequence=moment.sequence)


@dataclass(frozen=True, slots=True)
class SessionUpdated(Event):
    """From now on a session has these metadata and this TTL."""

    session_id: str
    metadata: Mapping[str, str]
    ttl_s: float | None

    kind: ClassVar = EventKind.SESSION_UPDATED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`. A TTL that stays the same is not begun anew."""
        state.remember(undo, "session", "lease")
        ttl_s, lease = _time_to_live(self.ttl_s, moment)
        if lease is None or state.lease is None or state.lease.ttl_s != ttl_s:
            state.lease = lease
        state.session = replace(state.session, metadata=self.metadata, ttl_s=ttl_s)
        return state


def _time_to_live(ttl_s: float | None, moment: Moment) -> tuple[float | None, Lease | None]:
    if ttl_s is None or moment.steady is None:
        return None, None
    return ttl_s, Lease(ttl_s, moment.steady + timedelta(seconds=ttl_s))


@dataclass(frozen=True, slots=True)
class SessionEnded(Event):
    """A session ended."""

    session_id: str
    reason: str

    kind: ClassVar = EventKind.SESSION_ENDED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> None:
        """See `Event.fold`."""


# Variables


@dataclass(frozen=True, slots=True)
class VariableRegistered(Event):
    """A variable was registered; the same commit has its version 0. `variable_key`: the file's own name for it."""

    variable_id: str
    name: str
    type: str
    constraints: str
    variable_key: int | None = bodies.sparse()

    kind: ClassVar = EventKind.VARIABLE_REGISTERED


@dataclass(frozen=True, slots=True)
class DependencyAdded(Event):
    """Variable `from_id` depends on `to_id` from this commit on."""

    from_id: str
    to_id: str
    type: str

    kind: ClassVar = EventKind.DEPENDENCY_ADDED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        state.remember(undo, "dependencies")
        edge = Dependency(self.from_id, self.to_id, self.type, moment.sequence)
        state.dependencies = state.dependencies.added(edge)
        return state


@dataclass(frozen=True, slots=True)
class OptimizationStarted(Event):
    """An optimizer locked a variable, or renewed the lock that it has had since `started_at`."""

    variable_id: str
    optimization_id: str
    optimizer_id: str
    started_at: datetime
    started_by: str
    config: Mapping[str, str]
    lease_s: float

    kind: ClassVar = EventKind.OPTIMIZATION_STARTED

    @classmethod
    def of(cls, variable_id: str, lock: Optimization) -> Self:
        """That a variable got this lock."""
        return cls(variable_id, lock.id, lock.optimizer_id, lock.started_at, lock.started_by, lock.config, lock.lease_s)

    def lock(self, at: datetime) -> Optimization:
        """The lock that it puts on its variable, in a commit at `at`. A holder that asks again gets its lock renewed.

        From the log alone, so that a check of the log arrives at the same row.
        """
        return Optimization(
            self.optimization_id,
            self.optimizer_id,
            self.started_at,
            self.started_by,
            self.config,
            self.lease_s,
            at if at != self.started_at else None,
        )

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        _set_lock(state, self.variable_id, self.lock(moment.at), undo)
        return state


@dataclass(frozen=True, slots=True)
class OptimizationStopped(Event):
    """The lock is off the variable."""

    variable_id: str
    optimization_id: str
    reason: str

    kind: ClassVar = EventKind.OPTIMIZATION_STOPPED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        _set_lock(state, self.variable_id, None, undo)
        return state


def _set_lock(state: SessionState, variable_id: str, lock: Optimization | None, undo: Undo) -> None:
    variable = state.variables.get(state.names.get(variable_id, ""))
    if variable is not None:
        state.put(variable._replace(optimization=lock), undo)


# Tools and executions


@dataclass(frozen=True, slots=True)
class ToolsRegistered(Event):
    """A worker runs these tools; those of the same names are replaced."""

    worker_id: str
    tools: tuple[RegisteredTool, ...]

    kind: ClassVar = EventKind.TOOLS_REGISTERED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        state.remember(undo, "tools", "weight_bytes")
        replaced = [state.tools[tool.spec.name] for tool in self.tools if tool.spec.name in state.tools]
        state.tools = FrozenDict({**state.tools, **{tool.spec.name: tool for tool in self.tools}})
        state.weight_bytes += sum(map(size_of_tool, self.tools)) - sum(map(size_of_tool, replaced))
        return state


@dataclass(frozen=True, slots=True)
class ExecutionBegan(Event):
    """A tool runs from here on. `worker_id`: whose tool it is; "" for the server's own.

    `retry_of`: the execution that ran before it for the same request; the logs of old releases do not say
    (`says_retry`).
    """

    execution_id: str
    tool: str
    parent_id: str | None
    idempotency_key: str | None
    fingerprint: str
    parameters: Mapping[str, Value]
    metadata: Mapping[str, str]
    isolation: Isolation
    attempt: int
    seed: str
    worker_id: str
    retry_of: str | None = None
    says_retry: bool = bodies.unlogged(True)

    kind: ClassVar = EventKind.EXECUTION_BEGAN

    def to_body(self) -> dict[str, Any]:
        """See `Event.to_body`."""
        body = Event.to_body(self)
        if not self.says_retry:
            del body["retry_of"]
        return body

    @classmethod
    def from_body(cls, body: object) -> Self:
        """See `Event.from_body`."""
        began = cast(Self, bodies.read(cls, body))
        return began if "retry_of" in cast(Mapping[str, Any], body) else replace(began, says_retry=False)

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        running = JournalEntry(
            self.execution_id, self.tool, moment.sequence, self.parent_id, self.idempotency_key, self.fingerprint
        )
        undo.append((state.executions.pop, (running.id, None)))
        state.executions[running.id] = running
        return state


@dataclass(frozen=True, slots=True)
class ExecutionEnded(Event):
    """An execution ended. One that was interrupted has a `reason`, and nothing else to report.

    `reads`: what it asked for, and as what it found it. `writes`, `published`: names and versions. `recorded`: what
    it was told of the world (see `times`, `lm_calls`).
    """

    execution_id: str
    status: ExecutionStatus
    result: Value | None = None
    reason: str | None = bodies.sparse()
    failure: Failure | None = None
    reads: Mapping[str, Seen | None] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    log: tuple[LogEntry, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[tuple[str, int], ...] = ()
    duration_us: int | None = None
    writes: tuple[tuple[str, int], ...] = ()
    conflicts: tuple[Conflict, ...] = ()

    kind: ClassVar = EventKind.EXECUTION_ENDED

    def to_body(self) -> dict[str, Any]:
        """See `Event.to_body`."""
        body = Event.to_body(self)
        if self.reason is None:
            return body
        return {name: body[name] for name in ("execution_id", "status", "result", "reason")}

    @property
    def times(self) -> list[datetime]:
        """What `now` gave it."""
        return [from_micros(each) for each in self.recorded.get("now", ())]

    @property
    def lm_calls(self) -> list[Any]:
        """The calls of language models that were recorded for it."""
        return list(self.recorded.get("lm", ()))

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        running = state.executions.pop(self.execution_id, None)
        if running is not None:
            undo.append((state.executions.__setitem__, (running.id, running)))
        return state


# Pruning

GoingVersion: TypeAlias = tuple[int, int, int, int | None, int | None]
"""variable_key, version, sequence, value_blob, binary_blob"""
GoingEvent: TypeAlias = tuple[int, int]
"""sequence, ordinal"""


@dataclass(frozen=True, slots=True)
class Pruned(Event):
    """Old history went, as `policy` allowed: so many `versions` and `events`, of the commits of `range`.

    `digest` covers what is left of those commits. `going` is what goes, by the keys of the file: no log has it.
    """

    versions: int
    events: int
    policy: PrunePolicy
    range: tuple[int, int]
    digest: str
    going: tuple[Sequence[GoingVersion], Sequence[GoingEvent]] = bodies.unlogged(((), ()))

    kind: ClassVar = EventKind.PRUNED

    @classmethod
    def planned(cls, policy: PrunePolicy, versions: Sequence[GoingVersion], events: Sequence[GoingEvent]) -> Self:
        """That these are to go."""
        return cls(len(versions), len(events), policy, (0, 0), "", (versions, events))


# By kind

EVENTS: Final[Mapping[EventKind, type[Event]]] = {
    each.kind: each
    for each in (
        SessionStarted,
        SessionUpdated,
        SessionEnded,
        VariableRegistered,
        DependencyAdded,
        OptimizationStarted,
        OptimizationStopped,
        ToolsRegistered,
        ExecutionBegan,
        ExecutionEnded,
        Pruned,
    )
}
"""The class of each kind of event."""
_OWN_KEYS: Final = ("session_key", "variable_key")
_IDS: Final = ("execution_id", "parent_id", "retry_of")


def event_in(kind: str, body: object) -> Event:
    """The event of a kind with this body; `MalformedEventError` if it cannot be read."""
    try:
        event = EVENTS[EventKind(kind)]
    except ValueError:
        raise MalformedEventError(f"unknown kind {kind!r}") from None
    return event.from_body(body)


def portable(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of an event without the names that things have in one file only."""
    return {key: entry for key, entry in body.items() if key not in _OWN_KEYS}


def renamed_executions(body: Mapping[str, Any], renamed: Callable[[str], str]) -> Mapping[str, Any]:
    """The body of an event with other ids of executions."""
    ids = {key: renamed(entry) for key, entry in body.items() if key in _IDS and isinstance(entry, str)}
    return {**body, **ids} if ids else body


def spec_body(spec: ToolSpec) -> dict[str, Any]:
    """A tool's specification, as the log and the table of tools keep it."""
    return cast(dict[str, Any], bodies.written(spec))


def spec_in(body: object) -> ToolSpec:
    """The specification with this body; `MalformedEventError` if it cannot be read."""
    return cast(ToolSpec, bodies.read(ToolSpec, body))


def conflicts_in(entries: object) -> tuple[Conflict, ...]:
    """The conflicts in the body of an execution's end; `MalformedEventError` if they cannot be read."""
    return cast(tuple[Conflict, ...], bodies.read(tuple[Conflict, ...], entries))
