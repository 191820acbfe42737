"""The life of a server: listening, refusing, draining."""

import asyncio
import json
import queue
import signal
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dspex_persist.infra.health import serves
from dspex_persist.infra.listen import TcpAddress, prepare
from dspex_persist.infra.process import ProcessFailedError
from dspex_persist.infra.server import Context, ListenError, ServerOptions, Service, health, life, serve
from tests.deadline import within
from tests.infra import ping
from tests.infra.ping import OpenChannel, PingClient, StartServer
from tests.infra.ping_server import REFUSED
from tests.logs import capture_logs

# --- Health ---


def test_a_host_may_watch_the_health_many_times_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WATCHES_OF_HEALTH", 2)

    async def first_answers(port: int, watches: int) -> list[StatusCode | int]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            calls, answers = [], list[StatusCode | int]()
            for _ in range(watches):
                calls.append(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
                try:
                    answers.append((await calls[-1].read()).status)
                except grpc.aio.AioRpcError as error:
                    answers.append(error.code())
            return answers

    async def test() -> None:
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        options = ServerOptions("127.0.0.1:0")
        serving = asyncio.create_task(
            serve(options, [], status_of=lambda _: None, on_ready=ready.set_result, stop=stop)
        )
        async with asyncio.timeout(within(20)):
            port = await ready
            serving_status = health_pb2.HealthCheckResponse.SERVING
            assert await first_answers(port, 3) == [serving_status, serving_status, StatusCode.RESOURCE_EXHAUSTED]
            # The others have ended with their connection.
            while await first_answers(port, 1) != [serving_status]:
                pass
            stop.set()
            await serving

    asyncio.run(test())


# --- Listening ---


def test_a_free_port_is_chosen_and_reported(start_server: StartServer, open_channel: OpenChannel) -> None:
    first, second = start_server(), start_server("--listen", "localhost:0")
    assert 0 < first.port != second.port > 0
    assert PingClient(open_channel(f"127.0.0.1:{first.port}"))("Ping", "one") == "one"
    assert PingClient(open_channel(f"localhost:{second.port}"))("Ping", "two") == "two"


def test_a_unix_socket_is_private_and_removed_with_its_server(
    start_server: StartServer, open_channel: OpenChannel, tmp_path: Path
) -> None:
    path = tmp_path / "ping.sock"
    server = start_server("--listen", f"unix:{path}")
    assert server.port == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PingClient(open_channel(f"unix:{path}"))("Ping", "pong") == "pong"
    assert server.terminate(10) == 0
    assert not path.exists()


def test_the_socket_of_a_dead_server_is_replaced(
    start_server: StartServer, open_channel: OpenChannel, tmp_path: Path
) -> None:
    path = tmp_path / "ping.sock"
    start_server("--listen", f"unix:{path}").kill()
    assert path.exists()
    start_server("--listen", f"unix:{path}")
    assert PingClient(open_channel(f"unix:{path}"))("Ping", "pong") == "pong"


def test_a_second_server_on_the_same_socket_is_refused(
    start_server: StartServer, open_channel: OpenChannel, tmp_path: Path
) -> None:
    listen = f"unix:{tmp_path / 'ping.sock'}"
    start_server("--listen", listen)
    with pytest.raises(ProcessFailedError) as caught:
        start_server("--listen", listen)
    assert caught.value.exit_code == REFUSED
    assert caught.value.stderr_tail == f"cannot listen on {listen}: another server is listening there"
    assert PingClient(open_channel(listen))("Ping", "pong") == "pong"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_second_server_on_the_same_port_is_refused(
    start_server: StartServer, open_channel: OpenChannel, host: str
) -> None:
    first = start_server()
    with pytest.raises(ProcessFailedError) as caught:
        start_server("--listen", f"{host}:{first.port}")
    assert caught.value.exit_code == REFUSED
    assert caught.value.stderr_tail == f"cannot listen on {host}:{first.port}: address already in use"
    assert PingClient(open_channel(f"127.0.0.1:{first.port}"))("Ping", "pong") == "pong"


# --- Draining ---


def test_a_drain_lets_calls_finish_and_ends_endless_streams(
    start_server: StartServer, open_channel: OpenChannel
) -> None:
    server = start_server()
    channel = open_channel(f"127.0.0.1:{server.port}")
    client = PingClient(channel)
    health: Any = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=within(20))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    in_flight, endless = client.later("FinishInDrain", "done"), client("Idle", "open")
    assert client("StreamsOpen", 2) == 2
    with _open_reflection(channel) as reflection:
        server.send_signal(signal.SIGTERM)
        assert in_flight.result().value == "done"
        assert [message.value for message in endless] == ["open"]
        assert [answer.status for answer in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert list(reflection) == []
    assert server.wait(within(5)) == 0
    assert client.error("Ping").code() is StatusCode.UNAVAILABLE


def test_late_calls_are_refused_with_the_reason(start_server: StartServer, open_channel: OpenChannel) -> None:
    """None of them gets gRPC's CANCELLED, which looks as if the client had cancelled the call."""
    server = start_server()
    channels = [open_channel(f"127.0.0.1:{server.port}") for _ in range(4)]
    begun = threading.Barrier(33)

    def call_until_refused(number: int) -> Any:
        client = PingClient(channels[number % 4])
        client("Ping")
        begun.wait(within(20))
        while True:
            try:
                client("Ping")
            except grpc.RpcError as error:
                return error

    with ThreadPoolExecutor(32) as pool:
        refused = [pool.submit(call_until_refused, number) for number in range(32)]
        begun.wait(within(20))
        server.send_signal(signal.SIGTERM)
        errors = [future.result(within(20)) for future in refused]
    assert {error.code() for error in errors} == {StatusCode.UNAVAILABLE}
    assert {error.details() for error in errors} == {"the server is shutting down; repeat the call later"}
    assert server.wait(within(5)) == 0


def test_a_late_call_that_belongs_to_one_in_progress_is_accepted() -> None:
    """The call in progress waits for it: refusing it would keep both waiting until the end of the grace period."""
    (answer,) = asyncio.run(_call_back_in_drain(lambda context: ("x-belongs", "yes") in _metadata(context)))
    assert answer == [
        "pong",
        [0, 1, 2],
        (StatusCode.UNAVAILABLE, "the server is shutting down; repeat the call later"),
    ]


def test_without_belongs_every_late_call_is_refused() -> None:
    (answer,) = asyncio.run(_call_back_in_drain(None))
    refused = (StatusCode.UNAVAILABLE, "the server is shutting down; repeat the call later")
    assert answer == [refused, refused, refused]


def test_an_error_in_belongs_fails_the_late_call_only() -> None:
    def fail(context: Context) -> bool:
        raise ZeroDivisionError

    with capture_logs() as logs:
        (answer,) = asyncio.run(_call_back_in_drain(fail))
    assert [code for code, _ in answer] == [StatusCode.INTERNAL] * 3
    assert [log["event"] for log in logs] == ["call failed"] * 3


def test_belongs_is_called_only_during_a_drain() -> None:
    contexts: list[Context] = []

    def belongs(context: Context) -> bool:
        contexts.append(context)
        return True

    asyncio.run(_call_back_in_drain(belongs))
    # Not for the call in progress, which came before.
    assert len(contexts) == 3


def _metadata(context: Context) -> tuple[Any, ...]:
    return tuple(context.invocation_metadata() or ())


class _CallingBack:
    """A servicer whose call in progress calls the server again during the drain, as a tool's worker does."""

    def __init__(self) -> None:
        self.port = 0
        self.begun = asyncio.Event()
        self.draining = asyncio.Event()
        self.answers: list[list[Any]] = []

    async def drain(self) -> None:
        self.draining.set()

    async def Ping(self, request: StringValue, _context: object) -> StringValue:
        return request

    async def CountTo(self, request: Int32Value, _context: object) -> AsyncIterator[Int32Value]:
        for number in range(request.value):
            yield Int32Value(value=number)

    async def FinishInDrain(self, request: StringValue, _context: object) -> StringValue:
        self.begun.set()
        await self.draining.wait()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            self.answers.append(
                [
                    await _answer_of(_ping(channel, "pong", belongs=True)),
                    await _answer_of(_count(channel, 3, belongs=True)),
                    await _answer_of(_ping(channel, "pong", belongs=False)),
                ]
            )
        return request


async def _call_back_in_drain(belongs: Callable[[Context], bool] | None) -> list[list[Any]]:
    """The answers to the calls of a call in progress: two that belong to it, and one that does not."""
    servicer, stop, ready = _CallingBack(), asyncio.Event(), asyncio.Event()

    def on_ready(port: int) -> None:
        servicer.port = port
        ready.set()

    options: dict[str, Any] = {} if belongs is None else {"belongs": belongs}
    serving = asyncio.create_task(
        serve(
            ServerOptions("127.0.0.1:0"),
            [Service(ping.DESCRIPTOR, servicer)],
            status_of=lambda _: None,
            on_ready=on_ready,
            stop=stop,
            on_drain=servicer.drain,
            **options,
        )
    )
    async with asyncio.timeout(8):  # less than the grace period
        await ready.wait()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{servicer.port}") as channel:
            finish: Any = channel.unary_unary(f"/{ping.SERVICE}/FinishInDrain", StringValue.SerializeToString)
            in_flight = finish(StringValue(value="done"))
            await servicer.begun.wait()
            stop.set()
            assert StringValue.FromString(await in_flight).value == "done"
        await serving
    return servicer.answers


async def _answer_of(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        code = error.code()
        return code, error.details() if code is StatusCode.UNAVAILABLE else ""


async def _ping(channel: grpc.aio.Channel, text: str, *, belongs: bool) -> Any:
    method: Any = channel.unary_unary(f"/{ping.SERVICE}/Ping", StringValue.SerializeToString, StringValue.FromString)
    answer = await method(StringValue(value=text), metadata=(("x-belongs", "yes" if belongs else "no"),))
    return answer.value


async def _count(channel: grpc.aio.Channel, to: int, *, belongs: bool) -> Any:
    method: Any = channel.unary_stream(f"/{ping.SERVICE}/CountTo", Int32Value.SerializeToString, Int32Value.FromString)
    call = method(Int32Value(value=to), metadata=(("x-belongs", "yes" if belongs else "no"),))
    return [message.value async for message in call]


def test_a_drain_ends_with_the_grace_period_after_cancelled_calls_have_cleaned_up(
    start_server: StartServer, open_channel: OpenChannel
) -> None:
    server = start_server("--grace-s", "0.2")
    client = PingClient(open_channel(f"127.0.0.1:{server.port}"))
    stuck = client.later("Stuck")
    assert client("StreamsOpen", 1) == 1
    assert server.terminate(5) == 0
    assert stuck.exception().code() is StatusCode.UNAVAILABLE
    events = [json.loads(line)["event"] for line in server.stderr_tail.splitlines()]
    assert events == ["cleaned up", "served"]


def test_health_is_not_serving_while_on_drain_runs() -> None:
    seen: list[object] = []

    async def drain(port: int) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            seen.append((await health.Check(health_pb2.HealthCheckRequest(), timeout=within(10))).status)

    asyncio.run(_serve_and_drain(drain, grace_s=within(10)))
    assert seen == [health_pb2.HealthCheckResponse.NOT_SERVING]


def test_a_drain_does_not_wait_forever_for_on_drain() -> None:
    async def drain(_port: int) -> None:
        await asyncio.get_running_loop().create_future()

    with capture_logs() as logs:
        asyncio.run(_serve_and_drain(drain))
    assert [log["event"] for log in logs] == ["streams did not end within the grace period"]


def test_an_error_in_on_drain_still_stops_the_server() -> None:
    ports: list[int] = []

    async def drain(port: int) -> None:
        ports.append(port)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(_serve_and_drain(drain))
    prepare(TcpAddress("127.0.0.1", ports[0]))


async def _serve_and_drain(drain: Callable[[int], Awaitable[None]], grace_s: float = 0.5) -> None:
    """Serve, and stop as soon as the server is ready; `drain` gets its port."""
    ports: list[int] = []
    stop = asyncio.Event()
    stop.set()
    await serve(
        ServerOptions("127.0.0.1:0", grace_s=grace_s),
        [Service(ping.DESCRIPTOR, object())],
        status_of=lambda _: None,
        on_ready=ports.append,
        stop=stop,
        on_drain=lambda: drain(ports[0]),
    )


@contextmanager
def _open_reflection(channel: grpc.Channel) -> Iterator[Iterator[object]]:
    """The further answers on a reflection stream that has had one request and stays open."""
    requests: queue.SimpleQueue[reflection_pb2.ServerReflectionRequest | None] = queue.SimpleQueue()
    requests.put(reflection_pb2.ServerReflectionRequest(list_services=""))
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = stub.ServerReflectionInfo(iter(requests.get, None), timeout=within(20))
    next(answers)
    try:
        yield answers
    finally:
        requests.put(None)


def test_health_is_not_serving_while_the_process_cannot_do_its_work() -> None:
    async def run() -> None:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        options, services = ServerOptions("127.0.0.1:0"), [Service(ping.DESCRIPTOR, object())]
        serving = asyncio.create_task(
            serve(
                options, services, status_of=lambda _: None, on_ready=port.set_result, stop=stop, is_fit=lambda: fit[0]
            )
        )
        address = TcpAddress("127.0.0.1", await port)
        for fit[0] in (True, False, True):
            said.append(await asyncio.to_thread(serves, address, None, within(10)))
        stop.set()
        await serving

    fit, said = [True], list[bool]()
    asyncio.run(run())
    assert said == [True, False, True]


def test_a_watch_of_the_health_is_told_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_LOOK_S", 0.01)

    async def run() -> None:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        options = ServerOptions("127.0.0.1:0")
        serving = asyncio.create_task(
            serve(options, [], status_of=lambda _: None, on_ready=port.set_result, stop=stop, is_fit=lambda: fit[0])
        )
        async with asyncio.timeout(within(20)), grpc.aio.insecure_channel(f"127.0.0.1:{await port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            for fit[0] in (True, False, True):
                said.append((await watch.read()).status)
            stop.set()
            said.append((await watch.read()).status)
            assert await watch.read() is grpc.aio.EOF
        await serving

    fit, said = [True], list[int]()
    asyncio.run(run())
    yes, no = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert said == [yes, no, yes, no]


# --- Refusals before serving ---


class _Synchronous:
    def Ping(self, request: StringValue, _context: object) -> StringValue:
        return request


class _Streaming:
    async def Ping(self, request: StringValue, _context: object):  # type: ignore[no-untyped-def]
        yield request


@pytest.mark.parametrize("servicer", [_Synchronous(), _Streaming()])
def test_a_method_of_the_wrong_kind_is_refused(servicer: object) -> None:
    with pytest.raises(TypeError, match=r"infra_test\.Pinger\.Ping"):
        asyncio.run(_serve("127.0.0.1:0", servicer))


def test_an_invalid_address_is_refused() -> None:
    with pytest.raises(ListenError):
        asyncio.run(_serve("nowhere", object()))


async def _serve(listen: str, servicer: object) -> None:
    await serve(
        ServerOptions(listen),
        [Service(ping.DESCRIPTOR, servicer)],
        status_of=lambda _: None,
        on_ready=lambda _: pytest.fail("it became ready"),
        stop=asyncio.Event(),
    )


def test_no_call_is_cancelled_because_the_server_was_slow_to_handle_it() -> None:
    """gRPC's default limit is half a minute, and it cancels silently."""
    options = dict(life._channel_options(ServerOptions("127.0.0.1:0")))
    assert options["grpc.server_max_unrequested_time_in_server"] >= 3600
