"""One command's view of the store, and what it stages.

A `UnitOfWork` reads sessions from memory and stages new versions and events; it never writes to a file.
Whoever runs it (a store, a test) either keeps what it staged or calls `rollback_to(START)`. A group of
units shares `Drafts`, so that each sees what the ones before it staged.
"""

import secrets
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Any, Protocol, TypeAlias

from dspex_persist.clock import from_micros, to_micros
from dspex_persist.state.errors import (
    InvalidValueError,
    LimitExceededError,
    SessionNotFoundError,
    VariableNotFoundError,
    closest,
    quote,
)
from dspex_persist.state.frozen import FrozenDict, freeze
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    Change,
    ChangeKind,
    Dependency,
    Event,
    EventKind,
    ExecutionStatus,
    Isolation,
    Optimization,
    Origin,
    RecordedExecution,
    RegisteredTool,
    RunningExecution,
    Session,
    Source,
    ToolParameter,
    ToolSpec,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.session_state import Lease, SessionState, growth_of, size_of_tool, weight_of

Savepoint: TypeAlias = tuple[int, int, int]
START: Savepoint = (0, 0, 0)
# Of patterns' instructions times bytes; RE2 takes up to some nanoseconds for each.
_MOST_MATCHING = 1_000_000_000
_TOKENS: Iterator[str] = iter(lambda: secrets.token_hex(6), "")


@dataclass(frozen=True, slots=True)
class VersionQuery:
    """Which versions of a variable are wanted: the newest `limit` below version `before`, deletions included.

    `identifier` is a name or an id. No version follows once those before it have `most_bytes`. With `as_of` a name
    means the variable that had it at that commit, or had it last by then.
    """

    identifier: str
    limit: int
    before: int | None = None
    most_bytes: int | None = None
    as_of: int | None = None


class Backing(Protocol):
    """What a unit of work asks its store for when memory does not have it."""

    def load(self, session_id: str) -> SessionState | None:
        """The live session's committed state."""

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """One committed version."""

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """The committed versions, newest first; None if the session never had the variable."""

    def find_outcome(self, session_id: str, key: str) -> "RecordedOutcome | None":
        """What was answered under an idempotency key."""

    def find_execution(self, state: SessionState, key: str) -> RecordedExecution | None:
        """The last execution under an idempotency key that has ended."""


@dataclass(frozen=True, slots=True)
class RecordedOutcome:
    """The answer kept under an idempotency key: which request it was, and its result as JSON."""

    session_id: str
    key: str
    cause: str
    fingerprint: str
    result: str


class Drafts:
    """What a group of units has changed so far, in memory only, over a backing.

    `load` finds sessions where the backing's own is not to be asked.
    """

    __slots__ = ("backing", "executions", "forgotten", "gone", "load", "outcomes", "states", "versions")

    def __init__(self, backing: Backing, load: Callable[[str], SessionState | None] | None = None) -> None:
        self.backing = backing
        self.load = backing.load if load is None else load
        self.states: dict[str, SessionState | None] = {}
        self.versions: list[Change] = []
        self.outcomes: dict[tuple[str, str], RecordedOutcome] = {}
        self.executions: dict[tuple[int, str], RecordedExecution] = {}
        self.forgotten: set[str] = set()
        # The variables that were deleted last, by their sessions and names.
        self.gone: Mapping[tuple[str, str], str] = {}

    def find(self, session_id: str) -> SessionState | None:
        """The session as the group sees it."""
        if session_id in self.states:
            return self.states[session_id]
        return self.load(session_id)

    def edit(self, session_id: str) -> SessionState | None:
        """The session as this group may change it."""
        if session_id not in self.states:
            loaded = self.load(session_id)
            self.states[session_id] = loaded.copy() if loaded is not None else None
        return self.states[session_id]


