"""A bounded pool of daemon threads, for code of others that may never return.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter ends; a thread that is stuck would keep a
server from ending.
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from dspex_persist.infra import forks

R = TypeVar("R")


class DaemonThreads:
    """At most `most` threads, made when they are needed. Work that finds none free waits its turn."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        # A condition and a deque cost twice as much for each piece of work.
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._lock = threading.Lock()
        # Threads that have asked for work, less the work that was ever queued for them.
        self._free = 0
        self._count = 0
        self._closed = False

    def submit(self, function: Callable[[], R]) -> "Future[R]":
        """Have `function` called on one of the threads. A future that is cancelled in time is left out."""
        future: Future[R] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads are closed")
            self._free -= 1
            if self._free < 0 and self._count < self._most:
                self._count += 1
                name = f"{self._name}-{self._count}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
            self._work.put((future, function))
        return future

    def close(self) -> None:
        """Take no more work, cancel what waits, let idle threads end; nobody waits for those that are busy."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(Empty):
                while (waiting := self._work.get_nowait()) is not None:
                    waiting[0].cancel()
            for _ in range(self._count):
                self._work.put(None)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            _carry_out(*work)
            # Let go before waiting: it may hold what its caller has let go of.
            del work

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._lock:
            self._free += 1
        return self._work.get()


def _carry_out(future: "Future[R]", function: Callable[[], R]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    process = os.getpid()
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 -- a thread's boundary: whoever waits is told
        _end_child_of(process)
        future.set_exception(error)
    else:
        _end_child_of(process)
        future.set_result(result)


def _end_child_of(process: int) -> None:
    """End a child that was forked by the work and has come back from it: it is none of its parent's threads."""
    if os.getpid() == process:
        return
    if sys.exc_info()[0] is not None:
        traceback.print_exc()
    os._exit(forks.STRAY_CHILD)
