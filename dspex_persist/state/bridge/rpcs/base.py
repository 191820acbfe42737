"""What an rpc over a command is: how the command and its result travel, each as a message and back."""

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
"""What an answer says beside its message, by name."""


def _nothing(_: object) -> dict[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc(Generic[C, R]):
    """How one kind of command travels, and its result.

    The client makes the request of a command and takes the result out of the response, the server the command out of
    the request and makes the response of a result. What goes wrong is a `StateError` on both sides, by `status`.
    """

    command: type[C]
    request_of: Callable[[C], Message]
    command_of: Callable[[Any, Call], C]
    response_of: Callable[[R, Call], Message]
    result_of: Callable[[C, Any, Trailer], R]
    headers_of: Callable[[C], Mapping[str, str]] = _nothing
    """What a command says beside the request."""
    rest_of: Callable[[C, R, Trailer], C | None] | None = None
    """The command that asks for the rest of a list, where the response left some off."""
    size_of: Callable[[Any, Limits], int] | None = None
    """Refuses a request with too much in it before any of that is read; how many bytes it is."""
    first: Callable[[C], Command[Any]] | None = None
    """What is read before, for the response to say: `Call.first`."""
    is_list: bool = False
    """Whether the response may be larger than a message."""
    log: Callable[[Any, C, R], None] | None = None
    """What the server's log says of it."""
    rpc: str = ""
    """The rpc's name, where it is not the command's."""

    @property
    def name(self) -> str:
        """The rpc's name."""
        return self.rpc or self.command.__name__


def identified(request: Callable[..., Message], **more: str) -> Callable[[Any], Message]:
    """A request that names a session and a variable; `more`: its other fields by the command's attribute."""

    def build(command: Any) -> Message:
        fields = {field: getattr(command, attribute) for field, attribute in more.items()}
        return request(session_id=command.session_id, variable_identifier=command.identifier, **fields)

    return build
