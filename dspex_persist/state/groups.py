"""Run groups of commands over a log store, and cache the sessions in memory. Independent of threads and of SQL.

`Groups.write_group` is the only way to write. The writer's thread calls it; a simulator can, too.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timedelta
from typing import Any, Final, Generic, NamedTuple, TypeVar

from dspex_persist import clock
from dspex_persist.infra import tracing
from dspex_persist.infra.access.tokens import Identity
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.infra.tracing import Place
from dspex_persist.state import outcomes
from dspex_persist.state.access import Access
from dspex_persist.state.budgets import Spent
from dspex_persist.state.cache import CountingCache, SessionCache
from dspex_persist.state.commands import (
    Command,
    ExpireSession,
    FinishImport,
    ImportSession,
    InterruptExecutions,
)
from dspex_persist.state.commands.base import check_text
from dspex_persist.state.commands.derivations import Derivation, derive
from dspex_persist.state.commands.recordings import NeedsOwnGroupError
from dspex_persist.state.errors import (
    AccessDeniedError,
    DamagedSessionError,
    FileChangedError,
    IdempotencyConflictError,
    InternalError,
    LostCommitsError,
    NotADatabaseError,
    OutcomeUnknownError,
    ReadFailedError,
    SessionHeldError,
    StateError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.holds import Held
from dspex_persist.state.limits import Limits
from dspex_persist.state.log_store import (
    OF_GROUPS,
    LogStore,
    News,
    UnwritableError,
    affected,
)
from dspex_persist.state.meter import Meter
from dspex_persist.state.model import (
    CommitChanges,
    EventKind,
    ImportedSession,
    JournalEntry,
    Origin,
    VariableVersion,
)
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.quotas import Quotas
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import (
    START,
    Backing,
    Drafts,
    Reading,
    RecordedOutcome,
    UnitOfWork,
    VersionQuery,
)
from dspex_persist.state.watch import Hub

S_co = TypeVar("S_co", bound=LogStore, covariant=True)

_logger: Final = get_logger(__name__)

CACHE_SIZE_BYTES: Final = 256 * 1024 * 1024
_ACTOR_LENGTH: Final = Limits().name_length
_EXPIRY: Final = Origin(actor="dspex-persist", cause="expiry")
_RECOVERY: Final = Origin(actor="dspex-persist", cause="recovery")
_IMPORT: Final = Origin(actor="dspex-persist", cause="import")
OF_THE_STORE: Final = (OutcomeUnknownError, FileChangedError, LostCommitsError, *OF_GROUPS)
"""Errors of a store that concern the whole group, and that its caller has to deal with."""


class Job(NamedTuple):
    """A command, the origin of the request, and its place in a trace, if there is one."""

    command: Command[Any]
    origin: Origin
    place: Place | None = None


class Outcome(NamedTuple):
    """How a job ended: with a result, or with an error."""

    result: Any = None
    error: StateError | None = None


class GroupMoment(NamedTuple):
    """When a group is written: the wall-clock time, never earlier than the last commit; and the steady clock's."""

    now: datetime
    steady: datetime

    @classmethod
    def after(cls, last_at: datetime) -> "GroupMoment":
        """Return the current moment for a log whose last commit was made at `last_at`."""
        return cls(max(clock.now(), last_at), clock.steady())


