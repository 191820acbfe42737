"""A bounded pool of daemon threads, for code of others that may never return.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter ends; a thread that is stuck would keep a
server from ending.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


class DaemonThreads:
    """At most `most` threads, made when they are needed. Work that finds none free waits its turn."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._idle = 0
        self._count = 0
        self._closed = False

    def submit(self, function: Callable[[], R]) -> "Future[R]":
        """Have `function` called on one of the threads. A future that is cancelled in time is left out."""
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 -- a thread's boundary: whoever waits is told
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changed:
            if self._closed:
                raise RuntimeError("the threads are closed")
            self._work.append(run)
            if self._idle < len(self._work) and self._count < self._most:
                self._count += 1
                name = f"{self._name}-{self._count}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
            else:
                self._changed.notify()
        return future

    def close(self) -> None:
        """Take no more work, and let idle threads end; nobody waits for those that are busy."""
        with self._changed:
            self._closed = True
            self._work.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            work()
            # Let go before waiting: it may hold what its caller has let go of.
            del work

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._idle += 1
            while not self._work and not self._closed:
                self._changed.wait()
            self._idle -= 1
            return self._work.popleft() if self._work else None
