"""Watching: a session's changes as an iterator, synchronous and asynchronous, or as calls of a function.

Watches pull: nothing queues up for a slow consumer but one page of updates, and one change for each variable that is
being debounced or throttled. They go on when the context moves to another backend (see `Source`).
"""

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Generic, NoReturn, Self, TypeVar, overload

from dspex_persist.cognitive.backends import Backend
from dspex_persist.cognitive.callbacks import Callback, Callbacks, Filter, Subscription, now_s
from dspex_persist.cognitive.changes import Change, Choice, Pace, Taken, read_value
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.cognitive.sources import News, Numbering, Source
from dspex_persist.errors import DspexError
from dspex_persist.infra.logs import get_logger
from dspex_persist.spelling import quote
from dspex_persist.state import arguments
from dspex_persist.state.abilities import KeepsOrder
from dspex_persist.state.errors import InvalidArgumentError, SessionNotFoundError, StateError
from dspex_persist.state.model import Update, UpdateKind, Variable

T = TypeVar("T")

# In a tuple, because freezegun replaces module attributes: a test that sets the time still has to wait for others.
_CLOCK: Final = (time.monotonic,)
_logger: Final = get_logger(__name__)


class Changes(Generic[T]):
    """The changes of variables, in the order of their commits, each once: iterate with `for` or with `async for`.

    Close it, for example by a `with` or `async with` block; closing ends the iteration at once. Otherwise the iteration
    ends when the session ends. Whoever stops may go on later, with `after=changes.position`.

    On an event loop, a watch on a server begins with `async with` or with the first step; everywhere else it begins
    when it is created.
    """

    def __init__(
        self,
        open_source: Callable[[Callable[[], None], Callable[[Source], None]], None],
        dropped: "deque[Source]",
        choice: Choice,
        keep: Filter | None,
        pace: Pace,
        *,
        read: Callable[[Variable], T],
        include_initial: bool,
    ) -> None:
        self._open_source = open_source
        self._read = read
        self._dropped = dropped
        self._choice = choice
        self._keep = keep
        self._pace = pace
        self._include_initial = include_initial
        # `_taking` is held while updates are pulled and filtered, `_lock` only while they are pulled.
        self._taking = threading.Lock()
        self._lock = threading.RLock()
        self._numberings: list[Numbering] = []
        self._opening = threading.Lock()
        self._is_open = False
        self._news = News()
        self._source: Source | None = None
        # What was pulled and is to be delivered, or an error of the filter.
        self._ready: deque[Taken | Exception] = deque()
        self._ended = False
        self._error: DspexError | None = None
        self._has_run_out = False
        self._left_at: int | None = None

    # Opening

    def open(self) -> None:
        """Begin to watch, if it has not begun yet."""
        with self._opening:
            if self._is_open or self._ended:
                return
            self._open_source(self._news, self._begin)
            # Nobody may be left to close it. Closing takes locks, so the garbage collector must not do it.
            source = self._source
            assert source is not None, "it has begun"
            weakref.finalize(self, self._dropped.append, source)
            if self._include_initial:
                # Not in `_begin`, which passes the gate: the filter may use the context.
                with self._lock:
                    updates, moves = initial_updates(source), len(self._numberings)
                self._take(updates, moves)
            self._is_open = True

    def _begin(self, source: Source) -> None:
        with self._lock:
            self._source = source
            ended = self._ended
        if ended:
            # It was closed meanwhile.
            source.close()

    async def aopen(self) -> None:
        """Do the same without blocking the event loop."""
        if not (self._is_open or self._ended):
            await asyncio.to_thread(self.open)

    # Taking

    def next(self, timeout_s: float | None = None) -> Change[T] | None:
        """Wait for the next change.

        Args:
            timeout_s: How long to wait at most, in seconds; None to wait without a limit.

        Returns:
            The change; None if there was none in time, or if the watch has ended (see `ended`).

        Raises:
            ContextClosedError: The context was closed.
            StateError: The watch cannot go on; `WatchGapError`, for example.
        """
        self.open()
        give_up_at = None if timeout_s is None else _now() + arguments.seconds("timeout_s", timeout_s)
        while True:
            self._news.forget()
            self._fill(may_block=True)
            if (change := self._pop()) is not None or self._ended:
                return change
            wait_s = self._wait_s()
            if give_up_at is not None:
                left_s = give_up_at - _now()
                if left_s <= 0:
                    return None
                wait_s = left_s if wait_s is None else min(wait_s, left_s)
            self._news.is_there.wait(wait_s)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change[T]:
        change = self.next()
        if change is None:
            raise StopIteration
        return change

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change[T]:
        await self.aopen()
        self._news.listen()
        while True:
            self._news.forget()
            if not self._fill(may_block=False):
                # From the file. What it finds is kept here: the caller may be cancelled meanwhile.
                await asyncio.to_thread(self._fill, may_block=True)
            change = self._pop()
            if change is not None:
                return change
            if self._ended:
                raise StopAsyncIteration
            await self._news.wait(self._wait_s())

    def _fill(self, *, may_block: bool) -> bool:
        """Pull, unless something is ready; returns False if that would block and must not."""
        with self._taking:
            source = self._source
            while source is not None and not self._ready and not self._ended:
                with self._lock:
                    updates = self._pull(source, may_block=may_block)
                    moves = len(self._numberings)
                if updates is None:
                    return False
                self._take(updates, moves)
                if not updates:
                    break
        return True

    def _pull(self, source: Source, *, may_block: bool) -> list[Update] | None:
        try:
            updates = source.pull() if may_block else source.pull_ready()
        except SessionNotFoundError:
            self._has_run_out = True
            self._end(None)
            return []
        except StateError as error:
            self._end(error)
            return []
        self._renumber(source)
        return updates

    def _follow(self) -> None:
        """Go on with the backend that the context has moved to."""
        with self._lock:
            if self._source is not None and not self._ended:
                self._source.follow()
                self._renumber(self._source)

    def _renumber(self, source: Source) -> None:
        for number_of in source.take_numberings():
            self._numberings.append(number_of)
            self._pace.renumber(number_of)
            for place, taken in enumerate(self._ready):
                if isinstance(taken, Taken):
                    self._ready[place] = Taken(number_of(taken.first), taken.change)

    def _take(self, updates: list[Update], moves: int) -> None:
        """Take updates that were pulled after so many moves."""
        wanted = [kept for update in updates if (kept := self._kept(update)) is not None]
        now = now_s()
        with self._lock:
            if self._ended:
                return
            for each in wanted:
                if isinstance(each, Exception):
                    self._ready.append(each)
                    continue
                first = each.commit
                for number_of in self._numberings[moves:]:
                    first = number_of(first)
                self._ready.extend(self._pace.offer(each, now, first))
            self._ready.extend(self._pace.due(now))

    def _kept(self, update: Update) -> Change[T] | Exception | None:
        """The change if it is wanted, or an error of the filter, which is raised when it is its turn.

        Called without `_lock`: the filter may use the context, which may be moving and then waits for `_lock`.
        """
        change = Change(update, read=self._read)
        if not self._choice.includes(change.name):
            return None
        try:
            return change if self._keep is None or self._keep(change) else None
        except Exception as error:  # noqa: BLE001 - a user's code
            return error

    def _pop(self) -> Change[T] | None:
        with self._lock:
            if self._ready:
                taken = self._ready.popleft()
                if isinstance(taken, Exception):
                    raise taken
                return taken.change
            if self._error is not None:
                raise self._error
            return None

    def _wait_s(self) -> float | None:
        with self._lock:
            due_s = self._pace.next_due_s()
        return None if due_s is None else max(0.0, due_s - now_s())

    # What it is doing

    @property
    def position(self) -> int:
        """The number of a commit: everything up to it was delivered. `watch(after=position)` goes on from there.

        What has been pulled, but not been delivered yet, comes after it.
        """
        with self._lock:
            return 0 if self._source is None else self._source.here(self._position())

    def _position(self) -> int:
        assert self._source is not None, "it has begun"
        if self._left_at is not None:
            return self._left_at
        left = [taken.first for taken in self._ready if isinstance(taken, Taken)]
        left += [taken.first for taken in self._pace.waiting()]
        return min(left) - 1 if left else self._source.position

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more but what was pulled already."""
        return self._ended

    @property
    def has_run_out(self) -> bool:
        """Whether it has ended because the session has."""
        return self._has_run_out

    @property
    def resumptions(self) -> int:
        """How often it has gone on after losing its server."""
        return 0 if self._source is None else self._source.resumptions

    @property
    def interrupted(self) -> StateError | None:
        """What separates it from its server at the moment; None while they are connected."""
        return None if self._source is None else self._source.interrupted

    # Closing

    def _end(self, error: DspexError | None) -> None:
        """End after what waits, which is delivered before."""
        with self._lock:
            if not self._ended:
                self._ready.extend(self._pace.flush())
                self._ended, self._error = True, error
        self._news()

    def _fail(self, error: DspexError) -> None:
        """End with an error, after what was pulled already."""
        self._end(error)
        if self._source is not None:
            self._source.close()

    def close(self) -> None:
        """Stop watching, and end the iteration at once. What has not been delivered comes after `position`."""
        with self._lock:
            if self._source is not None:
                self._left_at = self._position()
            self._ended, self._error = True, None
            self._ready.clear()
            self._pace.flush()
        self._news()
        if self._source is not None:
            self._source.close()

    async def aclose(self) -> None:
        """Do the same without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a watch cannot be copied, pickled, or sent to another process: begin another one, "
            "ctx.watch(..., after=changes.position)"
        )

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await self.aopen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def initial_updates(source: Source) -> list[Update]:
    """Return the values with which a watch begins, as updates."""
    return [
        Update(UpdateKind.INITIAL_VALUE, variable, source.position, variable.updated_at) for variable in source.initial
    ]


