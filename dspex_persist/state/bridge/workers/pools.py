"""Pools: the pools of a server, from what the settings say to what the runner uses."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from dspex_persist.infra.workers.options import PoolOptions
from dspex_persist.infra.workers.orphans import Run
from dspex_persist.infra.workers.pool import WorkerPool
from dspex_persist.infra.workers.statistics import PoolStatistics
from dspex_persist.infra.workers.worker import WorkerCommand
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.bridge.audit_service import AuditServicer
from dspex_persist.state.bridge.servicer import BridgeServicer
from dspex_persist.state.bridge.workers.callbacks import Callbacks, ExistingCallbacks, Running
from dspex_persist.state.bridge.workers.existing import ExistingLending
from dspex_persist.state.bridge.workers.lending import Leases, Lender, Lending, WorkerContact
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import RegisteredTool, ToolSpec
from dspex_persist.state.tools.pooled import POOL, PassedTool, PoolPort

OWN: Final = "tools"
"""The name of the pool of workers of ours."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """A pool to start.

    Attributes:
        name: Its name. The one called `OWN` has workers of ours.
        command: How each worker is started.
        options: Its size and limits.
        tools: The tools that are passed on to it, whether its workers register them or not.
        streaming: Which of them stream.
        takes_binary: Whether parameters of these tools may have binary content.
        settings: What its settings are called in errors; see `WorkerPool`.
    """

    name: str
    command: WorkerCommand
    options: PoolOptions
    tools: tuple[str, ...] = ()
    streaming: frozenset[str] = field(default_factory=frozenset)
    takes_binary: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


class Pools:
    """The pools of a server. Used on one event loop.

    Args:
        plans: The pools to start.
        limits: The limits of parameters and results.
        max_message_bytes: The largest message.

    Attributes:
        own: The pool of workers of ours; None without one.
        ports: The other pools, by name.
        passed: The tools that are passed on to these.
    """

    def __init__(self, plans: Iterable[PoolPlan], limits: Limits, max_message_bytes: int) -> None:
        self._plans = tuple(plans)
        self._max_message_bytes = max_message_bytes
        self._lenders: dict[str, Lender] = {}
        self.own: PoolPort | None = None
        self.passed: list[PassedTool] = []
        leases = Leases()
        others: dict[str, PoolPort] = {}
        for plan in self._plans:
            if plan.name == OWN:
                self.own = self._lenders[plan.name] = Lending(plan.name, limits, leases)
                continue
            lending = ExistingLending(plan.name, limits, leases, takes_binary=plan.takes_binary)
            self._lenders[plan.name] = others[plan.name] = lending
            for name in plan.tools:
                spec = ToolSpec(name, f"A tool of the workers of pool {plan.name}.", streaming=name in plan.streaming)
                address = f"{POOL}{plan.name}"
                self.passed.append(PassedTool(RegisteredTool(spec, address, address), lending, limits))
        self.ports: Mapping[str, PoolPort] = others

    @asynccontextmanager
    async def running(
        self, subject: str, bridge: BridgeServicer, audit: AuditServicer, denials: Denials, *, stop: asyncio.Event
    ) -> AsyncIterator[None]:
        """Keep all workers running. The block is entered when they have started, or when `stop` is set before that.

        Args:
            subject: See `Run`.
            bridge: Answers their callbacks.
            audit: Answers those of the second service.
            denials: Notes what others call at the addresses of the workers.
            stop: Set when the server is to end.

        Raises:
            PoolStartError: No worker of a pool starts.
        """
        if not self._plans:
            yield
            return
        run = Run(subject)
        try:
            # It looks at every process of this machine.
            await asyncio.to_thread(run.sweep)
            pools = {plan.name: self._pool(plan, run, bridge, audit, denials) for plan in self._plans}
            async with AsyncExitStack() as stack:
                for pool in pools.values():
                    stack.push_async_callback(pool.close)
                await _unless(stop, asyncio.gather(*(pool.start() for pool in pools.values())))
                for name, pool in pools.items():
                    self._lenders[name].use(pool)
                yield
        finally:
            await asyncio.to_thread(run.close)

    def statistics(self) -> tuple[PoolStatistics, ...]:
        """Return what each pool does now."""
        pools = (lender.pool for lender in self._lenders.values())
        return tuple(pool.statistics() for pool in pools if pool is not None)

    def _pool(
        self, plan: PoolPlan, run: Run, bridge: BridgeServicer, audit: AuditServicer, denials: Denials
    ) -> WorkerPool[WorkerContact]:
        def contact(worker: str) -> WorkerContact:
            if plan.name == OWN:
                return WorkerContact(
                    f"unix:{run.directory / worker}.back",
                    lambda running: Callbacks(running, bridge, audit, denials),
                    self._max_message_bytes,
                )

            def callbacks(running: Running) -> Callbacks:
                return ExistingCallbacks(running, bridge, audit, denials, plan.name)

            # They know only hosts and ports.
            return WorkerContact("127.0.0.1:0", callbacks, self._max_message_bytes)

        return WorkerPool(plan.name, plan.command, contact, run=run, options=plan.options, settings=plan.settings)


async def _unless(stop: asyncio.Event, work: "asyncio.Future[Any]") -> None:
    """Wait for work; cancel it as soon as `stop` is set."""
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        work.cancel()
    outcomes: list[object] = await asyncio.gather(work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not stop.is_set():
            raise outcome
