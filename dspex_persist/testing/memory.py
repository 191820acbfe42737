"""Session state in dictionaries: no file, no threads, no SQL. A double for unit tests, and an oracle for others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TypeVar

from dspex_persist import clock
from dspex_persist.state.commands import Command, ExpireSession
from dspex_persist.state.errors import StateError
from dspex_persist.state.events import Event
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Change, JournalEntry, Origin, Source, VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import START, Drafts, RecordedOutcome, UnitOfWork, VersionQuery, up_to

R = TypeVar("R")

_EXPIRY = Origin("memory", "expiry")


@dataclass(frozen=True, slots=True)
class MemoryCommit:
    """What one command left behind."""

    sequence: int
    origin: Origin
    changes: tuple[Change, ...]
    events: tuple[Event, ...]


class MemoryBacking:
    """A `Backing` that keeps what units of work staged, and the shortest way to run commands over it.

    One command is one unit, and one commit where it changed anything. `commits` is everything that was kept.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        session_ttl_s: float | None = None,
        optimization_lease_s: float = 300.0,
        now: Callable[[], datetime] = clock.now,
    ) -> None:
        self.commits: list[MemoryCommit] = []
        self._limits = limits or Limits()
        self._session_ttl_s = session_ttl_s
        self._optimization_lease_s = optimization_lease_s
        self._now = now
        self._states: dict[str, SessionState] = {}
        self._histories: dict[int, _History] = {}
        self._outcomes: dict[tuple[str, str], RecordedOutcome] = {}
        self._executions: dict[tuple[int, str], JournalEntry] = {}

    @property
    def sequence(self) -> int:
        """The last commit's number; 0 before the first."""
        return len(self.commits)

    @property
    def states(self) -> Mapping[str, SessionState]:
        """The live sessions as they stand, by id. Not to be changed."""
        return MappingProxyType(self._states)

    # Running commands

    def run(self, command: Command[R], origin: Origin | None = None) -> R:
        """Carry a command out and keep what it staged; a `StateError` means that nothing was kept."""
        command.check()
        if command.writes:
            self._expire(command.session_id)
        return self._run(command, origin or Origin("tester", command.cause, Source.PYTHON))

    def _expire(self, session_id: str) -> None:
        """End a session whose TTL is over, as a store does before it writes to it."""
        state = self._states.get(session_id)
        if state is not None and state.is_over(self._now()):
            self._run(ExpireSession(session_id), _EXPIRY)

    def _run(self, command: Command[R], origin: Origin) -> R:
        drafts = Drafts(self)
        unit = self.unit(drafts, origin)
        try:
            result = command.apply(unit)
        except StateError:
            unit.rollback_to(START)
            self._check_untouched(drafts)
            raise
        self.keep(drafts, unit)
        return result

    def unit(self, drafts: Drafts, origin: Origin, staged: int = 0) -> UnitOfWork:
        """A unit of work over `drafts`, after `staged` others with changes that are not kept yet."""
        return UnitOfWork(
            drafts,
            origin,
            self._now(),
            self.sequence + staged + 1,
            self._limits,
            self._session_ttl_s,
            self._optimization_lease_s,
        )

    def keep(self, drafts: Drafts, *units: UnitOfWork) -> None:
        """Make what a group of units staged the state of affairs."""
        for unit in units:
            if unit.has_changes():
                self._keep_unit(unit)
        self._executions.update(drafts.executions)
        for session_id, state in drafts.states.items():
            if state is None:
                self._states.pop(session_id, None)
            else:
                self._states[session_id] = state

    def _keep_unit(self, unit: UnitOfWork) -> None:
        assert unit.state is not None, "a unit with changes has a session"
        assert unit.sequence == self.sequence + 1, "units are kept in their order"
        self.commits.append(MemoryCommit(unit.sequence, unit.origin, tuple(unit.versions), tuple(unit.events)))
        history = self._histories.setdefault(unit.state.session.sequence, _History())
        for change in unit.versions:
            history.append(change)
        if unit.outcome is not None:
            self._outcomes[unit.outcome.session_id, unit.outcome.key] = unit.outcome

    def _check_untouched(self, drafts: Drafts) -> None:
        """A command that failed has to leave its drafts as it found them: whoever shares them must not notice."""
        for session_id, state in drafts.states.items():
            assert state == self._states.get(session_id), f"a failed command changed session {session_id!r}"
        assert not drafts.versions, "a failed command left versions"
        assert not drafts.outcomes, "a failed command left outcomes"
        assert not drafts.executions, "a failed command left executions"

    # What units of work ask for

    def load(self, session_id: str) -> SessionState | None:
        """The live session's state."""
        return self._states.get(session_id)

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """One version that was kept."""
        versions = self._history_of(state).versions.get(variable_id, [])
        return versions[version] if 0 <= version < len(versions) else None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """The versions that the query wants, newest first; None if the session never had the variable."""
        history, as_of = self._history_of(state), query.as_of
        live = state.find(query.identifier)
        variable_id = live.id if live is not None and as_of is None else history.find_id(query.identifier, as_of)
        if variable_id is None:
            return None
        return up_to(history.versions[variable_id][: query.before][::-1][: query.limit], query.most_bytes)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """What was answered under an idempotency key."""
        return self._outcomes.get((session_id, key))

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """The last execution under an idempotency key that has ended."""
        return self._executions.get((state.session.sequence, key))

    def _history_of(self, state: SessionState) -> "_History":
        return self._histories.setdefault(state.session.sequence, _History())


class _History:
    """All versions of all variables of one session: those that were deleted included."""

    def __init__(self) -> None:
        self.versions: dict[str, list[VariableVersion]] = {}
        self._ids: dict[str, list[str]] = {}

    def append(self, change: Change) -> None:
        versions = self.versions.setdefault(change.variable.id, [])
        assert change.version.version == len(versions), "versions have no gaps"
        versions.append(change.version)
        if not change.version.version:
            self._ids.setdefault(change.variable.name, []).append(change.variable.id)

    def find_id(self, identifier: str, as_of: int | None = None) -> str | None:
        """The id of the newest variable of this name, or of the one of this id, that had begun by commit `as_of`."""
        for each in (*reversed(self._ids.get(identifier, [])), identifier):
            if each in self.versions and (as_of is None or self.versions[each][0].sequence <= as_of):
                return each
        return None
