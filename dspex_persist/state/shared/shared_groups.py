"""SharedGroups: the sessions of a shared log, as far as this server has them in memory."""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any, Final

from dspex_persist import clock
from dspex_persist.infra.logs import get_logger
from dspex_persist.spelling import quote
from dspex_persist.state.commands import Command, EndMovedSession
from dspex_persist.state.errors import (
    OutcomeUnknownError,
    ReadFailedError,
    SessionHeldError,
    StateError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.events import ExecutionBegan
from dspex_persist.state.groups import CACHE_SIZE_BYTES, GroupMoment, Groups, Job, Outcome
from dspex_persist.state.holds import concerns
from dspex_persist.state.log_store import FencedError, MovedError, News
from dspex_persist.state.meter import Meter
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.shared.server_meter import ServerMeter
from dspex_persist.state.shared.shared_held import HeldElsewhere, HeldHere
from dspex_persist.state.shared_log import SharedLog
from dspex_persist.state.unit_of_work import Drafts, UnitOfWork

_logger: Final = get_logger(__name__)
_MOST_ATTEMPTS: Final = 64
"""How often a group is run that others keep overtaking."""
_AWAY: Final = (OutcomeUnknownError, ReadFailedError, UnavailableError, StorageError)
"""Errors of a log that may be reached again later."""
QUIET: Final = 3
"""After so many groups in a row without news, the next ones are optimistic: a group that was, in vain, costs two."""


class _ToBeSavedError(MovedError):
    """A group that only reads has renewed a TTL so far that it has to be saved: run it again as one that writes."""


class SharedGroups(Groups[SharedLog]):
    """The sessions of a shared log, as far as this server has them in memory.

    Args:
        log: The log of this server. `close` and `abandon` close it.
        options: Limits, TTLs and leases; the defaults if None.
        cache_size_bytes: How much memory the cached sessions may take.
        meter: Counts what any engine counts; None not to count.
        server_meter: Counts what is about the other servers; None not to count.

    Attributes:
        on_known: Called on the writing thread with `known` when that has changed.
        on_away: Called on the writing thread with the error when the log could not be followed.
        on_ended: Called on the writing thread with the ids of sessions that other servers have ended.
        on_fenced: Called on the writing thread after other servers have taken this one for dead. Its executions are
            being interrupted; it has another lease now.
    """

    def __init__(
        self,
        log: SharedLog,
        options: SessionOptions | None = None,
        *,
        cache_size_bytes: int = CACHE_SIZE_BYTES,
        meter: Meter | None = None,
        server_meter: ServerMeter | None = None,
    ) -> None:
        self._known = log.sequence
        self.on_known: Callable[[int], None] = _nothing
        self.on_away: Callable[[StateError], None] = _nothing
        self.on_ended: Callable[[Collection[str]], None] = _nothing
        self.on_fenced: Callable[[], None] = lambda: None
        self.server_meter = server_meter
        self._is_away = self._is_fenced = False
        self._back_at: datetime | None = None
        # Whether the group only reads, and whether it may.
        self._reads = False
        # How many groups in a row had no news.
        self._quiet = 0
        self._may_read = True
        # The executions that the last group begins, by session; and those that may have begun, as nobody can tell.
        self._begins: list[tuple[str, str]] = []
        self._doubtful: list[tuple[str, str]] = []
        self._told = log.sequence
        # Holds of this server that are over, but not in the log yet.
        self.released: deque[str] = deque()
        self._away: tuple[type[Exception], ...] = (*_AWAY, *log.driver_errors)
        super().__init__(log, options, cache_size_bytes=cache_size_bytes, meter=meter)

    @property
    def known(self) -> int:
        """See `Groups.known`. The log may be further, while memory is being brought up to date."""
        return self._known

    def write_group(self, jobs: Sequence[Job], *, wait: bool = True) -> list[Outcome]:
        """See `Groups.write_group`. If it is unknown whether the group was written, all of memory is forgotten."""
        self._may_read = not any(job.command.writes for job in jobs)
        for _ in range(_MOST_ATTEMPTS):
            try:
                outcomes = super().write_group(jobs, wait=wait)
            except _ToBeSavedError:
                self._may_read = False
                continue
            except MovedError:
                # The next attempt looks first.
                self._quiet = -1
                if self.server_meter is not None:
                    self.server_meter.repeated()
                continue
            except OutcomeUnknownError as error:
                self._doubtful += self._begins
                self._forget()
                return [Outcome(error=error) for _ in jobs]
            except FencedError:
                self._begin_anew()
                if any(job.command.writes for job in jobs):
                    return self._refuse_writes(jobs)
                continue
            self._tell()
            return outcomes
        reason = f"other servers have overtaken it {_MOST_ATTEMPTS} times"
        return [Outcome(error=StorageError(reason)) for _ in jobs]

    def _group(self, jobs: Sequence[Job], wait: bool) -> AbstractContextManager[News | None]:
        self._reads = self._may_read
        if self._reads:
            return self.log.reading()
        return self.log.optimistic_group(wait=wait) if self._quiet >= QUIET else super()._group(jobs, wait)

    def _begin(self, news: News | None) -> int:
        self._quiet += 1
        before = super()._begin(news)
        self._note_holds()
        return before

    def prepare(self, command: Command[Any], drafts: Drafts, at: GroupMoment, units: list[UnitOfWork]) -> None:
        """See `Groups.prepare`. What other servers hold is what the log says inside the group."""
        hold = self.log.holds.get(command.session_id)
        if hold is not None and not hold.is_own and concerns(command, is_full=hold.is_full):
            raise SessionHeldError(command.session_id)
        if isinstance(command, EndMovedSession) and (hold is None or not hold.is_own):
            # Others have written since it was copied.
            raise UnavailableError(
                f"session {quote(command.session_id)} was not moved: other servers took this one for dead meanwhile"
            )
        super().prepare(command, drafts, at, units)

    def _append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        if self._reads:
            raise _ToBeSavedError
        self._begins = [
            (unit.state.session.id, event.execution_id)
            for unit in units
            if unit.state is not None
            for event in unit.events
            if isinstance(event, ExecutionBegan)
        ]
        super()._append(units, touched)

    def _refuse_writes(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Refuse the writes of a server that was taken for dead: they may come from executions that are over."""
        error = UnavailableError("other servers took this one for dead, because it had not renewed its lease")
        reads = [job for job in jobs if not job.command.writes]
        outcomes = iter(self.write_group(reads) if reads else ())
        return [Outcome(error=error) if job.command.writes else next(outcomes) for job in jobs]

    def _tell(self) -> None:
        if self.log.sequence > self._told:
            self._told = self.log.sequence
            self.log.tell()

    # Following the others

    def check(self) -> None:
        """Follow the other servers: the poll that misses nothing."""
        self.follow()

    def follow(self) -> None:
        """Learn what others have committed. The writer calls it between groups."""
        try:
            if self._is_fenced:
                self._begin_lease()
            self._end_holds()
            news = self.log.news()
            if news is not None:
                self.learn(news)
            self._release_held()
        except FencedError:
            self._begin_anew()
        except self._away as error:
            self._miss(error)
            return
        if self._is_away:
            self._is_away, self._back_at = False, clock.steady()
            _logger.warning("the log can be reached again")
        self._advance(self.log.sequence)
        self.hub.wake()

    # Holds of sessions

    def _note_holds(self) -> None:
        """Have the calls of sessions wait that other servers hold."""
        for session_id, hold in self.log.holds.items():
            if hold.is_own:
                continue
            held = self.held.setdefault(session_id, HeldElsewhere(session_id, hold))
            if isinstance(held, HeldElsewhere) and held.hold.hold_id == hold.hold_id and hold.is_full:
                held.fill()

    def _release_held(self) -> None:
        """Have the calls go on that have waited for a hold which is over. Not in a group, as they make some."""
        holds = self.log.holds
        for session_id, held in tuple(self.held.items()):
            hold = holds.get(session_id)
            if isinstance(held, HeldElsewhere):
                if hold is None or hold.hold_id != held.hold.hold_id:
                    self._let_go(held, self.log.moved_to(session_id, held.hold.since))
            elif isinstance(held, HeldHere) and held.is_begun and (hold is None or hold.hold_id != held.hold_id):
                # It has ended with the lease.
                self._let_go(held, None)
        self._note_holds()

    def _let_go(self, held: HeldElsewhere | HeldHere, moved_to: str | None) -> None:
        held.release(moved_to)
        if self.held.get(held.session_id) is held:
            del self.held[held.session_id]

    def _end_holds(self) -> None:
        while self.released:
            hold_id = self.released[0]
            self.log.end_hold(hold_id)
            self.released.popleft()
            self.log.tell()

    def _miss(self, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            _logger.warning("the log cannot be reached", reason=str(error))
        self.on_away(error if isinstance(error, StateError) else UnavailableError(str(error)))

    def learn(self, news: News) -> None:
        """See `Groups.learn`. If it fails half-way, all of memory is forgotten, as the news do not come again."""
        self._quiet = 0
        try:
            super().learn(news)
        except BaseException:
            self._forget()
            raise
        if self.server_meter is not None:
            self.server_meter.learnt(news.sequence - news.after)
        if self.quotas is not None:
            # Others count for themselves.
            self.quotas.forget()
        self._told = max(self._told, news.sequence)
        self._advance(news.sequence)
        if news.ended and news.changed is not None:
            self.on_ended([news.changed[first] for first in news.ended])

    def _catch_up(self, changed: Mapping[int, str], news: News) -> None:
        found = {first: self._cache.find(session_id) for first, session_id in changed.items()}
        cached = {first: state for first, state in found.items() if state is not None}
        same = [each for first, each in cached.items() if each.session.sequence == first and first not in news.ended]
        later = self.log.advance(same, news.sequence)
        advanced = {before.session.sequence: after for before, after in zip(same, later, strict=True)}
        for first, state in cached.items():
            after = advanced.get(first)
            if after is not None:
                self._cache.put(changed[first], after)
            elif state.session.sequence <= first:
                self._cache.drop(changed[first])
            if self.server_meter is not None:
                self.server_meter.caught_up(in_place=after is not None)

    def _publish(self, drafts: Drafts, units: Sequence[UnitOfWork]) -> None:
        super()._publish(drafts, units)
        self._advance(self.log.sequence)

    def _advance(self, sequence: int) -> None:
        self._known = sequence
        self.on_known(sequence)

    def _forget(self) -> None:
        """Forget all of memory: what is needed again is read from the log."""
        super().learn(News(self._known, self.log.sequence, self._last_at, None))
        if self.quotas is not None:
            self.quotas.forget()
        self._advance(self.log.sequence)

    # The lease of this server

    def lose_lease(self) -> None:
        """Note that others took this server for dead; from any thread. `follow` then begins another lease."""
        self._is_fenced = True

    def _begin_lease(self) -> None:
        # A group compares the lease, and without an `append` has no other effect.
        with self.log.group() as news:
            if news is not None:
                self.learn(news)
        self._is_fenced = False

    def _begin_anew(self) -> None:
        self._is_fenced = False
        _logger.warning("other servers took this one for dead", reason="it had not renewed its lease")
        if self.server_meter is not None:
            self.server_meter.fenced()
        self._forget()
        self.on_fenced()

    # Others may have renewed the TTL of a session, which makes no commit

    def load(self, session_id: str) -> SessionState | None:
        """See `Groups.load`."""
        state = super().load(session_id)
        if state is not None and state.lease is not None and state.is_over(clock.steady()):
            expires_at = self.log.expiry_of(state)
            if expires_at is not None:
                lease = state.lease
                lease.saved_expires_at = max(lease.saved_expires_at, expires_at)
                lease.expires_at = max(lease.expires_at, expires_at + lease.slack)
        return state

    def find_loaded(self, session_id: str) -> SessionState | None:
        """See `Groups.find_loaded`. A session that seems to have expired is for the writer."""
        state = super().find_loaded(session_id)
        return None if state is not None and state.is_over(clock.steady()) else state

    # Servers that have died

    def sweep(self) -> int:
        """See `Groups.sweep`. It also interrupts the executions of servers that have died."""
        try:
            self._fence()
            doubts = len(self._doubtful)
            self._stale = self._find_orphans()
            swept = super().sweep()
            if not self._stale:
                del self._doubtful[:doubts]
            return swept
        except FencedError:
            self._begin_anew()
        except self._away as error:
            _logger.debug("not swept", reason=str(error))
        return 0

    def _fence(self) -> None:
        """Fence the servers that have died. While the log was away none could renew its lease: they get the time."""
        if self._is_away or (
            self._back_at is not None and clock.steady() - self._back_at < timedelta(seconds=self.log.lease_s)
        ):
            return
        for server in self.log.fence():
            _logger.warning("a server has not renewed its lease", server=server)

    def _find_orphans(self) -> dict[str, Sequence[str]]:
        """Return the executions that nobody runs, by session."""
        orphans = dict(self.log.unfinished())
        if orphans and self.server_meter is not None:
            self.server_meter.found_orphans(sum(map(len, orphans.values())))
        # Whoever asked for one of these was told that nobody knows.
        for session_id, execution_id in self._doubtful:
            orphans[session_id] = (*orphans.get(session_id, ()), execution_id)
        return orphans


def _nothing(_: object) -> None:
    pass
