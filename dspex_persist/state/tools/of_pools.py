"""What only the workers of pools know that they have: tools which no setting names.

They tell when they are called for a session, and some of them once in their life: what they have told is known from
then on, in every session.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, Protocol

from dspex_persist.state.model import Origin, RegisteredTool

_MOST_ASKED: Final = 10_000
_LISTED_S: Final = 1.0
"""How long a list of tools waits for pools that have not told yet."""
_PAUSE_S: Final = 10.0
"""For how long lists do not ask again after no worker could be asked."""


class Asked(Protocol):
    """A pool that can be asked for its tools; see `PoolPort`."""

    async def ask(self, session_id: str, origin: Origin) -> None:
        """Have a worker register the tools that it has for a session."""


class ToolsOfPools:
    """What the workers of pools have told. Used on the runner's home loop.

    Args:
        pools: The pools.
        most: How many tools are remembered.
    """

    def __init__(self, pools: Iterable[Asked], most: int) -> None:
        self._pools = tuple(pools)
        self._most = most
        self.known: Mapping[str, RegisteredTool] = {}
        """What they have told so far, by name. It never changes but is replaced: any thread may read it."""
        # By session and its begin.
        self._asking: dict[tuple[str, datetime], asyncio.Future[Sequence[BaseException | None]]] = {}
        # The pools that need not be asked for a list, and what asks the others.
        self._told: set[Asked] = set()
        self._learning: asyncio.Task[None] | None = None
        self._not_before = 0.0

    def __bool__(self) -> bool:
        return bool(self._pools)

    def note(self, tools: Iterable[RegisteredTool]) -> None:
        """Remember tools that a worker has registered for a session in the name of its pool."""
        known = dict(self.known)
        for tool in tools:
            if tool.spec.name in known or len(known) < self._most:
                known[tool.spec.name] = tool
        self.known = known

    async def ask_for(self, session_id: str, began_at: datetime, origin: Origin) -> None:
        """Ask the pools what they have for a session, once in its life, and wait for that."""
        session = session_id, began_at
        asking = self._asking.get(session)
        if asking is None:
            while len(self._asking) >= _MOST_ASKED:
                del self._asking[next(iter(self._asking))]
            asking = self._asking[session] = asyncio.ensure_future(self._ask(self._pools, session_id, origin))
        await asyncio.wait((asking,))
        if any(asking.result()) and self._asking.get(session) is asking:
            # They are asked again, for example when there is a worker.
            del self._asking[session]

    async def learn(self, session_id: str, origin: Origin) -> None:
        """Ask the pools that have never been asked, for a list of tools, and wait for a second at most."""
        untold = [pool for pool in self._pools if pool not in self._told]
        if not untold:
            return
        loop = asyncio.get_running_loop()
        if self._learning is None or self._learning.done():
            if loop.time() < self._not_before:
                return
            self._learning = loop.create_task(self._learn(untold, session_id, origin))
        await asyncio.wait((self._learning,), timeout=_LISTED_S)

    async def _learn(self, pools: Sequence[Asked], session_id: str, origin: Origin) -> None:
        if any(await self._ask(pools, session_id, origin)):
            self._not_before = asyncio.get_running_loop().time() + _PAUSE_S

    async def _ask(self, pools: Sequence[Asked], session_id: str, origin: Origin) -> Sequence[BaseException | None]:
        asks = (pool.ask(session_id, origin) for pool in pools)
        faults = await asyncio.gather(*asks, return_exceptions=True)
        self._told |= {pool for pool, fault in zip(pools, faults, strict=True) if fault is None}
        return faults
