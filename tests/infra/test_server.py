"""The server's calls: answers, refusals, streams, health and reflection, over a real socket."""

import re
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.empty_pb2 import Empty
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.infra import ping
from tests.infra.ping import MIB, ROOT, OpenChannel, PingClient, StartServer
from tests.infra.ping_server import SECRET

_REFERENCE = re.compile(r"internal error, reference ([0-9a-f]{8})")
_NOT_A_MESSAGE = b"\x0a\xff"


# --- Answers ---


@pytest.mark.parametrize("text", ["", "pong", "naïve 🦉\0"])
def test_a_call_is_answered(client: PingClient, text: str) -> None:
    assert client("Ping", text) == text


def test_a_stream_yields_every_message_in_order(client: PingClient) -> None:
    assert [message.value for message in client("CountTo", 1000)] == list(range(1000))


def test_messages_may_be_larger_than_grpcs_default_limit(client: PingClient) -> None:
    assert len(client("Ping", "x" * (20 * MIB))) == 20 * MIB


def test_a_message_above_the_limit_is_refused(start_server: StartServer, open_channel: OpenChannel) -> None:
    server = start_server("--max-message-bytes", "1000")
    client = PingClient(open_channel(f"127.0.0.1:{server.port}"))
    assert client("Ping", "x" * 900) == "x" * 900
    assert client.error("Ping", "x" * 1001).code() is StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("how", ["--admit-first", "--read-within-s=20"])
def test_a_call_that_is_admitted_before_its_request_is_read_is_answered_alike(
    start_server: StartServer, open_channel: OpenChannel, how: str
) -> None:
    server = start_server(how)
    client = PingClient(open_channel(f"127.0.0.1:{server.port}"))
    assert client("Ping", "x" * MIB) == "x" * MIB
    assert [message.value for message in client("CountTo", 100)] == list(range(100))
    codes = [client.error(name, text).code() for name, text in (("Fail", "a"), ("Fail", "abort"), ("Missing", ""))]
    assert codes == [StatusCode.FAILED_PRECONDITION, StatusCode.DATA_LOSS, StatusCode.UNIMPLEMENTED]
    assert client.error("Ping", _NOT_A_MESSAGE).code() is StatusCode.INVALID_ARGUMENT
    assert next(client("Idle", "x")).value == "x"
    flood = client("Flood", 10)
    assert next(flood).value == "x" * 10
    flood.cancel()
    assert server.terminate(10) == 0


def test_a_request_that_takes_too_long_is_not_waited_for(start_server: StartServer, open_channel: OpenChannel) -> None:
    server, released = start_server("--read-within-s=0.1"), threading.Event()

    def nothing() -> Iterator[bytes]:
        released.wait(within(20))
        yield from ()

    channel = open_channel(f"127.0.0.1:{server.port}")
    for requests in (nothing(), iter(())):
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(f"/{ping.SERVICE}/Ping")(requests, timeout=within(20))
        error: Any = caught.value
        assert error.code() is StatusCode.INVALID_ARGUMENT
        assert error.details() == "the call has no request, or did not send it in time"
    released.set()


# --- Refusals ---


@pytest.mark.parametrize("method", ["Ping", "Idle"])
def test_bytes_that_do_not_parse_are_an_invalid_argument(client: PingClient, method: str) -> None:
    error = client.error(method, _NOT_A_MESSAGE)
    assert error.code() is StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request is not a valid google.protobuf.StringValue message"


def test_a_known_error_becomes_its_status_with_the_metadata_that_fits(
    client: PingClient,
) -> None:
    error = client.error("Fail", "not like this")
    assert error.code() is StatusCode.FAILED_PRECONDITION
    assert error.details() == "not like this"
    assert dict(error.trailing_metadata()) == {"x-kind": "known", "x-kind-bin": b"\0"}


def test_a_known_error_of_a_stream_becomes_its_status(client: PingClient) -> None:
    error = client.error("CountTo", -1)
    assert (error.code(), error.details()) == (StatusCode.FAILED_PRECONDITION, "cannot count down")


@pytest.mark.parametrize("kind", ["unknown", "table", "no message", "cancelled"])
def test_an_unknown_failure_is_an_internal_error_without_its_text(client: PingClient, kind: str) -> None:
    error = client.error("Fail", kind)
    assert error.code() is StatusCode.INTERNAL
    assert _REFERENCE.fullmatch(error.details())
    assert error.trailing_metadata() == ()


