"""Executes code as a tool that the backend of a context does not have."""

from collections.abc import Iterator
from contextlib import contextmanager

from dspex_persist.cognitive.backends import BRIDGED, Backend, with_tools
from dspex_persist.cognitive.carried import CarriedTools
from dspex_persist.cognitive.steps import Terms
from dspex_persist.state.commands import ExecuteTool
from dspex_persist.state.model import ToolOutcome
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.tools.ports import ToolCode


def execute_code(backend: Backend, code: ToolCode, command: ExecuteTool, terms: Terms) -> ToolOutcome:
    """Execute a tool in this process: on a server's session in a transaction, unless the server has the tool."""
    backend.gate.enter_tool()
    try:
        with _executing(backend, code) as provider:
            return provider.run(command, terms.idempotency_key, actor=terms.actor, reason=terms.reason)
    finally:
        backend.gate.leave_tool()


@contextmanager
def _executing(backend: Backend, code: ToolCode) -> Iterator[StateProvider]:
    tools = {code.spec.name: code}
    if backend.kind == BRIDGED:
        yield CarriedTools(backend.provider, tools)
        return
    provider = with_tools(backend.provider, tools)
    try:
        yield provider
    finally:
        # The backend's own provider stays open.
        provider.close()
