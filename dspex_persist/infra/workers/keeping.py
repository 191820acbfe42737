"""Keeps the workers of a pool running: starts them, looks after them, replaces them. Knows no calls that wait."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Generic

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.workers.errors import WorkerLostError, setting_of, with_output
from dspex_persist.infra.workers.failures import FailuresInARow
from dspex_persist.infra.workers.leases import C, Member
from dspex_persist.infra.workers.members import Members
from dspex_persist.infra.workers.options import PoolOptions
from dspex_persist.infra.workers.orphans import Run
from dspex_persist.infra.workers.starting import Starter
from dspex_persist.infra.workers.statistics import Counts
from dspex_persist.infra.workers.worker import WorkerCommand, WorkerStartError

_MEMORY_POLL_S: Final = 1.0

_logger: Final = get_logger(__name__)


class Keeper(Generic[C]):
    """Keeps a number of workers running, and the spares that are asked for. Used on one event loop.

    Args:
        pool: The name of the pool.
        command: How each worker is started.
        contact: Makes what the user of the pool keeps for a worker, given the id of that.
        run: What the workers belong to.
        options: The size and limits of the pool.
        settings: What the options are called in errors; see `WorkerPool`.
        counts: What the pool counts; this counts what happens to workers.
        changed: Called when a worker got ready, did not start, or has left.

    Attributes:
        members: The workers that are ready.
        starting: How many are being started.
        last_failure: The last failure to start or to live, in full.
        told_failure: The same, as callers are told.
    """

    def __init__(
        self,
        pool: str,
        command: WorkerCommand,
        contact: Callable[[str], C],
        run: Run,
        *,
        options: PoolOptions,
        settings: Mapping[str, str],
        counts: Counts,
        changed: Callable[[], None],
    ) -> None:
        self.members = Members[C](options.affinity)
        self.starting = 0
        self.last_failure = self.told_failure = ""
        self._pool = pool
        self._options = options
        self._settings = settings
        self._counts = counts
        self._changed = changed
        self._logger = _logger.bind(pool=pool)
        self._starter = Starter(pool, command, contact, run, settings, lambda end: self._keep_task(self._ending, end))
        longest_trial_s = command.ready_timeout_s + options.stable_s
        self._failures = FailuresInARow(options, longest_trial_s, self._logger)
        self._may_start = asyncio.Semaphore(options.batch)
        # Of the spares, `_coming` have not got ready yet.
        self._spares = self._coming = 0
        self._keepers: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()

    # --- Life

    def start(self) -> "list[asyncio.Future[None]]":
        """Start the workers; returns a future of each, done when it is ready or has failed once."""
        firsts = [asyncio.get_running_loop().create_future() for _ in range(self._options.size)]
        for first in firsts:
            self._keep_task(self._keepers, self._keep(first))
        self.run(self._look_after())
        if self._options.kill_rss_bytes is not None:
            self.run(self._limit_memory(self._options.kill_rss_bytes))
        return firsts

    async def close(self) -> None:
        """Cancel all tasks, end all workers, and return when they are gone."""
        tasks = [*self._keepers, *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._ending:
            await asyncio.wait(self._ending)

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a task in the background, until it ends or `close` cancels it."""
        self._keep_task(self._background, coroutine)

    @property
    def is_pausing(self) -> bool:
        """Whether no worker is started for a while, after failures; from any thread."""
        return self._failures.is_pausing

    def failing(self) -> str:
        """Return why there is no worker, and there will be none for a while; "" if there is, or may be soon."""
        if self.members.all or self.starting or not self._failures.is_pausing:
            return ""
        return f"{self._failures}. The last: {self.told_failure}"

    # --- Starting and ending

    async def _keep(self, first: "asyncio.Future[None]") -> None:
        """Keep one of the workers running."""
        try:
            while True:
                await self._pause()
                await self._live(first, spare=False)
        finally:
            if not first.done():
                first.set_result(None)

    async def _pause(self) -> None:
        """Wait until another worker may be started."""
        await self._failures.pause()
        # Workers that do not end must not become more and more.
        while len(self._ending) > self._options.size:
            await asyncio.wait(self._ending, return_when=asyncio.FIRST_COMPLETED)

    async def _live(self, first: "asyncio.Future[None]", *, spare: bool) -> None:
        """Start a worker, and wait until it is over."""
        try:
            async with self._may_start:
                began = self._time()
                self.starting += 1
                try:
                    member = await self._begin(spare=spare)
                finally:
                    self.starting -= 1
        except WorkerStartError as error:
            self._start_failed(error, began)
            # Nested calls may have waited for it.
            self._changed()
            return
        finally:
            if not first.done():
                first.set_result(None)
        try:
            self._changed()
            reason = await member.over
            self._log_end(member, reason)
        finally:
            self._remove(member)
            # Its successor need not wait for its end.
            self._keep_task(self._ending, self._starter.end(member.worker, member.contact))

    async def _begin(self, *, spare: bool) -> Member[C]:
        began = self._time()
        worker, contact = await self._starter.start()
        member = Member(worker, contact, spare=spare, began=began, now=self._time())
        worker.exited.add_done_callback(lambda _: self._exited(member))
        self.members.add(member)
        self._counts.started += 1
        self._logger.info(
            "a worker is ready",
            worker=worker.id,
            pid=worker.pid,
            address=worker.address,
            took_s=round(self._time() - began, 3),
            spare=spare,
        )
        asyncio.get_running_loop().call_later(self._options.stable_s, self._stayed, member)
        return member

    def _exited(self, member: Member[C]) -> None:
        if member.over.done():
            return
        self._counts.crashed += 1
        how = f"worker {member.worker.id} {member.worker.ending}{'' if member.has_succeeded else ' at once'}"
        wrote = with_output(member.worker.tail)
        if member.requests or member.lease is not None:
            self._note_failure(how, wrote)
        else:
            self._note_failure(how + wrote)
        if not member.has_succeeded:
            self._failures.add(self.last_failure, member.began)
        # At once: nobody may get it any more.
        self._retire(member, None)
        if member.lease is not None and member.lease.interrupt is not None:
            member.lease.interrupt(member.lease.exited())

    def _retire(self, member: Member[C], reason: str | None) -> None:
        """Lend a worker no more, and have it end; without a reason, it has exited."""
        self.members.idle.pop(member.worker.id, None)
        member.leave(reason)

    def _remove(self, member: Member[C]) -> None:
        member.leave("the pool is closed")
        self.members.remove(member)
        self._changed()

    def _start_failed(self, error: WorkerStartError, began: float) -> None:
        self._counts.start_failures += 1
        self._logger.warning("a worker did not start", worker=error.worker, reason=error.reason, output=error.output)
        self._note_failure(str(error))
        self._failures.add(self.last_failure, began)

    def _note_failure(self, failure: str, in_call: str = "") -> None:
        """Note how a worker failed; callers are not told what it wrote in a call, which was not theirs."""
        self.told_failure, self.last_failure = failure, failure + in_call

    def _stayed(self, member: Member[C]) -> None:
        if not member.over.done():
            self.succeeded(member)

    def succeeded(self, member: Member[C]) -> None:
        """Note that a worker has lived long enough, or has done a call: it has not failed at once."""
        if not member.has_succeeded:
            member.has_succeeded = True
            self._failures.end()

    def _log_end(self, member: Member[C], reason: str | None) -> None:
        fields = {"worker": member.worker.id, "pid": member.worker.pid, "requests": member.requests}
        if reason is None:
            self._logger.warning("a worker exited", how=member.worker.ending, output=member.worker.tail, **fields)
        else:
            self._logger.info("a worker is replaced", why=reason, **fields)

    def start_spare(self) -> None:
        """Start a worker beyond the size of the pool, unless one is being started, or there are too many."""
        if self.starting or self._coming or self._spares >= self._options.nesting:
            return
        # Counted at once, so that the next waiter does not start another one.
        self._spares += 1
        self._coming += 1
        came = asyncio.get_running_loop().create_future()
        came.add_done_callback(self._came)
        self._keep_task(self._keepers, self._live_spare(came))

    async def _live_spare(self, came: "asyncio.Future[None]") -> None:
        try:
            await self._pause()
            await self._live(came, spare=True)
        finally:
            self._spares -= 1
            if not came.done():
                came.set_result(None)

    def _came(self, _: "asyncio.Future[None]") -> None:
        """A spare is ready, or has failed. Another one may be needed."""
        self._coming -= 1
        self._changed()

    # --- Looking after those that are ready

    def is_gone(self, member: Member[C]) -> bool:
        """Whether a worker cannot be lent any more, even if the event loop has not learnt that it has exited."""
        if member.worker.has_exited:
            self._exited(member)
        return member.over.done()

    def recycle(self, member: Member[C]) -> None:
        """Have a worker replaced that has done, grown or lived enough."""
        options, reason = self._options, ""
        if options.max_requests is not None and member.requests >= options.max_requests:
            reason = f"it has done {member.requests} calls"
        elif options.max_rss_bytes is not None and (rss := member.worker.rss_bytes) > options.max_rss_bytes:
            reason = f"it has {rss} bytes of memory in use"
        elif options.max_age_s is not None and (age_s := self._time() - member.ready_at) > options.max_age_s:
            # Workers that were started together must not all be gone together.
            reason = f"it is {age_s:.0f} s old" if len(self.members.regular()) >= options.size else ""
        if reason:
            self._counts.recycled += 1
            self._retire(member, reason)

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(self._options.health_interval_s)
            checks = [self._check(member) for member in list(self.members.idle.values())]
            await asyncio.gather(*checks)

    async def _limit_memory(self, most: int) -> None:
        while True:
            await asyncio.sleep(_MEMORY_POLL_S)
            for member in self.members:
                rss = member.worker.rss_bytes if member.lease is not None else 0
                if member.lease is not None and member.lease.interrupt is not None and rss > most:
                    most_of = setting_of(self._pool, "kill_rss_bytes", self._settings)
                    reason = f"it had {rss} bytes of memory in use, more than {most_of}"
                    self._counts.replaced += 1
                    # Now: the memory is wanted by others.
                    member.worker.kill()
                    member.leave(reason)
                    member.lease.interrupt(member.lease.pool.error(WorkerLostError, member.worker.id, reason))

    async def _check(self, member: Member[C]) -> None:
        if member.spare and self._time() - member.idle_since > self._options.spare_keep_s:
            self._retire(member, "nobody needs it any more")
            return
        self.recycle(member)
        reason = ""
        for _ in range(self._options.health_failures):
            if member.over.done() or member.lease is not None:
                # A busy one may be one that answers nothing meanwhile.
                return
            reason = await self._ping(member)
            if not reason:
                return
        if member.worker.id in self.members.idle:
            self._counts.replaced += 1
            self._note_failure(f"worker {member.worker.id} did not answer health checks: {reason}")
            self._retire(member, f"it did not answer {self._options.health_failures} health checks: {reason}")

    async def _ping(self, member: Member[C]) -> str:
        """Return why a worker does not answer; "" if it does."""
        try:
            async with asyncio.timeout(self._options.health_timeout_s):
                await member.contact.ping()
        except TimeoutError:
            return f"no answer within {self._options.health_timeout_s:g} s; it {member.worker.ending}"
        except Exception as error:  # noqa: BLE001 -- whatever it answers is not what it should
            return f"{type(error).__name__}: {error}"
        return ""

    # --- Small things

    def _keep_task(self, tasks: "set[asyncio.Task[None]]", coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(self._log_failed)

    def _log_failed(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._logger.error("a task of the pool failed", exc_info=error)

    @staticmethod
    def _time() -> float:
        return asyncio.get_running_loop().time()
