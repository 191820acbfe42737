"""A worker that is lent to one call, the calls that wait for one, and the block that has one until its end."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

from dspex_persist.infra.workers.errors import PoolError, WorkerExitedError, WorkerLostError, WorkerTimeoutError
from dspex_persist.infra.workers.options import PoolOptions
from dspex_persist.infra.workers.statistics import WorkerStatistics
from dspex_persist.infra.workers.worker import Worker

# A process that has closed its connections may take this long until it has ended.
_EXIT_S: Final = 1.0


class Contact:
    """What the user of a pool keeps for one worker: how it is talked to. Methods are called in the order below."""

    async def open(self) -> Mapping[str, str]:
        """Called before the process starts; returns more placeholders for its command."""
        return {}

    async def connect(self, address: str) -> None:
        """Called when the worker says that it is ready."""

    async def ping(self) -> None:
        """Return if the worker answers, and raise anything if it does not. Called to the worker's end."""

    def lost(self, error: Exception) -> str:
        """Return why an error of a call means that the connection to the worker is lost; "" if it does not."""
        return str(error) or type(error).__name__ if isinstance(error, ConnectionError | EOFError) else ""

    async def close(self) -> None:
        """Called when the process has ended, also if it never got ready. Must not raise."""


C = TypeVar("C", bound=Contact)
E = TypeVar("E", bound=PoolError)


class Pool(Protocol[C]):
    """What a lease knows of the pool that it is from."""

    @property
    def options(self) -> PoolOptions:
        """The size and limits of the pool."""

    def error(self, kind: Callable[..., E], *fields: object) -> E:
        """Return an error of this pool."""

    async def acquire(
        self, key: str | None, parent: "Lease[Any] | None", deadline: float | None, timeout_s: float | None
    ) -> "Lease[C]":
        """Wait for a worker."""

    def give_back(self, lease: "Lease[C]", error: BaseException | None) -> None:
        """Take a worker back."""

    def use_spare(self) -> None:
        """If all workers that are lent wait for nested calls, give the deepest of these a spare."""


class Member(Generic[C]):
    """A worker that is ready."""

    def __init__(self, worker: Worker, contact: C, *, spare: bool, began: float, now: float) -> None:
        self.worker = worker
        self.contact = contact
        self.spare = spare
        self.began = began
        self.ready_at = self.idle_since = now
        self.requests = 0
        self.has_succeeded = False
        self.keys: set[str] = set()
        self.lease: Lease[C] | None = None
        # Done when it is to leave the pool, with the reason; or when the process has ended, with None.
        self.over: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def leave(self, reason: str | None) -> None:
        if not self.over.done():
            self.over.set_result(reason)

    def statistics(self, now: float) -> WorkerStatistics:
        """Return what it is doing; from any thread."""
        lease, worker = self.lease, self.worker
        state = "idle" if lease is None else "busy" if lease.interrupt is not None else "settling"
        return WorkerStatistics(
            id=worker.id,
            pid=worker.pid,
            address=worker.address,
            state=state,
            spare=self.spare,
            requests=self.requests,
            age_s=now - self.ready_at,
            rss_bytes=worker.rss_bytes,
            busy_s=0.0 if lease is None else now - lease.began_at,
            key="" if lease is None or lease.key is None else lease.key,
        )


