"""The writer: writes jobs in groups, one group at a time.

The writer has a thread that writes everything that is queued. While nothing is being written or queued, a caller that
blocks for its result *leads*: it writes its job on its own thread, which saves two thread switches.
"""

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol, TypeAlias

from dspex_persist.infra import forks
from dspex_persist.infra.futures import Blocked, Ticket, TicketFuture
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import (
    EngineClosedError,
    OutcomeUnknownError,
    QueueFullError,
    SessionHeldError,
    StateError,
)
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.log_store import WouldWaitError
from dspex_persist.state.meter import Meter

_logger: Final = get_logger(__name__)

_MOST_IN_GROUP = 1024
GAP_S = 0.003
"""How long the writer waits for more jobs after a group of several, in seconds: about as long as a COMMIT takes."""
_RETURN_S: Final = 0.0001
"""How long a caller takes to come back with its next job, in seconds, roughly. More callers take longer."""
_WAKING_S: Final = 0.002
"""How long callers may take to wake each other, in seconds, before the writer wakes all that are left."""
_CHECK_S = 1.0
"""How often an idle writer checks that its file is still there and unchanged."""

_STACK: Final = 300
"""Stack frames that a group may need. A caller with fewer left before the recursion limit must not lead."""
_FAST_S: Final = 0.002
"""An event loop may block for a commit that takes up to this long: it is no more than other calls take."""


class WriteGroup(Protocol):
    """Writes jobs as one group. See `Groups.write_group`."""

    def __call__(self, jobs: Sequence[Job], *, wait: bool = True) -> list[Outcome]: ...


_Queued: TypeAlias = tuple[Job, Ticket[StateError]]


class _Sign(Enum):
    """Queue entries that are not jobs."""

    NEWS = "call `on_answered`"
    CHECK = "call `check`"
    END = "the last entry"


class _EndedError(Exception):
    """A group on another thread failed and ended the writer."""


class _Begun:
    """The ticket of a job that was begun, and is queued again."""

    __slots__ = ("_ticket", "settle")

    def __init__(self, ticket: Ticket[StateError]) -> None:
        self._ticket = ticket
        self.settle = ticket.settle

    def begin(self) -> bool:
        return True


def is_held(outcome: Outcome) -> bool:
    """Whether a job was not carried out because its session is held."""
    return isinstance(outcome.error, SessionHeldError)


