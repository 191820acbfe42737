"""One command's view of the store, and the changes that it stages.

A `UnitOfWork` reads sessions from memory and stages new versions and events; it never writes to a file. Its caller (a
store, a test) either stores the staged changes or calls `rollback_to(START)`. The units of a group share `Drafts`, so
that each sees the changes staged before it.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from operator import attrgetter
from typing import Any, Protocol, TypeAlias

from dspex_persist.spelling import closest, did_you_mean
from dspex_persist.state.budgets import Spent
from dspex_persist.state.errors import (
    LimitExceededError,
    SessionNotFoundError,
    StateError,
    VariableNotFoundError,
)
from dspex_persist.state.events import (
    Event,
    ExecutionEnded,
    Moment,
    OptimizationStopped,
    Pruned,
    SessionEnded,
    SessionStarted,
    ToolsRegistered,
    VariableConstrained,
    VariableRegistered,
)
from dspex_persist.state.fold import advanced, fold, fold_version
from dspex_persist.state.frozen import freeze
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    REASON,
    Change,
    ChangeKind,
    ExecutionStatus,
    JournalEntry,
    Optimization,
    Origin,
    Session,
    Source,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.quotas import Quotas, stored_bytes
from dspex_persist.state.session_state import SessionState, Undo, growth_of, size_of_tool
from dspex_persist.state.values.constraints import count_matching

Savepoint: TypeAlias = tuple[int, int, int]
START: Savepoint = (0, 0, 0)
_TOKENS: Iterator[str] = iter(lambda: secrets.token_hex(6), "")


@dataclass(frozen=True, slots=True)
class VersionQuery:
    """Selects versions of a variable: the newest `limit` below version `before`, including deletions.

    Attributes:
        identifier: The variable's name or id.
        limit: How many versions to return at most.
        before: Only versions with lower numbers; None for all.
        most_bytes: Stop after the version with which the values reach this size; None for no limit.
        as_of: A commit; a name then means the variable that had it at that commit, or had it last before.
    """

    identifier: str
    limit: int
    before: int | None = None
    most_bytes: int | None = None
    as_of: int | None = None


class Backing(Protocol):
    """The reads that a unit of work passes to its store because memory does not have the answer."""

    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's committed state, or None."""

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one committed version, or None."""

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return committed versions, newest first; None if the session never had the variable."""

    def find_outcome(self, session_id: str, key: str) -> "RecordedOutcome | None":
        """Return the outcome recorded under an idempotency key, or None."""

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last ended execution with an idempotency key, or None."""

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """Return what the LM calls of ended executions have used, by tool, and the last commit that counts."""


@dataclass(frozen=True, slots=True)
class RecordedOutcome:
    """The outcome recorded under an idempotency key: the request's fingerprint, and the result as JSON."""

    session_id: str
    key: str
    cause: str
    fingerprint: str
    result: str


class Drafts:
    """The changes that a group of units has staged so far, in memory, over a backing.

    `load` replaces the backing's method of that name.
    """

    __slots__ = ("backing", "executions", "forgotten", "gone", "load", "outcomes", "states", "versions")

    def __init__(self, backing: Backing, load: Callable[[str], SessionState | None] | None = None) -> None:
        self.backing = backing
        self.load = backing.load if load is None else load
        self.states: dict[str, SessionState | None] = {}
        self.versions: list[Change] = []
        self.outcomes: dict[tuple[str, str], RecordedOutcome] = {}
        self.executions: dict[tuple[int, str], JournalEntry] = {}
        self.forgotten: set[str] = set()
        # The id of the last deleted variable of each (session id, name).
        self.gone: dict[tuple[str, str], str] = {}

    def find(self, session_id: str) -> SessionState | None:
        """Return the session as the group sees it, to read."""
        if session_id in self.states:
            return self.states[session_id]
        return self.load(session_id)

    def edit(self, session_id: str) -> SessionState | None:
        """Return a copy of the session that the group may change."""
        if session_id not in self.states:
            loaded = self.load(session_id)
            self.states[session_id] = loaded.copy() if loaded is not None else None
        return self.states[session_id]


