"""The writer: one thread that takes jobs from a queue and writes them in groups."""

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
"""How long the writer waits for more jobs after a group of several, in seconds: about as long as a COMMIT takes."""
_CHECK_S = 1.0
"""How often an idle writer checks that its file is still there and unchanged."""

WriteGroup: TypeAlias = Callable[[Sequence[Job]], list[Outcome]]
_Queued: TypeAlias = tuple[Job, Future[Any]]


class Writer:
    """Passes queued jobs to `write_group`, group by group, and resolves their futures when it returns.

    All callbacks run on the writer's thread. An exception in any of them ends the writer.

    Args:
        write_group: Writes a group of jobs and returns one outcome for each.
        queue_length: How many jobs may wait; further ones fail with `QueueFullError`.
        check: Called about every second.
        on_idle: Called about every `idle_s` seconds.
        idle_s: Interval of `on_idle` in seconds.
        on_fatal: Called once if an exception ends the writer, with that exception. By then all waiting futures have
            failed, and so does every later submit.
        on_answered: Called after `on_idle`, and after each group once its futures are resolved.
        gap_s: How long to wait for more jobs while several callers write, in seconds.
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
        """Queue a job. Jobs are written in the order in which they were queued.

        Returns:
            A future for the job's result. It has already failed if the queue is full or the writer closed.
        """
        future: Future[Any] = Future()
        if self._queue.qsize() >= self._queue_length:
            future.set_exception(QueueFullError(self._queue_length))
            return future
        # The gate makes closing exact: jobs queued before it are written, later ones are refused.
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
        """Refuse all jobs in a forked child, where the writer's thread does not exist.

        The gate is replaced, because a thread that does not exist here either may hold it.
        """
        self._gate = threading.Lock()
        self._closed = reason

    def _run(self) -> None:
        waiting: list[_Queued] = []
        try:
            self._loop(waiting)
        except BaseException as error:  # noqa: BLE001 - a thread's boundary: no caller may be left waiting
            self._fail(waiting, error)
            self._on_fatal(error)

    def _loop(self, waiting: list[_Queued]) -> None:
        last_size = 0
        last_idle = last_check = last_end = time.monotonic()
        while True:
            more = self._gather(waiting, last_size, last_end)
            if waiting:
                last_size = len(waiting)
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

    def _gather(self, waiting: list[_Queued], last_size: int, last_end: float) -> bool:
        """Wait for a job and move all queued ones to `waiting`; False once the writer has to end.

        `last_size`: the number of jobs in the last group.
        """
        try:
            first = self._queue.get(timeout=min(self._idle_s, _CHECK_S))
        except Empty:
            return True
        if first is None:
            return False
        waiting.append(first)
        if last_size > 1 or not self._queue.empty():
            self._await_others(last_size - 1, last_end + self._gap_s - time.monotonic())
        while len(waiting) < _MOST_IN_GROUP:
            try:
                queued = self._queue.get_nowait()
            except Empty:
                break
            if queued is None:
                return False
            waiting.append(queued)
        return True

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

    def _write(self, waiting: list[_Queued]) -> None:
        # Skip jobs that their callers have cancelled. From here on a job cannot be cancelled.
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
        # As text, because exception renderers may show local variables, which hold users' values.
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
                # Never started, so certainly not written.
                queued[1].set_exception(EngineClosedError())