class Writer:
    """Passes queued jobs to `write_group` in order, group by group, and settles their tickets when it returns.

    Args:
        write_group: Writes jobs as one group and returns their outcomes. An exception ends the writer.
        queue_length: The most jobs that may be queued.
        check: Called about every second on the writer's thread. An exception ends the writer.
        on_idle: Called about every `idle_s` seconds on the writer's thread. An exception ends the writer.
        idle_s: Seconds between two calls of `on_idle`.
        on_fatal: Called once if an exception ended the writer, after every waiting caller got an error. All later
            calls fail with the same error.
        on_answered: Called on the writer's thread after the callers of a group have their outcomes.
        has_news: Returns whether `on_answered` has anything to do.
        defer: Called with each job whose session was held, and its ticket: it has to queue it again, or to settle the
            ticket.
        gap_s: Seconds that the writer waits after a group of several, so that its callers can join the next one.
        meter: Counts groups and errors; None not to count.
        main_leads: Whether the main thread may lead for a small job. Ctrl-C and other signal handlers of Python wait
            until the group is written, so this is for stores that never wait for a disk.
    """

    def __init__(
        self,
        write_group: WriteGroup,
        *,
        queue_length: int,
        check: Callable[[], object],
        on_idle: Callable[[], object],
        idle_s: float,
        on_fatal: Callable[[BaseException], None],
        on_answered: Callable[[], object] = lambda: None,
        has_news: Callable[[], bool] = lambda: False,
        defer: "Callable[[Job, Ticket[StateError]], None] | None" = None,
        gap_s: float = GAP_S,
        meter: Meter | None = None,
        main_leads: bool = False,
    ) -> None:
        self._meter = meter
        self._write_group = write_group
        self._queue: SimpleQueue[_Queued | _Sign] = SimpleQueue()
        self._queue_length = queue_length
        self._check = check
        self._on_idle = on_idle
        self._idle_s = idle_s
        self._gap_s = gap_s
        self._main_leads = main_leads
        self._on_fatal = on_fatal
        self._on_answered = on_answered
        self._has_news = has_news
        self._defer = defer
        self._closed: StateError | None = None
        # The thread whose exception ended the writer.
        self._failed_on: int | None = None
        self._gate = threading.Lock()
        # Held while a group is written, and during `check` and `on_idle`.
        self._turn = threading.RLock()
        # Jobs queued so far, and jobs finished so far. If they are equal, the queue is empty and no group is running.
        self._put = self._over = 0
        # The size of the last group, how long it took, and when it ended.
        self._last_size = 0
        self._last_took_s = 0.0
        self._last_end = 0.0
        self._cost_s = 0.0
        # Whether there is a `NEWS` in the queue, which does not count as a job.
        self._news_queued = False
        self.alive_at = time.monotonic()
        """When it last made progress, as `time.monotonic` counts. An idle one does about every second."""
        # Groups run in the same context on every thread.
        self._context = contextvars.Context()
        # Whether `check` was asked for, and whether there is a `CHECK` in the queue.
        self._check_asked = self._check_queued = False
        self._awaited = 0
        # The callers of the last group, who may not have been woken yet.
        self._asleep: list[Blocked[Any]] = []
        self._gathered = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dspex-persist-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job. Jobs are written in the order in which they were queued.

        Returns:
            A future for the job's result. It has already failed if the queue is full or the writer closed.
        """
        future = TicketFuture[Any]()
        self.queue([(job, future)])
        return future

    def run(self, job: Job) -> Any:
        """Write the job, and return its result. The calling thread writes it if it can lead.

        Raises:
            StateError: The job failed.
        """
        outcome = self.lead(job)
        if outcome is None:
            blocked: Blocked[Any] = Blocked()
            self.queue([(job, blocked)])
            return blocked.wait()
        try:
            if outcome.error is not None:
                raise outcome.error
            return outcome.result
        finally:
            # The traceback of an error knows this frame.
            del outcome

    def queue(self, entries: Iterable[_Queued]) -> None:
        """Queue jobs. Those that cannot be queued are settled with an error at once."""
        refused: list[tuple[_Queued, StateError]] = []
        # The gate makes closing exact: jobs queued before it are written, later ones are refused.
        with self._gate:
            for entry in entries:
                if self._closed is not None:
                    refused.append((entry, self._closed))
                elif self._queue.qsize() - self._news_queued - self._check_queued >= self._queue_length:
                    refused.append((entry, QueueFullError(self._queue_length)))
                else:
                    self._put += 1
                    self._queue.put(entry)
            if self._awaited and self._queue.qsize() >= self._awaited:
                self._awaited = 0
                self._gathered.set()
        if refused and self._meter is not None:
            self._meter.refused(sum(isinstance(error, QueueFullError) for _, error in refused))
        for entry, error in refused:
            _refuse([entry], error)

    def check_soon(self) -> None:
        """Have the writer call `check` after what is queued now, and not only when a second is over."""
        # One at a time is enough: others may ask for it far more often than it can be done.
        if not self._check_queued:
            self._check_queued = True
            self._queue.put(_Sign.CHECK)

    @property
    def length(self) -> int:
        """How many jobs are queued or being written."""
        return self._put - self._over

    @property
    def is_fast(self) -> bool:
        """Whether recent groups of one job were fast enough to block an event loop for one."""
        return self._cost_s < _FAST_S

    def lead(self, job: Job, *, wait: bool = True) -> Outcome | None:
        """Write a job on this thread. Returns None if it has to be queued, because other jobs are queued or being
        written, because the thread must not lead, or because it would have to wait for another program although
        `wait` is False."""
        # With several callers, the writer's thread makes larger groups.
        if self._last_size > 1 or self._put != self._over or not _has_stack():
            return None
        if not interrupts.can_come():
            return self._lead(job, wait)
        if not (self._main_leads and job.command.is_small):
            return None
        with interrupts.held():
            return self._lead(job, wait)

    def _lead(self, job: Job, wait: bool) -> Outcome | None:
        kept: list[BaseException] = []
        may_hold = True
        try:
            # Inside the `try`: another thread may raise an exception here even as `acquire` returns.
            if not self._turn.acquire(blocking=False):
                may_hold = False
                self._last_size = 2
                return None
            # Checked again: both may have changed before this thread got the lead.
            if self._put != self._over or self._closed is not None:
                return None
            outcome, failure = self._write_alone(job, wait, kept)
        finally:
            if may_hold:
                self._turn.release()
        if failure is not None:
            # Ends the writer's thread.
            self._queue.put(_Sign.END)
            self._on_fatal(failure)
            if not isinstance(failure, Exception):
                raise failure
        elif self._has_news() and not self._news_queued:
            # The writer's thread wakes the watchers: there may be thousands, and this caller has its result.
            self._news_queued = True
            self._queue.put(_Sign.NEWS)
        if kept:
            raise kept.pop()
        return outcome

    def _write_alone(
        self, job: Job, wait: bool, kept: list[BaseException]
    ) -> tuple[Outcome | None, BaseException | None]:
        """Write a job in a group of its own, and return its outcome, and what ended the writer if anything did."""
        interrupts.keep_in(kept)
        try:
            return self._carry_out([job], wait)[0], None
        except WouldWaitError:
            return None, None
        except BaseException as error:  # noqa: BLE001 - an exception in a group ends the writer
            return Outcome(error=self._fail([], error)), error
        finally:
            interrupts.keep_in(None)

    def _note_cost(self, took_s: float) -> None:
        # One slow commit counts at once, fast ones only gradually: a slow disk must not block an event loop twice.
        self._cost_s += (took_s - self._cost_s) * (0.05 if took_s < self._cost_s else 0.2)

    def close(self) -> None:
        """Write the queued jobs, then end the thread."""
        with self._gate:
            if self._closed is None:
                self._closed = EngineClosedError()
                self._queue.put(_Sign.END)
                self._gathered.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def refuse(self, reason: StateError) -> None:
        """Refuse all jobs in a forked child, where the writer's thread does not exist.

        The locks are replaced, because threads that do not exist here either may hold them.
        """
        self._gate, self._turn = threading.Lock(), threading.RLock()
        self._closed = reason

    def _run(self) -> None:
        waiting: list[_Queued] = []
        try:
            self._loop(waiting)
        except _EndedError:
            # These jobs have not begun, so they were not written.
            _refuse(waiting, EngineClosedError())
        except BaseException as error:  # noqa: BLE001 - a thread's boundary: no caller may be left waiting
            with self._turn:
                if self._failed_on != threading.get_ident():
                    # It came from outside a group, where `_leading` does not see it.
                    self._fail(waiting, error)
            if self._failed_on == threading.get_ident():
                self._on_fatal(error)
        finally:
            self._wake_rest()

    def _loop(self, waiting: list[_Queued]) -> None:
        last_idle = last_check = self._last_end = time.monotonic()
        while True:
            self.alive_at = time.monotonic()
            more = self._gather(waiting)
            if waiting:
                # After the lead is released, so that a caller can lead as soon as it has its result. No local variable
                # keeps the outcomes until the next group.
                self._answer(waiting, self._write(waiting))
            self._on_answered()
            if not more:
                # Waits for a leading caller. Later callers see that the writer is closed.
                with self._leading(waiting):
                    return
            if self._check_asked or time.monotonic() - last_check >= _CHECK_S:
                self._check_asked = False
                with self._leading(waiting), forks.busy():
                    self._check()
                last_check = time.monotonic()
            if time.monotonic() - last_idle >= self._idle_s:
                with self._leading(waiting), forks.busy():
                    self._on_idle()
                self._on_answered()
                last_idle = time.monotonic()

    @contextmanager
    def _leading(self, waiting: list[_Queued]) -> Iterator[None]:
        """Hold the lead. An exception ends the writer before another thread can lead."""
        with self._turn:
            if self._failed_on is not None:
                raise _EndedError
            try:
                yield
            except BaseException as error:
                self._fail(waiting, error)
                raise

    def _gather(self, waiting: list[_Queued]) -> bool:
        """Wait for a job and move all queued ones to `waiting`; False once the writer has to end."""
        try:
            first = self._get_first()
        except Empty:
            return True
        if isinstance(first, _Sign):
            return self._obey(first)
        waiting.append(first)
        if self._last_size > 1 or not self._queue.empty():
            # No longer than the callers need, or the disk: on a fast one, a wait costs more than another group.
            gap_s = min(self._gap_s, max(self._last_size * _RETURN_S, self._last_took_s))
            self._await_others(self._last_size - 1, self._last_end + gap_s - time.monotonic())
        self._wake_rest()
        while len(waiting) < _MOST_IN_GROUP:
            try:
                queued = self._queue.get_nowait()
            except Empty:
                break
            if not isinstance(queued, _Sign):
                waiting.append(queued)
            elif not self._obey(queued):
                return False
        return True

    def _get_first(self) -> "_Queued | _Sign":
        """Return the first entry of the queue.

        Raises:
            Empty: There was none for about a second.
        """
        if self._asleep:
            try:
                return self._queue.get(timeout=_WAKING_S)
            except Empty:
                self._wake_rest()
        return self._queue.get(timeout=min(self._idle_s, _CHECK_S))

    def _wake_rest(self) -> None:
        """Wake the callers who have not been woken by others: those may wait for the interpreter, with a busy one."""
        asleep, self._asleep = self._asleep, []
        for waiting in asleep:
            waiting.wake()

    def _obey(self, sign: _Sign) -> bool:
        if sign is _Sign.CHECK:
            self._check_asked, self._check_queued = True, False
        elif sign is _Sign.NEWS:
            self._news_queued = False
        return sign is not _Sign.END

    def _await_others(self, others: int, gap_s: float) -> None:
        """Wait a little while several callers write: larger groups are faster for all. A single caller never waits.

        The wait ends as soon as there are as many jobs as in the last group: by then hardly any caller is missing.
        """
        if gap_s <= 0 or self._queue.qsize() >= others > 0:
            return
        self._gathered.clear()
        self._awaited = others
        # Checked again now that `_awaited` is set, because jobs queued in between did not see it.
        if not self._queue.qsize() >= others > 0 and self._closed is None:
            self._gathered.wait(gap_s)
        self._awaited = 0

    def _write(self, waiting: list[_Queued]) -> list[Outcome]:
        """Write the jobs as one group. Removes those from `waiting` that were cancelled in time."""
        count = len(waiting)
        with self._leading(waiting):
            # From here on a job cannot be cancelled.
            waiting[:] = [queued for queued in waiting if queued[1].begin()]
            outcomes = self._carry_out([job for job, _ in waiting], wait=True) if waiting else []
            self._last_size = len(waiting)
            self._last_end = time.monotonic()
            self._over += count
            return outcomes

    def _carry_out(self, jobs: Sequence[Job], wait: bool) -> list[Outcome]:
        began = time.monotonic()
        with forks.busy():
            outcomes = self._context.run(self._write_group, jobs, wait=wait)
        self.alive_at = time.monotonic()
        self._last_took_s = self.alive_at - began
        if len(jobs) == 1:
            self._note_cost(self._last_took_s)
        if self._meter is not None:
            self._count(self._meter, outcomes)
        assert len(outcomes) == len(jobs), "each job has an outcome"
        return outcomes

    def _count(self, meter: Meter, outcomes: Sequence[Outcome]) -> None:
        meter.wrote(len(outcomes), self._last_took_s)
        for outcome in outcomes:
            # One whose session is held is written later.
            if outcome.error is not None and not is_held(outcome):
                meter.failed(outcome.error)

    def _answer(self, waiting: list[_Queued], outcomes: Sequence[Outcome]) -> None:
        """Settle the tickets of a written group. Those left in `waiting` if this raises have no outcome yet.

        Callers who are blocked wake each other from then on.
        """
        answered = 0
        late = [queued for queued, outcome in zip(waiting, outcomes, strict=True) if is_held(outcome)]
        if late and self._defer is not None:
            # Before the others are settled: one of them may be about to end the hold.
            for job, ticket in late:
                self._defer(job, _Begun(ticket))
        asleep: list[Blocked[Any]] = []
        try:
            for (_, ticket), outcome in zip(waiting, outcomes, strict=True):
                answered += 1
                if late and self._defer is not None and is_held(outcome):
                    continue
                if isinstance(ticket, Blocked):
                    ticket.keep(outcome.result, outcome.error)
                    if asleep:
                        asleep[-1].following = ticket
                    asleep.append(ticket)
                else:
                    ticket.settle(outcome.result, outcome.error)
        finally:
            del waiting[:answered]
            if asleep:
                self._asleep = asleep[1:]
                asleep[0].wake()

    def defer(self, job: Job, ticket: Ticket[StateError]) -> bool:
        """Have a job whose session was held wait until it is not; returns whether it does."""
        if self._defer is not None:
            self._defer(job, ticket)
        return self._defer is not None

    def _fail(self, waiting: list[_Queued], error: BaseException) -> StateError:
        """Fail the waiting jobs and all later ones with the error. Returns the error as callers see it."""
        reason = error if isinstance(error, StateError) else OutcomeUnknownError(f"the writer ended: {error!r}")
        # As text, because exception renderers may show local variables, which hold users' values.
        trace = "" if isinstance(error, StateError) else trace_of(error)
        _logger.error("writer ended", reason=str(reason), traceback=trace)
        if self._failed_on is None:
            self._failed_on = threading.get_ident()
        with self._gate:
            self._closed = reason
        for _, ticket in waiting:
            ticket.settle(None, reason)
        waiting.clear()
        while True:
            try:
                queued = self._queue.get_nowait()
            except Empty:
                return reason
            if not isinstance(queued, _Sign):
                # Never started, so certainly not written.
                _refuse([queued], EngineClosedError())


def _has_stack() -> bool:
    """Whether the calling thread is far enough from the recursion limit to lead."""
    try:
        sys._getframe(sys.getrecursionlimit() - _STACK)
    except ValueError:
        return True
    return False


def _refuse(entries: Iterable[_Queued], error: StateError) -> None:
    for _, ticket in entries:
        if ticket.begin():
            ticket.settle(None, error)


class LoopWrites:
    """Writes jobs from one event loop. Jobs of the same loop iteration are queued together. A small job is written on
    the loop itself, which saves two thread switches, while commits are fast and the loop serves no other call."""

    def __init__(self, writer: Writer, mailbox: LoopMailbox) -> None:
        self._writer = writer
        self._mailbox = mailbox
        self._pending: list[tuple[Job, Reply[Any]]] = []
        self._is_small = False

    def add(self, job: Job, reply: Reply[Any], *, is_small: bool) -> None:
        """Write a job, and settle the reply. `is_small`: whether running it takes less time than a commit."""
        if not self._pending:
            self._mailbox.call_soon(self._flush)
        self._pending.append((job, reply))
        self._is_small = is_small

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        is_alone = len(pending) == 1 and self._mailbox.traffic.calls <= 1
        if is_alone and self._is_small and self._writer.is_fast:
            ((job, reply),) = pending
            outcome = None if reply.cancelled() else self._writer.lead(job, wait=False)
            if outcome is not None:
                if not (is_held(outcome) and self._writer.defer(job, reply)):
                    reply.settle_here(outcome.result, outcome.error)
                return
        self._writer.queue(pending)
