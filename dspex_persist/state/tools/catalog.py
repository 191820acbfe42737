"""Which tools can be executed: those of this process, those that workers have registered, those of pools."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from dspex_persist.spelling import closest, did_you_mean
from dspex_persist.state import commands
from dspex_persist.state.errors import ToolNotFoundError
from dspex_persist.state.model import Concurrency, RegisteredTool
from dspex_persist.state.tools.endings import Endings
from dspex_persist.state.tools.of_pools import ToolsOfPools
from dspex_persist.state.tools.ports import RunnableTool
from dspex_persist.state.tools.requests import ToolRequest

_MOST_NAMED: Final = 20


class Catalog:
    """The tools that can be executed. Used on the runner's home loop.

    Args:
        endings: Has the store carry out commands.
        own: The tools of this process, by name.
        registered: Returns the runnable form of a tool that a worker has registered.
        of_pools: What the workers of pools have told.

    Attributes:
        own: The tools of this process, by name.
        of_pools: What the workers of pools have told.
    """

    def __init__(
        self,
        endings: Endings,
        own: Mapping[str, RunnableTool],
        registered: Callable[[RegisteredTool], RunnableTool],
        of_pools: ToolsOfPools,
    ) -> None:
        self.own = dict(own)
        self.of_pools = of_pools
        self._endings = endings
        self._registered = registered
        self._own_turns = {name: tool.spec.concurrency or Concurrency.OPTIMISTIC for name, tool in own.items()}

    def available(self, registered: Mapping[str, RegisteredTool]) -> dict[str, RunnableTool]:
        """Return all tools that can be executed, by name: those of this process, and the registered ones.

        A tool of this process has precedence over a registered one with the same name, and that over one of a pool.
        """
        others = {**self.of_pools.known, **registered}
        return self.own | {name: self._registered(tool) for name, tool in others.items() if name not in self.own}

    async def find_or_ask(self, request: ToolRequest, asker_id: str | None) -> RunnableTool:
        """Find the tool of a request as `find` does, if need be after pools were asked what they have for its session.

        Args:
            request: The request.
            asker_id: The execution whose code sent it and waits for it.
        """
        try:
            return await self.find(request)
        except ToolNotFoundError:
            # A tool that waits for this one may hold the worker; and it has been called for the session.
            if asker_id is not None or not self.of_pools:
                raise
        view = await self._endings.submit_here(commands.GetSession(request.session_id), request.origin)
        await self.of_pools.ask_for(request.session_id, view.created_at, request.origin)
        return await self.find(request)

    async def find(self, request: ToolRequest) -> RunnableTool:
        """Return the tool that a request names.

        Raises:
            ToolNotFoundError: There is no such tool in its session.
            StateError: The store failed.
        """
        own = self.own.get(request.tool)
        if own is not None:
            # Without a round trip to the store: BeginExecution checks that the session exists.
            return own
        registered = await self._endings.submit_here(commands.ListTools(request.session_id), request.origin)
        tool = registered.get(request.tool) or self.of_pools.known.get(request.tool)
        if tool is None:
            raise unknown_tool(request.tool, {*self.own, *registered, *self.of_pools.known})
        return self._registered(tool)

    def turns(self) -> Mapping[str, Concurrency]:
        """Return how each tool of this process, and of its pools, runs. The tools of the other servers are the same."""
        if not self.of_pools.known:
            return self._own_turns
        of_pools = {name: tool.spec.concurrency for name, tool in self.of_pools.known.items()}
        return {name: turns or Concurrency.OPTIMISTIC for name, turns in of_pools.items()} | self._own_turns


def unknown_tool(name: str, known: Iterable[str]) -> ToolNotFoundError:
    """Return the error for a tool that is not there, which names similar ones, or some, of those that are known."""
    names = sorted(known)
    hint = did_you_mean(closest(name, names), spell=str)
    return ToolNotFoundError(name, hint or f"there are: {', '.join(names[:_MOST_NAMED]) or 'none'}")