class Watchers:
    """All watches of a context.

    Args:
        session_id: The session.
        backend: Where it is.
    """

    def __init__(self, session_id: str, backend: Backend) -> None:
        self.session_id = session_id
        self._backend = backend
        self._read: Callable[[Variable], Any] = partial(read_value, session_id)
        self._callbacks = Callbacks(self._read)
        self._lock = threading.Lock()
        self._iterated: weakref.WeakSet[Changes[Any]] = weakref.WeakSet()
        self._dropped: deque[Source] = deque()
        self._closed = False
        backend.followers.add(self)

    def changes(
        self,
        choice: Choice,
        keep: Filter | None,
        pace: Pace,
        *,
        include_initial: bool,
        after: int | None,
        read: Callable[[Variable], T] | None = None,
    ) -> Changes[T]:
        """Return an iterator over changes; see `Watchable.watch`."""
        open_source = partial(self._open, choice, after)
        changes: Changes[T] = Changes(
            open_source, self._dropped, choice, keep, pace, read=read or self._read, include_initial=include_initial
        )
        with self._lock:
            self._iterated.add(changes)
        if isinstance(self._backend.provider, KeepsOrder) or not _is_on_loop():
            changes.open()
        return changes

    def subscribe(
        self,
        call: Callback,
        choice: Choice,
        keep: Filter | None,
        pace: Pace,
        *,
        include_initial: bool,
        after: int | None,
    ) -> Subscription:
        """Have a function called with changes; see `Watchable.watch`."""
        subscription = Subscription(self._callbacks, call, choice, keep, pace)
        waker = self._callbacks.waker()

        def add(source: Source) -> None:
            updates = initial_updates(source) if include_initial else []
            # What resumes after a commit reads a part of the history that nobody else needs.
            key = choice.identifiers if after is None else object()
            self._callbacks.add(subscription, key, source, waker, [Change(each, read=self._read) for each in updates])

        self._open(choice, after, waker, add)
        return subscription

    def _open(
        self, choice: Choice, after: int | None, wake: Callable[[], None], begin: Callable[[Source], None]
    ) -> None:
        """Open a source, and have its user begin."""
        while self._dropped:
            self._dropped.popleft().close()

        def enter() -> None:
            if self._closed:
                raise ContextClosedError(self.session_id)
            begin(Source(self._backend, self.session_id, choice.identifiers, after, wake))

        self._backend.gate.pass_through(enter)

    def follow(self) -> None:
        """Have all watches go on with the backend that the context has moved to, while its gate is held.

        So they miss nothing, even if the session ends before they pull again.
        """
        with self._lock:
            iterated = list(self._iterated)
        for follow in [*(each._follow for each in iterated), *(each.follow for each in self._callbacks.feeds())]:
            try:
                follow()
            except Exception as error:  # noqa: BLE001 - the session has moved; this one ends with it when it is pulled
                _logger.warning("a watch did not move along", session_id=self.session_id, reason=str(error))

    def close(self) -> None:
        """End all watches: functions get what has arrived, iterations end with `ContextClosedError`."""
        with self._lock:
            self._closed = True
            iterated = list(self._iterated)
        self._callbacks.close()
        for changes in iterated:
            changes._fail(ContextClosedError(self.session_id))
        while self._dropped:
            self._dropped.popleft().close()


