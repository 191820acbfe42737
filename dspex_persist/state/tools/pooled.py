"""PooledTool: a tool of this server whose code runs in a worker of a pool.

Its description is this process's, and so is the check of its arguments. Its code runs in the worker, which reads and
writes through the server, as part of the execution that it is lent to.
"""

from collections.abc import Mapping
from typing import Protocol

from dspex_persist.state.model import ToolSpec, Value
from dspex_persist.state.tools.invoke import Invoker
from dspex_persist.state.tools.local import LocalTool
from dspex_persist.state.tools.ports import RunnableTool, ToolCode
from dspex_persist.state.tools.session import ToolSession


class PoolPort(Protocol):
    """Runs the code of tools in the workers of a pool. Used on the runner's home loop."""

    @property
    def name(self) -> str:
        """The name of the pool."""

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
