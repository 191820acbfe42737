"""Commands on sessions in memory, without threads: what units of work staged, to be looked at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TypeVar

from dspex_persist import clock
from dspex_persist.state.commands import Command
from dspex_persist.state.events import Event
from dspex_persist.state.groups import GroupMoment, Groups, Job, Outcome, unit_of
from dspex_persist.state.limits import Limits
from dspex_persist.state.local import MemoryLog
from dspex_persist.state.model import Change, Origin, Source
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import Drafts, UnitOfWork

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class MemoryCommit:
    """What one command left behind."""

    sequence: int
    origin: Origin
    changes: tuple[Change, ...]
    events: tuple[Event, ...]


class RememberingLog(MemoryLog):
    """A log that has every commit as it was staged."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[MemoryCommit] = []

    @property
    def live(self) -> Mapping[str, SessionState]:
        """The live sessions, by id."""
        return MappingProxyType(self._live)

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        for number, unit in enumerate(units, self.sequence + 1):
            assert unit.sequence == number, "units are kept in their order"
            self.commits.append(MemoryCommit(number, unit.origin, tuple(unit.versions), tuple(unit.events)))
        super().append(units, touched)


class MemoryGroups(Groups[RememberingLog]):
    """The engine's own rules, one command at a time. `commits` is everything that was kept; `now` is the time."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        session_ttl_s: float | None = None,
        optimization_lease_s: float = 300.0,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        options = SessionOptions(session_ttl_s=session_ttl_s, optimization_lease_s=optimization_lease_s)
        # Unchecked: a limit of nothing at all is for tests alone.
        object.__setattr__(options, "limits", limits or options.limits)
        super().__init__(RememberingLog(), options)
        self._now = now

    @property
    def commits(self) -> list[MemoryCommit]:
        return self.log.commits

    @property
    def sequence(self) -> int:
        return self.log.sequence

    @property
    def states(self) -> Mapping[str, SessionState]:
        """The live sessions as they stand, by id. Not to be changed."""
        return self.log.live

    def run(self, command: Command[R], origin: Origin | None = None) -> R:
        """Carry a command out and keep what it staged; an error means that nothing was kept."""
        with self._timed():
            [outcome] = self.write_group([Job(command, origin or Origin("tester", command.cause, Source.PYTHON))])
        if outcome.error is not None:
            raise outcome.error
        result: R = outcome.result
        return result

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """One time for the whole of it."""
        if self._now is None:
            yield
            return
        at = self._now()
        with clock.reading(lambda: at):
            yield

    def _apply(self, jobs: Sequence[Job], drafts: Drafts, at: GroupMoment) -> tuple[list[Outcome], list[UnitOfWork]]:
        outcomes, units = super()._apply(jobs, drafts, at)
        if not units and any(outcome.error is not None for outcome in outcomes):
            self._check_untouched(drafts)
        return outcomes, units

    def _check_untouched(self, drafts: Drafts) -> None:
        """Check that a failed command left its drafts unchanged: other commands share them."""
        for session_id, state in drafts.states.items():
            assert state == self.states.get(session_id), f"a failed command changed session {session_id!r}"
        assert not drafts.versions, "a failed command left versions"
        assert not drafts.outcomes, "a failed command left outcomes"
        assert not drafts.executions, "a failed command left executions"

    # Groups of units, by hand

    def unit(self, drafts: Drafts, origin: Origin, staged: int = 0) -> UnitOfWork:
        """A unit of work over `drafts`, after `staged` others with changes that are not kept yet."""
        with self._timed():
            return unit_of(self.options, drafts, origin, GroupMoment.after(self._last_at), self.sequence + staged + 1)

    def keep(self, drafts: Drafts, *units: UnitOfWork) -> None:
        """Make what a group of units staged the state of affairs."""
        changed = [unit for unit in units if unit.has_changes()]
        self.log.append(changed, ())
        self._publish(drafts, changed)
