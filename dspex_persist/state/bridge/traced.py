"""Spans of calls of the bridge protocol, in both directions."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import grpc

from dspex_persist.infra.traced_calls import CallSpans, calling
from dspex_persist.infra.tracing import Attributes, Headers, Place
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.tools.session import ToolSession

_SESSION: Final = ("session_id", "session")
_NAME_LENGTH: Final = 255


def attributes_of(request: object) -> Attributes:
    """Return the attributes of a call that are in its request: the session."""
    names = (getattr(request, name, None) for name in _SESSION)
    session_id = next((name for name in names if isinstance(name, str) and name), None)
    return {} if session_id is None else {"dspex.session.id": session_id[:_NAME_LENGTH]}


def from_workers(running: Callable[[], Mapping[str, ToolSession]]) -> CallSpans:
    """Return how calls of a worker are traced, at an address of its own: they are part of what it runs."""

    def below() -> Place | None:
        # What only stands for a session is in no trace.
        return getattr(next(iter(running().values()), None), "place", None)

    return CallSpans(attributes_of, below, begins=False)


OF_CLIENTS: Final = CallSpans(attributes_of)
"""How calls of clients are traced."""
OF_THE_SERVER: Final = CallSpans(attributes_of, begins=False)
"""How calls are traced that a server makes to its worker."""


def calling_tool(address: str, attributes: Attributes, *, streams: bool) -> AbstractContextManager[Headers]:
    """Make a span around a call of a tool in another process; yields the headers that tell it the place."""
    rpc = f"{BRIDGE_SERVICE.full_name}.{'ExecuteStreamingTool' if streams else 'ExecuteTool'}"
    return calling(rpc, address, attributes, _code_of)


def _code_of(error: BaseException) -> Any:
    for each in (error, error.__cause__):
        if isinstance(each, grpc.aio.AioRpcError):
            return each.code()
    return None
