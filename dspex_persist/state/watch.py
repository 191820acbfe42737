"""Watching a session by pull.

A watch remembers the last commit that it has told; the writer only wakes it. Recent commits of watched sessions
are kept in memory, a bounded number each; a watch that has fallen behind them reads the file. Nothing queues for a
watch, so one that does not read costs nothing.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Self

from dspex_persist.state.errors import SessionNotFoundError
from dspex_persist.state.model import ChangeKind, CommitChanges, Update, UpdateKind, Variable

_RECENT_COMMITS = 256
_RECENT_BYTES = 4 * 1024 * 1024


class Watch(ABC):
    """The changes of one session from a commit on: whole commits, in order, none twice or missing, only durable ones.

    `initial` are the watched variables as of commit `position`, from which the watch goes on.
    """

    initial: tuple[Variable, ...]
    position: int

    @abstractmethod
    def pull(self) -> list[Update]:
        """What is there now, at most some hundred commits; [] if nothing. `SessionNotFoundError` once the session has
        ended and everything has been told."""

    @abstractmethod
    def pull_ready(self) -> list[Update] | None:
        """The same without waiting for anything; None if `pull` would have to read a file."""

    @abstractmethod
    def notify(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread, whenever there may be something to pull. It must not block."""

    @abstractmethod
    def close(self) -> None:
        """Stop watching."""

    def next(self, timeout_s: float | None = None) -> list[Update]:
        """Wait for updates; [] after `timeout_s`."""
        ready = threading.Event()
        self.notify(ready.set)
        updates = self.pull()
        if not updates and ready.wait(timeout_s):
            updates = self.pull()
        return updates

    def __iter__(self) -> Iterator[Update]:
        try:
            while True:
                yield from self.next()
        except SessionNotFoundError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Feed:
    """The recent commits of one watched session, for all who watch it."""

    __slots__ = ("commits", "ended", "floor", "size_bytes", "watching")

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self.commits: list[CommitChanges] = []
        self.size_bytes = 0
        self.ended = False
        self.watching: dict[object, Callable[[], None]] = {}

    def after(self, position: int) -> list[CommitChanges] | None:
        """The commits after `position`, or None if memory does not reach back so far."""
        # The list first: should the writer let commits go in between, the floor then says so.
        commits = self.commits
        if position < self.floor:
            return None
        return [commit for commit in commits if commit.sequence > position]

    def add(self, commits: Sequence[CommitChanges]) -> None:
        """Take new commits in, let old ones go. Readers hold the old list: it is never changed."""
        kept = [*self.commits, *commits]
        self.size_bytes += sum(commit.size_bytes for commit in commits)
        let_go = 0
        while len(kept) - let_go > _RECENT_COMMITS or (self.size_bytes > _RECENT_BYTES and let_go < len(kept)):
            self.size_bytes -= kept[let_go].size_bytes
            self.floor = kept[let_go].sequence
            let_go += 1
        self.commits = kept[let_go:]


class Hub:
    """The feeds of all watched sessions, by the number of the session's first commit; `count`: how many watch."""

    def __init__(self, sequence: int) -> None:
        self._lock = threading.Lock()
        self._sequence = sequence
        self._feeds: dict[int, Feed] = {}
        self._due: list[Feed] = []
        self.count = 0

    def is_watched(self, first_sequence: int) -> bool:
        """Whether anybody watches the session that began with this commit."""
        return first_sequence in self._feeds

    def join(self, first_sequence: int, who: object) -> Feed:
        """The session's feed; commits published from now on reach it."""
        with self._lock:
            feed = self._feeds.setdefault(first_sequence, Feed(self._sequence))
            feed.watching[who] = _no_wake
            self.count += 1
            return feed

    def leave(self, first_sequence: int, who: object) -> None:
        """Stop feeding `who`."""
        with self._lock:
            feed = self._feeds.get(first_sequence)
            if feed is None or feed.watching.pop(who, None) is None:
                return
            self.count -= 1
            if not feed.watching:
                del self._feeds[first_sequence]

    def advance(self, sequence: int) -> None:
        """Say that commits up to `sequence` are about to be published: who joins from now on finds them in the file."""
        with self._lock:
            self._sequence = sequence

    def publish(self, commits: dict[int, list[CommitChanges]], ended: Collection[int], sequence: int) -> None:
        """Give the watched sessions their durable commits up to `sequence`. Who watches them is woken by `wake`."""
        with self._lock:
            self._sequence = sequence
            for first_sequence, added in commits.items():
                if (feed := self._feeds.get(first_sequence)) is not None:
                    feed.add(added)
                    self._due.append(feed)
            for first_sequence in ended:
                if (feed := self._feeds.get(first_sequence)) is not None:
                    feed.ended = True
                    self._due.append(feed)

    def wake(self) -> None:
        """Wake who watches what was published since. Whoever wrote it was answered before: thousands may watch."""
        with self._lock:
            due, self._due = self._due, []
            wakes = {who: wake for feed in due for who, wake in feed.watching.items()}
        for wake in wakes.values():
            wake()

    def let_go(self) -> None:
        """Forget all who watch, in a forked child, where a thread that is no more may hold the lock."""
        self._lock = threading.Lock()
        self._feeds, self._due, self.count = {}, [], 0

    def wake_all(self) -> None:
        """Wake every watch, to see that its store has closed."""
        with self._lock:
            wakes = [wake for feed in self._feeds.values() for wake in feed.watching.values()]
        for wake in wakes:
            wake()


def _no_wake() -> None:
    pass


def updates_of(commit: CommitChanges, identifiers: Collection[str]) -> list[Update]:
    """What a watcher of `identifiers` (names or ids; none: everything) is told of a commit."""
    updates = [
        (UpdateKind.DELETED if change.version.kind is ChangeKind.DELETED else UpdateKind.VALUE_CHANGE, change)
        for change in commit.changes
        if is_watched(change.variable, identifiers)
    ]
    affected = [variable for variable in commit.dependants if is_watched(variable, identifiers)]
    total = len(updates) + len(affected)
    told = [
        Update(
            kind,
            change.variable,
            commit.sequence,
            change.version.created_at,
            change.version,
            "",
            (part, total),
        )
        for part, (kind, change) in enumerate(updates, 1)
    ]
    if affected:
        names = ", ".join(change.variable.name for change in commit.changes)
        created_at = commit.changes[0].version.created_at
        for part, variable in enumerate(affected, len(told) + 1):
            kind = UpdateKind.DEPENDENCY_CHANGED
            told.append(Update(kind, variable, commit.sequence, created_at, None, names, (part, total)))
    return told


def is_watched(variable: Variable, identifiers: Collection[str]) -> bool:
    """Whether one of `identifiers` means the variable; no identifiers mean every variable."""
    return not identifiers or variable.name in identifiers or variable.id in identifiers
