"""Barrier: makes reads of memory linearizable although other servers write."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

from dspex_persist.infra.futures import failed
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import StateError, UnavailableError
from dspex_persist.state.shared.server_meter import ServerMeter

_logger: Final = get_logger(__name__)


class Barrier:
    """Lets reads pass once memory has everything that was committed before they came.

    One round trip serves all that came before it began. What a read looks at has to be looked up after it has passed.

    Args:
        head: Asks for the number of the log's last commit: one round trip, on any thread.
        nudge: Has the writer follow the other servers soon; then it calls `learnt` or `away`.
        known: The last commit that memory has the effects of.
        meter: Counts round trips; None not to count.
    """

    def __init__(
        self, head: Callable[[], int], nudge: Callable[[], object], known: int, meter: ServerMeter | None = None
    ) -> None:
        self._head = head
        self._nudge = nudge
        self._known = known
        self._meter = meter
        self._changed = threading.Condition()
        # Those for whom nobody has asked yet; those who wait until memory has a commit.
        self._asked: list[Future[None]] = []
        self._waiting: list[tuple[int, list[Future[None]]]] = []
        # Held during a round trip.
        self._asking = threading.Lock()
        self._closed: StateError | None = None
        self._thread = threading.Thread(target=self._run, name="dspex-persist-barrier", daemon=True)
        self._thread.start()

    def ask(self) -> Future[None]:
        """Return a future that resolves when the caller may read.

        Its callbacks run on the thread of the barrier, so they must not wait for another read. It fails with a
        `StateError` if the log cannot be reached, or the barrier is closed.
        """
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
            StateError: The log cannot be reached, or the barrier is closed.
        """
        if not self._asking.acquire(blocking=False):
            self.ask().result()
            return
        try:
            head = self._ask(1)
        finally:
            self._asking.release()
        if head > self._known:
            future: Future[None] = Future()
            self._wait_for(head, [future])
            future.result()

    def learnt(self, sequence: int) -> None:
        """Note that memory now has the effects of all commits up to this one. Called by the writer."""
        # In this order: whoever begins to wait compares this after it is listed.
        self._known = sequence
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def away(self, error: StateError) -> None:
        """Fail those who wait for a commit, because the log cannot be reached. Called by the writer."""
        with self._changed:
            waiting, self._waiting = self._waiting, []
        _settle([each for _, futures in waiting for each in futures], error)

    def close(self, reason: StateError) -> None:
        """Fail all that wait, and all that come."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ask(self, reads: int) -> int:
        """Return the head. Whatever the log raises, callers get a `StateError`."""
        began = time.perf_counter()
        try:
            head = self._head()
        except Exception as error:
            if self._meter is not None:
                self._meter.not_answered()
            if isinstance(error, StateError):
                raise
            if self._closed is None:
                _logger.error("the head was not read", traceback=trace_of(error))
            raise UnavailableError(repr(error)) from error
        if self._meter is not None:
            self._meter.asked(reads, time.perf_counter() - began)
        return head

    def _wait_for(self, head: int, futures: list[Future[None]]) -> None:
        with self._changed:
            closed = self._closed
            if closed is None:
                self._waiting.append((head, futures))
                self._changed.notify_all()
        if closed is None:
            self._nudge()
        else:
            _settle(futures, closed)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._closed or self._is_any_ready())
                if self._closed is not None:
                    break
                asked, self._asked = self._asked, []
                ready = self._take_ready()
            _settle(ready, None)
            # Nobody waits for a reader of the rounds before, nor does it live until the next one.
            del ready
            if asked:
                self._serve(asked)
            del asked
        # Nothing is added any more.
        left = [*self._asked, *(each for _, futures in self._waiting for each in futures)]
        self._asked, self._waiting = [], []
        _settle(left, self._closed)

    def _is_any_ready(self) -> bool:
        return any(head <= self._known for head, _ in self._waiting)

    def _take_ready(self) -> list[Future[None]]:
        known = self._known
        ready = [each for head, futures in self._waiting if head <= known for each in futures]
        self._waiting = [(head, futures) for head, futures in self._waiting if head > known]
        return ready

    def _serve(self, asked: list[Future[None]]) -> None:
        try:
            with self._asking:
                head = self._ask(len(asked))
        except StateError as error:
            _settle(asked, error)
            return
        if head <= self._known:
            _settle(asked, None)
        else:
            self._wait_for(head, asked)


def _settle(futures: Sequence[Future[None]], error: StateError | None) -> None:
    for future in futures:
        if future.set_running_or_notify_cancel():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