def test_the_log_has_the_details_that_the_client_does_not_get(
    start_server: StartServer, open_channel: OpenChannel
) -> None:
    server = start_server()
    error = PingClient(open_channel(f"127.0.0.1:{server.port}")).error("Fail", "unknown")
    assert server.terminate(10) == 0
    match = _REFERENCE.fullmatch(error.details())
    assert match is not None
    line = next(line for line in server.stderr_tail.splitlines() if match[1] in line)
    assert SECRET in line
    assert "Traceback" in line
    assert "infra_test.Pinger.Fail" in line


def test_a_call_that_aborts_by_itself_keeps_its_status(client: PingClient) -> None:
    error = client.error("Fail", "abort")
    assert (error.code(), error.details()) == (StatusCode.DATA_LOSS, "its own words")


def test_details_that_are_too_long_are_shortened_and_the_status_stays(client: PingClient) -> None:
    error = client.error("Fail", "long")
    assert error.code() is StatusCode.FAILED_PRECONDITION
    assert re.fullmatch("é{500,}\\.\\.\\.", error.details())
    assert ("x-kind", "known") in error.trailing_metadata()


def test_lone_surrogates_in_details_are_replaced(client: PingClient) -> None:
    error = client.error("Fail", "surrogate")
    assert (error.code(), error.details()) == (StatusCode.FAILED_PRECONDITION, "a?z")


@pytest.mark.parametrize("method", ["Missing", "MissingStream"])
def test_a_method_that_the_servicer_lacks_is_unimplemented(client: PingClient, method: str) -> None:
    error = client.error(method)
    assert error.code() is StatusCode.UNIMPLEMENTED
    assert error.details() == f"infra_test.Pinger.{method} is not implemented by this server"


# --- Streams ---


def test_a_hundred_open_streams_do_not_block_a_call(client: PingClient) -> None:
    streams = [client("Idle", str(number)) for number in range(100)]
    assert [next(stream).value for stream in streams] == [str(number) for number in range(100)]
    assert client("StreamsOpen", 100) == 100
    assert client("Ping", "still there") == "still there"
    for stream in streams:
        stream.cancel()
    assert client("StreamsOpen", 0) == 0


@pytest.mark.parametrize("size_bytes", [10_000, 8 * ping.MIB])
def test_a_client_that_reads_nothing_gets_a_status_and_does_not_delay_others(
    client: PingClient, size_bytes: int
) -> None:
    """Also if it has not read the first message, with which gRPC sends the initial metadata."""
    flood = client("Flood", size_bytes)
    assert client("StreamsOpen", 1) == 1
    assert client("Ping", "still there") == "still there"
    assert client("StreamsOpen", 0) == 0
    with pytest.raises(grpc.RpcError) as caught:
        list(islice(flood, 1_000_000))
    assert caught.value.code() is StatusCode.ABORTED
    assert caught.value.details() == "too slow"


def test_a_frozen_client_is_cut_off(start_server: StartServer, open_channel: OpenChannel) -> None:
    server = start_server("--keepalive-s", "0.5")
    client = PingClient(open_channel(f"127.0.0.1:{server.port}"))
    script = f"""if True:
        import grpc
        from tests.infra.ping import PingClient
        with grpc.insecure_channel("127.0.0.1:{server.port}") as channel:
            stream = PingClient(channel)("Idle", timeout_s=3600)
            next(stream)
            print("GRPC_READY:0", flush=True)
            list(stream)
    """
    with ServerProcess.start([sys.executable, "-c", script], cwd=ROOT) as frozen:
        assert client("StreamsOpen", 1) == 1
        frozen.send_signal(signal.SIGSTOP)
        assert client("StreamsOpen", 0, timeout_s=within(15)) == 0


# --- Health and reflection ---


@pytest.mark.parametrize("service", ["", ping.SERVICE, "grpc.health.v1.Health"])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=within(20))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_health_of_an_unknown_service(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="no.Such")
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(request, timeout=within(20))
    assert caught.value.code() is StatusCode.NOT_FOUND
    watch = health.Watch(request, timeout=within(20))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_lists_and_describes_the_services(channel: grpc.Channel) -> None:
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=ping.SERVICE),
    ]
    listed, described = reflection.ServerReflectionInfo(iter(requests), timeout=within(20))
    names = {service.name for service in listed.list_services_response.service}
    assert names == {ping.SERVICE, "grpc.health.v1.Health"}
    files = [FileDescriptorProto.FromString(file) for file in described.file_descriptor_response.file_descriptor_proto]
    assert "infra_test.proto" in {file.name for file in files}


def test_reflection_refuses_bytes_that_do_not_parse(channel: grpc.Channel) -> None:
    name = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call = channel.stream_stream(name, bytes, Empty.FromString)(iter([_NOT_A_MESSAGE]), timeout=within(20))
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT
