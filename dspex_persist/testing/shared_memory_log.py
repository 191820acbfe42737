"""A log in memory that several engines share, as several servers share a database: for tests of what is above it."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any, NamedTuple

from dspex_persist.clock import EARLIEST
from dspex_persist.state.budgets import Spent
from dspex_persist.state.commands.sessions import MOVED
from dspex_persist.state.errors import SessionHeldError
from dspex_persist.state.events import ExecutionBegan, ExecutionEnded, SessionEnded
from dspex_persist.state.local import MemoryLog
from dspex_persist.state.log_store import FencedError, MovedError, News
from dspex_persist.state.model import CommitChanges, JournalEntry, VariableVersion
from dspex_persist.state.session_state import Lease, SessionState
from dspex_persist.state.shared_log import SharedHold, SharedLog
from dspex_persist.state.unit_of_work import Backing, RecordedOutcome, UnitOfWork, VersionQuery


class MemoryHold(NamedTuple):
    """A hold of a session, by a server with a lease."""

    hold_id: str
    owner: tuple[str, int]
    is_full: bool
    since: int


class SharedMemory(MemoryLog):
    """What the servers share: the log, the saved expiries, the leases of the servers, and whose each execution is."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = threading.RLock()
        self.last = EARLIEST
        self.numbers: list[tuple[int, str]] = []
        self.ended: set[int] = set()
        self.expiries: dict[int, datetime] = {}
        self.leases: dict[str, tuple[int, float]] = {}
        self.owners: dict[str, tuple[str, int]] = {}
        self.addresses: dict[str, str] = {}
        self.listeners: list[Callable[[], None]] = []
        # By the session's id; how often they have changed; and where sessions have moved, after which commits.
        self.holds: dict[str, MemoryHold] = {}
        self.holds_changed = 0
        self.moves: dict[str, tuple[int, str]] = {}

    def copy_of(self, session_id: str) -> SessionState | None:
        """Return a session as another process would load it."""
        state = self.load(session_id)
        if state is None:
            return None
        state.keys = dict(state.keys)
        if state.lease is not None:
            lease = Lease(state.lease.ttl_s, self.expiries[state.session.sequence])
            lease.expires_at += lease.slack
            state.lease = lease
        return state

    def keep(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState], server: tuple[str, int]) -> None:
        """Append for a server."""
        for unit in units:
            assert unit.sequence == self.sequence + 1, "commits are numbered without gaps"
            self.append([unit], ())
            state = unit.state
            assert state is not None, "a unit with changes has a session"
            first = state.session.sequence
            self.numbers.append((first, state.session.id))
            self.last = max(self.last, unit.now)
            if state.session.id not in self._live:
                self.ended.add(first)
            if state.lease is not None and first not in self.expiries:
                self.expiries[first] = state.lease.expires_at
            for event in unit.events:
                if isinstance(event, ExecutionBegan):
                    self.owners[event.execution_id] = server
                elif isinstance(event, ExecutionEnded):
                    self.owners.pop(event.execution_id, None)
                elif isinstance(event, SessionEnded) and event.reason.startswith(MOVED):
                    self.moves[event.session_id] = (unit.sequence, event.reason.removeprefix(MOVED))
        for state in touched:
            if state.lease is not None:
                self.save_expiry(state.session.sequence, state.lease.expires_at)

    def save_expiry(self, first: int, expires_at: datetime) -> None:
        """Save the expiry of a session, unless another server has saved a later one."""
        self.expiries[first] = max(self.expiries.get(first, EARLIEST), expires_at)

    def live(self) -> list[SessionState]:
        """Return the live sessions."""
        return list(self._live.values())


