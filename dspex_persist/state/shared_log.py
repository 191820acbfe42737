"""SharedLog: the port to a log to which several servers append at the same time.

A server is a process with one `SharedLog`, or one of several in a test. What `LogStore` requires holds for each server,
with these differences:

- `sequence` is the last commit that this server knows. Others may have committed since.
- `group` and `news` bring it up to date. What they yield or return names the sessions that memory has to forget, before
  anything of them is read again.
- A store that locks the log for a group never has to refuse it. Another one raises `MovedError` from `append`, or when
  the group ends, if the log has moved since the group began. Neither appends to a log that the group has not seen.
- `unfinished` returns the executions of servers that no longer live.
- After `OutcomeUnknownError` and `UnavailableError` the store is still usable: its next call connects again. By then,
  what memory holds is worth nothing.
- `LostCommitsError` means that commits which this server has seen are gone. The store is then unusable.

Each server has a lease, which it renews while it lives. A server whose lease has run out is fenced by another one:
nothing that it appends under the old lease is accepted, its executions are interrupted, and its holds of sessions end.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import NamedTuple

from dspex_persist.state.log_store import LogStore, News
from dspex_persist.state.session_state import SessionState


class SharedHold(NamedTuple):
    """A session that a server holds, as the others know it from the log.

    Attributes:
        hold_id: Which hold it is.
        is_own: Whether this server holds it.
        is_full: Whether all writes have to wait, and not only new executions.
        since: The last commit when it began.
    """

    hold_id: str
    is_own: bool
    is_full: bool
    since: int


class SharedLog(LogStore):
    """The storage of a log with several owners. The module's docstring lists the requirements."""

    @abstractmethod
    def head(self) -> int:
        """Return the number of the last commit, whoever made it, as of some moment during the call.

        Any thread may call it. It takes one round trip.
        """

    def optimistic_group(self, *, wait: bool = True) -> AbstractContextManager[News | None]:
        """Return a context manager like that of `group`, for when the others are probably not writing.

        A log that can compare its head as late as when the group is stored saves looking at it before. It yields None
        then, and raises `MovedError` if the head is another one: when the group ends, or reads from the log.
        """
        return self.group(wait=wait)

    def reading(self) -> AbstractContextManager[News | None]:
        """Return a context manager like that of `group`, in which nothing is appended.

        A log that locks for a group does without the lock here, if it can read one state of the log nevertheless.
        """
        return self.group()

    @abstractmethod
    def news(self) -> News | None:
        """Bring `sequence` up to date; return what others have committed, or None if nothing. Not inside a group."""

    def advance(self, states: Sequence[SessionState], until: int) -> list[SessionState | None]:
        """Return sessions in memory as of a later commit, each in its place.

        Args:
            states: The sessions, which do not change.
            until: A commit that is not later than the head.

        Returns:
            None for a session that is to be forgotten, and loaded when it is needed.
        """
        return [None for _ in states]

    @abstractmethod
    def expiry_of(self, state: SessionState) -> datetime | None:
        """Return the saved expiry of a session with a TTL, which others may have renewed; None if it has ended."""

    @abstractmethod
    def listen(self, on_news: Callable[[], None]) -> None:
        """Call `on_news`, on any thread, when others may have committed. It is a hint: some may not be told."""

    @abstractmethod
    def tell(self) -> None:
        """Tell the other servers that there may be news. It does not block."""

    def announce(self, address: str) -> None:
        """Note the address at which clients reach this server, which `server_of` returns to the others; any thread."""

    def server_of(self, execution_id: str) -> str | None:
        """Return the address of the other server that runs an execution, or None if none does; any thread.

        "" is the address of a server that has announced none. A log that does not override this finds none.
        """
        return None

    @property
    @abstractmethod
    def lease_s(self) -> float:
        """How long a server is taken for alive after it has renewed its lease, in seconds."""

    @abstractmethod
    def renew(self) -> None:
        """Renew the lease of this server.

        Any one thread may call it, also during a group.

        Raises:
            FencedError: It was too late. The next `group` raises this, too, and begins another lease.
        """

    @abstractmethod
    def fence(self) -> Sequence[str]:
        """Fence the other servers whose lease has run out. `unfinished` returns their executions from now on.

        Returns:
            Who they are: the address that each has announced, or its id.
        """

    # Holds of sessions. A log that does not override these has none.

    @property
    def holds(self) -> Mapping[str, SharedHold]:
        """The holds of servers that live, by the session's id, as of the last `group`, `reading` or `news`.

        A group is not stored if a hold has begun, or become full, that it has not seen. In a group, these are all.
        """
        return {}

    def hold(self, session_id: str, hold_id: str) -> None:
        """Begin a hold, in the name of this server. Not inside a group.

        Raises:
            SessionHeldError: There is one, or this server has lost its lease.
            StateError: It has not begun.
        """
        raise NotImplementedError

    def fill_hold(self, hold_id: str) -> bool:
        """Make a hold full; return whether it still existed. Not inside a group."""
        raise NotImplementedError

    def end_hold(self, hold_id: str) -> None:
        """End a hold, if it exists. Not inside a group."""
        raise NotImplementedError

    def moved_to(self, session_id: str, since: int) -> str | None:
        """Return where the session with this id has moved after a commit; None if it has not."""
        raise NotImplementedError
