"""SharedState: the engine of one of several servers that share a log (the port `SharedLog`)."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Final, TypeVar, Unpack, cast

from dspex_persist import clock
from dspex_persist.infra.futures import failed
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    EngineClosedError,
    OutcomeUnknownError,
    StateError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.groups import CACHE_SIZE_BYTES, Groups, Job, Outcome
from dspex_persist.state.log_state import LogEngine, OnLoop
from dspex_persist.state.log_store import FencedError, MovedError, News
from dspex_persist.state.model import Origin
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import Who, fault_of
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.shared_log import SharedLog
from dspex_persist.state.unit_of_work import Drafts, UnitOfWork

R = TypeVar("R")

_logger: Final = get_logger(__name__)
_MOST_ATTEMPTS: Final = 64
"""How often a group is run that others keep overtaking."""
_RENEWALS: Final = 4
"""How often a lease is renewed within its time."""
_AWAY: Final = (OutcomeUnknownError, UnavailableError, StorageError)
"""Errors of a log that may be reached again later."""
SWEEP_S: Final = 5.0
"""How often a server looks for expired sessions, and for servers that have died."""


class SharedGroups(Groups[SharedLog]):
    """The sessions of a shared log, as far as this server has them in memory.

    Attributes:
        known: The last commit that readers of memory see the effects of.
    """

    known = 0

    def __init__(
        self, log: SharedLog, options: SessionOptions | None = None, *, cache_size_bytes: int = CACHE_SIZE_BYTES
    ) -> None:
        self.on_known: Callable[[], None] = _nothing
        self.on_away: Callable[[StateError], None] = lambda _: None
        self._is_away = False
        super().__init__(log, options, cache_size_bytes=cache_size_bytes)
        self.known = log.sequence

    def write_group(self, jobs: Sequence[Job], *, wait: bool = True) -> list[Outcome]:
        """See `Groups.write_group`. If it is unknown whether the group was written, all of memory is forgotten."""
        for _ in range(_MOST_ATTEMPTS):
            try:
                return self._told(super().write_group(jobs, wait=wait))
            except MovedError:
                continue
            except OutcomeUnknownError as error:
                self._forget()
                return [Outcome(error=error) for _ in jobs]
            except FencedError:
                self._forget()
                return [Outcome(error=UnavailableError("other servers took this one for dead")) for _ in jobs]
        reason = f"other servers have overtaken it {_MOST_ATTEMPTS} times"
        return [Outcome(error=StorageError(reason)) for _ in jobs]

    def _told(self, outcomes: list[Outcome]) -> list[Outcome]:
        if self.log.sequence > self._last_told:
            self._last_told = self.log.sequence
            self.log.tell()
        return outcomes

    _last_told = 0

    def follow(self) -> None:
        """Learn what others have committed. The writer calls it between groups."""
        try:
            news = self.log.news()
        except _AWAY as error:
            if not self._is_away:
                self._is_away = True
                _logger.warning("the log cannot be reached", reason=str(error))
            self.on_away(error)
            return
        except FencedError:
            self._forget()
            return
        if self._is_away:
            self._is_away = False
            _logger.warning("the log can be reached again")
        if news is not None:
            self.learn(news)
        self._advance(self.log.sequence)
        self.hub.wake()

    def learn(self, news: News) -> None:
        """See `Groups.learn`."""
        super().learn(news)
        self._last_told = max(self._last_told, news.sequence)
        self._advance(news.sequence)

    def _catch_up(self, first: int, session_id: str, news: News) -> None:
        state = self._cache.find(session_id)
        if state is not None and state.session.sequence == first and first not in news.ended:
            after = self.log.advance(state, news.sequence)
            if after is not None:
                self._cache.put(session_id, after)
                return
        self._cache.drop(session_id)

    def _publish(self, drafts: Drafts, units: Sequence[UnitOfWork]) -> None:
        super()._publish(drafts, units)
        self._advance(self.log.sequence)

    def _advance(self, sequence: int) -> None:
        self.known = sequence
        self.on_known()

    def _forget(self) -> None:
        self.learn(News(self.known, self.log.sequence, self._last_at, None))

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
            self.log.fence()
            self._stale = dict(self.log.unfinished())
            return super().sweep()
        except _AWAY as error:
            _logger.debug("not swept", reason=str(error))
        except FencedError:
            self._forget()
        return 0

    def check(self) -> None:
        """Follow the others: the poll that misses nothing."""
        self.follow()


def _nothing() -> None:
    pass


class Barrier:
    """Lets reads pass once memory has everything that was committed before they came.

    One round trip serves all that came before it began.

    Args:
        groups: The sessions in memory.
        nudge: Has the writer follow the others soon.
    """

    def __init__(self, groups: SharedGroups, nudge: Callable[[], object]) -> None:
        self._groups = groups
        self._nudge = nudge
        self._changed = threading.Condition()
        self._asked: list[Future[None]] = []
        self._waiting: list[tuple[int, list[Future[None]]]] = []
        self._asking = threading.Lock()
        self._closed: StateError | None = None
        self._thread = threading.Thread(target=self._run, name="dspex-persist-barrier", daemon=True)
        groups.on_known, groups.on_away = self._on_known, self._on_away
        self._thread.start()

    def ask(self) -> Future[None]:
        """Return a future that resolves when the caller may read. Its callbacks run on the thread of the barrier."""
        future: Future[None] = Future()
        with self._changed:
            if self._closed is not None:
                return failed(self._closed)
            self._asked.append(future)
            self._changed.notify_all()
        return future

    def pass_through(self) -> None:
        """Wait until the caller may read. It asks for the head itself while no other caller does.

        Raises:
            StateError: The log cannot be reached.
        """
        if self._asking.acquire(blocking=False):
            try:
                head = self._groups.log.head()
            finally:
                self._asking.release()
            if head <= self._groups.known:
                return
        self.ask().result()

    def _on_known(self) -> None:
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def _on_away(self, error: StateError) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, []
        _settle([each for _, futures in waiting for each in futures], error)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._asked or self._closed or self._ready()):
                    self._changed.wait()
                if self._closed is not None:
                    left = [*self._asked, *(each for _, futures in self._waiting for each in futures)]
                    self._asked, self._waiting = [], []
                    break
                asked, self._asked = self._asked, []
                ready = self._take_ready()
            _settle(ready, None)
            if asked:
                self._serve(asked)
        _settle(left, self._closed)

    def _ready(self) -> bool:
        return any(head <= self._groups.known for head, _ in self._waiting)

    def _take_ready(self) -> list[Future[None]]:
        known = self._groups.known
        ready = [each for head, futures in self._waiting if head <= known for each in futures]
        self._waiting = [(head, futures) for head, futures in self._waiting if head > known]
        return ready

    def _serve(self, asked: list[Future[None]]) -> None:
        try:
            with self._asking:
                head = self._groups.log.head()
        except StateError as error:
            _settle(asked, error)
        except Exception as error:  # noqa: BLE001 - a thread's boundary
            _logger.error("the head was not read", traceback=trace_of(error))
            _settle(asked, UnavailableError(repr(error)))
        else:
            if head <= self._groups.known:
                _settle(asked, None)
                return
            with self._changed:
                self._waiting.append((head, asked))
            self._nudge()

    def close(self, reason: StateError) -> None:
        """Fail all that wait, and all that come."""
        with self._changed:
            self._closed = reason
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _settle(futures: Sequence[Future[None]], error: StateError | None) -> None:
    for future in futures:
        if future.set_running_or_notify_cancel():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


class SharedState(LogEngine):
    """One of several servers on one log: reads values from memory, once it has made sure that they are current.

    Args:
        groups: The sessions and their log. This object owns them and closes them.
        name: How error messages name this object.
        sweep_interval_s: How often expired sessions are ended, old outcomes deleted, and servers looked for that have
            died, in seconds.
        on_fatal: Called if the log has lost commits, or because of a bug. See `LogEngine`.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.
    """

    gives: ClassVar[tuple[str, ...]] = ("distributed",)
    loops_lead = False

    def __init__(
        self,
        groups: SharedGroups,
        *,
        name: str = "the shared session state",
        sweep_interval_s: float = SWEEP_S,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
    ) -> None:
        super().__init__(
            cast(Any, groups), name=name, sweep_interval_s=sweep_interval_s, on_fatal=on_fatal, actor=actor
        )
        self._shared = groups
        self._barrier = Barrier(groups, self._writer.check_soon)
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="dspex-persist-lease", daemon=True)
        self._renewer.start()
        groups.log.listen(self._writer.check_soon)

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """See `StateProvider.submit`."""
        if fault_of(command, origin) is not None or command.writes or self._failed is not None or self._closed:
            return super().submit(command, origin)
        result: Future[R] = Future()
        self._barrier.ask().add_done_callback(lambda passed: self._read_behind(passed, command, origin, result))
        return result

    def _read_behind(self, passed: Future[None], command: Command[R], origin: Origin | None, result: Future[R]) -> None:
        if not result.set_running_or_notify_cancel():
            return
        error = passed.exception()
        source: Future[R] = failed(cast(StateError, error)) if error is not None else super().submit(command, origin)
        source.add_done_callback(lambda done: _pass_on(done, result))

    def run(self, command: Command[R], idempotency_key: str | None = None, **who: Unpack[Who]) -> R:
        """See `StateProvider.run`."""
        command.check()
        if not command.writes:
            self.check_open()
            self._barrier.pass_through()
        return super().run(command, idempotency_key, **who)

    def on_loop(self, mailbox: LoopMailbox) -> "SharedOnLoop":
        """See `StateProvider.on_loop`."""
        return SharedOnLoop(self, mailbox)

    def _renew(self) -> None:
        while not self._ended.wait(self._shared.log.lease_s / _RENEWALS):
            try:
                self._shared.log.renew()
            except FencedError:
                _logger.warning("other servers took this one for dead")
                self._writer.check_soon()
            except StateError as error:
                _logger.debug("the lease was not renewed", reason=str(error))
            except Exception as error:  # noqa: BLE001 - a thread's boundary
                _logger.error("the lease was not renewed", traceback=trace_of(error))

    def _on_close(self) -> None:
        self._end(EngineClosedError())

    def _on_fatal(self, error: BaseException) -> None:
        self._end(error if isinstance(error, StateError) else OutcomeUnknownError(repr(error)))
        super()._on_fatal(error)

    def _end(self, reason: StateError) -> None:
        self._ended.set()
        self._barrier.close(reason)
        if threading.current_thread() is not self._renewer:
            self._renewer.join()


class SharedOnLoop(OnLoop):
    """Submits commands from one event loop, which never waits for the log."""

    def __call__(self, command: Command[R], origin: Origin | None = None) -> Reply[R]:
        state = self._state
        fault = fault_of(command, origin)
        if fault is not None or not command.writes:
            return self._mailbox.reply(state.submit(command, origin))
        return super().__call__(command, origin)


def _pass_on(source: "Future[R]", target: "Future[R]") -> None:
    error = source.exception()
    if error is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())
