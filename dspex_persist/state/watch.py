"""Watching a session by pull.

A watch remembers the last commit that it delivered; the writer only wakes it. Memory keeps a bounded number of recent
commits of each watched session; a watch that is further behind reads the file. Nothing queues up for a watch, so one
that does not pull costs nothing.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Final, Self

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import SessionNotFoundError, StateError
from dspex_persist.state.model import ChangeKind, CommitChanges, Update, UpdateKind, Variable

_logger: Final = get_logger(__name__)

_RECENT_COMMITS = 256
_RECENT_BYTES = 4 * 1024 * 1024


class Watch(ABC):
    """The durable commits of one session from some commit on: whole, in order, each exactly once.

    Iterate over it, or call `next`; close it when done, for example with a `with` block.

    Attributes:
        initial: The watched variables as of commit `position`; empty if the watch resumed after a commit.
        position: The number of the last commit that was delivered.
        first_sequence: The number of the commit that began the session; 0 if the backend does not tell.
        resumptions: How often the watch has gone on after losing its server.
        interrupted: The error that has separated the watch from its server; None while they are connected.
    """

    initial: tuple[Variable, ...]
    position: int
    first_sequence: int = 0
    resumptions: int = 0
    interrupted: StateError | None = None

    @abstractmethod
    def pull(self) -> list[Update]:
        """Return the updates that are available now, from at most a few hundred commits; [] if there are none.

        Raises:
            SessionNotFoundError: The session has ended, and all its updates have been delivered.
        """

    @abstractmethod
    def pull_ready(self) -> list[Update] | None:
        """Return the same as `pull` without blocking; None if `pull` would have to read the file."""

    def check_continues(self, first_sequence: int) -> None:  # noqa: B027 -- there may be nothing to check
        """Check that this watch, which resumed after a commit, continues an earlier one without a gap.

        Args:
            first_sequence: The `first_sequence` of the earlier watch; 0 if unknown.

        Raises:
            SessionNotFoundError: That session has ended; this is another one with its id.
            WatchGapError: Commits after `position` were pruned.
        """

    @abstractmethod
    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever there may be updates to pull. It must not block; errors are logged."""

    @abstractmethod
    def close(self) -> None:
        """Stop watching."""

    def next(self, timeout_s: float | None = None) -> list[Update]:
        """Wait for updates.

        Args:
            timeout_s: How long to wait at most, in seconds; None to wait without a limit.

        Returns:
            The updates, in order; [] if there were none within `timeout_s`.

        Raises:
            SessionNotFoundError: The session has ended, and all its updates have been delivered.
        """
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
    """The recent commits of one watched session, shared by all its watches."""

    __slots__ = ("commits", "ended", "floor", "size_bytes", "watching")

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self.commits: list[CommitChanges] = []
        self.size_bytes = 0
        self.ended = False
        self.watching: dict[object, Callable[[], None]] = {}

    def after(self, position: int) -> list[CommitChanges] | None:
        """Return the commits after `position`, or None if memory does not reach back that far."""
        # The list before the floor: if the writer drops commits in between, the floor shows it.
        commits = self.commits
        if position < self.floor:
            return None
        return [commit for commit in commits if commit.sequence > position]

    def add(self, commits: Sequence[CommitChanges]) -> None:
        """Add new commits and drop old ones. Readers may hold the old list, so it is replaced, never changed."""
        kept = [*self.commits, *commits]
        self.size_bytes += sum(commit.size_bytes for commit in commits)
        dropped = 0
        while len(kept) - dropped > _RECENT_COMMITS or (self.size_bytes > _RECENT_BYTES and dropped < len(kept)):
            self.size_bytes -= kept[dropped].size_bytes
            self.floor = kept[dropped].sequence
            dropped += 1
        self.commits = kept[dropped:]

    def skip(self, sequence: int) -> None:
        """Forget the commits up to `sequence`, some of which are only in the log."""
        # In this order: a reader takes the commits before it compares the floor.
        self.floor = sequence
        self.commits, self.size_bytes = [], 0


