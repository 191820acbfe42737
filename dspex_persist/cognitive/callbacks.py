"""Callbacks: functions that are called with the changes of a session, on one thread of the context."""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn, Self, TypeAlias

from dspex_persist import clock
from dspex_persist.cognitive.changes import Change, Choice, Pace, Taken
from dspex_persist.cognitive.sources import Source
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import EngineClosedError, SessionNotFoundError, StateError
from dspex_persist.state.model import Update, Variable

Callback: TypeAlias = Callable[[Change[Any]], object]
Filter: TypeAlias = Callable[[Change[Any]], object]

_CLOSE_S: Final = 5.0
_logger: Final = get_logger(__name__)


def now_s() -> float:
    """Return the time by which changes are debounced and throttled, in seconds."""
    return clock.steady().timestamp()


class Subscription:
    """A function that is called with each change. Close it, for example with a `with` block, to stop that.

    Attributes:
        error: What ended it, if that was an error; None if it goes on, was closed, or the session has ended.
        ended: Whether it has ended.
    """

    def __init__(self, callbacks: "Callbacks", call: Callback, choice: Choice, keep: Filter | None, pace: Pace) -> None:
        self._callbacks = callbacks
        self._call = call
        self._choice = choice
        self._keep = keep
        self._pace = pace
        # Changes up to this commit came before the subscription.
        self._since = 0
        self._feed: _Feed | None = None
        self.error: StateError | None = None
        self.ended = False

    @property
    def interrupted(self) -> StateError | None:
        """What separates it from its server at the moment; None while they are connected."""
        return None if self._feed is None else self._feed.source.interrupted

    @property
    def resumptions(self) -> int:
        """How often it has gone on after losing its server."""
        return 0 if self._feed is None else self._feed.source.resumptions

    def close(self) -> None:
        """Stop. What has arrived is delivered before, also a change that is being debounced or throttled.

        It waits for that for up to 5 seconds, unless the function itself calls it.
        """
        self._callbacks.remove(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a subscription cannot be copied or pickled: watch once more, ctx.watch(..., on_change=...)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # On the thread

    def _offer(self, change: Change[Any], now: float) -> None:
        if self.ended or not self._choice.includes(change.name):
            return
        try:
            wanted = self._keep is None or self._keep(change)
        except Exception as error:  # noqa: BLE001 - a user's code
            self._failed("the filter of a watch failed", change, error)
            return
        if wanted:
            self._deliver(self._pace.offer(change, now))

    def _deliver(self, taken: Iterable[Taken]) -> None:
        for each in taken:
            try:
                self._call(each.change)
            except Exception as error:  # noqa: BLE001 - a user's code
                self._failed("a callback of a watch failed", each.change, error)

    def _failed(self, event: str, change: Change[Any], error: Exception) -> None:
        name = getattr(self._call, "__qualname__", type(self._call).__name__)
        _logger.error(event, callback=name, variable=change.name, commit=change.commit, traceback=trace_of(error))

    def _end(self, error: StateError | None) -> None:
        if not self.ended:
            self._deliver(self._pace.flush())
            self.error, self.ended = error, True


class _Feed:
    """The source of all subscriptions to the same variables."""

    def __init__(self, key: object, source: Source) -> None:
        self.key = key
        self.source = source
        self.lock = threading.RLock()
        self.subscriptions: list[Subscription] = []
        self.is_woken = False

    def pull(self) -> tuple[list[Update], list[tuple[Subscription, int]]]:
        """Pull a page of updates; returns it with the subscriptions as of then, and after which commit each begins."""
        with self.lock:
            updates = self.source.pull() if self.subscriptions else []
            self._renumber()
            return updates, [(each, each._since) for each in self.subscriptions]

    def follow(self) -> None:
        """Go on with the backend that the context has moved to."""
        with self.lock:
            if self.subscriptions:
                self.source.follow()
                self._renumber()

    def _renumber(self) -> None:
        for number_of in self.source.take_numberings():
            for each in self.subscriptions:
                each._since = number_of(each._since)


class Callbacks:
    """The subscriptions of a context, and the thread that calls their functions.

    Args:
        read: Returns the value of a variable.
    """

    def __init__(self, read: Callable[[Variable], Any]) -> None:
        self._read_value = read
        self._lock = threading.Lock()
        self._feeds: set[_Feed] = set()
        # The newest feed for each key.
        self._shared: dict[object, _Feed] = {}
        # Used without the lock: whoever wakes the thread, such as the writer, must never wait for it.
        self._news = threading.Event()
        self._woken: deque[_Feed] = deque()
        self._initial: deque[tuple[Subscription, list[Change[Any]]]] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._paced: set[Subscription] = set()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def waker(self) -> "Waker":
        """Return what wakes the thread for a source that is about to be opened."""
        return Waker(self)

    def add(
        self, subscription: Subscription, key: object, source: Source, waker: "Waker", initial: list[Change[Any]]
    ) -> None:
        """Begin to call a function.

        Args:
            subscription: The subscription.
            key: What the source is of: sources with the same key serve each other's subscriptions.
            source: Its source, just opened. It is closed if another one serves as well.
            waker: What wakes the thread for the source.
            initial: What to call it with first.
        """
        subscription._since = source.position
        with self._lock:
            if self._thread is None:
                # In this context, so that the thread reads the same clock.
                run = contextvars.copy_context().run
                thread = threading.Thread(target=run, args=(self._run,), name="dspex-persist-callbacks", daemon=True)
                # First of all: the system may refuse to start it.
                thread.start()
                self._thread = thread
            # Before its feed has it, whose next updates come after these.
            self._initial.append((subscription, initial))
            feed = self._shared.get(key)
            if feed is not None:
                with feed.lock:
                    # One that has read on would lack what was committed since.
                    behind = feed.source.here(feed.source.position) <= subscription._since
                    shared = behind and bool(feed.subscriptions)
                    if shared:
                        feed.subscriptions.append(subscription)
            if feed is None or not shared:
                feed = self._shared[key] = _Feed(key, source)
                feed.subscriptions.append(subscription)
                self._feeds.add(feed)
                waker.feed = feed
            subscription._feed = feed
            if subscription._pace.is_used:
                self._paced.add(subscription)
        self.wake(feed)
        if feed.source is not source:
            source.close()

    def feeds(self) -> "tuple[_Feed, ...]":
        """Return the sources of the subscriptions."""
        with self._lock:
            return tuple(self._feeds)

    def wake(self, feed: _Feed) -> None:
        """Read a feed soon; from any thread."""
        if not feed.is_woken:
            feed.is_woken = True
            self._woken.append(feed)
        self._news.set()

    def remove(self, subscription: Subscription) -> None:
        """End a subscription, after what has arrived was delivered."""
        if threading.current_thread() is self._thread:
            self._remove(subscription, drain=False)
            return
        done = threading.Event()

        def remove() -> None:
            try:
                self._remove(subscription, drain=True)
            finally:
                done.set()

        with self._lock:
            if subscription.ended or self._stopped:
                return
            self._work.append(remove)
        self._news.set()
        if not done.wait(_CLOSE_S):
            _logger.warning("a callback of a watch is still running", waited_s=_CLOSE_S)

    def close(self) -> None:
        """End all subscriptions, after what has arrived was delivered."""
        with self._lock:
            thread = self._thread
            if self._stopped or thread is None:
                self._stopped = True
                return
            self._stopped = True
        self._news.set()
        if threading.current_thread() is not thread:
            thread.join(_CLOSE_S)
            if thread.is_alive():
                _logger.warning("a callback of a watch is still running", waited_s=_CLOSE_S)

    # On the thread

    def _run(self) -> None:
        while True:
            self._news.wait(self._wait_s())
            # Before reading the queues: what comes later sets it again.
            self._news.clear()
            stopped = self._stopped
            self._begin()
            while self._work:
                self._work.popleft()()
            for _ in range(len(self._woken)):
                feed = self._woken.popleft()
                feed.is_woken = False
                self._read(feed)
            if stopped:
                for feed in tuple(self._feeds):
                    self._drain(feed)
                    self._end(feed, None)
                return
            now = now_s()
            for subscription in tuple(self._paced):
                subscription._deliver(subscription._pace.due(now))

    def _begin(self) -> None:
        """Deliver the initial values of new subscriptions."""
        while self._initial:
            subscription, initial = self._initial.popleft()
            now = now_s()
            for change in initial:
                subscription._offer(change, now)

    def _wait_s(self) -> float | None:
        due = [subscription._pace.next_due_s() for subscription in tuple(self._paced)]
        due_s = min((each for each in due if each is not None), default=None)
        return None if due_s is None else max(0.0, due_s - now_s())

    def _read(self, feed: _Feed) -> bool:
        """Deliver a page of updates; returns whether there was one."""
        try:
            updates, targets = feed.pull()
        except SessionNotFoundError:
            self._end(feed, None)
            return False
        except StateError as error:
            if not (self._stopped and isinstance(error, EngineClosedError)):
                _logger.error("the watch of callbacks ended", reason=str(error))
            self._end(feed, error)
            return False
        if updates:
            # There may be more, but other feeds come first.
            self.wake(feed)
            self._begin()
            self._hand_out(updates, targets)
        return bool(updates)

    def _hand_out(self, updates: list[Update], targets: list[tuple[Subscription, int]]) -> None:
        now = now_s()
        for update in updates:
            change: Change[Any] = Change(update, read=self._read_value)
            for subscription, since in targets:
                if update.sequence > since:
                    subscription._offer(change, now)

    def _drain(self, feed: _Feed) -> None:
        while self._read(feed):
            pass

    def _remove(self, subscription: Subscription, *, drain: bool) -> None:
        feed = subscription._feed
        assert feed is not None, "it was added"
        if drain:
            self._drain(feed)
        subscription._end(None)
        with self._lock, feed.lock:
            self._paced.discard(subscription)
            if subscription in feed.subscriptions:
                feed.subscriptions.remove(subscription)
            is_last = not feed.subscriptions
            if is_last:
                self._forget(feed)
        if is_last:
            # Without the locks: the thread that reads a stream may be waiting for them, to wake this one.
            feed.source.close()

    def _end(self, feed: _Feed, error: StateError | None) -> None:
        with self._lock, feed.lock:
            ended, feed.subscriptions = feed.subscriptions, []
            self._paced.difference_update(ended)
            self._forget(feed)
        for subscription in ended:
            subscription._end(error)
        feed.source.close()

    def _forget(self, feed: _Feed) -> None:
        self._feeds.discard(feed)
        if self._shared.get(feed.key) is feed:
            del self._shared[feed.key]


class Waker:
    """Wakes the thread of callbacks for one feed."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self.feed: _Feed | None = None

    def __call__(self) -> None:
        """Say that the feed may have updates; from any thread."""
        if self.feed is not None:
            self._callbacks.wake(self.feed)