class UnitOfWork:
    """What one command reads and stages. All of one unit becomes one commit, or nothing of it does."""

    __slots__ = (
        "_drafts",
        "_matching",
        "_previous_sequence",
        "_undo",
        "events",
        "limits",
        "now",
        "optimization_lease_s",
        "origin",
        "outcome",
        "sequence",
        "session_ttl_s",
        "state",
        "steady",
        "tokens",
        "versions",
    )

    def __init__(
        self,
        drafts: Drafts,
        origin: Origin,
        now: datetime,
        sequence: int,
        limits: Limits,
        session_ttl_s: float | None = None,
        optimization_lease_s: float = 300.0,
        steady: datetime | None = None,
    ) -> None:
        self._drafts = drafts
        self.origin = origin
        self.now = now
        # What TTLs are measured with: see `clock.steady`.
        self.steady = now if steady is None else steady
        self.sequence = sequence
        self.limits = limits
        self.session_ttl_s = session_ttl_s
        self.optimization_lease_s = optimization_lease_s
        self.state: SessionState | None = None
        self.versions: list[Change] = []
        self.events: list[Event] = []
        self.outcome: RecordedOutcome | None = None
        self.tokens: Iterator[str] = _TOKENS
        # What takes each step back: a function and its arguments, no closure over this unit. That would be a cycle,
        # and every unit would wait for the garbage collector, which then costs more than the unit did.
        self._undo: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._previous_sequence = 0
        self._matching = 0

    # Sessions

    def find_session(self, session_id: str) -> SessionState | None:
        """The live session, touched; None where it never began, has ended or has expired."""
        state = self._drafts.find(session_id)
        if state is None:
            return None
        if state.lease is not None:
            if state.is_over(self.steady):
                return None
            state.lease.touch(self.steady)
        return state

    def session(self, session_id: str) -> SessionState:
        """The live session, or `SessionNotFoundError`."""
        state = self.find_session(session_id)
        if state is None:
            raise SessionNotFoundError(session_id)
        return state

    def find_expired(self, session_id: str) -> SessionState | None:
        """The session if it has expired but has not been ended yet."""
        state = self._drafts.find(session_id)
        return state if state is not None and state.is_over(self.steady) else None

    def start_session(self, session: Session, config: Mapping[str, Any]) -> SessionState:
        """Begin `session`; whoever calls has made sure that no live one has its id."""
        lease = None
        if session.ttl_s is not None:
            lease = Lease(session.ttl_s, self.steady + timedelta(seconds=session.ttl_s))
        state = SessionState(session=session, lease=lease, sequence=self.sequence)
        self._replace_state(session.id, state)
        body = {"session_id": session.id, "metadata": dict(session.metadata), "ttl_s": session.ttl_s}
        self._log(EventKind.SESSION_STARTED, body | {"config": dict(config)})
        return state

    def update_session(self, session: Session) -> None:
        """Replace the session's metadata and TTL."""
        state = self._edit(session.id)
        self._undo.append((_restore, (state, {"session": state.session, "lease": state.lease})))
        state.session = session
        if session.ttl_s is None:
            state.lease = None
        elif state.lease is None or state.lease.ttl_s != session.ttl_s:
            state.lease = Lease(session.ttl_s, self.steady + timedelta(seconds=session.ttl_s))
        body = {"session_id": session.id, "metadata": dict(session.metadata), "ttl_s": session.ttl_s}
        self._log(EventKind.SESSION_UPDATED, body)

    def end_session(self, session_id: str, reason: str) -> None:
        """End the session, and with it what runs in it; its history stays."""
        for execution_id in self._edit(session_id).executions:
            self.end_execution(session_id, execution_id, ExecutionStatus.INTERRUPTED, {"reason": f"session {reason}"})
        self._forget_outcomes(session_id)
        self._log(EventKind.SESSION_ENDED, {"session_id": session_id, "reason": reason})
        self._replace_state(session_id, None)

    # Variables

    def variable(self, session_id: str, identifier: str, *, hint: bool = True) -> Variable:
        """The live variable of this name or id, or the not-found error that fits.

        `hint`: say in it which one was perhaps meant, which takes a millisecond or more.
        """
        state = self.session(session_id)
        found = state.find(identifier)
        if found is None:
            raise VariableNotFoundError(session_id, identifier, _near(identifier, state.variables) if hint else "")
        return self.current(found)

    def current(self, variable: Variable) -> Variable:
        """The variable with an optimization whose lease has ended taken off."""
        lock = variable.optimization
        if lock is not None and lock.expires_at() <= self.now:
            return variable._replace(optimization=None)
        return variable

    def add_variable(self, session_id: str, variable: Variable) -> None:
        """Register a new variable at version 0."""
        state = self._edit(session_id)
        self._check_room(state, growth_of(variable, None))
        state.names[variable.id] = variable.name
        self._undo.append((state.names.pop, (variable.id, None)))
        body = {
            "variable_id": variable.id,
            "name": variable.name,
            "type": variable.type,
            "constraints": variable.constraints,
        }
        self._log(EventKind.VARIABLE_REGISTERED, body)
        self._put(state, variable)
        self._stage(variable, ChangeKind.REGISTERED, variable.value, variable.metadata, bool(variable.metadata))

    def write(
        self,
        session_id: str,
        variable: Variable,
        value: Value,
        metadata: Mapping[str, str],
        source: Source,
        kind: ChangeKind = ChangeKind.SET,
    ) -> Variable:
        """Append a version with `value` (already normalised); the variable as it stands afterwards."""
        state = self._edit(session_id)
        lock = variable.optimization
        if lock is not None and lock.optimizer_id == metadata.get("optimizer_id"):
            lock = replace(lock, renewed_at=self.now)
        merged = variable.metadata
        if metadata and kind.merges_metadata and not metadata.items() <= merged.items():
            merged = FrozenDict({**merged, **metadata})
        # By position: keywords take twice as long, and this is the hot path.
        written = Variable(
            variable.id,
            variable.name,
            variable.type,
            value,
            variable.version + 1,
            variable.constraints,
            merged,
            source,
            self.now,
            lock,
        )
        self._check_room(state, growth_of(written, state.variables.get(written.name)))
        self._put(state, written)
        self._stage(written, kind, value, metadata, merged is not variable.metadata)
        return written

    def _check_room(self, state: SessionState, growth: int) -> None:
        """Refuse what makes a session larger than a client can be told in one message."""
        size_bytes, most = state.weight_bytes + growth, self.limits.session_size_bytes
        # One that is too large already, because the setting was changed, may still shrink.
        if growth > 0 and size_bytes > most:
            raise LimitExceededError("size of the session in bytes", size_bytes, most, "session_size_bytes")

    def delete_variable(self, session_id: str, variable: Variable) -> None:
        """Append a deletion and take the variable and its dependencies out of the live state."""
        state = self._edit(session_id)
        names = ("variables", "names", "dependencies", "weight_bytes")
        self._undo.append((_restore, (state, {name: getattr(state, name) for name in names})))
        self._undo.append((_restore, (self._drafts, {"gone": self._drafts.gone})))
        self._drafts.gone = {**self._drafts.gone, (session_id, variable.name): variable.id}
        state.weight_bytes -= weight_of(state.variables[variable.name])
        state.variables = {name: kept for name, kept in state.variables.items() if name != variable.name}
        state.names = {key: name for key, name in state.names.items() if key != variable.id}
        state.dependencies = tuple(
            replace(edge, until=self.sequence)
            if edge.until is None and variable.id in (edge.from_id, edge.to_id)
            else edge
            for edge in state.dependencies
        )
        gone = variable._replace(version=variable.version + 1, updated_at=self.now, optimization=None)
        self._stage(gone, ChangeKind.DELETED, None, {})

    def find_version(self, session_id: str, variable: Variable, version: int) -> VariableVersion | None:
        """One version of a live variable, those that this group has staged included."""
        for change in reversed(self._drafts.versions):
            if change.version.variable_id == variable.id and change.version.version == version:
                return change.version
        return self._drafts.backing.find_version(self.session(session_id), variable.id, version)

    def history(self, session_id: str, query: VersionQuery) -> list[VariableVersion]:
        """The committed versions, newest first; deleted variables included."""
        found = self._drafts.backing.history(self.session(session_id), query)
        if found is None:
            raise VariableNotFoundError(session_id, query.identifier)
        return found

    def find_last_id(self, session_id: str, name: str) -> str | None:
        """The id of the variable that has the name, or had it last; None if none ever had."""
        state = self.session(session_id)
        if (live := state.find(name)) is not None:
            return live.id
        if (session_id, name) in self._drafts.gone:
            return self._drafts.gone[session_id, name]
        newest = self._drafts.backing.history(state, VersionQuery(name, 1))
        return newest[0].variable_id if newest else None

    # Dependencies and optimization

    def add_dependency(self, session_id: str, edge: Dependency) -> None:
        """Keep a dependency; whoever calls has made sure that it closes no cycle."""
        state = self._edit(session_id)
        self._undo.append((_restore, (state, {"dependencies": state.dependencies})))
        state.dependencies = (*state.dependencies, edge)
        body = {"from_id": edge.from_id, "to_id": edge.to_id, "type": edge.type}
        self._log(EventKind.DEPENDENCY_ADDED, body)

    def start_optimization(self, session_id: str, variable: Variable, lock: Optimization) -> None:
        """Put the lock on the variable."""
        self._put(self._edit(session_id), variable._replace(optimization=lock))
        body = {
            "variable_id": variable.id,
            "optimization_id": lock.id,
            "optimizer_id": lock.optimizer_id,
            "started_at": to_micros(lock.started_at),
            "started_by": lock.started_by,
            "config": dict(lock.config),
            "lease_s": lock.lease_s,
        }
        self._log(EventKind.OPTIMIZATION_STARTED, body)

    def stop_optimization(self, session_id: str, variable: Variable, lock: Optimization, reason: str) -> Variable:
        """Take the lock off the variable."""
        freed = variable._replace(optimization=None)
        self._put(self._edit(session_id), freed)
        body = {"variable_id": variable.id, "optimization_id": lock.id, "reason": reason}
        self._log(EventKind.OPTIMIZATION_STOPPED, body)
        return freed

    def drop_ended_lock(self, session_id: str, variable: Variable) -> Variable:
        """Log the end of a lock whose lease ran out, once somebody changes the variable after it."""
        if variable.optimization is not None:
            return variable
        kept = self.session(session_id).variables.get(variable.name)
        if kept is None or kept.optimization is None:
            return variable
        return self.stop_optimization(session_id, kept, kept.optimization, "lease ended")

    # Tools and their executions

    def register_tools(self, session_id: str, worker_id: str, tools: Sequence[RegisteredTool]) -> None:
        """Keep tools that a worker runs; one of the same name is replaced."""
        state = self._edit(session_id)
        replaced = [state.tools[tool.spec.name] for tool in tools if tool.spec.name in state.tools]
        growth = sum(map(size_of_tool, tools)) - sum(map(size_of_tool, replaced))
        self._check_room(state, growth)
        self._undo.append((_restore, (state, {"tools": state.tools, "weight_bytes": state.weight_bytes})))
        state.tools = FrozenDict({**state.tools, **{tool.spec.name: tool for tool in tools}})
        state.weight_bytes += growth
        self._log(EventKind.TOOLS_REGISTERED, {"worker_id": worker_id, "tools": [asdict(tool) for tool in tools]})

    def begin_execution(self, session_id: str, execution: RunningExecution, facts: Mapping[str, Any]) -> SessionState:
        """Begin the journal entry of an execution; the session as it stands from then on."""
        state = self._edit(session_id)
        self._undo.append((_restore, (state, {"executions": state.executions})))
        state.executions = {**state.executions, execution.id: execution}
        body = {
            "execution_id": execution.id,
            "tool": execution.tool,
            "parent_id": execution.parent_id,
            "idempotency_key": execution.idempotency_key,
            "fingerprint": execution.fingerprint,
        }
        self._log(EventKind.EXECUTION_BEGAN, body | dict(facts))
        return state

    def end_execution(
        self,
        session_id: str,
        execution_id: str,
        status: ExecutionStatus,
        facts: Mapping[str, Any],
        result: Value | None = None,
        attempt: int = 1,
    ) -> None:
        """End the journal entry of a running execution."""
        state = self._edit(session_id)
        running = state.executions[execution_id]
        self._undo.append((_restore, (state, {"executions": state.executions})))
        state.executions = {key: kept for key, kept in state.executions.items() if key != execution_id}
        body = {"execution_id": execution_id, "status": status.value, "result": value_body(result), **facts}
        self._log(EventKind.EXECUTION_ENDED, body)
        if running.idempotency_key is not None:
            place = (state.session.sequence, running.idempotency_key)
            self._undo.append((_put_back, (self._drafts.executions, place, self._drafts.executions.get(place))))
            self._drafts.executions[place] = RecordedExecution(
                execution_id, running.tool, status, running.fingerprint, self.sequence, attempt, result
            )

    def find_execution(self, session_id: str, key: str) -> RecordedExecution | None:
        """The last execution under this idempotency key that has ended."""
        state = self.session(session_id)
        staged = self._drafts.executions.get((state.session.sequence, key))
        return staged if staged is not None else self._drafts.backing.find_execution(state, key)

    # Pruning

    def prune(self, session: Session, key: int, body: Mapping[str, Any]) -> None:
        """Account for history that goes. The session, of which the store knows by `key`, may have ended."""
        live = self._drafts.find(session.id)
        if live is not None and live.key == key:
            self._edit(session.id)
        else:
            self.state = SessionState(session, key=key)
        self._log(EventKind.PRUNED, body)

    # Outcomes of keyed requests

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """What was answered under this idempotency key."""
        staged = self._drafts.outcomes.get((session_id, key))
        if staged is not None or session_id in self._drafts.forgotten:
            return staged
        return self._drafts.backing.find_outcome(session_id, key)

    def _forget_outcomes(self, session_id: str) -> None:
        """Keys belong to a session, not to its id: the next session of this id may use them again."""
        drafts = self._drafts
        for place in [place for place in drafts.outcomes if place[0] == session_id]:
            self._undo.append((drafts.outcomes.__setitem__, (place, drafts.outcomes.pop(place))))
        if session_id not in drafts.forgotten:
            drafts.forgotten.add(session_id)
            self._undo.append((drafts.forgotten.discard, (session_id,)))

    def record_outcome(self, outcome: RecordedOutcome) -> None:
        """Keep the answer in the same commit as what it answers for."""
        place = (outcome.session_id, outcome.key)
        self._drafts.outcomes[place] = outcome
        self._undo.append((self._drafts.outcomes.pop, (place, None)))
        self.outcome = outcome

    # Bookkeeping

    def count_matching(self, name: str, work: int) -> None:
        """Refuse a value if all that this unit matches with patterns becomes too much. `work`: instructions of the
        pattern times bytes."""
        self._matching += work
        if self._matching > _MOST_MATCHING:
            self._matching -= work
            reason = "together with those before it is too much to match in one call with patterns of this complexity"
            raise InvalidValueError(name, reason)

    def new_token(self) -> str:
        """A unique, unguessable part of an id: 12 hexadecimal digits, or what `tokens` has been set to give."""
        return next(self.tokens)

    def has_changes(self) -> bool:
        """Whether keeping this unit makes a commit."""
        return bool(self.versions or self.events)

    def savepoint(self) -> Savepoint:
        """A point to which `rollback_to` can return."""
        return len(self._undo), len(self.versions), len(self.events)

    def rollback_to(self, savepoint: Savepoint) -> None:
        """Take back everything staged since."""
        undo, versions, events = savepoint
        while len(self._undo) > undo:
            take_back, arguments = self._undo.pop()
            take_back(*arguments)
        if len(self.versions) > versions:
            del self._drafts.versions[versions - len(self.versions) :]
            del self.versions[versions:]
        del self.events[events:]
        if self.state is not None and not self.has_changes():
            self.state.sequence = self._previous_sequence
            self.state = None

    def _edit(self, session_id: str) -> SessionState:
        state = self._drafts.edit(session_id)
        if state is None:
            raise SessionNotFoundError(session_id)
        if self.state is None:
            self._previous_sequence = state.sequence
            state.sequence = self.sequence
            self.state = state
        return state

    def _replace_state(self, session_id: str, state: SessionState | None) -> None:
        states = self._drafts.states
        self._undo.append((states.__setitem__, (session_id, self._drafts.edit(session_id))))
        states[session_id] = state
        if state is not None:
            self.state = state

    def _put(self, state: SessionState, variable: Variable) -> None:
        previous = state.put(variable)
        if previous is None:
            self._undo.append((state.remove, (variable.name,)))
        else:
            self._undo.append((state.put, (previous,)))

    def _log(self, kind: EventKind, body: Mapping[str, Any]) -> None:
        self.events.append(Event(kind, body))

    def _stage(
        self,
        variable: Variable,
        kind: ChangeKind,
        value: Value | None,
        metadata: Mapping[str, str],
        merged: bool = False,
    ) -> None:
        version = VariableVersion(
            variable.id,
            variable.type,
            variable.version,
            kind,
            value,
            freeze(metadata),
            variable.source,
            self.now,
            self.origin.actor,
            self.origin.cause,
            self.sequence,
        )
        change = Change(version, variable, merged)
        self._drafts.versions.append(change)
        self.versions.append(change)


