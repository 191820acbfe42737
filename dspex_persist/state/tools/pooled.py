"""Tools whose code runs in a worker of a pool.

A `PooledTool` is one of this server: its description and the check of its arguments are this process's. A `PassedTool`
is one that only the worker knows. Either way its code reads and writes through the server, as part of the execution
that the worker is lent to.
"""

from collections.abc import Mapping
from typing import Final, Protocol

from dspex_persist.state.errors import ToolArgumentError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, RegisteredTool, ToolSpec, Value
from dspex_persist.state.tools.invoke import Invoker
from dspex_persist.state.tools.local import LocalTool
from dspex_persist.state.tools.ports import RunnableTool, ToolCode
from dspex_persist.state.tools.remote import RemoteTool
from dspex_persist.state.tools.session import ToolSession

POOL: Final = "pool:"
"""How the address of a tool begins that a worker of a pool has registered; the name of the pool follows."""


class PoolPort(Protocol):
    """Runs the code of tools in the workers of a pool. Used on the runner's home loop."""

    @property
    def name(self) -> str:
        """The name of the pool."""

    @property
    def takes_binary(self) -> bool:
        """Whether parameters may have binary content."""

    async def ask(self, session_id: str, origin: Origin) -> None:
        """Have a worker register the tools that it has for a session, as some do only when they are called for it.

        Args:
            session_id: The session.
            origin: Who is the reason for it.

        Raises:
            StateError: There is no worker, or it was lost.
        """

    async def run(self, spec: ToolSpec, session: ToolSession) -> Value:
        """Lend a worker to an execution, and run the code of a tool in it.

        What the code logs and records goes to the session. Chunks go to its `outlet`, if it has one.

        Args:
            spec: The tool.
            session: The session of the execution.

        Returns:
            The result, or the list of the chunks.

        Raises:
            RaisedError: The tool's code raised.
            ToolPoolError: There was no worker, or it was lost.
            StateError: The worker cannot be used, or a limit is exceeded.
        """


class PooledTool(LocalTool):
    """A tool whose code the workers of `pool` have as well."""

    def __init__(self, code: ToolCode, invoker: Invoker, pool: PoolPort) -> None:
        super().__init__(code, invoker)
        self._pool = pool

    @property
    def where(self) -> Mapping[str, str]:
        """The pool."""
        return {"dspex.where": f"pool {self._pool.name}"}

    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Have a worker run it, which reads the arguments again from the parameters."""
        return await self._pool.run(self.spec, session)


def pooled_tools(tools: Mapping[str, ToolCode], invoker: Invoker, pool: PoolPort) -> dict[str, RunnableTool]:
    """Return the tools as the runner uses them, by name; their code runs in the pool."""
    return {name: PooledTool(code, invoker, pool) for name, code in tools.items()}


class PassedTool(RemoteTool):
    """A tool that the workers of a pool have, and this process does not: it is passed on as it is."""

    def __init__(self, tool: RegisteredTool, pool: PoolPort, limits: Limits) -> None:
        super().__init__(tool, None, limits)
        self._pool = pool

    @property
    def where(self) -> Mapping[str, str]:
        """The pool."""
        return {"dspex.where": f"pool {self._pool.name}"}

    async def bind(self, parameters: Mapping[str, Value]) -> Mapping[str, object]:
        """Check that the parameters are within the limits, and that the worker may have them."""
        for name, value in parameters.items():
            if value.binary is not None and not self._pool.takes_binary:
                reason = (
                    f"the workers of pool {self._pool.name} get no binary content, which some of them would unpickle"
                )
                raise ToolArgumentError(self.spec.name, name, reason)
        return await super().bind(parameters)

    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Have a worker run it."""
        return await self._pool.run(self.spec, session)
