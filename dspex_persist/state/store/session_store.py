"""SessionStore: one SQLite file of sessions. It writes groups of commands, and serves memory and history.

`write_group` is the only way to write and knows no threads: the writer thread calls it, and so can a simulator.
"""

import contextlib
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, get_args

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from dspex_persist import clock
from dspex_persist.infra import forks
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.commands import Command, ExpireSession, ForkSession, InterruptExecutions
from dspex_persist.state.commands.base import check_text
from dspex_persist.state.errors import (
    CheckpointError,
    DamagedSessionError,
    FileChangedError,
    IdempotencyConflictError,
    InternalError,
    InvalidArgumentError,
    NotADatabaseError,
    OutcomeUnknownError,
    ReadFailedError,
    StateError,
    StorageError,
    quote,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    CommitChanges,
    Origin,
    PrunePolicy,
    PruneReport,
    RecordedExecution,
    VariableVersion,
)
from dspex_persist.state.options import check_count, check_seconds
from dspex_persist.state.provider import Progress
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import audit, log, migrate, outcomes, prune, recordings, recovery, times
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.anchor import Anchor, Head
from dspex_persist.state.store.answers import StoredAudit
from dspex_persist.state.store.cache import SessionCache
from dspex_persist.state.store.engine import (
    Durability,
    OwnershipLock,
    checkpoint,
    open_beside,
    open_readers,
    open_writer,
    read_error,
    resolved,
    snapshot,
    warn_of_others,
)
from dspex_persist.state.store.guard import RESTORE, FileGuard
from dspex_persist.state.unit_of_work import START, Drafts, HistoryQuery, RecordedOutcome, UnitOfWork
from dspex_persist.state.watch import Hub

_logger: Final = get_logger(__name__)

_CERTAIN_ABORTS = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY})
# What the rows of one job bring about, whatever else is in its group: they never reach the disk.
_OF_ONE_JOB = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError)

_LOCKED = "another program holds the lock for writing to the database; have it finish, and repeat the call"
_BROUGHT_HOME = "all that was acknowledged has been brought into the file: open it again"


