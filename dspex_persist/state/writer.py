"""The writer: one thread that takes queued jobs and has them written group by group."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias

from dspex_persist.infra import forks
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import EngineClosedError, OutcomeUnknownError, QueueFullError, StateError
from dspex_persist.state.groups import Job, Outcome

_logger: Final = get_logger(__name__)

_MOST_IN_GROUP = 1024
GAP_S = 0.003
"""How long the writer waits, after a group of several, for its callers to come back: a COMMIT takes about as long."""
_CHECK_S = 1.0
"""How often the writer looks whether it still has what it writes to, while nobody writes."""

WriteGroup: TypeAlias = Callable[[Sequence[Job]], list[Outcome]]
_Queued: TypeAlias = tuple[Job, Future[Any]]


class Writer:
    """Runs `write_group` on everything that is queued, again and again, and resolves the futures after it returns.

    `on_idle` runs about every `idle_s` seconds on the same thread, `check` about every second: what it raises ends the
    writer. `on_answered` runs after `on_idle`, and after each group once its futures have been resolved. `on_fatal` is
    called, once, with what ended the writer before its time; by then every waiting future has failed, and every later
    submit does.
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
        gap_s: float = GAP_S,
    ) -> None:
        self._write_group = write_group
        self._queue: SimpleQueue[_Queued | None] = SimpleQueue()
        self._queue_length = queue_length
        self._check = check
        self._on_idle = on_idle
        self._idle_s = idle_s
        self._gap_s = gap_s
        self._on_fatal = on_fatal
        self._on_answered = on_answered
        self._closed: StateError | None = None
        self._gate = threading.Lock()
        self._awaited = 0
        self._gathered = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dspex-persist-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job. Jobs are written in the order in which they were queued."""
        future: Future[Any] = Future()
        if self._queue.qsize() >= self._queue_length:
            future.set_exception(QueueFullError(self._queue_length))
            return future
        # The gate makes closing exact: what is queued before it is written, what comes after it is refused.
        with self._gate:
            if self._closed is None:
                self._queue.put((job, future))
                if self._awaited and self._queue.qsize() >= self._awaited:
                    self._awaited = 0
                    self._gathered.set()
                return future
        future.set_exception(self._closed)
        return future

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._gate:
            if self._closed is None:
                self._closed = EngineClosedError()
                self._queue.put(None)
                self._gathered.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def refuse(self, reason: StateError) -> None:
        """Take no more jobs, in a forked child, which has no writer's thread; a thread that is no more may hold the
        gate."""
        self._gate = threading.Lock()
        self._closed = reason

    def _run(self) -> None:
        waiting: list[_Queued] = []
        try:
            self._loop(waiting)
        except BaseException as error:  # noqa: BLE001 - a thread's boundary: nobody may be left waiting
            self._fail(waiting, error)
            self._on_fatal(error)

    def _loop(self, waiting: list[_Queued]) -> None:
        company = 0
        last_idle = last_check = last_end = time.monotonic()
        while True:
            more = self._gather(waiting, company, last_end)
            if waiting:
                company = len(waiting)
                self._write(waiting)
                last_end = time.monotonic()
            if not more:
                return
            if time.monotonic() - last_check >= _CHECK_S:
                with forks.busy():
                    self._check()
                last_check = time.monotonic()
            if time.monotonic() - last_idle >= self._idle_s:
                with forks.busy():
                    self._on_idle()
                self._on_answered()
                last_idle = time.monotonic()

    def _gather(self, waiting: list[_Queued], company: int, last_end: float) -> bool:
        """Fill `waiting` with what is queued, waiting for the first one; whether more may come.

        `company`: how many were in the last group.
        """
        try:
            first = self._queue.get(timeout=min(self._idle_s, _CHECK_S))
        except Empty:
            return True
        if first is None:
            return False
        waiting.append(first)
        if company > 1 or not self._queue.empty():
            self._await_company(company - 1, last_end + self._gap_s - time.monotonic())
        while len(waiting) < _MOST_IN_GROUP:
            try:
                queued = self._queue.get_nowait()
            except Empty:
                break
            if queued is None:
                return False
            waiting.append(queued)
        return True

    def _await_company(self, others: int, gap_s: float) -> None:
        """While others write too, a short gap makes the groups larger and everything faster. Alone: no delay.

        It ends early when as many as in the last group are there again: then hardly anybody is missing.
        """
        if gap_s <= 0 or self._queue.qsize() >= others > 0:
            return
        self._gathered.clear()
        self._awaited = others
        # Looked at again after the mark was set: whoever came in between did not see it.
        if not self._queue.qsize() >= others > 0 and self._closed is None:
            self._gathered.wait(gap_s)
        self._awaited = 0

    def _write(self, waiting: list[_Queued]) -> None:
        # A caller that gave up before its turn is left out; from here on it cannot cancel any more.
        waiting[:] = [queued for queued in waiting if queued[1].set_running_or_notify_cancel()]
        with forks.busy():
            outcomes = self._write_group([job for job, _ in waiting])
        for (_, future), outcome in zip(waiting, outcomes, strict=True):
            if outcome.error is None:
                future.set_result(outcome.result)
            else:
                future.set_exception(outcome.error)
        waiting.clear()
        self._on_answered()

    def _fail(self, waiting: list[_Queued], error: BaseException) -> None:
        reason = error if isinstance(error, StateError) else OutcomeUnknownError(f"the writer ended: {error!r}")
        # As text: a renderer of exceptions may show local variables, and those are users' values.
        trace = "" if isinstance(error, StateError) else trace_of(error)
        _logger.error("writer ended", reason=str(reason), traceback=trace)
        with self._gate:
            self._closed = reason
        for _, future in waiting:
            if not future.done():
                future.set_exception(reason)
        while True:
            try:
                queued = self._queue.get_nowait()
            except Empty:
                return
            if queued is not None and queued[1].set_running_or_notify_cancel():
                # Not begun: certainly not written.
                queued[1].set_exception(EngineClosedError())