def _now() -> float:
    return _CLOCK[0]()


def _is_on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class WaitFor:
    """Waits until a variable has a value that fits: `ctx.wait_for(...)`, or `await ctx.wait_for.aio(...)`."""

    __slots__ = ("_watchers",)

    def __init__(self, watchers: Watchers) -> None:
        self._watchers = watchers

    def __call__(self, name: str, predicate: Callable[[Any], object], timeout_s: float | None = None) -> Any:
        """Wait until the value of a variable fits, and return it.

        Args:
            name: The name of the variable.
            predicate: Takes a value, and says whether it is the one. It is asked about the current value first, then
                about each new one.
            timeout_s: How long to wait at most, in seconds; None to wait without a limit.

        Raises:
            TimeoutError: No value has fitted in this time.
            VariableNotFoundError: The session never had such a variable.
            SessionNotFoundError: The session has ended.
            ContextClosedError: The context was closed.
        """
        arguments.function("predicate", predicate)
        left = None if timeout_s is None else arguments.seconds("timeout_s", timeout_s)
        give_up_at = None if left is None else _now() + left
        with self._changes(name) as changes:
            while True:
                change = changes.next(None if give_up_at is None else max(0.0, give_up_at - _now()))
                if change is None:
                    raise self._timed_out(name, timeout_s, changes)
                if not change.is_deletion and predicate(value := change.value):
                    return value

    async def aio(self, name: str, predicate: Callable[[Any], object], timeout_s: float | None = None) -> Any:
        """Do the same without blocking the event loop. `predicate` is called on the loop."""
        arguments.function("predicate", predicate)
        left = None if timeout_s is None else arguments.seconds("timeout_s", timeout_s)
        changes = self._changes(name)
        try:
            async with asyncio.timeout(left), changes:
                async for change in changes:
                    if not change.is_deletion and predicate(value := change.value):
                        return value
        except TimeoutError:
            pass
        raise self._timed_out(name, timeout_s, changes)

    def _changes(self, name: str) -> Changes[Any]:
        choice = Choice((arguments.text("name", name),))
        return self._watchers.changes(choice, None, Pace(None, None), include_initial=True, after=None)

    def _timed_out(self, name: str, timeout_s: float | None, changes: Changes[Any]) -> Exception:
        if timeout_s is None or changes.has_run_out:
            return SessionNotFoundError(self._watchers.session_id)
        return TimeoutError(f"no value of {quote(name)} has fitted within {timeout_s:g} s")


