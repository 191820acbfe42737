"""Groups: runs groups of commands over a log store, and has the sessions in memory. Knows no threads and no SQL.

`Groups.write_group` is the only way to write: a writer's thread calls it, and so can a simulator.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeVar

from dspex_persist import clock
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state import outcomes
from dspex_persist.state.cache import SessionCache
from dspex_persist.state.commands import Command, ExpireSession, InterruptExecutions
from dspex_persist.state.commands.base import check_text
from dspex_persist.state.errors import (
    DamagedSessionError,
    FileChangedError,
    IdempotencyConflictError,
    InternalError,
    NotADatabaseError,
    OutcomeUnknownError,
    ReadFailedError,
    StateError,
    StorageError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.log_store import LogStore, UnwritableError, affected
from dspex_persist.state.model import CommitChanges, EventKind, JournalEntry, Origin, VariableVersion
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import START, Backing, Drafts, RecordedOutcome, UnitOfWork, VersionQuery
from dspex_persist.state.watch import Hub

S_co = TypeVar("S_co", bound=LogStore, covariant=True)

_logger: Final = get_logger(__name__)

CACHE_SIZE_BYTES: Final = 256 * 1024 * 1024
_EXPIRY: Final = Origin(actor="dspex-persist", cause="expiry")
_RECOVERY: Final = Origin(actor="dspex-persist", cause="recovery")


class Job(NamedTuple):
    """A command and who asks."""

    command: Command[Any]
    origin: Origin


class Outcome(NamedTuple):
    """What became of a job: a result, or the error with which it failed."""

    result: Any = None
    error: StateError | None = None


class GroupMoment(NamedTuple):
    """When a group is written: by the wall clock, but never before the last commit; and by the steady clock."""

    now: datetime
    steady: datetime

    @classmethod
    def after(cls, last_at: datetime) -> "GroupMoment":
        """This moment, in a log whose last commit has that time."""
        return cls(max(clock.now(), last_at), clock.steady())


def unit_of(options: SessionOptions, drafts: Drafts, origin: Origin, at: GroupMoment, sequence: int) -> UnitOfWork:
    """A unit of work under these options; `sequence` is the number that its commit would have."""
    return UnitOfWork(
        drafts,
        origin,
        at.now,
        sequence,
        options.limits,
        options.session_ttl_s,
        options.optimization_lease_s,
        at.steady,
    )


class Groups(Generic[S_co]):
    """The sessions of one log, which it owns. `hub`: where they are watched; `cache_size_bytes` bounds those in memory.

    One thread at a time may call `write_group`, `sweep`, `check` and `close`; any thread may read. Whatever these raise
    instead of returning it as an outcome ends the use of the store: see `LogStore`.
    """

    def __init__(
        self, log: S_co, options: SessionOptions | None = None, *, cache_size_bytes: int = CACHE_SIZE_BYTES
    ) -> None:
        self.log = log
        self.options = options or SessionOptions()
        self.hub = Hub(log.sequence)
        self._cache = SessionCache(cache_size_bytes)
        self._last_at = log.last_at
        # Nothing runs any more of what ran when the store was closed or its process died.
        self._stale = dict(log.unfinished())
        self._interrupt_stale()

    def _interrupt_stale(self) -> None:
        """A disk without room keeps nobody from reading: what cannot be said now is said by a later sweep."""
        if self._stale:
            # By their ids: by the time of that sweep, others may have begun.
            jobs = [
                Job(InterruptExecutions(session_id, tuple(ids)), _RECOVERY) for session_id, ids in self._stale.items()
            ]
            if all(outcome.error is None for outcome in self.write_group(jobs)):
                self._stale = {}

    # Writing

    def write_group(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run the jobs in order, and have the store keep what they staged as one atomic group.

        A job that fails its checks, or whose unit cannot be kept, fails alone. An error of the storage fails all of
        them and changes nothing; one that leaves the outcome open is raised as `OutcomeUnknownError`: the store must
        then be thrown away. `FileChangedError`: the log is not what it was any more.
        """
        drafts, at = Drafts(self), GroupMoment.after(self._last_at)
        try:
            with self.log.group():
                results, units = self._apply(jobs, drafts, at)
                states = drafts.states.values()
                touched = [state for state in states if state and state.lease and state.lease.is_unsaved()]
                if units or touched:
                    self.log.append(units, touched)
        except StorageError as error:
            return [Outcome(error=error) for _ in jobs]
        except (OutcomeUnknownError, FileChangedError):
            raise
        except Exception as error:  # noqa: BLE001 - what a job staged cannot be encoded
            if len(jobs) > 1:
                return self._write_halves(jobs)
            return [Outcome(error=_refusal(job.command, error)) for job in jobs]
        if units:
            self._last_at = at.now
        self._publish(drafts, units)
        return results

    def _write_halves(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One of the jobs cannot be written: halving leaves it alone with its error, and the others are written.

        That costs some more groups, but only ever then; a savepoint for each job would cost every group.
        """
        middle = len(jobs) // 2
        return self.write_group(jobs[:middle]) + self.write_group(jobs[middle:])

    def _apply(self, jobs: Sequence[Job], drafts: Drafts, at: GroupMoment) -> tuple[list[Outcome], list[UnitOfWork]]:
        units: list[UnitOfWork] = []
        return [self._run(job, drafts, at, units) for job in jobs], units

    def _run(self, job: Job, drafts: Drafts, at: GroupMoment, units: list[UnitOfWork]) -> Outcome:
        unit: UnitOfWork | None = None
        try:
            job.command.check()
            self._prepare(job.command, drafts, at, units)
            unit = unit_of(self.options, drafts, job.origin, at, self.log.sequence + len(units) + 1)
            result = _apply_once(job, unit)
            self._keep_touch(job.command, drafts)
        except self.log.driver_errors:
            raise
        except Exception as error:  # noqa: BLE001 - a command's boundary: its neighbours in the group must not pay for it
            if unit is not None:
                unit.rollback_to(START)
            return Outcome(error=error if isinstance(error, StateError) else _internal(job.command, error))
        if unit.has_changes():
            units.append(unit)
        return Outcome(result)

    def _prepare(self, command: Command[Any], drafts: Drafts, at: GroupMoment, units: list[UnitOfWork]) -> None:
        """Before a session is written to, end it if its TTL is over."""
        if not command.writes or isinstance(command, ExpireSession):
            return
        # Edited even where it stays as it is: that is how the expiry of a session that was only touched is saved.
        state = drafts.edit(command.session_id)
        if state is not None and state.is_over(at.steady):
            self._run(Job(ExpireSession(command.session_id), _EXPIRY), drafts, at, units)

    def _keep_touch(self, command: Command[Any], drafts: Drafts) -> None:
        """Have the expiry of a session that was only read saved when it is due."""
        read = drafts.find(command.session_id) if not command.writes else None
        if read is not None and read.lease is not None and read.lease.is_unsaved():
            drafts.edit(command.session_id)

    def _publish(self, drafts: Drafts, units: Sequence[UnitOfWork]) -> None:
        """Let readers and watchers see what is durable now."""
        for session_id, state in drafts.states.items():
            if state is None:
                self._cache.drop(session_id)
            else:
                if state.lease is not None and state.lease.is_unsaved():
                    state.lease.saved_expires_at = state.lease.expires_at
                self._cache.put(session_id, state)
        self._cache.evict()
        if units:
            self.hub.advance(self.log.sequence)
            self._tell_watchers(units)

    def _tell_watchers(self, units: Sequence[UnitOfWork]) -> None:
        commits: dict[int, list[CommitChanges]] = {}
        ended: list[int] = []
        for unit in units:
            state = unit.state
            if state is None or not self.hub.is_watched(state.session.sequence):
                continue
            changes = tuple(unit.versions)
            told = CommitChanges(unit.sequence, changes, affected(state, unit.sequence, changes))
            commits.setdefault(state.session.sequence, []).append(told)
            if any(event.kind is EventKind.SESSION_ENDED for event in unit.events):
                ended.append(state.session.sequence)
        self.hub.publish(commits, ended, self.log.sequence)

    # What units of work ask for, inside a group

    def load(self, session_id: str) -> SessionState | None:
        """The live session's state; from the store if memory does not have it, and then kept."""
        state = self._cache.find(session_id)
        if state is None:
            state = self.log.load(session_id)
            if state is not None:
                self._cache.put(session_id, state)
        return state

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """One committed version."""
        return self.log.find_version(state, variable_id, version)

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Committed versions."""
        return self.log.history(state, query)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """What was answered under an idempotency key."""
        return self.log.find_outcome(session_id, key)

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """The last execution under an idempotency key that has ended."""
        return self.log.find_execution(state, key)

    # Reading, from any thread

    def find_loaded(self, session_id: str) -> SessionState | None:
        """The session's published state if it is in memory."""
        return self._cache.find(session_id)

    def read_current(self, command: Command[Any], origin: Origin, state: SessionState) -> Any:
        """Apply a reading command to a published state."""
        try:
            return command.apply(self._reading(Drafts(_MEMORY, lambda _: state), origin))
        except StateError:
            raise
        except Exception as error:
            raise _internal(command, error) from error

    def read_stored(self, command: Command[Any], origin: Origin, state: SessionState | None = None) -> Any:
        """Apply a reading command to what is stored, in a snapshot; to `state` and its stored past if it is given."""
        try:
            with self.log.snapshot() as past:
                drafts = Drafts(past, lambda _: state)
                if state is None:
                    drafts.states[command.session_id] = self._load_beside(past, command.session_id)
                return command.apply(self._reading(drafts, origin))
        except StateError:
            raise
        except self.log.driver_errors:
            raise
        except Exception as error:
            raise _internal(command, error) from error

    def _load_beside(self, past: Backing, session_id: str) -> SessionState | None:
        state, loaded = past.load(session_id), self._cache.find(session_id)
        if state is not None and loaded is not None and loaded.session.sequence == state.session.sequence:
            # The true expiry is the one in memory, if the session is there.
            state.lease = loaded.lease
        return state

    def _reading(self, drafts: Drafts, origin: Origin) -> UnitOfWork:
        return unit_of(self.options, drafts, origin, GroupMoment.after(self._last_at), self.log.sequence)

    def had(self, state: SessionState, identifier: str) -> bool:
        """Whether the session has or had a variable of this name or id."""
        with self.log.snapshot() as past:
            return past.history(state, VersionQuery(identifier, 1)) is not None

    # Housekeeping, by the writer

    def expired(self, limit: int = 100) -> list[Job]:
        """The jobs that end the sessions whose TTL is over."""
        return [Job(ExpireSession(each), _EXPIRY) for each in self.log.expired(clock.steady(), limit)]

    def sweep(self) -> int:
        """Reclaim: end expired sessions, forget old answers; how many sessions ended. Readers need not wait for it."""
        self._interrupt_stale()
        swept = 0
        while jobs := self._find_expired():
            ended = sum(1 for outcome in self.write_group(jobs) if outcome.result)
            swept += ended
            if ended == 0:
                break
        retention = timedelta(seconds=self.options.outcome_retention_s)
        # What cannot be reclaimed now is reclaimed by a later sweep.
        with suppress(StorageError):
            self.log.reclaim(min(clock.now(), clock.steady()) - retention, self.hub.is_watched)
        return swept

    def _find_expired(self) -> list[Job]:
        try:
            return self.expired()
        except (ReadFailedError, NotADatabaseError) as error:
            # A later sweep ends them. Who reads one of them until then is told that it is over.
            _logger.warning("expired sessions not found", reason=str(error))
            return []

    def check(self) -> None:
        """Raise `FileChangedError` where the store is not what it was any more."""
        self.log.check()

    def close(self) -> None:
        """Let the store go."""
        self.log.close()

    def abandon(self) -> None:
        """Let the store go without another write: after an outcome that is unknown."""
        self.log.abandon()


class _Memory:
    """The past, for commands that read nothing but current values."""

    def load(self, session_id: str) -> NoReturn:
        raise NotImplementedError("the session is given")

    def find_version(self, state: SessionState, variable_id: str, version: int) -> NoReturn:
        raise NotImplementedError("memory holds no history")

    def history(self, state: SessionState, query: VersionQuery) -> NoReturn:
        raise NotImplementedError("memory holds no history")

    def find_outcome(self, session_id: str, key: str) -> NoReturn:
        raise NotImplementedError("memory holds no outcomes")

    def find_execution(self, state: SessionState, key: str) -> NoReturn:
        raise NotImplementedError("memory holds no executions that have ended")


_MEMORY: Final = _Memory()


def _refusal(command: Command[Any], error: Exception) -> StateError:
    return error.error if isinstance(error, UnwritableError) else _internal(command, error)


def _internal(command: Command[Any], error: Exception) -> InternalError:
    """What a caller is told of a fault of ours; the log has the rest."""
    reference = secrets.token_hex(6)
    # As text: a renderer of exceptions may show local variables, and those are users' values.
    trace = trace_of(error)
    _logger.error("command failed", command=command.cause, reference=reference, traceback=trace)
    return InternalError(f"internal error, reference {reference}")


def _apply_once(job: Job, unit: UnitOfWork) -> Any:
    """Apply the command; under an idempotency key, once: a repetition gets the recorded answer."""
    command, key = job.command, job.origin.idempotency_key
    if job.origin.actor:
        # A low limit on the names of variables must not lock out every user of a longer name.
        check_text("actor", job.origin.actor, max(unit.limits.name_length, Limits().name_length), "name_length")
    if key is None or not command.writes:
        return command.apply(unit)
    check_text("idempotency key", key, unit.limits.name_length, "name_length")
    fingerprint = command.meaning(unit)
    recorded = unit.find_outcome(command.session_id, key)
    if recorded is not None:
        # Older files have it as the request was spelled.
        if recorded.fingerprint != fingerprint and recorded.fingerprint != command.fingerprint():
            raise IdempotencyConflictError(key, recorded.cause)
        try:
            return outcomes.decode(command.returns, recorded.result)
        except ValueError as error:
            raise DamagedSessionError(command.session_id, type(error).__name__) from error
    result = command.apply(unit)
    if unit.has_changes():
        text = outcomes.encode(command.returns, result)
        unit.record_outcome(RecordedOutcome(command.session_id, key, command.cause, fingerprint, text))
    return result