def unit_of(options: SessionOptions, drafts: Drafts, origin: Origin, at: GroupMoment, sequence: int) -> UnitOfWork:
    """Create a unit of work with these options; `sequence` is the number of its commit, if it makes one."""
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
    """The sessions of one log. It owns the log and publishes commits to the watchers in `hub`.

    One thread at a time may call `write_group`, `sweep`, `check` and `close`; any thread may read. An exception from
    one of these methods, as opposed to an error in an `Outcome`, means that the store cannot be used any more: see
    `LogStore`.

    Args:
        log: The store. `close` and `abandon` close it.
        options: Limits, TTLs and leases; the defaults if None.
        cache_size_bytes: How much memory the cached sessions may take; the least recently used are evicted.
        meter: Counts sessions that had to be loaded, and repeated writes; None not to count.
    """

    def __init__(
        self,
        log: S_co,
        options: SessionOptions | None = None,
        *,
        cache_size_bytes: int = CACHE_SIZE_BYTES,
        meter: Meter | None = None,
    ) -> None:
        self.log = log
        self.meter = meter
        self.options = options or SessionOptions()
        self.hub = Hub(log.sequence)
        self._cache = SessionCache(cache_size_bytes) if meter is None else CountingCache(cache_size_bytes)
        # The derivations of sessions by their ids; the tuples are replaced, never changed.
        self.derivations: dict[str, tuple[Derivation, ...]] = {}
        # Sessions whose writers wait, by id.
        self.held: dict[str, Held] = {}
        # How much identities may store; None where that is not limited.
        self.quotas: Quotas | None = None
        self._last_at = log.last_at
        self.alive_at = time.monotonic()
        """When a group, or a page of an import, was begun last, as `time.monotonic` counts."""
        # Executions that were running when the store was closed, or when its process died, do not run any more.
        self._stale = dict(log.unfinished())
        self._interrupt_stale()

    def _interrupt_stale(self) -> None:
        """Mark the stale executions as interrupted. On a full disk, reads still work and a later sweep tries again."""
        if self._stale:
            # Named by their ids, because others may have begun by the time of that sweep.
            jobs = [
                Job(InterruptExecutions(session_id, tuple(ids)), _RECOVERY) for session_id, ids in self._stale.items()
            ]
            if all(outcome.error is None for outcome in self.write_group(jobs)):
                self._stale = {}

    # Writing

    def write_group(self, jobs: Sequence[Job], *, wait: bool = True) -> list[Outcome]:
        """Run the jobs in order and append their units of work to the log as one atomic group.

        A job that fails its checks, or whose unit cannot be stored, fails alone. A storage error fails all of them and
        changes nothing.

        Args:
            jobs: The commands, each with its origin.
            wait: Whether it may wait for another program. If not, it raises `WouldWaitError` instead.

        Returns:
            One outcome for each job, in the same order.

        Raises:
            WouldWaitError: It would have had to wait; nothing was run.
            OutcomeUnknownError: It is unknown whether the group was written. Abandon the store.
            FileChangedError: Something else changed the log. Abandon the store.
        """
        before = self.log.sequence
        try:
            with self._group(jobs, wait) as news:
                before = self._begin(news)
                drafts, at = Drafts(self), self.moment()
                results, units = self._apply(jobs, drafts, at)
                states = drafts.states.values()
                touched = [state for state in states if state and state.lease and state.lease.is_unsaved()]
                if units or touched:
                    self._append(units, touched)
        except (StorageError, UnavailableError) as error:
            return [Outcome(error=error) for _ in jobs]
        except OF_THE_STORE:
            raise
        except NeedsOwnGroupError:
            return self._write_apart(jobs, wait)
        except Exception as error:
            # A staged change cannot be encoded.
            if self.log.sequence != before:
                # It was written. Another thread may raise an exception in this one at any time.
                raise
            if len(jobs) > 1:
                return self._write_halves(jobs)
            return [Outcome(error=_refusal(job.command, error)) for job in jobs]
        if units:
            self._last_at = at.now
            self._trace(jobs, len(units), at.now)
        self._publish(drafts, units)
        self._count_commits(before)
        return results

    def _group(self, jobs: Sequence[Job], wait: bool) -> AbstractContextManager[News | None]:
        return self.log.group(wait=wait)

    def _append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        self.log.append(units, touched)

    def _trace(self, jobs: Sequence[Job], commits: int, began: datetime) -> None:
        """Make a span for each job of a group that wants to write, in the trace of that one."""
        tracer = tracing.tracer()
        if tracer is None:
            return
        facts = {
            "dspex.commit.group_size": len(jobs),
            "dspex.commit.count": commits,
            "dspex.commit.last_sequence": self.log.sequence,
        }
        ended = clock.now()
        for job in jobs:
            if job.place is not None and job.command.writes:
                tracer.past("commit", facts, job.place, began, ended)

    def _begin(self, news: News | None) -> int:
        """Prepare for the jobs of a group; return the number of the last commit before it."""
        if news is not None:
            self.learn(news)
        if self.quotas is not None:
            self.quotas.begin()
        return self.log.sequence

    def _write_halves(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Write the others if one job cannot be written: halving the group isolates that job with its error.

        This takes a few more groups, but only in this case; a savepoint for each job would slow down every group.
        """
        middle = len(jobs) // 2
        return self.write_group(jobs[:middle]) + self.write_group(jobs[middle:])

    def _write_apart(self, jobs: Sequence[Job], wait: bool) -> list[Outcome]:
        """Write an import in a group of its own, between those of the jobs before it and after it."""
        outcomes: list[Outcome] = []
        for place, (command, *_) in enumerate(jobs):
            if isinstance(command, ImportSession):
                before, after = jobs[:place], jobs[place + 1 :]
                outcomes += self.write_group(before, wait=wait) if before else []
                outcomes.append(self._write_import(command, wait))
                return outcomes + (self.write_group(after) if after else [])
        raise AssertionError("only an import needs a group of its own")

    def _write_import(self, command: ImportSession, wait: bool) -> Outcome:
        before = self.log.sequence
        try:
            self.log.prepare_import()
            with self.log.group(wait=wait) as news:
                before = self._begin(news)
                importing = _Importing(self, command, self.moment())
                result = importing.write()
        except OF_THE_STORE:
            raise
        except self.log.driver_errors:
            raise
        except Exception as error:
            if self.log.sequence != before:
                # It was written, see `write_group`.
                raise
            return Outcome(error=error if isinstance(error, StateError) else _refusal(command, error))
        self._last_at = importing.at.now
        self._publish(importing.drafts, importing.expired)
        self._count_commits(before)
        if self.quotas is not None:
            self.quotas.forget()
        self.hub.advance(self.log.sequence)
        return Outcome(result)

    def _count_commits(self, before: int) -> None:
        if self.meter is not None:
            self.meter.commits += self.log.sequence - before

    def _apply(self, jobs: Sequence[Job], drafts: Drafts, at: GroupMoment) -> tuple[list[Outcome], list[UnitOfWork]]:
        units: list[UnitOfWork] = []
        return [self._run(job, drafts, at, units) for job in jobs], units

    def _run(self, job: Job, drafts: Drafts, at: GroupMoment, units: list[UnitOfWork]) -> Outcome:
        unit: UnitOfWork | None = None
        try:
            job.command.check()
            self.prepare(job.command, drafts, at, units)
            if job.origin.identity is not None and job.command.writes:
                _check_access(job, job.origin.identity, drafts)
            unit = unit_of(self.options, drafts, job.origin, at, self.log.sequence + len(units) + 1)
            unit.quotas = self.quotas
            if self.derivations:
                unit.derivations = self.derivations.get(job.command.session_id, ())
            result = _apply_once(job, unit, self.meter)
            self._keep_touch(job.command, drafts)
        except NeedsOwnGroupError:
            raise
        except OF_GROUPS:
            raise
        except self.log.driver_errors:
            raise
        except Exception as error:  # noqa: BLE001 - a command's boundary: it must not fail the others in its group
            if unit is not None:
                unit.rollback_to(START)
            if not isinstance(error, StateError):
                return Outcome(error=_internal(job.command, error))
            # The frames of its traceback refer to those of the group, and these to it: this breaks the cycle.
            return Outcome(error=error.with_traceback(None))
        if unit.has_changes():
            units.append(unit)
        return Outcome(result)

    def prepare(self, command: Command[Any], drafts: Drafts, at: GroupMoment, units: list[UnitOfWork]) -> None:
        """End the session that the command writes to, if its TTL is over; `SessionHeldError` if somebody holds it."""
        if self.held and (held := self.held.get(command.session_id)) is not None and held.refuses(command):
            raise SessionHeldError(command.session_id)
        if not command.writes or isinstance(command, ExpireSession):
            return
        # Edited even if the command changes nothing, so that the new expiry of a touched session is saved.
        state = drafts.edit(command.session_id)
        if state is not None and state.is_over(at.steady):
            self._run(Job(ExpireSession(command.session_id), _EXPIRY), drafts, at, units)

    def _keep_touch(self, command: Command[Any], drafts: Drafts) -> None:
        """Save the expiry of a session that was only read, when that is due."""
        read = drafts.find(command.session_id) if not command.writes else None
        if read is not None and read.lease is not None and read.lease.is_unsaved():
            drafts.edit(command.session_id)

    def _publish(self, drafts: Drafts, units: Sequence[UnitOfWork]) -> None:
        """Let readers and watchers see the commits that are now durable."""
        if self.quotas is not None:
            self.quotas.settle()
            if any(event.kind is EventKind.PRUNED for unit in units for event in unit.events):
                self.quotas.forget()
        for session_id, state in drafts.states.items():
            if state is None:
                self._cache.drop(session_id)
                self.derivations.pop(session_id, None)
            else:
                if state.lease is not None and state.lease.is_unsaved():
                    state.lease.saved_expires_at = state.lease.expires_at
                self._cache.put(session_id, state)
        self._cache.evict()
        if units:
            self.hub.advance(self.log.sequence)
            self._publish_to_watchers(units)

    def _publish_to_watchers(self, units: Sequence[UnitOfWork]) -> None:
        commits: dict[int, list[CommitChanges]] = {}
        ended: list[int] = []
        for unit in units:
            state = unit.state
            if state is None or not self.hub.is_watched(state.session.sequence):
                continue
            changes = tuple(unit.versions)
            commit = CommitChanges(unit.sequence, changes, affected(state, unit.sequence, changes))
            commits.setdefault(state.session.sequence, []).append(commit)
            if any(event.kind is EventKind.SESSION_ENDED for event in unit.events):
                ended.append(state.session.sequence)
        # A watch that joins from now on finds them in the log.
        if commits or ended:
            self.hub.publish(commits, ended, self.log.sequence)

    def learn(self, news: News) -> None:
        """Forget what memory knows of sessions that other owners of the log have changed, and wake their watches."""
        self._last_at = max(self._last_at, news.last_at)
        if news.changed is None:
            self._cache.clear()
        else:
            self._catch_up(news.changed, news)
        self.hub.skip(news.changed, news.ended, news.sequence)

    def _catch_up(self, changed: Mapping[int, str], news: News) -> None:
        for session_id in changed.values():
            self._cache.drop(session_id)

    # The `Backing` of units of work, inside a group

    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's state, from the cache or else from the store, which then fills the cache."""
        state = self._cache.find(session_id)
        if state is None:
            if self.meter is not None:
                self.meter.misses += 1
            state = self.log.load(session_id)
            if state is not None:
                self._cache.put(session_id, state)
        return state

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one committed version."""
        return self.log.find_version(state, variable_id, version)

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return committed versions."""
        return self.log.history(state, query)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under an idempotency key."""
        return self.log.find_outcome(session_id, key)

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last ended execution with an idempotency key."""
        return self.log.find_execution(state, key)

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """Return what the LM calls of ended executions have used."""
        return self.log.spent(state)

    # Reading, from any thread

    @property
    def known(self) -> int:
        """The last commit of the log that memory has the effects of."""
        return self.log.sequence

    def cache_figures(self) -> tuple[int, int, int]:
        """Return how many sessions are in memory, how much of it they take, and how often one was found there."""
        return len(self._cache), self._cache.size_bytes, self._cache.hits

    def find_loaded(self, session_id: str) -> SessionState | None:
        """Return the session's published state if it is in memory."""
        return self._cache.find(session_id)

    def read_current(self, command: Command[Any], origin: Origin, state: SessionState) -> Any:
        """Apply a reading command to a published state."""
        try:
            sequence, limits = self.log.sequence, self.options.limits
            return command.apply(Reading(command.session_id, state, origin, sequence, limits, self.moment))
        except StateError:
            raise
        except Exception as error:
            raise _internal(command, error) from error

    def read_stored(self, command: Command[Any], origin: Origin, state: SessionState | None = None) -> Any:
        """Apply a reading command to a snapshot of the store.

        Args:
            command: The command.
            origin: Who makes the request.
            state: The session's current state, if it is known; the snapshot is then only read for the past.
        """
        try:
            with self.log.snapshot() as past:
                drafts = Drafts(past, lambda _: state)
                if state is None:
                    drafts.states[command.session_id] = self._load_with_lease(past, command.session_id)
                return command.apply(unit_of(self.options, drafts, origin, self.moment(), self.log.sequence))
        except StateError:
            raise
        except self.log.driver_errors:
            raise
        except Exception as error:
            raise _internal(command, error) from error

    def _load_with_lease(self, past: Backing, session_id: str) -> SessionState | None:
        state, loaded = past.load(session_id), self._cache.find(session_id)
        if state is not None and loaded is not None and loaded.session.sequence == state.session.sequence:
            # The file's expiry may be behind the one in memory.
            state.lease = loaded.lease
        return state

    def moment(self) -> GroupMoment:
        """Return the current moment, as far as the log is concerned."""
        self.alive_at = time.monotonic()
        return GroupMoment.after(self._last_at)

    def had(self, state: SessionState, identifier: str) -> bool:
        """Whether the session has, or ever had, a variable with this name or id."""
        with self.log.snapshot() as past:
            return past.history(state, VersionQuery(identifier, 1)) is not None

    # Housekeeping, by the writer

    def expired(self, limit: int = 100) -> list[Job]:
        """Return the jobs that end expired sessions, at most `limit`."""
        return [Job(ExpireSession(each), _EXPIRY) for each in self.log.expired(clock.steady(), limit)]

    def sweep(self) -> int:
        """End expired sessions and delete old outcomes. Readers do not depend on it: they see the expiry at once.

        Returns:
            How many sessions ended.
        """
        self._interrupt_stale()
        swept = 0
        while jobs := self._find_expired():
            ended = sum(1 for outcome in self.write_group(jobs) if outcome.result)
            swept += ended
            if ended == 0:
                break
        retention = timedelta(seconds=self.options.outcome_retention_s)
        # If this fails, a later sweep tries again.
        with suppress(StorageError):
            self.log.reclaim(min(clock.now(), clock.steady()) - retention, self.hub.is_watched)
        return swept

    def _find_expired(self) -> list[Job]:
        try:
            return self.expired()
        except (ReadFailedError, NotADatabaseError) as error:
            # A later sweep ends them. Until then, reads of one of them already fail as expired.
            _logger.warning("expired sessions not found", reason=str(error))
            return []

    def check(self) -> None:
        """Raise `FileChangedError` if something else changed the store."""
        self.log.check()

    def close(self) -> None:
        """Close the store."""
        self.log.close()

    def abandon(self) -> None:
        """Close the store without writing anything more, after an unknown outcome."""
        self.log.abandon()


class _Importing:
    """An import within its group.

    Attributes:
        at: When it happens.
        drafts: The session, and the one that had its id and has expired.
        expired: The unit that ended that one, if there was one.
    """

    def __init__(self, groups: Groups[LogStore], command: ImportSession, at: GroupMoment) -> None:
        self._groups = groups
        self._log = groups.log
        self._command = command
        self.at = at
        self.drafts = Drafts(groups)
        self.expired: list[UnitOfWork] = []
        self._sequence = groups.log.sequence
        self._units: list[UnitOfWork] = []
        self._interrupted = 0
        self._answers = 0

    def write(self) -> ImportedSession:
        """Append the commits to the log."""
        command = self._command
        command.check()
        self._groups.prepare(command, self.drafts, self.at, self.expired)
        self._units += self.expired
        self._sequence += len(self.expired)
        first = self._sequence + 1
        for page in command.steps():
            for step in page:
                self._take(step)
            if self._log.takes_pages:
                self._append([])
            # Its pages may come for as long as the session is copied.
            self.at = self._groups.moment()
        state = self.drafts.states.get(command.session_id)
        self._append([state] if state is not None and state.lease is not None else [])
        if self._sequence >= first:
            self._log.note_import(first, self._sequence)
        commits = self._sequence - first + 1
        facts = (command.session_id, commits, first, self._sequence, self._interrupted, self._answers)
        return ImportedSession(*facts, command.content_hash)

    def _take(self, step: Command[Any]) -> None:
        unit = unit_of(self._groups.options, self.drafts, _IMPORT, self.at, self._sequence + 1)
        result = step.apply(unit)
        if unit.has_changes():
            self._units.append(unit)
            self._sequence += 1
            self._answers += unit.outcome is not None
        if isinstance(step, FinishImport):
            self._interrupted = result

    def _append(self, touched: Sequence[SessionState]) -> None:
        if self._units or touched:
            self._log.append(self._units, touched)
        self._units = []
        # Later reads find them in the group.
        self.drafts.versions.clear()
        self.drafts.executions.clear()
        self.drafts.outcomes.clear()


def _check_access(job: Job, identity: Identity, drafts: Drafts) -> None:
    """Refuse a write that waited in the queue while its session got other rules, or began with some."""
    state = drafts.find(job.command.session_id)
    access = None if state is None else Access.of(state.session.metadata)
    if access is not None and access != job.origin.access and not access.owns(identity):
        raise AccessDeniedError(identity.name, job.command.cause, job.command.session_id, "it: they have just changed")


def _refusal(command: Command[Any], error: Exception) -> StateError:
    return error.error if isinstance(error, UnwritableError) else _internal(command, error)


def _internal(command: Command[Any], error: Exception) -> InternalError:
    """Log a bug of ours, and return the error for the caller, which only refers to the log entry."""
    reference = secrets.token_hex(6)
    # As text, because exception renderers may show local variables, which hold users' values.
    trace = trace_of(error)
    _logger.error("command failed", command=command.cause, reference=reference, traceback=trace)
    return InternalError(f"internal error, reference {reference}")


def _apply_once(job: Job, unit: UnitOfWork, meter: Meter | None) -> Any:
    """Apply the command, but only once under an idempotency key: a repeated request gets the recorded outcome."""
    command, key = job.command, job.origin.idempotency_key
    if job.origin.actor:
        # A low limit on the names of variables must not lock out all users with longer names.
        check_text("actor", job.origin.actor, max(unit.limits.name_length, _ACTOR_LENGTH), "name_length")
    if key is None or not command.writes:
        result = command.apply(unit)
        _settle(command, unit)
        return result
    check_text("idempotency key", key, unit.limits.name_length, "name_length")
    fingerprint = command.canonical_fingerprint(unit)
    recorded = unit.find_outcome(command.session_id, key)
    if recorded is not None:
        # Older releases stored the fingerprint of the request as it was spelled.
        if recorded.fingerprint != fingerprint and recorded.fingerprint != command.fingerprint():
            raise IdempotencyConflictError(key, recorded.cause)
        if meter is not None:
            meter.replayed()
        try:
            return outcomes.decode(command.returns, recorded.result)
        except ValueError as error:
            raise DamagedSessionError(command.session_id, type(error).__name__) from error
    result = command.apply(unit)
    _settle(command, unit)
    if unit.has_changes():
        text = outcomes.encode(command.returns, result)
        unit.record_outcome(RecordedOutcome(command.session_id, key, command.cause, fingerprint, text))
    return result


def _settle(command: Command[Any], unit: UnitOfWork) -> None:
    """Compute what is derived from the changes of a command, and check the rules."""
    if command.keeps_rules:
        if unit.derivations:
            derive(unit, command.session_id)
        unit.check_rules()