class Watchable:
    """What has a session that can be watched: a context."""

    @property
    def _watchers(self) -> Watchers:
        """All its watches."""
        raise NotImplementedError

    @overload
    def watch(
        self,
        *names: str,
        on_change: None = None,
        filter: Filter | None = None,
        debounce_s: float | None = None,
        throttle_s: float | None = None,
        include_initial: bool = False,
        after: int | None = None,
    ) -> Changes[Any]: ...

    @overload
    def watch(
        self,
        *names: str,
        on_change: Callback,
        filter: Filter | None = None,
        debounce_s: float | None = None,
        throttle_s: float | None = None,
        include_initial: bool = False,
        after: int | None = None,
    ) -> Subscription: ...

    def watch(
        self,
        *names: str,
        on_change: Callback | None = None,
        filter: Filter | None = None,
        debounce_s: float | None = None,
        throttle_s: float | None = None,
        include_initial: bool = False,
        after: int | None = None,
    ) -> Changes[Any] | Subscription:
        """Watch variables: everybody's changes, from any process, in the order of their commits, each once.

        Without `on_change` it returns an iterator for `for change in ...` and `async for change in ...`. With it, the
        function is called with each change, on one thread of the context; what it raises is logged, and a slow one
        delays only other functions.

        Args:
            names: Names of variables, and globs with `*` and `?`; none for all variables.
            on_change: Called with each change.
            filter: Takes a change, and says whether it is wanted.
            debounce_s: Deliver the last of several changes of a variable once it has not changed for this long, in
                seconds.
            throttle_s: Deliver at most one change of a variable in this time, in seconds: the first at once, then the
                last.
            include_initial: Begin with the values as they are.
            after: Resume after this commit: the `position` of an earlier watch, or the `commit` of a change.

        Raises:
            VariableNotFoundError: The session never had a variable with one of the names.
            InvalidArgumentError: An argument is wrong.
            SessionNotFoundError: The session has ended.
            ContextClosedError: The context was closed.
        """
        arguments.flag("include_initial", include_initial)
        if after is not None:
            arguments.sequence("after", after)
        if include_initial and after is not None:
            raise InvalidArgumentError("include_initial", "a watch that resumes with `after` has no initial values")
        choice, pace = Choice(names), Pace(debounce_s, throttle_s)
        if filter is not None:
            arguments.function("filter", filter)
        if on_change is None:
            return self._watchers.changes(choice, filter, pace, include_initial=include_initial, after=after)
        arguments.function("on_change", on_change)
        return self._watchers.subscribe(on_change, choice, filter, pace, include_initial=include_initial, after=after)

    @property
    def wait_for(self) -> WaitFor:
        """Wait until a variable has a value that fits: `wait_for(name, predicate, timeout_s)`; see `WaitFor`."""
        return WaitFor(self._watchers)