_PAGE_BYTES = 4 * 1024 * 1024
"""How much of a whole series of jobs waits in memory, roughly; at most that of 64 jobs."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a store behaves. `cache_size_bytes` bounds the sessions in memory; times are seconds."""

    durability: Durability = "full"
    limits: Limits = field(default_factory=Limits)
    session_ttl_s: float | None = None
    optimization_lease_s: float = 300.0
    cache_size_bytes: int = 256 * 1024 * 1024
    outcome_retention_s: float = 7 * 86_400.0
    retention_keep_versions: int | None = None
    retention_age_s: float | None = None
    retention_ended_sessions_s: float | None = None
    warn_size_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.durability not in get_args(Durability):
            raise InvalidArgumentError("durability", f"{quote(self.durability)} is neither 'full' nor 'normal'")
        if not isinstance(self.limits, Limits):
            raise InvalidArgumentError("limits", f"{quote(self.limits)} is no dspex_persist.state.limits.Limits")
        for limit in fields(Limits):
            check_count(f"limits.{limit.name}", getattr(self.limits, limit.name))
        check_seconds("outcome_retention_s", self.outcome_retention_s)
        check_seconds("optimization_lease_s", self.optimization_lease_s)
        check_count("cache_size_bytes", self.cache_size_bytes)
        for name in ("session_ttl_s", "retention_age_s", "retention_ended_sessions_s"):
            if getattr(self, name) is not None:
                check_seconds(name, getattr(self, name))
        for name in ("retention_keep_versions", "warn_size_bytes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))


class Job(NamedTuple):
    """A command and who asks."""

    command: Command[Any]
    origin: Origin


class Moment(NamedTuple):
    """When a group is written: by the wall clock, but never before the last commit; and by the steady clock."""

    now: datetime
    steady: datetime


class Outcome(NamedTuple):
    """What became of a job: a result, or the error with which it failed."""

    result: Any = None
    error: StateError | None = None


class SessionStore:
    """The store on an open file. One thread at a time may call `write_group`, `sweep` and `close`."""

    def __init__(self, path: Path, options: StoreOptions | None = None) -> None:
        self.options = options or StoreOptions()
        with contextlib.ExitStack() as undo:
            self._lock = OwnershipLock(path, create=True)
            undo.callback(self._lock.release)
            # Errors name the file as its user does.
            self.path, self._name = resolved(path), path
            with forks.busy():
                self._open_file(undo)
                warn_of_others(self.path)
                self._interrupt_executions()
            undo.pop_all()

    def _open_file(self, undo: contextlib.ExitStack) -> None:
        self._readers = open_readers(self.path)
        undo.callback(self._readers.dispose)
        self._writer = open_writer(self.path, self.options.durability)
        undo.callback(self._writer.dispose)
        try:
            migrate.refuse_foreign(self._readers)
            # Another program's file gets none beside it.
            self._anchor = Anchor(open_beside(self.path, ".anchor"))
            undo.callback(self._anchor.close)
            migrate.upgrade(self._writer, self._name)
            self._connection = self._writer.connect()
            with self._connection.begin():
                self.head = recovery.recover(self._connection, self._anchor.read(), self._name)
                self._keys = log.Keys(self._connection)
                self._last_at = clock.from_micros(times.last_own(self._connection))
                self._guard = FileGuard(self.path, self._name, self._connection)
        except (DBAPIError, sqlite3.Error) as error:
            raise NotADatabaseError(str(self._name), read_error(self.path, error).reason) from error
        except OSError as error:
            raise NotADatabaseError(str(self._name), error.strerror or str(error)) from error
        self._cache = SessionCache(self.options.cache_size_bytes)
        self.hub = Hub(self.head.sequence)

    def _interrupt_executions(self) -> None:
        """Say in the journal that nothing runs any more of what ran when the file was closed or its process died."""
        try:
            with snapshot(self._readers) as connection:
                self._stale = stored_executions.unfinished(connection)
            self._interrupt_stale()
        except (OutcomeUnknownError, ReadFailedError, FileChangedError) as error:
            raise NotADatabaseError(str(self._name), str(error)) from error

    def _interrupt_stale(self) -> None:
        """A disk without room keeps nobody from reading: what cannot be said now is said by a later sweep."""
        if self._stale:
            # By their ids: by the time of that sweep, others may have begun.
            jobs = [Job(InterruptExecutions(*each), _RECOVERY) for each in self._stale.items()]
            if all(outcome.error is None for outcome in self.write_group(jobs)):
                self._stale = {}

    # Writing

    def write_group(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run the jobs in order and make what they staged durable in one SQLite transaction.

        A job that fails its checks, or whose rows cannot be written, fails alone. An error of the storage fails all of
        them and changes nothing; one that leaves the outcome open is raised as `OutcomeUnknownError`: the store must
        then be thrown away. `FileChangedError`: the file is not what it was any more.
        """
        drafts = Drafts(self)
        at = self._moment()
        keys = self._keys.copy()
        self._look()
        try:
            with self._connection.begin() as transaction:
                self._guard.look_inside(self._connection, self.head)
                results, units = self._apply(jobs, drafts, at)
                head = self._write(units, drafts, keys)
                if head is None:
                    transaction.rollback()
        except (DBAPIError, sqlite3.Error) as error:
            failure = self._settle(error)
            if isinstance(_original(error), _OF_ONE_JOB) and len(jobs) > 1:
                return self._write_halves(jobs)
            return [Outcome(error=failure) for _ in jobs]
        except FileChangedError:
            raise
        except Exception as error:  # noqa: BLE001 - what a job staged cannot be encoded
            if len(jobs) > 1:
                return self._write_halves(jobs)
            return [Outcome(error=_internal(job.command, error)) for job in jobs]
        self._keys = keys
        if units:
            self._last_at = at.now
        self._note_written()
        self._publish(drafts, units, head)
        return results

    def _write_halves(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One of the jobs cannot be written: halving leaves it alone with its error, and the others are written.

        That costs some more transactions, but only ever then; a savepoint for each job would cost every group.
        """
        middle = len(jobs) // 2
        return self.write_group(jobs[:middle]) + self.write_group(jobs[middle:])

    def check_file(self) -> None:
        """Raise `FileChangedError` where the file is not what it was any more, or others have written to it."""
        self._look()
        try:
            if self._guard.has_news(self._connection):
                with self._connection.begin() as transaction:
                    self._guard.look_inside(self._connection, self.head)
                    transaction.rollback()
        except (DBAPIError, sqlite3.Error) as error:
            # Nothing was to be written. Who writes next, hears of it.
            _logger.warning("file not checked", reason=str(read_error(self.path, error)))

    def _look(self) -> None:
        wrong = self._guard.look()
        if wrong is not None:
            advice = RESTORE if self._guard.has_moved() or not self._bring_home() else _BROUGHT_HOME
            raise FileChangedError(str(self._name), f"{wrong}; {advice}")

    def _bring_home(self) -> bool:
        """Only what is beside the file is gone, and SQLite has it open still: have all of it in the file."""
        try:
            return checkpoint(self._writer, "FULL")
        except (DBAPIError, sqlite3.Error):
            return False

    def _note_written(self) -> None:
        """Before anything that was written is acknowledged: it must be in the file of that name."""
        self._guard.note_written()
        self._look()

    def write_whole(self, jobs: Iterable[Job]) -> list[Any]:
        """Run the jobs in order, all of them in one transaction, however many there are; the results that are not None.

        The first that fails is raised, and so is what `jobs` itself raises: then nothing is left of any of them. What
        they stage goes into the transaction page by page, so that memory never holds all of it.
        """
        drafts = Drafts(self)
        keys = self._keys.copy()
        results: list[Any] = []
        self._look()
        try:
            with self._connection.begin():
                self._guard.look_inside(self._connection, self.head)
                head = self._write_pages(jobs, drafts, keys, results)
                if head.sequence > self.head.sequence:
                    log.note_import(self._connection, self.head.sequence + 1, head.sequence)
                for state in drafts.states.values():
                    if state is not None and state.lease is not None:
                        log.save_expiry(self._connection, state)
                        state.lease.saved_expires_at = state.lease.expires_at
        except (DBAPIError, sqlite3.Error) as error:
            raise self._settle(error) from error
        self._keys = keys
        self._note_written()
        self._publish(drafts, (), head)
        self.hub.advance(head.sequence)
        return results

    def _write_pages(self, jobs: Iterable[Job], drafts: Drafts, keys: log.Keys, results: list[Any]) -> Head:
        rest, head, more = iter(jobs), self.head, True
        while more:
            writer = log.LogWriter(self._connection, head, keys)
            more = self._fill_page(rest, writer, drafts, results)
            writer.flush()
            head = writer.head
            # They are in the transaction now, where whoever asks finds them.
            drafts.versions.clear()
            drafts.executions.clear()
        return head

    def _fill_page(self, rest: Iterator[Job], writer: log.LogWriter, drafts: Drafts, results: list[Any]) -> bool:
        """Have the writer take in about `_PAGE_BYTES`; whether there may be more jobs."""
        at, size_bytes = self._moment(), 0
        for job in rest:
            unit = self._unit(job.origin, drafts, at, writer.head.sequence + 1)
            result = job.command.apply(unit)
            if unit.has_changes():
                writer.add(unit)
            if result is not None:
                results.append(result)
            size_bytes += _PAGE_BYTES // 64 + sum(change.variable.value.size_bytes for change in unit.versions)
            if size_bytes > _PAGE_BYTES:
                return True
        return False

    def _moment(self) -> Moment:
        return Moment(max(clock.now(), self._last_at), clock.steady())

    def _unit(self, origin: Origin, drafts: Drafts, at: Moment, sequence: int) -> UnitOfWork:
        options = self.options
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

    def _apply(self, jobs: Sequence[Job], drafts: Drafts, at: Moment) -> tuple[list[Outcome], list[UnitOfWork]]:
        units: list[UnitOfWork] = []
        return [self._run(job, drafts, at, units) for job in jobs], units

    def _run(self, job: Job, drafts: Drafts, at: Moment, units: list[UnitOfWork]) -> Outcome:
        unit: UnitOfWork | None = None
        try:
            job.command.check()
            self._prepare(job.command, drafts, at, units)
            unit = self._unit(job.origin, drafts, at, self.head.sequence + len(units) + 1)
            result = _apply_once(job, unit)
            self._keep_touch(job.command, drafts)
        except (DBAPIError, sqlite3.Error):
            raise
        except Exception as error:  # noqa: BLE001 - a command's boundary: its neighbours in the group must not pay for it
            if unit is not None:
                unit.rollback_to(START)
            return Outcome(error=error if isinstance(error, StateError) else _internal(job.command, error))
        if unit.has_changes():
            units.append(unit)
        return Outcome(result)

    def _prepare(self, command: Command[Any], drafts: Drafts, at: Moment, units: list[UnitOfWork]) -> None:
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

    def _write(self, units: Sequence[UnitOfWork], drafts: Drafts, keys: log.Keys) -> Head | None:
        writer = log.LogWriter(self._connection, self.head, keys)
        for unit in units:
            writer.add(unit)
        writer.flush()
        unsaved = [state for state in drafts.states.values() if state and state.lease and state.lease.is_unsaved()]
        for state in unsaved:
            log.save_expiry(self._connection, state)
        return writer.head if units or unsaved else None

    def _settle(self, error: DBAPIError | sqlite3.Error) -> StorageError:
        """After an error of SQLite: make sure that nothing of the group is left, or say that nobody can know."""
        original = _original(error)
        code = getattr(original, "sqlite_errorcode", None)
        if not isinstance(original, _OF_ONE_JOB) and (code is None or (code & 0xFF) not in _CERTAIN_ABORTS):
            self._raise_unknown(original)
        # SQLITE_FULL has rolled back by itself; for anything else the transaction's end has. Both must be true now.
        driver = self._connection.connection.dbapi_connection
        if driver is None or driver.in_transaction:
            self._raise_unknown(original)
        reason = _LOCKED if isinstance(code, int) and code & 0xFF == sqlite3.SQLITE_BUSY else str(original)
        _logger.warning("group failed", reason=reason)
        return StorageError(reason)

    def _raise_unknown(self, original: object) -> NoReturn:
        raise OutcomeUnknownError(f"SQLite reported {original!s} while writing {self._name}")

    def _publish(self, drafts: Drafts, units: Sequence[UnitOfWork], head: Head | None) -> None:
        """Let readers and watchers see what is durable now."""
        if head is not None:
            self.head = head
            if self.options.durability == "full":
                self._write_anchor(head)
        for session_id, state in drafts.states.items():
            if state is None:
                self._cache.drop(session_id)
            else:
                if state.lease is not None and state.lease.is_unsaved():
                    state.lease.saved_expires_at = state.lease.expires_at
                self._cache.put(session_id, state)
        self._cache.evict()
        if units:
            self.hub.advance(self.head.sequence)
            self._tell_watchers(units)

    def _write_anchor(self, head: Head) -> None:
        try:
            self._anchor.write(head)
        except OSError as error:
            raise OutcomeUnknownError(f"{self._name}.anchor: {error.strerror or error}") from error

    def _tell_watchers(self, units: Sequence[UnitOfWork]) -> None:
        commits: dict[int, list[CommitChanges]] = {}
        ended: list[int] = []
        for unit in units:
            state = unit.state
            if state is None or not self.hub.is_watched(state.session.sequence):
                continue
            changes = log.sort_changes(state, unit.versions)
            told = CommitChanges(unit.sequence, tuple(changes), audit.affected(state, unit.sequence, changes))
            commits.setdefault(state.session.sequence, []).append(told)
            if any(event.kind == "session_ended" for event in unit.events):
                ended.append(state.session.sequence)
        self.hub.publish(commits, ended, self.head.sequence)

    # What units of work ask for: inside a group, on the writer's connection

    def load(self, session_id: str) -> SessionState | None:
        """The live session's state; from the file if memory does not have it, and then kept."""
        state = self._cache.find(session_id)
        if state is None:
            state = _load(self._connection, session_id)
            if state is not None:
                self._cache.put(session_id, state)
        return state

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """One committed version."""
        key = state.keys.get(variable_id)
        return stored_variables.find_version(self._connection, key, version) if key is not None else None

    def history(self, state: SessionState, query: HistoryQuery) -> list[VariableVersion] | None:
        """The newest committed versions."""
        return _history(self._connection, state, query)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """What was answered under an idempotency key."""
        return outcomes.find(self._connection, session_id, key)

    def find_execution(self, state: SessionState, key: str) -> RecordedExecution | None:
        """The last execution under an idempotency key that has ended."""
        return stored_executions.find_by_key(self._connection, state.key, key)

    # Reading, from any thread

    def find_loaded(self, session_id: str) -> SessionState | None:
        """The session's published state if it is in memory."""
        return self._cache.find(session_id)

    def read_current(self, command: Command[Any], origin: Origin, state: SessionState) -> Any:
        """Apply a reading command to a published state."""
        try:
            return command.apply(self._reading(_Published(state), origin))
        except StateError:
            raise
        except Exception as error:
            raise _internal(command, error) from error

    def read_file(self, command: Command[Any], origin: Origin, state: SessionState | None = None) -> Any:
        """Apply a reading command to the file, in a snapshot of its own; to `state` and the file if it is given."""
        try:
            with snapshot(self._readers) as connection:
                return command.apply(self._reading(_Snapshot(connection, self._cache, state), origin))
        except (StateError, DBAPIError, sqlite3.Error):
            raise
        except Exception as error:
            raise _internal(command, error) from error

    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """The session's next commits, from the file."""
        with snapshot(self._readers) as connection:
            return audit.changes_after(connection, state, after, most_commits)

    def was_there(self, state: SessionState, identifier: str) -> bool:
        """Whether the session has or had a variable of this name or id."""
        with snapshot(self._readers) as connection:
            return stored_variables.find_key(connection, state.key, identifier) is not None

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """The log of a session, live or ended."""
        return recordings.read_session(self._readers, session_id, started=started, reveal=reveal)

    def fork(self, session_id: str, new_session_id: str, at: str = "") -> ForkSession:
        """What makes a new session of a session as of a point."""
        return recordings.fork_of(self._readers, session_id, new_session_id, at)

    def audit(self, *, reveal: bool = False) -> StoredAudit:
        """The history, to be asked."""
        return StoredAudit(self._readers, reveal=reveal)

    def prune(
        self, policy: PrunePolicy, write: Callable[[list[Job]], object] | None, progress: Progress
    ) -> PruneReport:
        """Look for what may go and hand over the jobs for it, little by little; `write` returns when they are done."""
        carry_out = None if write is None else lambda commands: write([Job(each, _PRUNING) for each in commands])
        return prune.run(self._readers, policy, carry_out, progress)

    def size_bytes(self) -> int:
        """What the file and its WAL take on the disk."""
        total = 0
        for suffix in ("", "-wal"):
            # The WAL may not be there, or not any more.
            with contextlib.suppress(OSError):
                total += self.path.with_name(self.path.name + suffix).stat().st_size
        return total

    def _reading(self, backing: "_Published | _Snapshot", origin: Origin) -> UnitOfWork:
        return self._unit(origin, Drafts(backing), self._moment(), self.head.sequence)

    # Housekeeping, by the writer

    def expired(self, limit: int = 100) -> list[Job]:
        """The jobs that end the sessions whose TTL is over."""
        with snapshot(self._readers) as connection:
            ids = stored_sessions.expired(connection, clock.steady(), limit)
        return [Job(ExpireSession(session_id), _EXPIRY) for session_id in ids]

    def sweep(self) -> int:
        """Reclaim: end expired sessions, forget old answers; how many sessions ended. Readers need not wait for it."""
        self._interrupt_stale()
        swept = 0
        while jobs := self._find_expired():
            ended = sum(1 for outcome in self.write_group(jobs) if outcome.result)
            swept += ended
            if ended == 0:
                break
        self._look()
        try:
            with self._connection.begin():
                self._guard.look_inside(self._connection, self.head)
                outcomes.forget(self._connection, min(clock.now(), clock.steady()), self.options.outcome_retention_s)
        except (DBAPIError, sqlite3.Error) as error:
            self._settle(error)
        self._note_written()
        return swept

    def _find_expired(self) -> list[Job]:
        try:
            return self.expired()
        except (ReadFailedError, NotADatabaseError) as error:
            # A later sweep ends them. Who reads one of them until then is told that it is over.
            _logger.warning("expired sessions not found", reason=str(error))
            return []

    def close(self) -> None:
        """Bring the WAL into the file, remember the head, let the file go."""
        try:
            with forks.busy():
                self._readers.dispose()
                self._connection.close()
                checkpoint(self._writer)
                self._anchor.write(self.head)
        except (DBAPIError, sqlite3.Error, OSError) as error:
            raise CheckpointError(str(self._name), str(error)) from error
        finally:
            self._writer.dispose()
            self._anchor.close()
            self._lock.release()

    def abandon(self) -> None:
        """Let the file go without another write: after an outcome that is unknown."""
        with contextlib.suppress(Exception):
            self._readers.dispose()
        for release in (self._anchor.close, self._lock.release):
            with contextlib.suppress(OSError):
                release()


_EXPIRY = Origin(actor="dspex-persist", cause="expiry")
_RECOVERY = Origin(actor="dspex-persist", cause="recovery")
_PRUNING = Origin(actor="dspex-persist", cause="pruning")


class _Published:
    """What a reading command needs when its session is in memory."""

    def __init__(self, state: SessionState) -> None:
        self._state = state

    def load(self, session_id: str) -> SessionState | None:
        return self._state

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        raise NotImplementedError("memory holds no history")

    def history(self, state: SessionState, query: HistoryQuery) -> list[VariableVersion] | None:
        raise NotImplementedError("memory holds no history")

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        raise NotImplementedError("memory holds no outcomes")

    def find_execution(self, state: SessionState, key: str) -> RecordedExecution | None:
        raise NotImplementedError("memory holds no executions that have ended")


class _Snapshot:
    """What a reading command needs, all as of one snapshot of the file."""

    def __init__(self, connection: Connection, cache: SessionCache, state: SessionState | None) -> None:
        self._connection = connection
        self._cache = cache
        self._state = state

    def load(self, session_id: str) -> SessionState | None:
        if self._state is None:
            self._state = self._load(session_id)
        return self._state

    def _load(self, session_id: str) -> SessionState | None:
        state = _load(self._connection, session_id)
        loaded = self._cache.find(session_id)
        if state is not None and loaded is not None and loaded.session.sequence == state.session.sequence:
            # The true expiry is the one in memory, if the session is there.
            state.lease = loaded.lease
        return state

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        key = state.keys.get(variable_id)
        return stored_variables.find_version(self._connection, key, version) if key is not None else None

    def history(self, state: SessionState, query: HistoryQuery) -> list[VariableVersion] | None:
        return _history(self._connection, state, query)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        return outcomes.find(self._connection, session_id, key)

    def find_execution(self, state: SessionState, key: str) -> RecordedExecution | None:
        return stored_executions.find_by_key(self._connection, state.key, key)


def _load(connection: Connection, session_id: str) -> SessionState | None:
    """The live session's state from the file. What cannot be made of its rows fails the calls on this session alone."""
    try:
        return stored_sessions.load(connection, session_id)
    except (DBAPIError, sqlite3.Error):
        raise
    except Exception as error:
        # As text: a renderer of exceptions may show local variables, and those are users' values.
        _logger.error("session cannot be read", session_id=session_id, traceback=trace_of(error))
        raise DamagedSessionError(session_id, type(error).__name__) from error


def _history(connection: Connection, state: SessionState, query: HistoryQuery) -> list[VariableVersion] | None:
    variable = state.find(query.identifier) if query.as_of is None else None
    key = state.keys.get(variable.id) if variable is not None else None
    if key is None:
        key = stored_variables.find_key(connection, state.key, query.identifier, query.as_of)
    return stored_variables.history(connection, key, query) if key is not None else None


def _original(error: Exception) -> object:
    """The driver's own error in one of SQLAlchemy's."""
    return getattr(error, "orig", error)


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
    fingerprint = command.meant(unit).fingerprint()
    recorded = unit.find_outcome(command.session_id, key)
    if recorded is not None:
        # Older files have it as the request was spelled.
        if recorded.fingerprint not in (fingerprint, command.fingerprint()):
            raise IdempotencyConflictError(key, recorded.cause)
        return outcomes.decode(command.returns, recorded.result)
    result = command.apply(unit)
    if unit.has_changes():
        text = outcomes.encode(command.returns, result)
        unit.record_outcome(RecordedOutcome(command.session_id, key, command.cause, fingerprint, text))
    return result
