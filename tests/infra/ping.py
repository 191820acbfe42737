"""A tiny service for tests, whose messages are Google's well-known types, and its clients."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from dspex_persist.infra.process import ServerProcess
from tests.deadline import within

DEADLINE_S = within(20)

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
SERVICE = "infra_test.Pinger"


class _Method(NamedTuple):
    name: str
    request: type[StringValue] | type[Int32Value]
    response: type[StringValue] | type[Int32Value]
    streams: bool = False


_METHODS = (
    _Method("Ping", StringValue, StringValue),
    _Method("Fail", StringValue, StringValue),
    _Method("Missing", StringValue, StringValue),
    _Method("MissingStream", StringValue, StringValue, streams=True),
    # Answers when the drain has begun.
    _Method("FinishInDrain", StringValue, StringValue),
    # Never answers; logs when its clean-up after a cancellation is done.
    _Method("Stuck", StringValue, StringValue),
    # Answers once that many streams are open.
    _Method("StreamsOpen", Int32Value, Int32Value),
    _Method("CountTo", Int32Value, Int32Value, streams=True),
    # Sends one message, then nothing until the drain.
    _Method("Idle", StringValue, StringValue, streams=True),
    # Writes without end; gives up on a client that reads nothing for half a second.
    _Method("Flood", Int32Value, StringValue, streams=True),
)


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="infra_test.proto", package="infra_test", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    service = file.service.add(name="Pinger")
    for method in _METHODS:
        service.method.add(
            name=method.name,
            input_type="." + method.request.DESCRIPTOR.full_name,
            output_type="." + method.response.DESCRIPTOR.full_name,
            server_streaming=method.streams,
        )
    return file


descriptor_pool.Default().AddSerializedFile(_file().SerializeToString())
DESCRIPTOR: ServiceDescriptor = descriptor_pool.Default().FindServiceByName(SERVICE)


class PingClient:
    """Calls any method by its name. Requests are a str, an int, or bytes to send unchanged."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._methods = {method.name: _callable(channel, method) for method in _METHODS}

    def __call__(self, name: str, argument: str | int | bytes = "", *, timeout_s: float = DEADLINE_S) -> Any:
        """Return the value of the answer or, for a streaming method, the call, which yields the messages."""
        answer = self._methods[name](argument, timeout=timeout_s)
        return answer if isinstance(answer, Iterator) else answer.value

    def later(self, name: str, argument: str | int | bytes = "", *, timeout_s: float = DEADLINE_S) -> Any:
        """Return the future of a unary call."""
        return self._methods[name].future(argument, timeout=timeout_s)

    def error(self, name: str, argument: str | int | bytes = "") -> Any:
        """Return the error of the call, with `code()`, `details()` and `trailing_metadata()`."""
        try:
            answer = self(name, argument)
            answered = list(answer) if isinstance(answer, Iterator) else answer
        except grpc.RpcError as error:
            return error
        raise AssertionError(f"{name} answered {answered!r}")


def _callable(channel: grpc.Channel, method: _Method) -> Any:
    open_method = channel.unary_stream if method.streams else channel.unary_unary
    return open_method(f"/{SERVICE}/{method.name}", _serializer(method), method.response.FromString)


def _serializer(method: _Method) -> Callable[[Any], bytes]:
    def serialize(argument: Any) -> bytes:
        return argument if isinstance(argument, bytes) else method.request(value=argument).SerializeToString()

    return serialize


StartServer = Callable[..., ServerProcess]
OpenChannel = Callable[[str], grpc.Channel]


def start_ping_server(*arguments: str) -> ServerProcess:
    """Start `tests.infra.ping_server` with these arguments, and wait until it is ready."""
    return ServerProcess.start([sys.executable, "-m", "tests.infra.ping_server", *arguments], cwd=ROOT)


def open_channel_to(target: str) -> grpc.Channel:
    # A separate subchannel pool, so that the back-off of a channel to a dead server does not delay this one.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 100 * MIB)]
    return grpc.insecure_channel(target, options)