class UnitOfWork:
    """What one command reads and stages. A unit becomes one commit as a whole, or nothing of it does."""

    __slots__ = (
        "_drafts",
        "_matching",
        "_previous_sequence",
        "_undo",
        "derivations",
        "events",
        "limits",
        "now",
        "optimization_lease_s",
        "origin",
        "outcome",
        "quotas",
        "rules_deferred",
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
        # The clock for TTLs: see `clock.steady`.
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
        # Set while an execution's commands are staged: only what it leaves at its end has to fit the rules.
        self.rules_deferred = False
        # How variables are computed from others; see `commands.derivations`.
        self.derivations: Sequence[Any] = ()
        # Counts what identities store; None where that is not limited.
        self.quotas: Quotas | None = None
        self._undo: Undo = []
        self._previous_sequence = 0
        self._matching = 0

    # Sessions

    def find_session(self, session_id: str) -> SessionState | None:
        """Return the live session and renew its TTL; None if it never began, has ended or has expired."""
        state = self._drafts.find(session_id)
        if state is None:
            return None
        if state.lease is not None:
            if state.is_over(self.steady):
                return None
            state.lease.touch(self.steady)
        return state

    def peek(self, session_id: str) -> SessionState | None:
        """Return what `find_session` does, without renewing the TTL."""
        state = self._drafts.find(session_id)
        if state is not None and state.lease is not None and state.is_over(self.steady):
            return None
        return state

    def session(self, session_id: str) -> SessionState:
        """Return the live session and renew its TTL, or raise `SessionNotFoundError`."""
        state = self.find_session(session_id)
        if state is None:
            raise SessionNotFoundError(session_id)
        return state

    def find_expired(self, session_id: str) -> SessionState | None:
        """Return the session if it has expired but has not been ended yet."""
        state = self._drafts.find(session_id)
        return state if state is not None and state.is_over(self.steady) else None

    def start_session(self, event: SessionStarted) -> SessionState:
        """Begin a session. The caller has checked that no live session has its id."""
        state = fold(None, event, self._moment, self._undo)
        assert state is not None, "a new session has a state"
        self._replace_state(event.session_id, state)
        if self.quotas is not None and self.quotas.start(self.sequence, self.origin.actor):
            self._undo.append((self.quotas.take_back, (self.sequence,)))
        self.events.append(event)
        return state

    def end_session(self, session_id: str, reason: str) -> None:
        """End the session and interrupt its running executions; its history stays."""
        # Sorted, because a rollback can have changed their order.
        state = self._edit(session_id)
        running = sorted(state.executions.values(), key=attrgetter("began_sequence"))
        first = state.session.sequence
        if self.quotas is not None and (size_bytes := self.quotas.end(first)) is not None:
            self._undo.append((self.quotas.take_back, (first, size_bytes)))
        self.interrupt(session_id, [each.id for each in running], f"session {reason}")
        self._forget_outcomes(session_id)
        self.record(session_id, SessionEnded(session_id, reason))

    # Events

    def record(self, session_id: str, event: Event) -> SessionState:
        """Stage an event and apply it to its session; return the session.

        The caller has checked that the event is valid in the session's state. Events with further consequences, such
        as the end of an execution, have separate methods.
        """
        state = self._edit(session_id)
        after = fold(state, event, self._moment, self._undo)
        if after is not state:
            self._replace_state(session_id, after)
        self.events.append(event)
        return state

    # Variables

    def variable(self, session_id: str, identifier: str, *, hint: bool = True) -> Variable:
        """Return the live variable with this name or id.

        Args:
            session_id: The session.
            identifier: The variable's name or id.
            hint: Whether the error suggests a similar name; finding one takes a millisecond or more.

        Raises:
            SessionNotFoundError: The session does not exist, or has ended.
            VariableNotFoundError: The session has no such variable.
        """
        # Most often the group has a draft of the session, and it has no TTL to renew: a batch asks for each variable.
        draft = self._drafts.states.get(session_id)
        state = draft if draft is not None and draft.lease is None else self.session(session_id)
        variable = state.find(identifier)
        if variable is None:
            suggestion = _suggestion(identifier, state.variables) if hint else ""
            raise VariableNotFoundError(session_id, identifier, suggestion)
        return variable if variable.optimization is None else self.current(variable)

    def current(self, variable: Variable) -> Variable:
        """Return the variable without its optimization lock if the lock's lease has ended."""
        lock = variable.optimization
        if lock is not None and lock.expires_at() <= self.now:
            return variable._replace(optimization=None)
        return variable

    def add_variable(self, session_id: str, variable: Variable) -> None:
        """Register a new variable at version 0."""
        state = self._edit(session_id)
        self._check_room(state, growth_of(variable, None))
        event = VariableRegistered(variable.id, variable.name, variable.type, variable.constraints)
        self.record(session_id, event)
        version = self._version(variable, 0, ChangeKind.REGISTERED, variable.value, variable.metadata, variable.source)
        fold_version(state, version, self._undo, event)
        self._stage(version, state.variables[variable.name], bool(variable.metadata))

    def write(
        self,
        session_id: str,
        variable: Variable,
        value: Value,
        metadata: Mapping[str, str],
        source: Source,
        kind: ChangeKind = ChangeKind.SET,
    ) -> Variable:
        """Append a version with `value`, which is normalised already; return the new state of the variable.

        If the lease of its lock has ended, that is logged before.
        """
        state = self._edit(session_id)
        kept = state.variables.get(variable.name)
        if kept is not variable:
            variable = self.drop_ended_lock(session_id, variable)
        version = self._version(variable, variable.version + 1, kind, value, metadata, source)
        written = advanced(variable, version)
        growth = growth_of(written, kept)
        if growth > 0:
            self._check_room(state, growth)
        state.place(written, kept, growth, self._undo)
        self._stage(version, written, written.metadata is not variable.metadata, variable.value)
        return written

    def make_room(self, session_id: str, growth: int) -> None:
        """Refuse a change by which the session would grow beyond its limit; `growth` is in bytes."""
        self._check_room(self._edit(session_id), growth)

    def _check_room(self, state: SessionState, growth: int) -> None:
        """Refuse a change that makes the session too large to send to a client in one message."""
        size_bytes, most = state.weight_bytes + growth, self.limits.session_size_bytes
        # A session that is too large already, because the setting was lowered, may still shrink.
        if growth > 0 and size_bytes > most:
            raise LimitExceededError("size of the session in bytes", size_bytes, most, "session_size_bytes")

    def constrain(self, session_id: str, variable: Variable, constraints: str) -> Variable:
        """Give a variable other constraints, with the version that is written next; return it."""
        variable = self.drop_ended_lock(session_id, variable)
        state = self._edit(session_id)
        self._check_room(state, growth_of(variable._replace(constraints=constraints), variable))
        self.record(session_id, VariableConstrained(variable.id, variable.version + 1, constraints))
        return state.variables[variable.name]

    def delete_variable(self, session_id: str, variable: Variable) -> None:
        """Append a deletion, and remove the variable and its dependencies from the live state."""
        state = self._edit(session_id)
        gone, place = self._drafts.gone, (session_id, variable.name)
        self._undo.append((_put_back, (gone, place, gone.get(place))))
        gone[place] = variable.id
        version = self._version(variable, variable.version + 1, ChangeKind.DELETED, None, {}, variable.source)
        fold_version(state, version, self._undo)
        self._stage(version, advanced(variable, version), previous=variable.value)

    def find_version(self, session_id: str, variable: Variable, version: int) -> VariableVersion | None:
        """Return one version of a live variable, whether committed or staged by this group."""
        for change in reversed(self._drafts.versions):
            if change.version.variable_id == variable.id and change.version.version == version:
                return change.version
        return self._drafts.backing.find_version(self.session(session_id), variable.id, version)

    def history(self, session_id: str, query: VersionQuery) -> list[VariableVersion]:
        """Return committed versions, newest first, also of a deleted variable."""
        versions = self._drafts.backing.history(self.session(session_id), query)
        if versions is None:
            raise VariableNotFoundError(session_id, query.identifier)
        return versions

    def find_last_id(self, session_id: str, name: str) -> str | None:
        """Return the id of the variable that has the name, or had it last; None if no variable ever had it."""
        state = self.session(session_id)
        if (live := state.find(name)) is not None:
            return live.id
        if (session_id, name) in self._drafts.gone:
            return self._drafts.gone[session_id, name]
        newest = self._drafts.backing.history(state, VersionQuery(name, 1))
        return newest[0].variable_id if newest else None

    def find_last_type(self, session_id: str, identifier: str) -> str | None:
        """Return the type of the variable that has the name or id, or had it last; None if none ever had it."""
        state = self.find_session(session_id)
        if state is None:
            return None
        if (live := state.find(identifier)) is not None:
            return live.type
        newest = self._drafts.backing.history(state, VersionQuery(identifier, 1))
        return newest[0].type if newest else None

    # Rules

    def violations(self, since: Savepoint = START) -> list[tuple[StateError, tuple[str, ...]]]:
        """Return the errors of those rules that do not hold after the changes since a savepoint.

        Each comes with the names of the rule's variables.
        """
        state = self.state
        if state is None or state.rules is None:
            return []
        changed = {change.variable.name: None for change in self.versions[since[1] :]}
        return [*state.rules.violations(state.variables.get, changed)] if changed else []

    def check_rules(self, since: Savepoint = START) -> None:
        """Raise `RuleViolatedError` if a rule does not hold after the changes since a savepoint."""
        state = self.state
        if state is not None and state.rules is not None and not self.rules_deferred:
            for error, _ in self.violations(since):
                raise error

    # Optimization

    def stop_optimization(self, session_id: str, variable: Variable, lock: Optimization, reason: str) -> Variable:
        """Remove the lock from the variable."""
        self.record(session_id, OptimizationStopped(variable.id, lock.id, reason))
        return variable._replace(optimization=None)

    def drop_ended_lock(self, session_id: str, variable: Variable) -> Variable:
        """Log the end of a lock whose lease ran out, before the variable is changed."""
        if variable.optimization is not None:
            return variable
        kept = self.session(session_id).variables.get(variable.name)
        if kept is None or kept.optimization is None:
            return variable
        return self.stop_optimization(session_id, kept, kept.optimization, "lease ended")

    # Tools and their executions

    def register_tools(self, session_id: str, event: ToolsRegistered) -> None:
        """Register the tools of a worker; they replace tools with the same names. Without any, its tools go."""
        tools = self._edit(session_id).tools
        replaced = [tools[tool.spec.name] for tool in event.tools if tool.spec.name in tools]
        growth = sum(map(size_of_tool, event.tools)) - sum(map(size_of_tool, replaced))
        self._check_room(self._edit(session_id), growth)
        self.record(session_id, event)

    def end_execution(self, session_id: str, event: ExecutionEnded, attempt: int = 1) -> None:
        """End the journal entry of a running execution."""
        state = self._edit(session_id)
        running = state.executions[event.execution_id]
        self.record(session_id, event)
        if running.idempotency_key is not None:
            place = (state.session.sequence, running.idempotency_key)
            self._undo.append((_put_back, (self._drafts.executions, place, self._drafts.executions.get(place))))
            self._drafts.executions[place] = replace(
                running, status=event.status, sequence=self.sequence, attempt=attempt, result=event.result
            )

    def interrupt(self, session_id: str, execution_ids: Iterable[str], reason: str) -> None:
        """End running executions because something that they depend on has ended."""
        for execution_id in execution_ids:
            self.end_execution(session_id, ExecutionEnded(execution_id, ExecutionStatus.INTERRUPTED, reason=reason))

    def find_execution(self, session_id: str, key: str) -> JournalEntry | None:
        """Return the last ended execution with this idempotency key."""
        state = self.session(session_id)
        staged = self._drafts.executions.get((state.session.sequence, key))
        return staged if staged is not None else self._drafts.backing.find_execution(state, key)

    def spent(self, session_id: str) -> tuple[int, Mapping[str, Spent]]:
        """Return what the LM calls of ended executions have used, by tool, and the last commit that counts."""
        return self._drafts.backing.spent(self.session(session_id))

    # Pruning

    def prune(self, session: Session, key: int, event: Pruned) -> None:
        """Stage the removal of history. The session, which the store knows by `key`, may have ended."""
        live = self._drafts.find(session.id)
        if live is not None and live.key == key:
            self._edit(session.id)
        else:
            self.state = SessionState(session, key=key)
        self.events.append(event)

    # Outcomes of keyed requests

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under this idempotency key."""
        staged = self._drafts.outcomes.get((session_id, key))
        if staged is not None or session_id in self._drafts.forgotten:
            return staged
        return self._drafts.backing.find_outcome(session_id, key)

    def _forget_outcomes(self, session_id: str) -> None:
        """Forget the session's outcomes, because the next session with this id may use the same keys."""
        drafts = self._drafts
        for place in [place for place in drafts.outcomes if place[0] == session_id]:
            self._undo.append((drafts.outcomes.__setitem__, (place, drafts.outcomes.pop(place))))
        if session_id not in drafts.forgotten:
            drafts.forgotten.add(session_id)
            self._undo.append((drafts.forgotten.discard, (session_id,)))

    def record_outcome(self, outcome: RecordedOutcome) -> None:
        """Record an outcome in the same commit as the changes of its request."""
        place = (outcome.session_id, outcome.key)
        self._drafts.outcomes[place] = outcome
        self._undo.append((self._drafts.outcomes.pop, (place, None)))
        self.outcome = outcome

    # Bookkeeping

    def count_matching(self, name: str, work: int) -> None:
        """Refuse a value if pattern matching takes too much work in this unit; see `values.constraints`."""
        self._matching = count_matching(self._matching, name, work)

    def new_token(self) -> str:
        """Return the next of `tokens`, for use in an id: by default 12 random hexadecimal digits."""
        return next(self.tokens)

    def has_changes(self) -> bool:
        """Whether this unit makes a commit."""
        return bool(self.versions or self.events)

    def savepoint(self) -> Savepoint:
        """Return a point to which `rollback_to` can return."""
        return len(self._undo), len(self.versions), len(self.events)

    def rollback_to(self, savepoint: Savepoint) -> None:
        """Undo everything staged since the savepoint."""
        undo, versions, events = savepoint
        if len(self._undo) > undo:
            while len(self._undo) > undo:
                undo_one, arguments = self._undo.pop()
                undo_one(*arguments)
            for state in self._drafts.states.values():
                if state is not None:
                    state.put_in_order()
        if len(self.versions) > versions:
            del self._drafts.versions[versions - len(self.versions) :]
            del self.versions[versions:]
        del self.events[events:]
        if self.state is not None and not self.has_changes():
            self.state.sequence = self._previous_sequence
            self.state = None

    def _edit(self, session_id: str) -> SessionState:
        state = self._drafts.states.get(session_id) or self._drafts.edit(session_id)
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

    @property
    def _moment(self) -> Moment:
        # Not cached, because an import sets the time.
        return Moment(self.sequence, self.now, self.steady)

    def _version(
        self,
        variable: Variable,
        number: int,
        kind: ChangeKind,
        value: Value | None,
        metadata: Mapping[str, str],
        source: Source,
    ) -> VariableVersion:
        origin = self.origin
        if origin.reason:
            metadata = {**metadata, REASON: origin.reason}
        return VariableVersion(
            variable.id,
            variable.type,
            number,
            kind,
            value,
            freeze(metadata),
            source,
            self.now,
            origin.actor,
            origin.cause,
            self.sequence,
        )

    def _stage(
        self, version: VariableVersion, variable: Variable, merged: bool = False, previous: Value | None = None
    ) -> None:
        if self.quotas is not None and self.state is not None:
            first = self.state.session.sequence
            if self.quotas.counts(first):
                size_bytes = stored_bytes(version)
                self.quotas.add(first, size_bytes)
                self._undo.append((self.quotas.add, (first, -size_bytes)))
        change = Change(version, variable, merged, previous)
        self._drafts.versions.append(change)
        self.versions.append(change)


class _Published(Drafts):
    """One published session, which is only read."""

    __slots__ = ()

    def __init__(self, session_id: str, state: SessionState) -> None:
        self.states = {session_id: state}


class Reading(UnitOfWork):
    """The unit of a command that only reads the current values of a session in memory.

    It takes the time when it is first needed: few sessions have a TTL, and few variables a lock.
    """

    __slots__ = ("_take_moment",)

    def __init__(
        self,
        session_id: str,
        state: SessionState,
        origin: Origin,
        sequence: int,
        limits: Limits,
        take_moment: Callable[[], tuple[datetime, datetime]],
    ) -> None:
        self._drafts = _Published(session_id, state)
        self.origin = origin
        self.sequence = sequence
        self.limits = limits
        self._take_moment = take_moment

    def __getattr__(self, name: str) -> datetime:
        if name not in ("now", "steady"):
            raise AttributeError(name)
        self.now, self.steady = self._take_moment()
        return self.now if name == "now" else self.steady


def up_to(versions: Sequence[VariableVersion], most_bytes: int | None) -> list[VariableVersion]:
    """Return the first of `versions`, up to the one with which they reach `most_bytes`."""
    if most_bytes is None:
        return list(versions)
    before = accumulate((version.size_bytes for version in versions), initial=0)
    return [version for version, size_bytes in zip(versions, before, strict=False) if size_bytes < most_bytes]


def _suggestion(identifier: str, names: Iterable[str]) -> str:
    return did_you_mean(closest(identifier, names))


def _put_back(entries: dict[Any, Any], key: object, previous: object) -> None:
    if previous is None:
        entries.pop(key, None)
    else:
        entries[key] = previous