class Hub:
    """The feeds of all watched sessions, by the number of each session's first commit. `count`: the open watches."""

    def __init__(self, sequence: int) -> None:
        self._lock = threading.Lock()
        self._sequence = sequence
        self._feeds: dict[int, Feed] = {}
        self._due: list[Feed] = []
        self.count = 0

    def is_watched(self, first_sequence: int) -> bool:
        """Whether the session that began with this commit has a watch."""
        return first_sequence in self._feeds

    def join(self, first_sequence: int, watch: object) -> Feed:
        """Return the session's feed for `watch`; it contains all commits published from now on."""
        with self._lock:
            feed = self._feeds.setdefault(first_sequence, Feed(self._sequence))
            feed.watching[watch] = _no_wake
            self.count += 1
            return feed

    def leave(self, first_sequence: int, watch: object) -> None:
        """Remove `watch` from the session's feed."""
        with self._lock:
            feed = self._feeds.get(first_sequence)
            if feed is None or feed.watching.pop(watch, None) is None:
                return
            self.count -= 1
            if not feed.watching:
                del self._feeds[first_sequence]

    def advance(self, sequence: int) -> None:
        """Note that commits up to `sequence` are about to be published. New watches find them in the file."""
        with self._lock:
            self._sequence = sequence

    def publish(self, commits: dict[int, list[CommitChanges]], ended: Collection[int], sequence: int) -> None:
        """Add durable commits up to `sequence` to the feeds of watched sessions. `wake` then wakes their watches.

        Args:
            commits: The new commits, by the number of their session's first commit.
            ended: The sessions that ended, by the same number.
            sequence: The number of the store's last commit.
        """
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

    def lag(self, first_sequence: int, position: int) -> tuple[int, datetime | None]:
        """Return how far a watch is behind that has delivered the commits up to `position`; from any thread.

        Args:
            first_sequence: The number of its session's first commit.
            position: The last commit that it has delivered.

        Returns:
            How many commits with changes it has not delivered, of those that are kept in memory; and the time of the
            first of them, None if there is none.
        """
        feed = self._feeds.get(first_sequence)
        commits = [] if feed is None else feed.commits
        if not commits or commits[-1].sequence <= position:
            return 0, None
        missing = [commit for commit in commits if commit.sequence > position and commit.changes]
        return len(missing), missing[0].changes[0].version.created_at if missing else None

    def skip(self, changed: Collection[int] | None, ended: Collection[int], sequence: int) -> None:
        """Have the watches of these sessions read their commits up to `sequence` from the log, and wake them.

        Args:
            changed: The sessions, by the numbers of their first commits; None for all.
            ended: Those that have ended.
            sequence: The number of the log's last commit.
        """
        with self._lock:
            self._sequence = max(self._sequence, sequence)
            for first_sequence in tuple(self._feeds) if changed is None else changed:
                if (feed := self._feeds.get(first_sequence)) is not None:
                    feed.skip(sequence)
                    feed.ended = feed.ended or first_sequence in ended
                    self._due.append(feed)

    @property
    def has_news(self) -> bool:
        """Whether `wake` has any watcher to wake."""
        return bool(self._due)

    def wake(self) -> None:
        """Wake the watches of the sessions published since the last call.

        Separate from `publish`, because the writer first answers its callers: there may be thousands of watches.
        """
        with self._lock:
            due, self._due = self._due, []
            wakes = {watch: wake for feed in due for watch, wake in feed.watching.items()}
        _call_all(wakes.values())

    def forget_watches(self) -> None:
        """Forget all watches in a forked child, where the lock may be held by a thread that does not exist there."""
        self._lock = threading.Lock()
        self._feeds, self._due, self.count = {}, [], 0

    def wake_all(self) -> None:
        """Wake every watch, so that it notices that its store has closed."""
        with self._lock:
            wakes = [wake for feed in self._feeds.values() for wake in feed.watching.values()]
        _call_all(wakes)


def _no_wake() -> None:
    pass


def _call_all(wakes: Iterable[Callable[[], None]]) -> None:
    for wake in wakes:
        try:
            wake()
        except Exception as error:  # noqa: BLE001 - a watcher's code, such as a wake-up of a loop that has closed
            _logger.error("waking a watch failed", traceback=trace_of(error))


def updates_of(commit: CommitChanges, identifiers: Collection[str]) -> list[Update]:
    """Return the updates of a commit for a watcher of `identifiers` (names or ids; empty for all variables)."""
    changes = [
        (UpdateKind.DELETED if change.version.kind is ChangeKind.DELETED else UpdateKind.VALUE_CHANGE, change)
        for change in commit.changes
        if is_watched(change.variable, identifiers)
    ]
    affected = [variable for variable in commit.dependants if is_watched(variable, identifiers)]
    total = len(changes) + len(affected)
    updates = [
        Update(
            kind,
            change.variable,
            commit.sequence,
            change.version.created_at,
            change.version,
            "",
            (part, total),
            change.previous,
            change.version.actor,
            change.version.cause,
        )
        for part, (kind, change) in enumerate(changes, 1)
    ]
    if affected:
        names = ", ".join(change.variable.name for change in commit.changes)
        first = commit.changes[0].version
        for part, variable in enumerate(affected, len(updates) + 1):
            kind, whole = UpdateKind.DEPENDENCY_CHANGED, (part, total)
            facts = (variable, commit.sequence, first.created_at, None, names, whole, None, first.actor, first.cause)
            updates.append(Update(kind, *facts))
    return updates


def is_watched(variable: Variable, identifiers: Collection[str]) -> bool:
    """Whether `identifiers` contain the variable's name or id; empty identifiers match every variable."""
    return not identifiers or variable.name in identifiers or variable.id in identifiers
