"""Daemon threads for users' code, which may never return or may end its event loop: a bounded pool, and loops.

`concurrent.futures.ThreadPoolExecutor` joins its threads at the end of the interpreter, so a stuck thread would keep a
server from ending.
"""

import asyncio
import contextlib
import inspect
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, Final, TypeAlias, TypeVar

from dspex_persist.infra import forks
from dspex_persist.infra.futures import Ticket, TicketFuture
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of

R = TypeVar("R")

_Work: TypeAlias = tuple[Ticket[BaseException], Callable[[], object]]

_CLEAN_UP_S: Final = 2.0

_logger: Final = get_logger(__name__)


class DaemonThreads:
    """A pool of at most `most` threads, started on demand. Further work waits in a queue.

    New work wakes one thread. That one wakes the next before it begins, if there is more. So a single thread does many
    short pieces one after another, without a thread switch for each; and work that blocks holds up none of the others.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._work: deque[_Work] = deque()
        # The locks on which idle threads wait; the last one to become idle is the first to be woken.
        self._idle: list[threading.Lock] = []
        # Whether a thread has been woken or started, and has not looked for work yet.
        self._is_waking = False
        self._count = 0
        self._closed = False

    def submit(self, function: Callable[[], R]) -> "Future[R]":
        """Call `function` on one of the threads, unless its future is cancelled before.

        Raises:
            RuntimeError: The pool is closed.
        """
        future: TicketFuture[R] = TicketFuture()
        self.start(function, future)
        return future

    def start(self, function: Callable[[], object], ticket: Ticket[BaseException]) -> None:
        """Call `function` on one of the threads, and settle the ticket with its outcome.

        Raises:
            RuntimeError: The pool is closed, or the system has no thread for it.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads are closed")
            self._work.append((ticket, function))
            try:
                self._wake_one()
            except RuntimeError:
                # The system refuses to start a thread. If there are others, one of them does the work.
                if not self._count:
                    self._work.pop()
                    raise

    def close(self) -> None:
        """Accept no more work, cancel the queue, and end idle threads; does not wait for busy ones."""
        with self._lock:
            self._closed = True
            cancelled = list(self._work)
            self._work.clear()
            while self._idle:
                self._idle.pop().release()
        for ticket, _ in cancelled:
            if ticket.begin():
                ticket.settle(None, CancelledError())

    def _wake_one(self) -> None:
        """Have another thread look for work, unless one is about to. Called with the lock."""
        if self._is_waking:
            return
        if self._idle:
            self._idle.pop().release()
        elif self._count < self._most:
            name = f"{self._name}-{self._count + 1}"
            threading.Thread(target=self._run, name=name, daemon=True).start()
            self._count += 1
        else:
            return
        self._is_waking = True

    def _run(self) -> None:
        wake = threading.Lock()
        wake.acquire()
        is_woken = True
        while (work := self._next(wake, is_woken)) is not None:
            is_woken = False
            _carry_out(*work)
            # Before waiting for more, because it may keep objects alive that its caller has dropped.
            del work

    def _next(self, wake: threading.Lock, is_woken: bool) -> _Work | None:
        """Return the next work, for which a thread waits that is woken by `wake`; None if the pool is closed."""
        while True:
            with self._lock:
                if is_woken:
                    self._is_waking = False
                if self._closed:
                    return None
                if self._work:
                    work = self._work.popleft()
                    if self._work:
                        with contextlib.suppress(RuntimeError):
                            self._wake_one()
                    return work
                self._idle.append(wake)
            wake.acquire()
            is_woken = True


def _carry_out(ticket: Ticket[BaseException], function: Callable[[], object]) -> None:
    if not ticket.begin():
        return
    process = forks.process()
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 -- a thread's boundary: the ticket reports the error
        _end_child_of(process)
        ticket.settle(None, error)
    else:
        _end_child_of(process)
        ticket.settle(result, None)
    # The ticket refers to the error, whose traceback refers to this frame: this breaks the cycle.
    del ticket, function


def _end_child_of(process: int) -> None:
    """Exit if the work forked and this is the child: it must not continue as a thread of its parent's pool."""
    if forks.process() == process:
        return
    error = sys.exc_info()[1]
    if error is not None:
        sys.stderr.write(trace_of(error))
    os._exit(forks.STRAY_CHILD)


def on_new_thread(function: Callable[[], R], name: str) -> "Future[R]":
    """Call `function` on a new daemon thread, which ends with it."""
    threads = DaemonThreads(1, name)
    future = threads.submit(function)
    future.add_done_callback(lambda _: threads.close())
    return future


