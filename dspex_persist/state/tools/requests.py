"""ToolRequest: a wish to have a tool executed, as a runner takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dspex_persist.state import commands
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.tools.chunks import Outlet

IDEMPOTENCY_KEY: Final = "idempotency_key"
"""The entry of a request's metadata under which its execution is found again."""


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A wish to have a tool executed. `timeout_s`: how long whoever asks is going to wait, `until`: until when, on the
    runner's home loop. `outlet`: where chunks go."""

    session_id: str
    tool: str
    parameters: Mapping[str, Value]
    origin: Origin
    metadata: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    timeout_s: float | None = None
    style: str = "json"
    until: float | None = None
    outlet: Outlet | None = None


def request_of(command: commands.ExecuteTool, origin: Origin) -> ToolRequest:
    """The request that a command makes."""
    key = command.metadata.get(IDEMPOTENCY_KEY) or origin.idempotency_key
    return ToolRequest(
        command.session_id, command.tool, command.parameters, origin, command.metadata, key, command.timeout_s
    )
