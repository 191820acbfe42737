"""Daemon threads for code of others, which may never return, and may end what it runs on: a bounded pool of them, and
event loops.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter ends; a thread that is stuck would keep a
server from ending.
"""

import asyncio
import contextlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, InvalidStateError
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from dspex_persist.infra import forks
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of

R = TypeVar("R")

_CLEAN_UP_S: Final = 2.0

_logger: Final = get_logger(__name__)


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
    # The traceback of an error knows this frame, and the future the error.
    del future, function


def _end_child_of(process: int) -> None:
    """End a child that was forked by the work and has come back from it: it is none of its parent's threads."""
    if os.getpid() == process:
        return
    error = sys.exc_info()[1]
    if error is not None:
        sys.stderr.write(trace_of(error))
    os._exit(forks.STRAY_CHILD)


class LoopEndedError(Exception):
    """The event loop that something ran on was ended by other code on it."""

    def __str__(self) -> str:
        return "other code on the same event loop closed it, so this could not go on; there is a new one now"


class _SharedLoop(asyncio.SelectorEventLoop):
    """A loop on which nobody can change what everybody has there."""

    def set_task_factory(self, factory: Any) -> None:
        """How tasks are made is nobody's."""
        raise _shared("its task factory")

    def set_default_executor(self, executor: Any) -> None:
        """Nor is where `asyncio.to_thread` goes."""
        raise _shared("its default executor")

    async def shutdown_default_executor(self, *_: Any, **__: Any) -> None:
        """After which there would be no other."""
        raise _shared("its default executor")

    def close(self) -> None:
        """Closing is its thread's alone: in between two runs, another thread would take the pipe that wakes it away."""
        raise RuntimeError("the event loop is shared and cannot be closed; run a loop of your own, in a thread")

    def close_for_good(self) -> None:
        """Close it, on the thread that ran it."""
        super().close()


def _shared(what: str) -> RuntimeError:
    return RuntimeError(f"{what} cannot be changed: the event loop is shared; run a loop of your own, in a thread")


class LoopThread:
    """An event loop on a daemon thread of its own, which is started when it is first asked for.

    Code that runs there may stop the loop, or raise what ends one (SystemExit, KeyboardInterrupt): it goes on all the
    same. If it cannot, because it was closed, there is a new one, and whoever waits for something on the old one hears
    `LoopEndedError`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: _SharedLoop | None = None
        # What was started on this loop and has not ended.
        self._started: dict[Future[Any], Coroutine[Any, Any, Any]] = {}
        self._closed = False
        self._over = False
        forks.tell(self)

    def forked(self, *, quiet: bool) -> None:
        """See `forks.Heir`."""
        if self._loop is not None:
            forks.end_on(self._loop)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        with self._lock:
            return self._open()

    def start(self, coroutine: Coroutine[Any, Any, R]) -> "Future[R]":
        """Run a coroutine on the loop, in the context of whoever calls."""
        with self._lock:
            try:
                future = asyncio.run_coroutine_threadsafe(coroutine, self._open())
            except RuntimeError:
                coroutine.close()
                raise
            started = self._started
            started[future] = coroutine
        future.add_done_callback(lambda each: started.pop(each, None))
        return future

    def close(self, wait_s: float = _CLEAN_UP_S) -> None:
        """Cancel what runs on the loop, and stop the loop when it has cleaned up: after `wait_s` in any case, unless
        that is 0."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop = self._loop
        if loop is None:
            return
        cleaning = self._clean_up()
        try:
            ended = asyncio.run_coroutine_threadsafe(cleaning, loop)
        except RuntimeError:  # it is closed already
            cleaning.close()
            self._over = True
            return
        if wait_s:
            with contextlib.suppress(TimeoutError, CancelledError):
                ended.result(wait_s)
            self._over = True
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(loop.stop)

    async def _clean_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._over = True
        asyncio.get_running_loop().stop()

    def _open(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise RuntimeError("the event loop is closed")
        if self._loop is None or self._loop.is_closed():
            self._loop, self._started = _SharedLoop(), {}
            run = (self._loop, self._started)
            threading.Thread(target=self._run, args=run, name=self._name, daemon=True).start()
        return self._loop

    def _run(self, loop: _SharedLoop, started: dict[Future[Any], Coroutine[Any, Any, Any]]) -> None:
        """On the loop's own thread, which closes it, as nobody waits for code that does not let it stop."""
        what = ""
        while not self._over:
            try:
                loop.run_forever()
                what = "stop()"
            except (SystemExit, KeyboardInterrupt) as error:
                what = type(error).__name__
            except Exception as error:  # noqa: BLE001 -- the loop itself is broken, by whatever code did to it
                what = type(error).__name__
                break
            if not self._over:
                _logger.warning("event loop goes on, though code on it would have ended it", loop=self._name, by=what)
        if not self._over:
            _logger.warning("event loop was ended by code on it; there will be a new one", loop=self._name, by=what)
        with self._lock:
            if self._loop is loop:
                self._loop = None
        _cancel_rest(loop)
        with contextlib.suppress(Exception):
            loop.close_for_good()
        for future, coroutine in list(started.items()):
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                # It was handed over to a loop that was closed before it got there.
                coroutine.close()
            with contextlib.suppress(InvalidStateError):
                future.set_exception(LoopEndedError())


def _cancel_rest(loop: asyncio.AbstractEventLoop) -> None:
    """Of a loop that was stopped before all of it had been cancelled, because code on it was late, or never began."""
    # What was handed over and has not begun becomes a task only now; and what is cancelled may stop the loop again.
    for _ in range(3):
        if loop.is_closed():
            return
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        rest = asyncio.wait(tasks, timeout=_CLEAN_UP_S) if tasks else asyncio.sleep(0)
        with contextlib.suppress(BaseException):
            loop.run_until_complete(rest)
        if inspect.getcoroutinestate(rest) == inspect.CORO_CREATED:
            # The loop is broken, and did not begin.
            rest.close()
            return
