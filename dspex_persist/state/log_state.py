"""LogEngine: session state in this process, over any log store (the port `LogStore`). LogState: over one's own."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar, Unpack, cast

from dspex_persist.infra import forks, tracing
from dspex_persist.infra.futures import Ticket, failed, settled
from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.infra.threads import is_on_loop
from dspex_persist.infra.user import user_name
from dspex_persist.state import arguments, values
from dspex_persist.state.abilities import Derives, Holdable, Importable, KeepsOrder, SessionHold, SessionImport
from dspex_persist.state.commands import (
    Command,
    EndMovedSession,
    GetVariableHistory,
    HoldSession,
    ImportSession,
    ListVariables,
    ReadState,
    TouchSession,
)
from dspex_persist.state.commands.base import Reads
from dspex_persist.state.commands.derivations import Derivation, with_derivation
from dspex_persist.state.errors import (
    EngineClosedError,
    ForkedProcessError,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionHeldError,
    SessionNotFoundError,
    StateError,
    TooManyWatchersError,
    UnavailableError,
    VariableNotFoundError,
    WatchGapError,
    quote,
)
from dspex_persist.state.groups import Groups, Job
from dspex_persist.state.holds import Held
from dspex_persist.state.imports import IMPORT, CheckedImport, Feed
from dspex_persist.state.limits import Limits
from dspex_persist.state.log_store import LogStore
from dspex_persist.state.meter import EngineFigures, Meter
from dspex_persist.state.model import ImportedSession, Origin, Source, Update, Variable
from dspex_persist.state.options import check_seconds
from dspex_persist.state.provider import StateProvider, Who, check_watch, fault_of
from dspex_persist.state.recording import Header
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.watch import Watch, is_watched, updates_of
from dspex_persist.state.writer import GAP_S, LoopWrites, Writer

R = TypeVar("R")

_READ_THREADS: Final = 4
_CURRENT: Final = (Reads.CURRENT, Reads.LOADED)
"""What reads of a session in memory say that they read."""
_POLL_S: Final = 0.002
"""How often a hold looks whether a tool is still running, in seconds."""
_WATCHING: Final = Origin("", "WatchVariables")


def default_actor(actor: str | None) -> str:
    """Return the actor of a provider, by default the user of this process; `InvalidArgumentError` if it is no text."""
    return f"user:{user_name()}" if actor is None else arguments.text("actor", actor)


class LogEngine(StateProvider, KeepsOrder, Importable):
    """A provider that writes one group at a time, and reads current values from memory and past ones from the log.

    It executes no tools: see `WithTools`. A subclass adds the abilities of its log, such as `Durable`.

    Args:
        groups: The sessions and their log. This object owns them and closes them.
        name: How error messages name this object.
        sweep_interval_s: How often expired sessions are ended and old outcomes deleted, in seconds.
        gap_s: How long the writer waits for further jobs while several callers write, in seconds. Waiting pays if
            writing a group is expensive.
        main_leads: Whether the main thread may write small jobs itself; see `Writer`.
        on_fatal: Called if the writer ends because of an unknown outcome or a bug. No more writes are possible then,
            and every later call raises, whether or not there is a callback.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.

    Raises:
        InvalidArgumentError: `sweep_interval_s` is not a positive number of seconds, or `actor` not a text.
    """

    loops_lead = True
    """Whether an event loop may write a small group itself, or query the log, because that takes no longer than other
    calls do."""

    imports_lead = True
    """Whether an import may have the log for itself for as long as its commits come."""

    def __init__(
        self,
        groups: Groups[LogStore],
        *,
        name: str = "the session state",
        sweep_interval_s: float = 30.0,
        gap_s: float = GAP_S,
        main_leads: bool = False,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
    ) -> None:
        check_seconds("sweep_interval_s", sweep_interval_s)
        self._actor = default_actor(actor)
        self._groups = groups
        self._name = name
        self._failed: StateError | None = None
        self._fatal_callback = on_fatal
        self._closing, self._deriving = threading.Lock(), threading.Lock()
        self._closed = False
        self._origins: dict[str, Origin] = {}
        # Imports for which the writer waits.
        self._feeds: weakref.WeakSet[Feed] = weakref.WeakSet()
        self._readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="dspex-persist-reader")
        self._writer = Writer(
            groups.write_group,
            queue_length=groups.options.limits.queue_length,
            check=self._check,
            on_idle=self._on_idle,
            idle_s=sweep_interval_s,
            gap_s=gap_s,
            meter=groups.meter,
            main_leads=main_leads,
            on_fatal=self._on_fatal,
            on_answered=groups.hub.wake,
            has_news=lambda: groups.hub.has_news,
            defer=self._defer,
        )
        forks.register(self)

    @property
    def limits(self) -> Limits:
        """The limits from the options."""
        return self._groups.options.limits

    @property
    def meter(self) -> Meter | None:
        """What counts; None if nothing does."""
        return self._groups.meter

    @property
    def head_sequence(self) -> int:
        """The number of the last commit."""
        return self._groups.log.sequence

    @property
    def silent_s(self) -> float:
        """For how many seconds the writer has not shown that it makes progress. An idle one shows it each second."""
        return time.monotonic() - max(self._writer.alive_at, self._groups.alive_at)

    def figures(self) -> EngineFigures:
        """Return what the engine does now; from any thread."""
        groups = self._groups
        return EngineFigures(groups.log.sequence, self._writer.length, *groups.cache_figures(), groups.hub.count)

    def lag(self, first_sequence: int, position: int) -> tuple[int, datetime | None]:
        """Return how far a watch is behind; see `Hub.lag`."""
        return self._groups.hub.lag(first_sequence, position)

    def loaded(self, session_id: str) -> SessionState | None:
        """Return the published state of a session if it is in memory. That is no use of the session."""
        return self._groups.find_loaded(session_id)

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """Submit a command; see `StateProvider.submit`. A read of a cached session is done when this returns."""
        fault = fault_of(command, origin)
        if fault is not None:
            return failed(fault)
        origin = origin or self.default_origin(command.cause)
        if command.writes:
            if self._groups.held and (held := self._held_for(command)) is not None:
                return held.park(partial(self._submit_write, command, origin))
            return self._submit_write(command, origin)
        try:
            self.check_open()
        except StateError as error:
            return failed(error)
        state = self._state_for(command)
        if state is None:
            return self._submit_read(command, origin)
        future: Future[R] = Future()
        try:
            future.set_result(self._read(command, origin, state))
        except StateError as error:
            future.set_exception(error)
        return future

    def run(self, command: Command[R], idempotency_key: str | None = None, **who: Unpack[Who]) -> R:
        """See `StateProvider.run`. A write is done on the calling thread while no other caller writes."""
        origin = self.origin(command.cause, idempotency_key, **who)
        command.check()
        if command.writes:
            return self._run_write(command, origin)
        self.check_open()
        state = self._state_for(command)
        if state is None:
            return self._submit_read(command, origin).result()
        return self._read(command, origin, state)

    def _run_write(self, command: Command[R], origin: Origin) -> R:
        while True:
            if self._groups.held and (held := self._held_for(command)) is not None:
                held.wait()
            # A hold may begin between these lines.
            with contextlib.suppress(SessionHeldError):
                return cast(R, self._writer.run(self._write_job(command, origin)))

    def _submit_write(self, command: Command[R], origin: Origin) -> Future[R]:
        return self._writer.submit(self._write_job(command, origin))

    def _defer(self, job: Job, ticket: Ticket[StateError]) -> None:
        """Have a command wait that came to the writer just before its session was held."""
        held = self._groups.held.get(job.command.session_id)
        again = partial(self._writer.queue, [(job, ticket)])
        if held is None:
            again()
        else:
            held.park_refused(again, lambda error: _refuse(ticket, error))

    def _held_for(self, command: Command[Any]) -> Held | None:
        held = self._groups.held.get(command.session_id)
        return held if held is not None and held.parks(command) else None

    def on_loop(self, mailbox: LoopMailbox) -> "OnLoop":
        """See `StateProvider.on_loop`."""
        return OnLoop(self, mailbox)

    def _state_for(self, command: Command[Any]) -> SessionState | None:
        """The published state that the command can read at once, if it is in memory and that does not take long."""
        if command.reads not in _CURRENT:
            return None
        state = self._groups.find_loaded(command.session_id)
        return None if state is None or command.takes_long(state) else state

    def _submit_read(self, command: Command[R], origin: Origin) -> Future[R]:
        reads = command.reads
        state = self._groups.find_loaded(command.session_id) if reads is not Reads.FILE else None
        if reads is Reads.LOADED and state is None:
            return settled(cast(R, None))
        if reads is Reads.CURRENT and state is None:
            # Only the writer loads sessions, so that no session changes while it is being loaded.
            return self._writer.submit(Job(command, origin))
        future = self._readers.submit(self._read_on_thread, command, origin, state)
        if state is None or state.lease is not None:
            # A read renews the TTL, too, and only the writer can do that.
            self._writer.submit(Job(TouchSession(command.session_id), origin))
        return future

    def begin_import(self, header: Header, session_id: str | None = None) -> SessionImport:
        """See `Importable.begin_import`."""
        self.check_open()
        session_id = arguments.text("session_id", header.session_id if session_id is None else session_id)
        options = self._groups.options
        return CheckedImport(header, options, session_id, self._submit_import, may_lead=self.imports_lead)

    def _submit_import(self, command: ImportSession) -> Future[ImportedSession]:
        feed = command.pages
        if isinstance(feed, Feed):
            self._feeds.add(feed)
        future = self.submit(command, IMPORT)
        if self._closed and isinstance(feed, Feed):
            # Closing has not seen it.
            feed.stop()
        return future

    def _write_job(self, command: Command[Any], origin: Origin) -> Job:
        known = command.ahead is not None and command.ahead.limits is self.limits
        if not known and command.json_length > values.SHORT_JSON:
            self._read_values(command, origin)
        return Job(command, origin, tracing.here())

    def read_ahead(self, command: Command[Any], origin: Origin | None = None) -> bool:
        """See `StateProvider.read_ahead`."""
        if fault_of(command, origin) is not None or command.json_length <= values.SHORT_JSON:
            return False
        self._read_values(command, origin or self.default_origin(command.cause), strict=True)
        return True

    def _read_values(self, command: Command[Any], origin: Origin, *, strict: bool = False) -> None:
        """Parse the values here, for the variables as they are now: on the writer's thread every caller would wait."""
        if self._failed is not None or self._closed:
            return
        may_query = self.loops_lead or not is_on_loop()
        facts = _Facts(self._groups, command, origin, may_query=may_query)
        find_type = facts.find_type if origin.idempotency_key is not None else None
        command.read_ahead(values.ReadAhead(self.limits, strict=strict), facts.find, find_type)

    def _read_on_thread(self, command: Command[R], origin: Origin, state: SessionState | None) -> R:
        if state is not None and command.reads in _CURRENT:
            return cast(R, self._groups.read_current(command, origin, state))
        return cast(R, self._groups.read_stored(command, origin, state))

    def _read(self, command: Command[R], origin: Origin, state: SessionState) -> R:
        try:
            return cast(R, self._groups.read_current(command, origin, state))
        finally:
            if state.lease is not None and state.lease.is_unsaved():
                self._writer.submit(Job(TouchSession(state.session.id), origin))

    def watch(
        self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None
    ) -> "LogWatch":
        """Watch variables; see `StateProvider.watch`."""
        identifiers = check_watch(session_id, identifiers, after_sequence)
        if self._groups.hub.count >= self._groups.options.limits.watchers:
            raise TooManyWatchersError(self._groups.options.limits.watchers)
        return LogWatch(self._groups, self.check_open, partial(self._state_of, session_id), identifiers, after_sequence)

    def _state_of(self, session_id: str) -> SessionState:
        return self.run(ReadState(session_id))

    def check_open(self) -> None:
        """Raise the error that ended the engine, if it has ended.

        Raises:
            EngineClosedError: It was closed.
            StateError: The error that ended its writer.
        """
        if self._failed is not None:
            raise self._failed
        if self._closed:
            raise EngineClosedError()

    def _check(self) -> None:
        self._groups.check()

    def _on_idle(self) -> None:
        self._groups.sweep()

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        """Return the origin of requests by this process: its user, for example `user:alice`."""
        if idempotency_key is not None:
            key = arguments.text("idempotency_key", idempotency_key)
            return Origin(self._actor, cause, Source.PYTHON, key)
        origin = self._origins.get(cause)
        if origin is None:
            origin = self._origins[cause] = Origin(self._actor, cause, Source.PYTHON)
        return origin

    def close(self) -> None:
        """Write the queued jobs, then close the log."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            for held in tuple(self._groups.held.values()):
                held.release()
            for feed in tuple(self._feeds):
                feed.stop()
            self._writer.close()
            self._on_close()
            self._readers.shutdown()
            self._groups.hub.wake_all()
            if self._failed is None:
                self._groups.close()

    def _on_close(self) -> None:
        """Release what else uses the log. Called after the last write, before the log is closed."""

    def forked(self, *, quiet: bool) -> None:
        """Make every call fail at once in a forked child, where closing does nothing. See `forks.ForkListener`."""
        self._failed = ForkedProcessError(self._name)
        self._closed = True
        self._closing, self._deriving = threading.Lock(), threading.Lock()
        self._groups.held = {}
        self._writer.refuse(self._failed)
        self._groups.hub.forget_watches()

    def _on_fatal(self, error: BaseException) -> None:
        """Called on the thread whose group ended the writer, after all waiting callers have failed."""
        self._failed = error if isinstance(error, StateError) else OutcomeUnknownError(repr(error))
        self._groups.hub.wake_all()
        self._groups.abandon()
        if self._fatal_callback is not None:
            self._fatal_callback(error)


class HoldsSessions(LogEngine, Holdable):
    """An engine that holds sessions. This process is their only writer, unless a subclass tells the others."""

    _poll_s = _POLL_S

    def hold_session(self, session_id: str, *, timeout_s: float = 30.0, origin: Origin | None = None) -> SessionHold:
        """See `Holdable.hold_session`."""
        self.check_open()
        session_id, timeout_s = arguments.text("session_id", session_id), arguments.timeout("timeout_s", timeout_s)
        held = self._new_hold(session_id)
        if self._groups.held.setdefault(session_id, held) is not held:
            raise SessionHeldError(session_id)
        hold = _Hold(self, held, origin)
        try:
            self._begin_hold(held)
            self._fill(held, timeout_s)
            self._note_full(held)
        except BaseException:
            hold.close()
            raise
        return hold

    def _fill(self, held: Held, timeout_s: float) -> None:
        """Wait until no tool runs in the session, and have all writes wait."""
        deadline = time.monotonic() + timeout_s
        while not self.run(HoldSession(held.session_id, held.fill)):
            if time.monotonic() > deadline:
                reason = f"a tool is still running in session {quote(held.session_id)} after {timeout_s:g} s"
                raise UnavailableError(reason)
            time.sleep(self._poll_s)

    def _new_hold(self, session_id: str) -> Held:
        return Held(session_id)

    def _begin_hold(self, held: Held) -> None:
        """Have nobody else begin executions in the session any more."""

    def _note_full(self, held: Held) -> None:
        """Have nobody else write it any more."""

    def _release(self, held: Held, moved_to: str | None) -> None:
        """End a hold; from any thread, also twice."""
        held.release(moved_to)
        if self._groups.held.get(held.session_id) is held:
            del self._groups.held[held.session_id]

    def _await_release(self) -> None:
        """Wait until everybody may go on."""


class LogState(HoldsSessions, Derives):
    """The engine of a log with one owner.

    Only this process writes to the log, so derived variables are computed whoever writes.
    """

    def add_derivation(self, session_id: str, derivation: Derivation) -> Callable[[], None]:
        """See `Derives.add_derivation`."""
        self.check_open()
        known = self._groups.derivations
        with self._deriving:
            known[session_id] = with_derivation(known.get(session_id, ()), derivation)
        return partial(self._remove_derivation, session_id, derivation)

    def _remove_derivation(self, session_id: str, derivation: Derivation) -> None:
        known = self._groups.derivations
        with self._deriving:
            left = tuple(each for each in known.get(session_id, ()) if each is not derivation)
            if left:
                known[session_id] = left
            else:
                known.pop(session_id, None)


def _refuse(ticket: Ticket[StateError], error: StateError) -> None:
    if ticket.begin():
        ticket.settle(None, error)


class _Hold(SessionHold):
    """A session that is held, for whoever moves it. It ends when this is closed, or collected."""

    def __init__(self, state: HoldsSessions, held: Held, origin: Origin | None) -> None:
        self._state = state
        self._held = held
        self._origin = origin
        self._end = weakref.finalize(self, state._release, held, None)

    def move(self, moved_to: str) -> None:
        """See `SessionHold.move`."""
        command = EndMovedSession(self._held.session_id, moved_to)
        self._state.submit(command, self._origin).result()
        self._state._release(self._held, moved_to)
        self._state._await_release()

    def close(self) -> None:
        """See `SessionHold.close`."""
        if self._end.alive:
            self._end()
            self._state._await_release()


class OnLoop:
    """Submits commands from one event loop. See `StateProvider.on_loop`."""

    def __init__(self, state: LogEngine, mailbox: LoopMailbox) -> None:
        self._state = state
        self._mailbox = mailbox
        self._writes = LoopWrites(state._writer, mailbox)

    def __call__(self, command: Command[R], origin: Origin | None = None) -> Reply[R]:
        state = self._state
        reply: Reply[R] = Reply(self._mailbox)
        fault = fault_of(command, origin)
        if fault is not None:
            reply.settle_here(None, fault)
            return reply
        origin = origin or state.default_origin(command.cause)
        if command.writes:
            if state._groups.held and (held := state._held_for(command)) is not None:
                return self._mailbox.reply(held.park(partial(state._submit_write, command, origin)))
            is_small = state.loops_lead and command.is_small
            is_small = is_small and state._groups.find_loaded(command.session_id) is not None
            self._writes.add(state._write_job(command, origin), reply, is_small=is_small)
            return reply
        try:
            state.check_open()
            published = state._state_for(command)
            if published is None:
                return self._mailbox.reply(state._submit_read(command, origin))
            reply.settle_here(state._read(command, origin, published), None)
        except StateError as error:
            reply.settle_here(None, error)
        try:
            return reply
        finally:
            # It refers to its error, whose traceback refers to this frame: this breaks the cycle.
            del reply


class _Facts:
    """Looks up the variables for which a command carries values. Queries the log only if the values are large."""

    def __init__(self, groups: Groups[LogStore], command: Command[Any], origin: Origin, *, may_query: bool) -> None:
        queries = may_query and command.json_length > values.LONG_JSON
        self._query = partial(groups.read_stored, origin=origin) if queries else None
        self._session_id = command.session_id
        self._state = groups.find_loaded(command.session_id)
        if self._state is None and self._query is not None:
            with contextlib.suppress(StateError):
                self._state = self._query(ReadState(command.session_id))

    def find(self, identifier: str) -> Variable | None:
        """Return the live variable with this name or id."""
        return self._state.find(identifier) if self._state is not None else None

    def find_type(self, identifier: str) -> str | None:
        """Return the type of the variable that has this name or id, or had it last."""
        variable = self.find(identifier)
        if variable is not None or self._query is None:
            return variable.type if variable is not None else None
        try:
            newest = self._query(GetVariableHistory(self._session_id, identifier, 1), state=self._state)
        except StateError:
            return None
        return newest[0].type if newest else None


class LogWatch(Watch):
    """A watch of a session in this process: reads recent commits from memory, earlier ones from the log."""

    def __init__(
        self,
        groups: Groups[LogStore],
        check_open: Callable[[], None],
        read_state: Callable[[], SessionState],
        identifiers: Sequence[str],
        after_sequence: int | None,
    ) -> None:
        self._groups = groups
        self._check_open = check_open
        self._identifiers = frozenset(identifiers)
        self.first_sequence = read_state().session.sequence
        # Joined before the state is read, so that no commit is missed in between.
        self._feed = groups.hub.join(self.first_sequence, self)
        try:
            self._state = read_state()
            self._start(identifiers, after_sequence)
        except BaseException:
            self.close()
            raise

    def _start(self, identifiers: Sequence[str], after_sequence: int | None) -> None:
        state, session_id = self._state, self._state.session.id
        if state.session.sequence != self.first_sequence:
            raise SessionNotFoundError(session_id)
        if after_sequence is None:
            everything = self._groups.read_current(ListVariables(session_id), _WATCHING, state)
            self.initial = tuple(variable for variable in everything if is_watched(variable, self._identifiers))
            self.position = state.sequence
        else:
            head = self._groups.log.sequence
            if not 0 <= after_sequence <= head:
                reason = f"{after_sequence} is not between 0 and the store's last commit, {head}"
                raise InvalidArgumentError("after_sequence", reason)
            self.initial = ()
            self.position = after_sequence
        for identifier in identifiers:
            if state.find(identifier) is None and not self._groups.had(state, identifier):
                raise VariableNotFoundError(session_id, identifier)

    def check_continues(self, first_sequence: int) -> None:
        """See `Watch.check_continues`."""
        session_id = self._state.session.id
        if first_sequence not in (0, self.first_sequence):
            raise SessionNotFoundError(session_id)
        if self.position < self._state.sequence:
            marker = self._groups.log.find_pruning(self._state, self.position)
            if marker is not None:
                raise WatchGapError(session_id, self.position, marker)

    def pull_ready(self) -> list[Update] | None:
        """See `Watch.pull_ready`."""
        self._check_open()
        # Read before the commits: a session that has ended by now has already published all of them.
        ended = self._feed.ended
        commits = self._feed.after(self.position)
        if commits is None:
            return None
        updates: list[Update] = []
        for commit in commits:
            updates.extend(updates_of(commit, self._identifiers))
            self.position = commit.sequence
        if ended and not updates:
            raise SessionNotFoundError(self._state.session.id)
        return updates

    def pull(self) -> list[Update]:
        """See `Watch.pull`."""
        while (updates := self.pull_ready()) is None:
            # The log may have more than memory knows of, whose dependants that does not know either.
            floor = self._feed.floor
            until = max(floor, self._groups.known)
            commits = self._groups.log.changes_after(self._current_state(), self.position)
            commits = [commit for commit in commits if commit.sequence <= until]
            if not commits:
                # The log has no more commits of this session up to that floor; the next ones may be in the feed.
                self.position = max(self.position, floor)
                continue
            past: list[Update] = []
            for commit in commits:
                past.extend(updates_of(commit, self._identifiers))
                self.position = commit.sequence
            if past:
                return past
        return updates

    def _current_state(self) -> SessionState:
        session_id = self._state.session.id
        state = self._groups.find_loaded(session_id)
        if state is None:
            # Others may have had it in memory since, and added dependencies.
            with contextlib.suppress(StateError), self._groups.log.snapshot() as past:
                state = past.load(session_id)
        if state is not None and state.session.sequence == self.first_sequence:
            self._state = state
        return self._state

    def notify(self, wake: Callable[[], None]) -> None:
        """See `Watch.notify`."""
        if self in self._feed.watching:
            self._feed.watching[self] = wake

    def close(self) -> None:
        """Stop watching."""
        self._groups.hub.leave(self.first_sequence, self)