def up_to(versions: Sequence[VariableVersion], most_bytes: int | None) -> list[VariableVersion]:
    """The first of `versions`, until they have `most_bytes`; at least one."""
    if most_bytes is None:
        return list(versions)
    before = accumulate((version.size_bytes for version in versions), initial=0)
    return [version for version, size_bytes in zip(versions, before, strict=False) if size_bytes < most_bytes]


def _near(identifier: str, names: Iterable[str]) -> str:
    near = closest(identifier, names)
    return f"did you mean {quote(near)}?" if near else ""


def value_body(value: Value | None) -> Mapping[str, str] | None:
    """A value in the body of an event."""
    if value is None:
        return None
    return {"json": value.json} | ({"binary": b64encode(value.binary).decode()} if value.binary is not None else {})


def value_in(body: Mapping[str, str] | None) -> Value | None:
    """A value in the body of an event."""
    if body is None:
        return None
    binary = body.get("binary")
    return Value(body["json"], None if binary is None else b64decode(binary))


def spec_in(body: Mapping[str, Any]) -> ToolSpec:
    """A tool's specification in the body of an event."""
    parameters = tuple(
        ToolParameter(**{**each, "default": None if each["default"] is None else Value(each["default"]["json"])})
        for each in body["parameters"]
    )
    return ToolSpec(
        **{
            **body,
            "parameters": parameters,
            "required_variables": tuple(body["required_variables"]),
            "isolation": Isolation(body["isolation"]),
        }
    )


def started_lock(body: Mapping[str, Any], at: int) -> Optimization:
    """The lock that an `optimization_started` event of a commit at `at` (microseconds) puts on its variable.

    From the log alone, so that a check of the log arrives at the same row. A holder that asks again gets its lock as
    it was, renewed.
    """
    return Optimization(
        id=body["optimization_id"],
        optimizer_id=body["optimizer_id"],
        started_at=from_micros(body["started_at"]),
        started_by=body["started_by"],
        config=body["config"],
        lease_s=body["lease_s"],
        renewed_at=from_micros(at) if at != body["started_at"] else None,
    )


def _put_back(entries: dict[Any, Any], key: object, previous: object) -> None:
    if previous is None:
        entries.pop(key, None)
    else:
        entries[key] = previous


def _restore(state: SessionState | Drafts, fields: Mapping[str, Any]) -> None:
    for name, previous in fields.items():
        setattr(state, name, previous)
