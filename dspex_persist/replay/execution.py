"""A take: one recorded execution, run again by the engine's own runner over a store that is this recording."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar, cast

from dspex_persist.replay.rebuild import Past
from dspex_persist.replay.recorded import RecordedExecution
from dspex_persist.state import commands
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import Begun
from dspex_persist.state.errors import StateError, UnsupportedError
from dspex_persist.state.events import Event, ExecutionEnded, Moment
from dspex_persist.state.fold import fold
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    Change,
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
    """An execution of a take: what it was to repeat, if anything, and what it did.

    `end` is what the journal would say of its end, None until then; `changes` and `events` are all of its commit.
    """

    id: str
    tool: str
    parameters: Mapping[str, Value]
    recorded: RecordedExecution | None
    calls: "list[ReplayedCall]" = field(default_factory=list)
    published: list[Change] = field(default_factory=list)
    end: ExecutionEnded | None = None
    changes: tuple[Change, ...] = ()
    events: tuple[Event, ...] = ()
    lm: Sequence[object] = ()
    """What differs in its calls of language models, each a text with a headline."""
    from_recording: bool = False
    """Whether its code did not run, and it did what was recorded."""


class ReplayRun:
    """What the runner takes for the store, for one execution and those that it calls. Usable from any thread."""

    def __init__(self, recorded: RecordedExecution, past: Past, limits: Limits) -> None:
        self.state, self.masked = past.take(recorded.number)
        self.state.executions = {}
        self.recorded = recorded
        self.played: dict[str, ReplayedCall] = {}
        self.moment = recorded.at
        self._past = past
        self._limits = limits
        self._until = recorded.number
        self._lock = threading.RLock()
        self._unexpected = 0

    @property
    def names(self) -> Mapping[str, str]:
        """The names of the variables that were there when it began, by id."""
        return self.state.names

    @property
    def root(self) -> ReplayedCall | None:
        """The execution itself, if it has begun."""
        return self.played.get(self.recorded.id)

    def now(self) -> datetime:
        """The time in the take: that of its beginning, or the last one that it was told since."""
        return self.moment

    def carry_out(self, command: Command[R], origin: Origin) -> R:
        """Answer a command as the store would have; nothing of it is kept but what is to be compared."""
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
        parent = self.played[command.parent_id] if command.parent_id is not None else None
        recorded = self.recorded if parent is None else _match(parent, command)
        if recorded is not None:
            execution_id, seed = recorded.id, recorded.seed
            self.moment = max(self.moment, recorded.at)
        else:
            self._unexpected += 1
            execution_id, seed = f"{self.recorded.id}+{self._unexpected}", f"{self.recorded.seed}+{self._unexpected}"
        played = self.played[execution_id] = ReplayedCall(execution_id, command.tool, command.parameters, recorded)
        if parent is not None:
            parent.calls.append(played)
        running = JournalEntry(execution_id, command.tool, self.recorded.number, command.parent_id)
        self.state.executions = {**self.state.executions, execution_id: running}
        return Begun(execution_id, self.recorded.number, self._limits, LEASE_S, seed, self.state)

    # Ending

    def _finish(self, command: commands.FinishExecution, origin: Origin) -> Any:
        repeated = self.played[command.verdict.execution_id].recorded
        ended_at = repeated.ended_at if repeated is not None else None
        unit = self._unit(self.state, origin, ended_at or self.now())
        finished = command.apply(unit)
        ends = {event.execution_id: event for event in unit.events if isinstance(event, ExecutionEnded)}
        for execution_id, event in ends.items():
            played = self.played[execution_id]
            played.end, played.changes, played.events = event, tuple(unit.versions), tuple(unit.events)
            fold(self.state, event, Moment(unit.sequence, unit.now), [])
        return finished

    # Publishing

    def _publish(self, command: commands.PublishVariable, origin: Origin) -> Variable:
        """As it was recorded it came after what others had written by then."""
        played = self.played[command.execution_id]
        base = self._base_of(played)
        base.executions = self.state.executions
        unit = self._unit(base, origin, self.now())
        variable = command.apply(unit)
        played.published.extend(unit.versions)
        return variable

    def _base_of(self, played: ReplayedCall) -> SessionState:
        recorded, at = played.recorded, len(played.published)
        if recorded is None or at >= len(recorded.published):
            return self.state
        number = recorded.published[at][1] - 1
        self._until = max(self._until, number)
        return self._past.take(number)[0]

    # Reading

    def history(self, state: SessionState, identifier: str) -> list[VariableVersion] | None:
        """All versions that the take knows of a variable, oldest first."""
        live = state.find(identifier)
        kept = self._past.rebuilt.history(live.id if live is not None else identifier, self._until) or []
        own = [change.version for played in self.played.values() for change in played.published]
        wanted = live.id if live is not None else kept[0].variable_id if kept else ""
        versions = {entry.version: entry for entry in (*kept, *own) if entry.variable_id == wanted}
        return [versions[number] for number in sorted(versions)] or None

    def times_of(self, execution_id: str) -> Callable[[], datetime]:
        """What an execution is told when it asks for the time: what was recorded, then the last of it again."""
        recorded = self.played[execution_id].recorded
        left = iter(recorded.times if recorded is not None else ())

        def read() -> datetime:
            told = next(left, self.moment)
            self.moment = max(self.moment, told)
            return told

        return read


def _match(parent: ReplayedCall, command: commands.BeginExecution) -> RecordedExecution | None:
    """The recorded call that a call repeats: the next of the same tool with the same parameters, else of the tool."""
    if parent.recorded is None:
        return None
    taken = {call.id for call in parent.calls}
    left = [each for each in parent.recorded.children if each.id not in taken and each.tool == command.tool]
    return next((each for each in left if each.parameters == command.parameters), left[0] if left else None)


@dataclass(frozen=True, slots=True)
class _Backing:
    """What a unit of work of a take reads from."""

    take: ReplayRun
    state: SessionState

    def load(self, session_id: str) -> SessionState | None:
        return self.state if session_id == self.state.session.id else None

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        known = self.take.history(state, variable_id) or ()
        return next((entry for entry in known if entry.version == version), None)

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        known = self.take.history(state, query.identifier)
        if known is None:
            return None
        below = [entry for entry in reversed(known) if query.before is None or entry.version < query.before]
        return up_to(below[: query.limit], query.most_bytes)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        return None

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        return None


class ReplayStore(Submits):
    """Where takes are run, one at a time."""

    def __init__(self) -> None:
        self.take: ReplayRun | None = None

    @property
    def current(self) -> ReplayRun:
        """The take that runs."""
        assert self.take is not None, "tools run in takes"
        return self.take

    def submit(self, command: Command[R], origin: Origin | None = None) -> "Future[R]":
        """Have the take answer."""
        future: Future[R] = Future()
        take = self.take
        if take is None:
            future.set_exception(UnsupportedError(f"{command.cause} after the replay"))
            return future
        try:
            future.set_result(take.carry_out(command, origin or Origin("replay", command.cause)))
        except StateError as error:
            future.set_exception(error)
        return future
