"""A pool of workers: each is lent to one call at a time, and is replaced when it fails. It knows no services.

A call that runs in a worker may need another worker of the pool. Such nested calls go first. If every worker that is
lent waits for nested calls, nobody would ever return one; the deepest call then gets a spare worker beyond the size.
"""

import asyncio
import contextlib
import time
from bisect import insort
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Generic, Self

from dspex_persist.infra import forks
from dspex_persist.infra.workers.errors import (
    NestedTooDeepError,
    PoolError,
    PoolSaturatedError,
    PoolStartError,
    PoolUnavailableError,
    QueueTimeoutError,
    WorkerBusyError,
    WorkerExitedError,
    WorkerLostError,
    WorkerTimeoutError,
)
from dspex_persist.infra.workers.keeping import Keeper
from dspex_persist.infra.workers.leases import C, E, Lease, Loan, Member, Waiter, count_waiting
from dspex_persist.infra.workers.options import PoolOptions
from dspex_persist.infra.workers.orphans import Run
from dspex_persist.infra.workers.statistics import Counts, PoolStatistics
from dspex_persist.infra.workers.worker import WorkerCommand


class WorkerPool(Generic[C]):
    """Keeps a number of workers running, and lends them. Used on one event loop, whose thread has to outlive it.

    Attributes:
        name: The name, in errors and in the log.
        options: Its size and limits.
    """

    def __init__(
        self,
        name: str,
        command: WorkerCommand,
        contact: Callable[[str], C],
        *,
        run: Run,
        options: PoolOptions | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Make a pool without workers.

        Args:
            name: Its name.
            command: How each worker is started.
            contact: Makes what its user keeps for a worker, given the id of that.
            run: What the workers belong to; several pools can share one. Its owner closes it, after the pools.
            options: The size and limits.
            settings: What the options and those of the command are called in errors, by their names; by default
                `pools.NAME.OPTION`.
        """
        self.name = name
        self.options = options or PoolOptions()
        self._command = command
        self._settings = settings or {}
        self._state = "new"
        self._closing: asyncio.Task[None] | None = None
        self._clock: Callable[[], float] = time.monotonic
        self._counts = Counts()
        self._keeper = Keeper(
            name,
            command,
            contact,
            run,
            options=self.options,
            settings=self._settings,
            counts=self._counts,
            changed=self._workers_changed,
        )
        self._members = self._keeper.members
        self._waiters: list[Waiter[C]] = []
        self._numbers = 0
        # Fewer calls wait, or a worker is free.
        self._changed = asyncio.Event()

    # --- Life

    async def start(self) -> None:
        """Start the workers, and wait until each of them is ready or has failed once; those that failed are retried.

        Raises:
            PoolStartError: Not one worker started. The pool is closed.
        """
        assert self._state == "new", "a pool starts once"
        self._state = "running"
        self._clock = asyncio.get_running_loop().time
        forks.register(self)
        firsts = self._keeper.start()
        try:
            await asyncio.gather(*firsts)
        except asyncio.CancelledError:
            await self.close()
            raise
        if firsts and not self._counts.started:
            reason = self._keeper.last_failure
            await self.close()
            raise self.error(PoolStartError, reason)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`. The workers are the parent's."""
        self._state = "closed"

    async def drain(self, timeout_s: float) -> bool:
        """Take no more calls, but nested ones of calls in progress; wait for all to end, then close.

        Args:
            timeout_s: How long to wait, in seconds; calls that still run then are interrupted.

        Returns:
            Whether all calls ended by themselves.
        """
        if self._state == "running":
            self._state = "draining"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._is_quiet():
                    self._changed.clear()
                    await self._changed.wait()
        is_quiet = self._is_quiet()
        await self.close()
        return is_quiet

    async def close(self) -> None:
        """Interrupt all calls, end all workers, and return when they are gone. May be called again."""
        if self._closing is None:
            self._state = "closed"
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        closed = self.error(PoolUnavailableError, "it is closed")
        self._fail_waiters(closed)
        for member in self._members:
            if member.lease is not None and member.lease.interrupt is not None:
                member.lease.interrupt(closed)
        await self._keeper.close()
        forks.unregister(self)

    # --- Lending

    def lend(
        self, key: str | None = None, *, timeout_s: float | None = None, parent: Lease[Any] | None = None
    ) -> "Loan[C]":
        """Lend a worker: `async with pool.lend(...) as lease:`.

        The block is interrupted when the worker exits, when its time is over, or when the pool closes; it then ends
        with the error of the pool. A block that is cancelled, or whose time is over, has its worker replaced, unless it
        has called `lease.release_when`.

        Args:
            key: The affinity key: the worker that had it last is preferred, or demanded (`options.affinity`).
            timeout_s: How long to wait for a worker and to use it, in seconds; by default the limits of the pool.
            parent: The lease, of any pool, of the call that makes this one and waits for it. The call goes first, and
                its key is only a hint.

        Raises:
            PoolSaturatedError: Too many calls wait.
            QueueTimeoutError: No worker became free in time.
            WorkerBusyError: The worker of the key is busy.
            NestedTooDeepError: There are too many parents.
            PoolUnavailableError: The pool is draining or closed, or its workers fail at once.
            WorkerTimeoutError: The block took too long.
            WorkerExitedError: The worker ended during the block.
        """
        return Loan(self, key, timeout_s, parent)

    def forget(self, key: str) -> None:
        """Forget which worker had an affinity key."""
        if self._members.homes.forget(key):
            self._dispatch()

    def error(self, kind: Callable[..., E], *fields: object) -> E:
        """Return an error of this pool."""
        return kind(self.name, *fields, settings=self._settings)

    def statistics(self) -> PoolStatistics:
        """Return what the pool does now, and what it has counted; from any thread."""
        now, members = self._clock(), list(self._members)
        state = self._state
        if state == "running" and self._keeper.is_pausing:
            state = "failing"
        elif state == "running" and len(self._members.regular()) < self.options.size:
            state = "starting"
        return PoolStatistics(
            pool=self.name,
            state=state,
            size=self.options.size,
            idle=len(self._members.idle),
            busy=max(0, len(members) - len(self._members.idle)),
            starting=self._keeper.starting,
            spares=sum(member.spare for member in members),
            queued=len(self._waiters),
            last_failure=self._keeper.last_failure,
            workers=tuple(member.statistics(now) for member in members),
            **asdict(self._counts),
        )

    async def acquire(
        self, key: str | None, parent: Lease[Any] | None, deadline: float | None, timeout_s: float | None
    ) -> Lease[C]:
        """Wait for a worker; use `lend`."""
        if parent is not None and parent.depth >= self.options.nesting:
            raise self.error(NestedTooDeepError, self.options.nesting)
        self._numbers += 1
        waiter = Waiter[C](self._numbers, key, parent)
        while True:
            self._check_open(parent)
            member = self._members.pick(waiter) or await self._wait(waiter, deadline, timeout_s)
            if not self._keeper.is_gone(member):
                break
            waiter = Waiter(self._numbers, key, parent)
        if deadline is None and timeout_s is None and self.options.call_timeout_s is not None:
            deadline = self._time() + self.options.call_timeout_s
        # The error of a call shows what was written during it, and not what those of others have written.
        member.worker.forget_output()
        lease = member.lease = Lease(self, member, key, parent, deadline)
        self._members.idle.pop(member.worker.id, None)
        self._counts.requests += 1
        if key is not None and parent is None:
            self._members.homes.bind(key, member)
        return lease

    async def _wait(self, waiter: Waiter[C], deadline: float | None, timeout_s: float | None) -> Member[C]:
        self._check_wait(waiter)
        queue_s = self.options.queue_timeout_s
        if waiter.parent is not None:
            # It may need a spare, whose start takes longer than a worker that is to become free.
            queue_s += self._command.ready_timeout_s
        until = self._time() + queue_s
        if deadline is not None and deadline < until:
            until, queue_s = deadline, timeout_s or 0.0
        insort(self._waiters, waiter, key=lambda each: each.rank)
        count_waiting(waiter.parent, 1)
        self.use_spare()
        try:
            async with asyncio.timeout_at(until):
                return await waiter.turn
        except TimeoutError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                return waiter.turn.result()
            self._counts.queue_timeouts += 1
            raise self.error(QueueTimeoutError, queue_s, self._described()) from None
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._give_back(waiter.turn.result())
            raise
        finally:
            count_waiting(waiter.parent, -1)
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self.use_spare()
            self._changed.set()

    def _check_open(self, parent: Lease[Any] | None) -> None:
        if self._state == "draining" and parent is not None:
            return
        if self._state != "running":
            raise self.error(PoolUnavailableError, f"it is {self._state.replace('new', 'not started')}")

    def _check_wait(self, waiter: Waiter[C]) -> None:
        if reason := self._keeper.failing():
            raise self.error(PoolUnavailableError, reason)
        # Separately: calls that wait must not keep those from ending that have workers.
        alike = sum((each.parent is None) is (waiter.parent is None) for each in self._waiters)
        if alike >= self.options.queue_size:
            self._counts.saturated += 1
            raise self.error(PoolSaturatedError, self.options.size, alike)
        home = self._members.homes.find(waiter.key)
        if self.options.affinity == "strict_fail_fast" and home is not None and waiter.parent is None:
            self._counts.saturated += 1
            raise self.error(WorkerBusyError, home.worker.id)

    def _workers_changed(self) -> None:
        """Give a worker that is ready to a call that waits, or refuse all when there will be none for a while."""
        if reason := self._keeper.failing():
            self._fail_waiters(self.error(PoolUnavailableError, reason))
        self._dispatch()

    def _dispatch(self) -> None:
        """Give free workers to the calls that wait."""
        for waiter in self._waiters[:] if self._members.idle else ():
            # One that was cancelled may not know it yet.
            member = None if waiter.turn.done() else self._members.pick(waiter)
            if member is not None:
                self._give(member, waiter)
                if not self._members.idle:
                    break
        self.use_spare()
        self._changed.set()

    def _give(self, member: Member[C], waiter: Waiter[C]) -> None:
        del self._members.idle[member.worker.id]
        self._waiters.remove(waiter)
        waiter.turn.set_result(member)

    def _fail_waiters(self, error: PoolError) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.turn.done():
                waiter.turn.set_exception(error)

    # --- Returning

    def give_back(self, lease: Lease[C], error: BaseException | None) -> None:
        """Take a worker back; `lend` does it."""
        member = lease.member
        member.requests += 1
        if isinstance(error, WorkerTimeoutError):
            self._counts.call_timeouts += 1
        elif isinstance(error, WorkerExitedError | WorkerLostError):
            self._counts.exits += 1
        elif isinstance(error, Exception):
            self._counts.errors += 1
        if lease.settling is not None:
            self._keeper.run(self._settle(lease, *lease.settling))
            return
        if isinstance(error, asyncio.CancelledError | WorkerTimeoutError):
            lease.discard("its call was given up")
        self._release(lease)

    async def _settle(self, lease: Lease[C], settled: Awaitable[object], within_s: float) -> None:
        waiting = asyncio.ensure_future(settled)
        either: set[asyncio.Future[Any]] = {waiting, lease.member.worker.exited}
        try:
            await asyncio.wait(either, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                lease.discard(f"it did not end a call within {within_s:g} s after that was given up")
        finally:
            if waiting.done() and not waiting.cancelled():
                waiting.exception()
            waiting.cancel()
            self._release(lease)

    def _release(self, lease: Lease[C]) -> None:
        member = lease.member
        member.lease = None
        if lease.discarded:
            self._counts.replaced += 1
            member.leave(lease.discarded)
        elif not self._keeper.is_gone(member):
            self._keeper.succeeded(member)
            self._keeper.recycle(member)
        self._give_back(member)

    def _give_back(self, member: Member[C]) -> None:
        if not self._keeper.is_gone(member) and self._state != "closed":
            member.idle_since = self._time()
            self._members.idle[member.worker.id] = member
        self._dispatch()

    def use_spare(self) -> None:
        """If all workers that are lent wait for nested calls, give the deepest of these that waits here a spare.

        It is deeper than what other spares do: otherwise it is not what the deepest lent worker waits for, and that one
        gets a worker from another pool. So no two spares do calls of the same depth, and `nesting` spares are enough.
        """
        waiter = next((each for each in self._waiters if each.parent is not None and not each.turn.done()), None)
        if waiter is None or self._state == "closed":
            return
        if not self._members.are_stuck(waiter.depth):
            return
        spare = self._members.idle_spare()
        if spare is not None:
            self._give(spare, waiter)
        elif not self._members.are_idle:
            self._keeper.start_spare()

    # --- Small things

    def _is_quiet(self) -> bool:
        return not self._waiters and self._members.are_idle

    def _described(self) -> str:
        busy = sum(member.lease is not None for member in self._members)
        words = [f"{busy} of {self.options.size} workers busy", f"{len(self._waiters)} calls waiting"]
        if len(self._members.regular()) < self.options.size and self._keeper.told_failure:
            words.append(f"the last failure: {self._keeper.told_failure}")
        return ", ".join(words)

    @staticmethod
    def _time() -> float:
        return asyncio.get_running_loop().time()
