"""Run one recorded execution again: the engine's runner runs it over a store that answers from the recording."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar, cast

from dspex_persist.replay.rebuild import Past
from dspex_persist.replay.recorded import RecordedExecution
from dspex_persist.state import commands
from dspex_persist.state.budgets import Spent
from dspex_persist.state.commands import Command, Derivation
from dspex_persist.state.commands.executions import Begun
from dspex_persist.state.errors import StateError, UnsupportedError
from dspex_persist.state.events import Event, ExecutionEnded, Moment
from dspex_persist.state.fold import fold
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    Change,
    ChangeKind,
    JournalEntry,
    Origin,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.provider import Submits
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import Drafts, RecordedOutcome, UnitOfWork, VersionQuery, up_to

R = TypeVar("R")

LEASE_S: Final = 300.0


@dataclass(eq=False, slots=True)
class ReplayedCall:
    """An execution in a replay: what it repeats (`recorded`, None for an unexpected call), and what it did.

    `end` is the second half of its journal entry, None while it runs; `changes` and `events` are those of its commit.
    """

    id: str
    tool: str
    parameters: Mapping[str, Value]
    recorded: RecordedExecution | None
    calls: "list[ReplayedCall]" = field(default_factory=list)
    published: list[Change] = field(default_factory=list)
    derived: list[Change] = field(default_factory=list)
    """What was computed from what it published."""
    end: ExecutionEnded | None = None
    changes: tuple[Change, ...] = ()
    events: tuple[Event, ...] = ()
    lm: Sequence[object] = ()
    """The differences in its language model calls, each a text with a headline."""
    from_recording: bool = False
    """Whether a stand-in repeated what was recorded, instead of the tool's code."""


class ReplayRun:
    """Plays the store for the runner, for one execution and those that it calls. Usable from any thread."""

    def __init__(self, recorded: RecordedExecution, past: Past, limits: Limits) -> None:
        self.state, self.masked = past.state_after(recorded.number)
        self.state.executions = {}
        self.recorded = recorded
        self.calls: dict[str, ReplayedCall] = {}
        self.moment = recorded.at
        self._past = past
        self._limits = limits
        self._until = recorded.number
        self._lock = threading.RLock()
        self._unexpected = 0

    @property
    def names(self) -> Mapping[str, str]:
        """The names of the variables that existed when it began, by id."""
        return self.state.names

    @property
    def root(self) -> ReplayedCall | None:
        """The execution itself, if it has begun."""
        return self.calls.get(self.recorded.id)

    def now(self) -> datetime:
        """Return the time in the replay: the recorded beginning, or the last recorded time that the tool has read."""
        return self.moment

    def carry_out(self, command: Command[R], origin: Origin) -> R:
        """Carry out a command as the store would have, but keep only what is compared later."""
        with self._lock:
            match command:
                case commands.BeginExecution():
                    return cast(R, self._begin(command))
                case commands.FinishExecution():
                    return cast(R, self._finish(command, origin))
                case commands.PublishVariable():
                    return cast(R, self._publish(command, origin))
            if command.writes:
                raise UnsupportedError(f"{command.cause} outside an execution, in a replay,")
            return command.apply(self._unit(self.state, origin, self.now()))

    def _unit(self, state: SessionState, origin: Origin, now: datetime) -> UnitOfWork:
        return UnitOfWork(Drafts(_Backing(self, state)), origin, now, self._until, self._limits, None, LEASE_S)

    # Beginning

    def _begin(self, command: commands.BeginExecution) -> Begun:
        parent = self.calls[command.parent_id] if command.parent_id is not None else None
        recorded = self.recorded if parent is None else _match(parent, command)
        if recorded is not None:
            execution_id, seed = recorded.id, recorded.seed
            self.moment = max(self.moment, recorded.at)
        else:
            self._unexpected += 1
            execution_id, seed = f"{self.recorded.id}+{self._unexpected}", f"{self.recorded.seed}+{self._unexpected}"
        call = self.calls[execution_id] = ReplayedCall(execution_id, command.tool, command.parameters, recorded)
        if parent is not None:
            parent.calls.append(call)
        running = JournalEntry(execution_id, command.tool, self.recorded.number, command.parent_id)
        self.state.executions = {**self.state.executions, execution_id: running}
        return Begun(execution_id, self.recorded.number, self._limits, LEASE_S, seed, self.state)

    # Ending

    def _finish(self, command: commands.FinishExecution, origin: Origin) -> Any:
        repeated = self.calls[command.verdict.execution_id].recorded
        ended_at = repeated.ended_at if repeated is not None else None
        unit = self._unit(self.state, origin, ended_at or self.now())
        if repeated is not None:
            unit.derivations = repeated.derivations.get(repeated.ended, ())
        finished = command.apply(unit)
        ends = {event.execution_id: event for event in unit.events if isinstance(event, ExecutionEnded)}
        for execution_id, event in ends.items():
            call = self.calls[execution_id]
            call.end, call.changes, call.events = event, tuple(unit.versions), tuple(unit.events)
            fold(self.state, event, Moment(unit.sequence, unit.now), [])
        return finished

    # Publishing

    def _publish(self, command: commands.PublishVariable, origin: Origin) -> tuple[Variable, ...]:
        """Publish on the recorded state of that moment, which includes what other callers had written by then."""
        call = self.calls[command.execution_id]
        base, derivations = self._base_of(call)
        base.executions = self.state.executions
        unit = self._unit(base, origin, self.now())
        unit.derivations = derivations
        variables = command.apply(unit)
        for change in unit.versions:
            is_derived = change.version.kind is not ChangeKind.PUBLISHED
            (call.derived if is_derived else call.published).append(change)
        return variables

    def _base_of(self, call: ReplayedCall) -> tuple[SessionState, Sequence[Derivation]]:
        """The session on which a call publishes next, and what was computed in that commit."""
        recorded, at = call.recorded, len(call.published)
        if recorded is None or at >= len(recorded.published):
            return self.state, ()
        number = recorded.published[at][1]
        self._until = max(self._until, number - 1)
        return self._past.state_after(number - 1)[0], recorded.derivations[number]

    # Reading

    def history(self, state: SessionState, identifier: str) -> list[VariableVersion] | None:
        """Return all versions of a variable that exist at this point of the replay, oldest first; None if none do."""
        live = state.find(identifier)
        kept = self._past.rebuilt.history(live.id if live is not None else identifier, self._until) or []
        own = [change.version for call in self.calls.values() for change in (*call.published, *call.derived)]
        wanted = live.id if live is not None else kept[0].variable_id if kept else ""
        versions = {entry.version: entry for entry in (*kept, *own) if entry.variable_id == wanted}
        return [versions[number] for number in sorted(versions)] or None

    def times_of(self, execution_id: str) -> Callable[[], datetime]:
        """Return a clock for an execution: it returns the recorded times in order, then repeats the last one."""
        recorded = self.calls[execution_id].recorded
        left = iter(recorded.times if recorded is not None else ())

        def read() -> datetime:
            time = next(left, self.moment)
            self.moment = max(self.moment, time)
            return time

        return read


