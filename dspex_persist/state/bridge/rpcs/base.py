"""Rpc: how a command is sent as a request, and its result as a response."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from dspex_persist.state.bridge.incoming import Call
from dspex_persist.state.commands import Command
from dspex_persist.state.limits import Limits

C = TypeVar("C", bound=Command[Any])
R = TypeVar("R")
Trailer: TypeAlias = Callable[[str], str | None]
"""Returns a trailer of the response by name, or None."""


def _nothing(_: object) -> dict[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc(Generic[C, R]):
    """The translation of one kind of command and its result.

    The client calls `request_of` and `result_of`, the server `command_of` and `response_of`. Errors are `StateError`s
    on both sides; `status` translates them.
    """

    command: type[C]
    request_of: Callable[[C], Message]
    command_of: Callable[[Any, Call], C]
    response_of: Callable[[R, Call], Message]
    result_of: Callable[[C, Any, Trailer], R]
    headers_of: Callable[[C], Mapping[str, str]] = _nothing
    """The headers for a command."""
    rest_of: Callable[[C, R, Trailer], C | None] | None = None
    """The command for the rest of a list whose response was not complete; None if it was."""
    size_of: Callable[[Any, Limits], int] | None = None
    """The size of a request in bytes; refuses one that is too large before it is parsed."""
    first: Callable[[C], Command[Any]] | None = None
    """A command to run before, whose result the response needs (`Call.first`)."""
    instead: Callable[[C], Command[R | None]] | None = None
    """A read to run instead of the command, unless its result is None or the call has an idempotency key."""
    is_list: bool = False
    """Whether the response may become too large for a message, and needs a check."""
    log: Callable[[Any, C, R], None] | None = None
    """Logs the call on the server."""
    beside: bool = False
    """Whether the rpc belongs to the service beside the bridge's own."""
    rpc: str = ""
    """The name of the rpc, if it differs from the command's."""

    @property
    def name(self) -> str:
        """The name of the rpc."""
        return self.rpc or self.command.__name__


def identified(request: Callable[..., Message], **more: str) -> Callable[[Any], Message]:
    """Return a `request_of` for a request with a session and a variable.

    Args:
        request: The type of the request.
        more: The other fields of the request, each with the name of the command's attribute.
    """

    def build(command: Any) -> Message:
        fields = {field: getattr(command, attribute) for field, attribute in more.items()}
        return request(session_id=command.session_id, variable_identifier=command.identifier, **fields)

    return build
