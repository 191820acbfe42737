"""The events of a commit, which record what new versions do not: one class for each kind.

The fields of a class determine the JSON body in the log (see `bodies`), and its `fold` applies the event to the
session's state. No other module knows the keys of a body. docs/architecture.md says how to add an event.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, NamedTuple, Self, TypeAlias, cast

from dspex_persist.clock import from_micros
from dspex_persist.state import bodies
from dspex_persist.state.bodies import MalformedEventError as MalformedEventError
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.masking import Secrets
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
    Rule,
    Seen,
    Session,
    ToolSpec,
    Value,
)
from dspex_persist.state.rules import Rules
from dspex_persist.state.session_state import Lease, SessionState, Undo, size_of_tool


class Moment(NamedTuple):
    """When a commit happens: its number, its wall-clock time, and the steady clock's time, which measures TTLs.

    `steady` is None while a past session is rebuilt, which then gets no TTL.
    """

    sequence: int
    at: datetime
    steady: datetime | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A fact in a commit other than a new version."""

    kind: ClassVar[EventKind]

    def to_body(self) -> dict[str, Any]:
        """Return the event's body for the log, as a JSON object."""
        return cast(dict[str, Any], bodies.written(self))

    @classmethod
    def from_body(cls, body: object) -> Self:
        """Return the event with this body, or raise `MalformedEventError`."""
        return cast(Self, bodies.read(cls, body))

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState | None:
        """Apply the event to the session's state, and append the steps that undo it to `undo`.

        Returns:
            The state; None if the session has ended.
        """
        return state


# Sessions


@dataclass(frozen=True, slots=True)
class SessionStarted(Event):
    """A session began. `config` is the client's; `session_key` identifies the session within its file."""

    session_id: str
    metadata: Mapping[str, str]
    ttl_s: float | None
    config: Mapping[str, Any] = field(default_factory=dict)
    session_key: int | None = bodies.sparse()

    kind: ClassVar = EventKind.SESSION_STARTED

    def start(self, moment: Moment) -> SessionState:
        """Return the state of the new session."""
        ttl_s, lease = _time_to_live(self.ttl_s, moment)
        session = Session(self.session_id, moment.at, self.metadata, ttl_s, moment.sequence)
        return SessionState(session, lease=lease, sequence=moment.sequence)


