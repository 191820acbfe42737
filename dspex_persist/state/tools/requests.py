"""ToolRequest: a request to execute a tool."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from dspex_persist.state import commands
from dspex_persist.state.frozen import NO_ENTRIES
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.tools.chunks import Outlet

IDEMPOTENCY_KEY: Final = "idempotency_key"
"""The key of a request's metadata whose value identifies repetitions of the same request."""


class ToolRequest(NamedTuple):
    """A request to execute a tool.

    Attributes:
        timeout_s: How long the caller waits; None if it sets no limit.
        style: See `RemoteCall`.
        until: The end of that time, in the time of the runner's home loop. The runner sets it.
        outlet: Where the chunks of a streaming tool go. The runner sets it.
    """

    session_id: str
    tool: str
    parameters: Mapping[str, Value]
    origin: Origin
    metadata: Mapping[str, str] = NO_ENTRIES
    idempotency_key: str | None = None
    timeout_s: float | None = None
    style: str = "json"
    until: float | None = None
    outlet: Outlet | None = None


def request_of(command: commands.ExecuteTool, origin: Origin) -> ToolRequest:
    """Return the request for a command; a key in its metadata has precedence over that of its origin."""
    key = command.metadata.get(IDEMPOTENCY_KEY) or origin.idempotency_key
    return ToolRequest(
        command.session_id, command.tool, command.parameters, origin, command.metadata, key, command.timeout_s
    )