def _match(parent: ReplayedCall, command: commands.BeginExecution) -> RecordedExecution | None:
    """The recorded call that a call repeats: the next one of the tool with the same parameters, else the next one."""
    if parent.recorded is None:
        return None
    matched = {call.id for call in parent.calls}
    left = [each for each in parent.recorded.children if each.id not in matched and each.tool == command.tool]
    return next((each for each in left if each.parameters == command.parameters), left[0] if left else None)


@dataclass(frozen=True, slots=True)
class _Backing:
    """The reads of a unit of work, answered by the replay."""

    run: ReplayRun
    state: SessionState

    def load(self, session_id: str) -> SessionState | None:
        return self.state if session_id == self.state.session.id else None

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        known = self.run.history(state, variable_id) or ()
        return next((entry for entry in known if entry.version == version), None)

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        known = self.run.history(state, query.identifier)
        if known is None:
            return None
        below = [entry for entry in reversed(known) if query.before is None or entry.version < query.before]
        return up_to(below[: query.limit], query.most_bytes)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        return None

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        return None

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        return 0, {}


class ReplayStore(Submits):
    """The store of a replay. It passes the runner's commands to the current `ReplayRun`."""

    def __init__(self) -> None:
        self.run: ReplayRun | None = None

    @property
    def current(self) -> ReplayRun:
        """The current run; there must be one."""
        assert self.run is not None, "tools only run during a run"
        return self.run

    def submit(self, command: Command[R], origin: Origin | None = None) -> "Future[R]":
        """Carry out a command in the current run."""
        future: Future[R] = Future()
        run = self.run
        if run is None:
            future.set_exception(UnsupportedError(f"{command.cause} after the replay"))
            return future
        try:
            future.set_result(run.carry_out(command, origin or Origin("replay", command.cause)))
        except StateError as error:
            future.set_exception(error)
        return future