@dataclass(frozen=True, slots=True)
class SessionUpdated(Event):
    """A session got new metadata and a new TTL."""

    session_id: str
    metadata: Mapping[str, str]
    ttl_s: float | None

    kind: ClassVar = EventKind.SESSION_UPDATED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`. A TTL that stays the same does not restart."""
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


@dataclass(frozen=True, slots=True)
class SessionRestored(Event):
    """This commit brought the session back to its state as of commit `sequence`.

    In a recording, `sequence` is the number of that commit in the recording.
    """

    sequence: int

    kind: ClassVar = EventKind.SESSION_RESTORED


# Variables


@dataclass(frozen=True, slots=True)
class VariableRegistered(Event):
    """A variable was registered; its version 0 is in the same commit.

    `variable_key` identifies the variable within its file.
    """

    variable_id: str
    name: str
    type: str
    constraints: str
    variable_key: int | None = bodies.sparse()

    kind: ClassVar = EventKind.VARIABLE_REGISTERED


@dataclass(frozen=True, slots=True)
class VariableConstrained(Event):
    """A variable got other constraints with its version `version`, which is in the same commit.

    `variable_key` identifies the variable within its file.
    """

    variable_id: str
    version: int
    constraints: str
    variable_key: int | None = bodies.sparse()

    kind: ClassVar = EventKind.VARIABLE_CONSTRAINED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        variable = state.variables.get(state.names.get(self.variable_id, ""))
        if variable is not None:
            state.put(variable._replace(constraints=self.constraints), undo)
        return state


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
class DependencyRemoved(Event):
    """Variable `from_id` does not depend on `to_id` any more, in the way that `type` says."""

    from_id: str
    to_id: str
    type: str

    kind: ClassVar = EventKind.DEPENDENCY_REMOVED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        state.remember(undo, "dependencies")
        edge = Dependency(self.from_id, self.to_id, self.type, moment.sequence)
        state.dependencies = state.dependencies.removed(edge)
        return state


@dataclass(frozen=True, slots=True)
class OptimizationStarted(Event):
    """An optimizer locked a variable, or renewed the lock that it has held since `started_at`."""

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
        """Create the event for a lock on a variable."""
        return cls(variable_id, lock.id, lock.optimizer_id, lock.started_at, lock.started_by, lock.config, lock.lease_s)

    def lock(self, at: datetime) -> Optimization:
        """Return the lock that the event, in a commit at `at`, puts on its variable, or renews.

        It depends only on the log, so that a check of the log computes the same row.
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
    """The lock was removed from the variable."""

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


# Rules


@dataclass(frozen=True, slots=True)
class RuleAdded(Event):
    """The session has a rule from this commit on, which replaces the one of its name."""

    name: str
    expression: str
    description: str = ""

    kind: ClassVar = EventKind.RULE_ADDED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        rule = Rule(self.name, self.expression, self.description)
        return _with_rules(state, (state.rules or Rules()).added(rule), undo)


@dataclass(frozen=True, slots=True)
class RuleRemoved(Event):
    """The session does not have the rule any more."""

    name: str

    kind: ClassVar = EventKind.RULE_REMOVED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        return _with_rules(state, (state.rules or Rules()).without(self.name), undo)


def _with_rules(state: SessionState, rules: Rules, undo: Undo) -> SessionState:
    state.remember(undo, "rules", "weight_bytes")
    state.weight_bytes += rules.weight_bytes - (state.rules.weight_bytes if state.rules is not None else 0)
    state.rules = rules or None
    return state


# Tools and executions


@dataclass(frozen=True, slots=True)
class ToolsRegistered(Event):
    """A worker registered tools, which replace tools with the same names; without any, it took its tools away."""

    worker_id: str
    tools: tuple[RegisteredTool, ...]

    kind: ClassVar = EventKind.TOOLS_REGISTERED

    def fold(self, state: SessionState, moment: Moment, undo: Undo) -> SessionState:
        """See `Event.fold`."""
        state.remember(undo, "tools", "weight_bytes")
        if not self.tools:
            gone = {name: tool for name, tool in state.tools.items() if tool.worker_id == self.worker_id}
            state.tools = FrozenDict({name: tool for name, tool in state.tools.items() if name not in gone})
            state.weight_bytes -= sum(map(size_of_tool, gone.values()))
            return state
        replaced = [state.tools[tool.spec.name] for tool in self.tools if tool.spec.name in state.tools]
        state.tools = FrozenDict({**state.tools, **{tool.spec.name: tool for tool in self.tools}})
        state.weight_bytes += sum(map(size_of_tool, self.tools)) - sum(map(size_of_tool, replaced))
        return state


@dataclass(frozen=True, slots=True)
class ExecutionBegan(Event):
    """An execution of a tool began.

    Attributes:
        worker_id: The worker that runs the tool; "" for the server itself.
        retry_of: The previous execution for the same request.
        says_retry: Whether the log records `retry_of`; old releases did not.
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
    """An execution ended.

    Attributes:
        reason: Why it was interrupted; such an event has no further fields.
        reads: The names that it looked up, and the variables and versions that it found.
        writes: Names and versions that it wrote.
        published: Names and versions that it published before its commit.
        recorded: Its recorded inputs, such as the clock; see `times` and `lm_calls`.
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
        """The times that `now` returned."""
        return [from_micros(each) for each in self.recorded.get("now", ())]

    @property
    def lm_calls(self) -> list[Any]:
        """The recorded calls of language models."""
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
    """History was pruned.

    Attributes:
        versions: How many versions were deleted.
        events: How many events were deleted.
        policy: The policy that allowed it.
        range: The first and the last affected commit.
        digest: A hash of the remaining rows of those commits.
        going: The rows to delete, by the keys of the file; not part of the log.
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
        """Create the event for versions and events to be deleted."""
        return cls(len(versions), len(events), policy, (0, 0), "", (versions, events))


# By kind

EVENTS: Final[Mapping[EventKind, type[Event]]] = {
    each.kind: each
    for each in (
        SessionStarted,
        SessionUpdated,
        SessionEnded,
        VariableRegistered,
        VariableConstrained,
        DependencyAdded,
        RuleAdded,
        RuleRemoved,
        DependencyRemoved,
        OptimizationStarted,
        OptimizationStopped,
        ToolsRegistered,
        ExecutionBegan,
        ExecutionEnded,
        SessionRestored,
        Pruned,
    )
}
"""The class of each kind of event."""
_OWN_KEYS: Final = ("session_key", "variable_key")
_OF_SESSION: Final = frozenset({EventKind.SESSION_STARTED, EventKind.SESSION_UPDATED, EventKind.SESSION_ENDED})
_IDS: Final = frozenset({"execution_id", "parent_id", "retry_of"})


def event_in(kind: str, body: object) -> Event:
    """Return the event of a kind with this body, or raise `MalformedEventError`."""
    try:
        event = EVENTS[EventKind(kind)]
    except ValueError:
        raise MalformedEventError(f"unknown kind {kind!r}") from None
    return event.from_body(body)


def portable(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of an event without the keys that are only valid in one file."""
    return {key: entry for key, entry in body.items() if key not in _OWN_KEYS}


def without_secrets(kind: EventKind, body: Mapping[str, Any], secrets: Secrets) -> Mapping[str, Any]:
    """Return the body of an event with these values masked in its LM calls, if it has any."""
    recorded = body.get("recorded") if kind is EventKind.EXECUTION_ENDED and secrets else None
    return {**body, "recorded": secrets.masked_recorded(recorded)} if isinstance(recorded, Mapping) else body


def anonymous(kind: EventKind, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the body of an event without the id of its session, which an import may change."""
    if kind in _OF_SESSION:
        return {key: entry for key, entry in body.items() if key != "session_id"}
    return body


def names_executions(body: Mapping[str, Any]) -> bool:
    """Whether the body of an event has execution ids."""
    return not _IDS.isdisjoint(body)


def renamed_executions(body: Mapping[str, Any], renamed: Callable[[str], str]) -> Mapping[str, Any]:
    """Return the body of an event with its execution ids mapped by `renamed`."""
    ids = {key: renamed(entry) for key, entry in body.items() if key in _IDS and isinstance(entry, str)}
    return {**body, **ids}


def spec_body(spec: ToolSpec) -> dict[str, Any]:
    """Return the body of a tool's specification, for the log and the table of tools."""
    return cast(dict[str, Any], bodies.written(spec))


def spec_in(body: object) -> ToolSpec:
    """Return the specification with this body, or raise `MalformedEventError`."""
    return cast(ToolSpec, bodies.read(ToolSpec, body))


def conflicts_in(entries: object) -> tuple[Conflict, ...]:
    """Return the conflicts in the body of an execution's end, or raise `MalformedEventError`."""
    return cast(tuple[Conflict, ...], bodies.read(tuple[Conflict, ...], entries))
