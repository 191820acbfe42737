"""State over a stub or a channel that somebody else has made, and errors as such clients know them."""

from collections.abc import Callable, Hashable, Mapping
from functools import cache
from types import ModuleType
from typing import Any, Final, cast

import grpc

from dspex_persist.state import errors
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.client.state import BridgedState
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as dspex_persist_audit_pb2
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2_grpc as dspex_persist_audit_pb2_grpc
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as snakepit_bridge_pb2
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2_grpc as snakepit_bridge_pb2_grpc
from dspex_persist.state.bridge.generated.dspex_persist_audit_pb2_grpc import AuditServiceStub
from dspex_persist.state.bridge.generated.snakepit_bridge_pb2_grpc import BridgeServiceStub as BridgeServiceStub
from dspex_persist.state.bridge.secure import Peer
from dspex_persist.state.bridge.status import status_of
from dspex_persist.state.errors import InvalidArgumentError, StateError, UnsupportedError
from dspex_persist.state.model import RegisteredTool, ToolSpec

_SHOWN: Final = "the server behind the stub"
_METHODS: Final = ("GetVariable", "SetVariable", "ExecuteTool")
"""Rpcs that every stub of this protocol has; those of newer ones lack the first two."""
MODULES: Final[Mapping[str, ModuleType]] = {
    "snakepit_bridge_pb2": snakepit_bridge_pb2,
    "snakepit_bridge_pb2_grpc": snakepit_bridge_pb2_grpc,
}
"""The generated modules, by the names that they have where they are generated without a package."""


class StubState(BridgedState):
    """Session state on a server that is reached over a stub or a channel of the caller, which stays open.

    Args:
        stub: A `BridgeServiceStub`, or a `grpc.Channel`. Of a stub only the bridge protocol can be used.

    Raises:
        InvalidArgumentError: It is neither, or it is an asynchronous one.
    """

    def __init__(self, stub: Any) -> None:
        is_channel = isinstance(stub, grpc.Channel)
        if not is_channel:
            _check_stub(stub)
        # Its owner decides how long a call may take: a tool may run for as long as it likes.
        self._set_up(Peer("", _SHOWN, None), 300.0, 60.0, None, None, None)
        channel = stub if is_channel else _NoChannel()
        self._use(channel, BridgeServiceStub(stub) if is_channel else stub, AuditServiceStub(channel))

    @property
    def url(self) -> str:
        """Nothing: only the owner of the stub knows it."""
        return ""

    def _close_channel(self) -> None:
        """Leave it open: its owner closes it."""


def is_stub(given: object) -> bool:
    """Whether something is a channel, or has the methods of a stub."""
    return isinstance(given, grpc.Channel | grpc.aio.Channel) or hasattr(given, "ExecuteTool")


def _check_stub(stub: Any) -> None:
    if isinstance(stub, grpc.aio.Channel) or isinstance(
        getattr(stub, "ExecuteTool", None), grpc.aio.UnaryUnaryMultiCallable
    ):
        reason = "it is asynchronous, and this API is not: make one of grpc.insecure_channel(address)"
        raise InvalidArgumentError("stub", reason)
    missing = [name for name in _METHODS if not callable(getattr(stub, name, None))]
    if missing:
        reason = f"it has no {', '.join(missing)}: make it with BridgeServiceStub(channel) of dspex_persist.compat"
        raise InvalidArgumentError("stub", reason)


class _NoChannel:
    """Stands for the channel of a service that a stub cannot reach."""

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        return lambda method, **_: _NoMethod(method.rpartition("/")[2])


class _NoMethod:
    def __init__(self, rpc: str) -> None:
        self._rpc = rpc

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"{self._rpc} over a stub of the bridge protocol", "give the channel instead of a stub")

    with_call = __call__

    def future(self, *_: Any, **__: Any) -> Any:
        return self()


def registration(spec: ToolSpec) -> snakepit_bridge_pb2.ToolRegistration:
    """Return the message with which a worker registers a tool whose address somebody else supplies."""
    message: snakepit_bridge_pb2.ToolRegistration = codec.registration_message(RegisteredTool(spec, ""))
    return message


def registration_request(session_id: str, worker_id: str, tools: Any) -> snakepit_bridge_pb2.RegisterToolsRequest:
    """Return the request to register tools: messages of `registration`."""
    return snakepit_bridge_pb2.RegisterToolsRequest(session_id=session_id, worker_id=worker_id, tools=tools)


# Errors


class CallError(grpc.RpcError):
    """What makes an error one of gRPC, too: `code()` and `details()`."""

    def code(self) -> grpc.StatusCode:
        """Return the status code that a server sends with it."""
        status = status_of(self)
        return grpc.StatusCode.UNKNOWN if status is None else status.code

    def details(self) -> str:
        """Return its text."""
        return str(self)


_ABOUT_VALUES: Final = (
    errors.InvalidValueError,
    errors.InvalidConstraintsError,
    errors.UnknownTypeError,
    errors.InvalidArgumentError,
    errors.LimitExceededError,
    errors.ToolArgumentError,
    errors.ToolNotFoundError,
)


def in_old_terms(error: StateError) -> StateError:
    """Have an error be an instance of what existing programs catch: ValueError or RuntimeError, and grpc.RpcError."""
    kind = type(error)
    if not issubclass(kind, CallError):
        # An instance of the same class as before, so that whoever expects that class finds it.
        error.__class__ = _old_kind(cast(Hashable, kind))
    return error


@cache
def _old_kind(kind: type[StateError]) -> type[StateError]:
    bases: list[type] = [kind]
    if not issubclass(kind, KeyError | ValueError | RuntimeError):
        bases.append(ValueError if issubclass(kind, _ABOUT_VALUES) else RuntimeError)
    return type(kind.__name__, (*bases, CallError), {"__module__": kind.__module__, "__doc__": kind.__doc__})