class Lease(Generic[C]):
    """A worker that is lent to one call.

    Attributes:
        worker: The id of the worker.
        pid: Its process.
        address: Its gRPC target.
        contact: What the pool's user keeps for it.
        parent: The lease of the call that this one is nested in.
        depth: How deep it is nested; 0 if it is not.
        key: The affinity key.
        deadline: The event loop's time at which the call has to end; None without a limit.
    """

    def __init__(
        self,
        pool: "Pool[C]",
        member: Member[C],
        key: str | None,
        parent: "Lease[Any] | None",
        deadline: float | None,
    ) -> None:
        self.worker = member.worker.id
        self.pid = member.worker.pid
        self.address = member.worker.address
        self.contact = member.contact
        self.key = key
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.deadline = deadline
        self.began_at = asyncio.get_running_loop().time()
        # How many nested calls, of this pool or others, wait for a worker.
        self.waiting = 0
        self.pool = pool
        self.member = member
        self.discarded = ""
        self.settling: tuple[Awaitable[object], float] | None = None
        self.interrupt: Callable[[PoolError], None] | None = None

    def discard(self, reason: str) -> None:
        """Have the worker replaced when the call ends, because it cannot be trusted any more."""
        self.discarded = self.discarded or reason

    def release_when(self, settled: Awaitable[object], within_s: float) -> None:
        """Have the worker become free only when `settled` is done, although the caller does not wait for that.

        Use it for a call that was given up: until the worker has really ended it, no other call may get the worker. If
        that takes longer than `within_s` seconds, the worker is replaced. How `settled` ends does not matter.
        """
        self.settling = (settled, within_s)

    async def lost(self, reason: str) -> PoolError:
        """Return the error of a call that has lost its connection to the worker, which is replaced.

        `lend` calls this for the errors that `Contact.lost` knows.

        Args:
            reason: How the connection was lost, for the case that the worker's process runs on.
        """
        worker = self.member.worker
        if not worker.has_exited:
            await asyncio.wait({worker.exited}, timeout=_EXIT_S)
        if worker.has_exited:
            return self.exited()
        self.discard(reason)
        return self.pool.error(WorkerLostError, self.worker, reason)

    def exited(self) -> WorkerExitedError:
        """Return the error of a call whose worker has exited."""
        worker = self.member.worker
        return self.pool.error(WorkerExitedError, self.worker, worker.ending, worker.tail)


class Waiter(Generic[C]):
    """A call that waits for a worker."""

    def __init__(self, number: int, key: str | None, parent: Lease[Any] | None) -> None:
        self.key = key
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        # The deepest nested call goes first: it ends before those that wait for it.
        self.rank = (-self.depth, number)
        self.turn: asyncio.Future[Member[C]] = asyncio.get_running_loop().create_future()


class Loan(Generic[C]):
    """What `WorkerPool.lend` returns."""

    def __init__(self, pool: "Pool[C]", key: str | None, timeout_s: float | None, parent: Lease[Any] | None) -> None:
        self._pool = pool
        self._key = key
        self._timeout_s = timeout_s
        self._parent = parent
        self._error: PoolError | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Lease[C]:
        loop = asyncio.get_running_loop()
        deadline = None if self._timeout_s is None else loop.time() + self._timeout_s
        self._lease = lease = await self._pool.acquire(self._key, self._parent, deadline, self._timeout_s)
        task = asyncio.current_task()
        assert task is not None, "coroutines run in tasks"
        self._task, self._cancelling = task, task.cancelling()
        lease.interrupt = self._interrupt
        if lease.deadline is not None:
            self._timer = loop.call_at(lease.deadline, self._time_out)
        if lease.member.worker.has_exited:
            # It exited after it was chosen, before there was anything to interrupt.
            loop.call_soon(self._interrupt, lease.exited())
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        lease = self._lease
        lease.interrupt = None
        if self._timer is not None:
            self._timer.cancel()
        raised = self._raised(error)
        if raised is None and isinstance(error, Exception) and (reason := lease.contact.lost(error)):
            raised = await lease.lost(reason)
        self._pool.give_back(lease, raised or error or self._error)
        if raised is not None:
            raise raised from error

    def _raised(self, error: BaseException | None) -> PoolError | None:
        """The error that the block ends with instead of its own."""
        if self._error is not None:
            is_cancelled = self._task.uncancel() > self._cancelling
            # A block that ended well in spite of the interruption has its result.
            if isinstance(error, Exception) or (isinstance(error, asyncio.CancelledError) and not is_cancelled):
                return self._error
            return None
        if isinstance(error, Exception) and not isinstance(error, PoolError) and self._lease.member.worker.has_exited:
            return self._lease.exited()
        return None

    def _time_out(self) -> None:
        lease = self._lease
        limit_s = self._timeout_s if self._timeout_s is not None else self._pool.options.call_timeout_s
        self._interrupt(self._pool.error(WorkerTimeoutError, lease.worker, limit_s or 0.0, lease.member.worker.ending))

    def _interrupt(self, error: PoolError) -> None:
        if self._error is None and self._lease.interrupt is not None:
            self._error = error
            self._task.cancel()


def count_waiting(lease: Lease[Any] | None, change: int) -> None:
    """Count a nested call that waits, at all leases that wait for it."""
    pools = set[Pool[Any]]()
    while lease is not None:
        lease.waiting += change
        pools.add(lease.pool)
        lease = lease.parent
    if change > 0:
        for pool in pools:
            pool.use_spare()
