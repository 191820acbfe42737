"""LocalTool: a tool whose code is in this process."""

import functools
from collections.abc import Mapping
from typing import Final

from dspex_persist.state import values
from dspex_persist.state.errors import StateError, ToolArgumentError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.tools.failures import failure_of
from dspex_persist.state.tools.invoke import Invoker
from dspex_persist.state.tools.ports import RunnableTool, ToolCode
from dspex_persist.state.tools.session import ToolSession

_LARGE_BYTES: Final = 100_000
_WHERE: Final = {"dspex.where": "server"}


class LocalTool(RunnableTool):
    """A tool whose code `invoker` calls."""

    def __init__(self, code: ToolCode, invoker: Invoker) -> None:
        super().__init__(code.spec, result_type=code.result_type)
        self._code = code
        self._invoker = invoker

    @property
    def where(self) -> Mapping[str, str]:
        """The server itself."""
        return _WHERE

    def binds_at_once(self, size_bytes: int) -> bool:
        """Whether the parameters are small, and none of the tool's own code reads them."""
        return self._code.reads_plainly and size_bytes < _LARGE_BYTES

    async def bind(self, parameters: Mapping[str, Value]) -> Mapping[str, object]:
        """Convert the parameters to the types that the tool declares."""
        limits = self._invoker.limits
        for name, value in parameters.items():
            values.check_binary_size(name, len(value.binary or b""), limits)
        if self.binds_at_once(sum(value.size_bytes for value in parameters.values())):
            return self._code.bind(parameters, limits)
        # Parsing a large value takes as long as a hundred calls, and users' code (validators) any time, so neither may
        # hold up the loop. A new thread, because all threads of the tools may be taken by code that never returns.
        read = functools.partial(_bound, self._code, parameters, limits)
        return await self._invoker.home.on_thread(read, "dspex-persist-arguments")

    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Call the code through the invoker."""
        return await self._invoker.invoke(self._code, session, arguments)


def local_tools(tools: Mapping[str, ToolCode], invoker: Invoker) -> dict[str, RunnableTool]:
    """Return the tools of this process as the runner uses them, by name."""
    return {name: LocalTool(code, invoker) for name, code in tools.items()}


def _bound(code: ToolCode, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
    """Bind the parameters on a thread. Whatever the tool's own code raises means that the arguments are wrong."""
    try:
        return code.bind(parameters, limits)
    except StateError:
        raise
    except BaseException as error:  # noqa: BLE001 -- users' code
        raise ToolArgumentError(code.spec.name, ", ".join(parameters), failure_of(error).type) from None