class LoopEndedError(Exception):
    """Other code on the same event loop closed it."""

    def __str__(self) -> str:
        return "other code on the same event loop closed it, so this could not go on; there is a new one now"


class _SharedLoop(asyncio.SelectorEventLoop):
    """An event loop that refuses changes which would affect all code on it."""

    def set_task_factory(self, factory: Any) -> None:
        """Refuse to change how tasks are made."""
        raise _shared("its task factory")

    def set_default_executor(self, executor: Any) -> None:
        """Refuse to change where `asyncio.to_thread` runs."""
        raise _shared("its default executor")

    async def shutdown_default_executor(self, *_: Any, **__: Any) -> None:
        """Refuse to shut the executor down, which cannot be replaced."""
        raise _shared("its default executor")

    def close(self) -> None:
        """Refuse: only the loop's thread may close it; another one could remove its wake-up pipe between two runs."""
        raise RuntimeError("the event loop is shared and cannot be closed; run a loop of your own, in a thread")

    def close_by_owner(self) -> None:
        """Close the loop; for the thread that ran it."""
        super().close()


def _shared(what: str) -> RuntimeError:
    return RuntimeError(f"{what} cannot be changed: the event loop is shared; run a loop of your own, in a thread")


class LoopThread:
    """An event loop on a separate daemon thread, which starts on first use.

    If code on the loop stops it, or raises SystemExit or KeyboardInterrupt, the loop continues. If the code breaks or
    closes it, the futures of everything that ran there fail with `LoopEndedError`, and the next use starts a new loop.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: _SharedLoop | None = None
        # What runs on this loop.
        self._started: dict[Future[Any], Coroutine[Any, Any, Any]] = {}
        self._closed = False
        self._over = False
        forks.register(self)

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`."""
        if self._loop is not None:
            forks.end_on(self._loop)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        with self._lock:
            return self._open()

    def start(self, coroutine: Coroutine[Any, Any, R]) -> "Future[R]":
        """Run a coroutine on the loop, in the caller's context.

        Raises:
            RuntimeError: The `LoopThread` is closed, or the system has no thread for it.
            OSError: The system has no descriptors for the loop.
        """
        with self._lock:
            try:
                future = asyncio.run_coroutine_threadsafe(coroutine, self._open())
            except (RuntimeError, OSError):
                coroutine.close()
                raise
            started = self._started
            started[future] = coroutine
        future.add_done_callback(lambda each: started.pop(each, None))
        return future

    def close(self, wait_s: float = _CLEAN_UP_S) -> None:
        """Cancel everything on the loop, and stop the loop once that has cleaned up.

        Args:
            wait_s: After this many seconds the loop stops in any case; with 0, return at once and set no limit.
        """
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
            loop, started = _SharedLoop(), dict[Future[Any], Coroutine[Any, Any, Any]]()
            try:
                threading.Thread(target=self._run, args=(loop, started), name=self._name, daemon=True).start()
            except RuntimeError:
                # The system refuses to start a thread: the next use tries again.
                loop.close_by_owner()
                raise
            self._loop, self._started = loop, started
        return self._loop

    def _run(self, loop: _SharedLoop, started: dict[Future[Any], Coroutine[Any, Any, Any]]) -> None:
        """Run the loop to its end, on its thread; this also closes it, because no caller waits for slow code there."""
        what = ""
        while not self._over:
            try:
                loop.run_forever()
                what = "stop()"
            except (SystemExit, KeyboardInterrupt) as error:
                what = type(error).__name__
            except Exception as error:  # noqa: BLE001 -- users' code has broken the loop itself
                what = type(error).__name__
                break
            if not self._over:
                _logger.warning("code on the event loop tried to stop it; it continues", loop=self._name, by=what)
        if not self._over:
            _logger.warning("code on the event loop ended it; it will be replaced", loop=self._name, by=what)
        with self._lock:
            if self._loop is loop:
                self._loop = None
        _cancel_rest(loop)
        with contextlib.suppress(Exception):
            loop.close_by_owner()
        for future, coroutine in list(started.items()):
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                # The loop was closed before the coroutine began.
                coroutine.close()
            with contextlib.suppress(InvalidStateError):
                future.set_exception(LoopEndedError())


def is_on_loop() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def end_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on a loop that this thread ran now and then, and close it."""
    _cancel_rest(loop)
    loop.close()


def _cancel_rest(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the remaining tasks of a loop that was stopped too early, with tasks that are slow or have not begun."""
    # Several rounds: queued coroutines become tasks only when the loop runs, and cancelled code may stop it again.
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