class SharedMemoryLog(SharedLog):
    """One server's view of the shared memory.

    Args:
        memory: What the servers share.
        optimistic: Whether groups run without the turn, and may have to run again.
        lease_s: See `SharedLog.lease_s`.
    """

    def __init__(self, memory: SharedMemory, *, optimistic: bool = False, lease_s: float = 15.0) -> None:
        self._memory = memory
        self._optimistic = optimistic
        self._lease_s = lease_s
        self._sequence = memory.sequence
        self._last_at = memory.last
        self._id = uuid.uuid4().hex
        self._epoch = 0
        self._appended: list[Any] = []
        self._holds: dict[str, SharedHold] = {}
        self._holds_seen = 0
        self._register()

    def _register(self) -> None:
        self._epoch = self._memory.leases.get(self._id, (0, 0.0))[0] + 1
        self._memory.leases[self._id] = (self._epoch, time.monotonic())

    @property
    def sequence(self) -> int:
        """See `LogStore`."""
        return self._sequence

    @property
    def last_at(self) -> datetime:
        """See `LogStore`."""
        return self._last_at

    def head(self) -> int:
        """See `SharedLog`."""
        return self._memory.sequence

    def news(self) -> News | None:
        """See `SharedLog`."""
        self._see_holds()
        after, numbers = self._sequence, self._memory.numbers
        sequence = len(numbers)
        if sequence == after:
            return None
        changed = dict(numbers[after:sequence])
        self._sequence = sequence
        return News(after, sequence, self._memory.last, changed, frozenset(changed.keys() & self._memory.ended))

    @contextmanager
    def group(self, *, wait: bool = True) -> Iterator[News | None]:
        """See `LogStore`."""
        with nullcontext() if self._optimistic else self._memory.turn:
            self._check_lease()
            self._appended = []
            yield self.news()
            if self._appended:
                with self._memory.turn if self._optimistic else nullcontext():
                    self.store()

    def store(self) -> None:
        """Store what was appended in the group, within the turn. A test may override it to lose the answer."""
        self._check_lease()
        if self._memory.sequence != self._sequence or self._memory.holds_changed != self._holds_seen:
            raise MovedError
        for units, touched in self._appended:
            self._memory.keep(units, touched, (self._id, self._epoch))
        self._sequence = self._memory.sequence

    def _check_lease(self) -> None:
        if not self.has_lease():
            self._register()
            raise FencedError

    def has_lease(self) -> bool:
        """Return whether nobody has taken this server for dead."""
        return self._memory.leases[self._id][0] == self._epoch

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """See `LogStore`."""
        self._appended.append((tuple(units), tuple(touched)))

    def note_import(self, first: int, last: int) -> None:
        """See `LogStore`."""

    def load(self, session_id: str) -> SessionState | None:
        """See `LogStore`."""
        return self._memory.copy_of(session_id)

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """See `LogStore`."""
        return self._memory.find_version(state, variable_id, version)

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """See `LogStore`."""
        return self._memory.history(state, query)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """See `LogStore`."""
        return self._memory.find_outcome(session_id, key)

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """See `LogStore`."""
        return self._memory.find_execution(state, key)

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """See `LogStore`."""
        return self._memory.spent(state)

    def snapshot(self) -> AbstractContextManager[Backing]:
        """See `LogStore`."""
        return _Snapshot(self)

    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """See `LogStore`."""
        return self._memory.changes_after(state, after, most_commits)

    def expiry_of(self, state: SessionState) -> datetime | None:
        """See `SharedLog`."""
        return self._memory.expiries.get(state.session.sequence)

    def listen(self, on_news: Callable[[], None]) -> None:
        """See `SharedLog`."""
        self._on_news = on_news
        self._memory.listeners.append(on_news)

    def tell(self) -> None:
        """See `SharedLog`."""
        for each in tuple(self._memory.listeners):
            if each is not getattr(self, "_on_news", None):
                each()

    @property
    def holds(self) -> Mapping[str, SharedHold]:
        """See `SharedLog`."""
        return self._holds

    def _see_holds(self) -> None:
        with self._memory.turn:
            self._holds_seen = self._memory.holds_changed
            self._holds = {
                session_id: SharedHold(hold.hold_id, hold.owner[0] == self._id, hold.is_full, hold.since)
                for session_id, hold in self._memory.holds.items()
                if self._is_leased(hold.owner)
            }

    def _is_leased(self, owner: tuple[str, int]) -> bool:
        server, epoch = owner
        return self._memory.leases.get(server, (0, 0.0))[0] == epoch

    def hold(self, session_id: str, hold_id: str) -> None:
        """See `SharedLog`."""
        with self._memory.turn:
            hold = self._memory.holds.get(session_id)
            if (hold is not None and self._is_leased(hold.owner)) or not self.has_lease():
                raise SessionHeldError(session_id)
            held = MemoryHold(hold_id, (self._id, self._epoch), is_full=False, since=self._memory.sequence)
            self._memory.holds[session_id] = held
            self._memory.holds_changed += 1

    def fill_hold(self, hold_id: str) -> bool:
        """See `SharedLog`."""
        with self._memory.turn:
            for session_id, hold in self._memory.holds.items():
                if hold.hold_id == hold_id and self._is_leased(hold.owner):
                    self._memory.holds[session_id] = hold._replace(is_full=True)
                    self._memory.holds_changed += 1
                    return True
        return False

    def end_hold(self, hold_id: str) -> None:
        """See `SharedLog`."""
        with self._memory.turn:
            holds = self._memory.holds
            self._memory.holds = {each: hold for each, hold in holds.items() if hold.hold_id != hold_id}

    def moved_to(self, session_id: str, since: int) -> str | None:
        """See `SharedLog`."""
        sequence, place = self._memory.moves.get(session_id, (0, ""))
        return place if sequence > since else None

    def announce(self, address: str) -> None:
        """See `SharedLog`."""
        self._memory.addresses[self._id] = address

    def server_of(self, execution_id: str) -> str | None:
        """See `SharedLog`."""
        server, epoch = self._memory.owners.get(execution_id, ("", 0))
        if server in ("", self._id) or self._memory.leases.get(server, (0, 0.0))[0] != epoch:
            return None
        return self._memory.addresses.get(server, "")

    @property
    def lease_s(self) -> float:
        """See `SharedLog`."""
        return self._lease_s

    def renew(self) -> None:
        """See `SharedLog`."""
        with self._memory.turn:
            if not self.has_lease():
                raise FencedError
            self._memory.leases[self._id] = (self._epoch, time.monotonic())

    def fence(self) -> Sequence[str]:
        """See `SharedLog`."""
        now, fenced = time.monotonic(), list[str]()
        with self._memory.turn:
            for server, (epoch, renewed) in tuple(self._memory.leases.items()):
                if server != self._id and now - renewed > self._lease_s:
                    self._memory.leases[server] = (epoch + 1, float("inf"))
                    fenced.append(self._memory.addresses.get(server) or server)
        return fenced

    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """See `SharedLog`."""
        found: dict[str, list[str]] = {}
        for state in self._memory.live():
            for execution_id in tuple(state.executions):
                server, epoch = self._memory.owners.get(execution_id, ("", 0))
                if self._memory.leases.get(server, (0, 0.0))[0] != epoch:
                    found.setdefault(state.session.id, []).append(execution_id)
        return found

    def expired(self, now: datetime, limit: int) -> list[str]:
        """See `LogStore`."""
        expiries = self._memory.expiries
        over = (
            state.session.id
            for state in self._memory.live()
            if state.lease is not None and expiries[state.session.sequence] <= now and not state.executions
        )
        return list(over)[:limit]

    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """See `LogStore`."""
        with self._memory.turn:
            self._memory.reclaim(before, lambda _: True)

    def close(self) -> None:
        """Leave: the log stays for the others."""
        with self._memory.turn:
            self._memory.leases.pop(self._id, None)
            self._memory.addresses.pop(self._id, None)


class _Snapshot(AbstractContextManager[Backing]):
    def __init__(self, log: SharedMemoryLog) -> None:
        self._log = log

    def __enter__(self) -> Backing:
        return self._log

    def __exit__(self, *_: object) -> None:
        pass
