"""Calling tools in other processes: real gRPC servers, some of which die, freeze or answer nonsense."""

import asyncio
import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue

from dspex_persist.infra.access.tls import CallerFiles
from dspex_persist.infra.circuit import Circuit
from dspex_persist.infra.listen import is_loopback
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.headers import EXECUTION_ID
from dspex_persist.state.bridge.workers import remote
from dspex_persist.state.bridge.workers.remote import RemoteTools
from dspex_persist.state.errors import InvalidArgumentError, RemoteToolError, ToolFailedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import RegisteredTool, ToolSpec, Value
from dspex_persist.state.tools.ports import RemoteCall
from tests.bridge.worker import Worker, serving
from tests.certificates import Authority
from tests.deadline import within
from tests.logs import capture_logs

ROOT = Path(__file__).parents[2]
JSON_URL, STRING_VALUE_URL = "type.googleapis.com/snakepit.", "type.googleapis.com/google.protobuf.StringValue"
DEADLINE_S = within(20)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S * 2):
            await test

    asyncio.run(bounded())


def call_of(tool: str, address: str, **more: Any) -> RemoteCall:
    fields: dict[str, Any] = {"session_id": "s1", "execution_id": "exec-1", "parameters": {}, **more}
    return RemoteCall(tool=RegisteredTool(ToolSpec(tool), "worker-1", address), **fields)


@asynccontextmanager
async def remote_tools(**options: Any) -> AsyncIterator[RemoteTools]:
    defaults: dict[str, Any] = {"call_timeout_s": DEADLINE_S, "connect_timeout_s": DEADLINE_S, "allow": lambda _: True}
    tools = RemoteTools(**(defaults | options))
    try:
        yield tools
    finally:
        await tools.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- the product has no event for it
            await asyncio.sleep(0.01)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def process() -> Iterator[ServerProcess]:
    with worker_process() as process:
        yield process


def worker_process(listen: str = "127.0.0.1:0") -> ServerProcess:
    return ServerProcess.start([sys.executable, "-m", "tests.bridge.worker", listen], cwd=ROOT)


async def failure(tools: RemoteTools, call: RemoteCall) -> RemoteToolError:
    with pytest.raises(RemoteToolError) as caught:
        await tools.execute(call)
    return caught.value


# --- Requests and results ---


@pytest.mark.parametrize("unix", ["", "worker.sock", "a%20worker?.sock"])
def test_a_call_reaches_the_worker_complete_and_returns_its_result(unix: str, tmp_path: Path) -> None:
    async def test() -> None:
        worker = Worker()
        listen = f"unix:{tmp_path / unix}" if unix else "127.0.0.1:0"
        async with serving(worker, listen) as address, remote_tools() as tools:
            parameters = {"rate": Value("0.5"), "vector": Value('{"shape":[2],"type":"tensor"}', b"\0\1")}
            call = call_of("greet", address, parameters=parameters, metadata={"k": "é"})
            assert await tools.execute(call) == Value('{"tool": "greet"}')
            assert tools.state_of(address) == "closed"
        (request,), (headers,) = worker.requests, worker.headers
        assert headers[EXECUTION_ID] == "exec-1"
        assert (request.session_id, request.tool_name, request.stream) == ("s1", "greet", False)
        assert dict(request.metadata) == {"k": "é"}
        assert request.parameters["rate"] == AnyMessage(type_url=JSON_URL + "float", value=b"0.5")
        assert request.parameters["vector"].type_url == JSON_URL + "tensor.binary"
        assert dict(request.binary_parameters) == {"vector": b"\0\1"}

    run(test())


def test_parameters_keep_the_style_of_the_client() -> None:
    async def test() -> None:
        worker = Worker()
        async with serving(worker) as address, remote_tools() as tools:
            await tools.execute(call_of("greet", address, parameters={"n": Value("1")}, style="string_value"))
        assert worker.requests[0].parameters["n"] == AnyMessage(type_url=STRING_VALUE_URL, value=b"1")

    run(test())


@pytest.mark.parametrize(
    ("tool", "result"),
    [("nothing", None), ("null", Value("null")), ("string value", Value('{"a": 1}'))],
)
def test_results(tool: str, result: Value | None) -> None:
    async def test() -> None:
        async with serving(Worker()) as address, remote_tools() as tools:
            assert await tools.execute(call_of(tool, address)) == result

    run(test())


def test_a_result_may_be_larger_than_grpcs_default_limit() -> None:
    async def test() -> None:
        limits = Limits(value_size_bytes=16 * 1024 * 1024)
        async with serving(Worker()) as address, remote_tools(limits=limits) as tools:
            result = await tools.execute(call_of("large", address, parameters={"x": Value(f'"{"y" * 5_000_000}"')}))
            assert result is not None
            assert len(result.json) > 8_000_000

    run(test())


@pytest.mark.parametrize(
    ("tool", "metadata", "reason"),
    [
        ("fail", {}, "ZeroDivisionError: by zero"),
        ("fail silently", {}, "the tool failed without a message"),
        ("no json", {}, "its result is not a value: .*not JSON"),
        ("foreign type", {}, "its result is not a value: .*acme.Thing"),
        ("no message", {}, "the worker's answer is not a message of the protocol"),
        ("raise", {}, "UNKNOWN: .*a bug"),
        ("abort", {"code": "INVALID_ARGUMENT"}, "INVALID_ARGUMENT: its own words"),
        ("abort", {"code": "DEADLINE_EXCEEDED"}, "DEADLINE_EXCEEDED: its own words"),
    ],
)
def test_a_failing_tool_does_not_count_against_its_address(tool: str, metadata: dict[str, str], reason: str) -> None:
    async def test() -> None:
        async with serving(Worker()) as address, remote_tools(failures=1) as tools:
            with pytest.raises(ToolFailedError, match=reason) as caught:
                await tools.execute(call_of(tool, address, metadata=metadata))
            assert caught.value.execution_id == "exec-1"
            assert tools.state_of(address) == "closed"

    run(test())


def test_a_result_above_the_limits_is_refused() -> None:
    async def test() -> None:
        limits = Limits(value_size_bytes=1000)
        async with serving(Worker()) as address, remote_tools(limits=limits) as tools:
            with pytest.raises(ToolFailedError, match=r"size of .*result"):
                await tools.execute(call_of("large", address))

    run(test())


def test_a_server_without_the_rpc_has_its_own_error() -> None:
    async def test() -> None:
        async with serving(Worker(), leave_out=("ExecuteTool",)) as address, remote_tools(failures=1) as tools:
            error = await failure(tools, call_of("greet", address))
            assert error.reason == "the server at this address does not serve this rpc"
            assert tools.state_of(address) == "closed"

    run(test())


def test_text_that_no_message_can_carry_is_an_error_of_the_caller() -> None:
    async def test() -> None:
        async with remote_tools() as tools:
            with pytest.raises(InvalidArgumentError):
                await tools.execute(call_of("greet", "127.0.0.1:1", metadata={"k": "\ud800"}))

    run(test())


# --- Which addresses are called ---


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "its address is unknown"),
        ("nowhere", "expected HOST:PORT"),
        ("dns:///localhost:80", "expected HOST:PORT"),
        ("192.0.2.1:80", "calls to other machines are refused; allow them with --insecure"),
    ],
)
def test_addresses_that_are_not_called(address: str, reason: str) -> None:
    async def test() -> None:
        async with remote_tools(allow=is_loopback) as tools:
            error = await failure(tools, call_of("greet", address))
            assert reason in error.reason
            assert (error.tool, error.address) == ("greet", address)
            assert tools.state_of(address) == "closed"

    run(test())


def test_connections_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "_MOST_ADDRESSES", 2)

    async def test() -> None:
        one, two, three = Worker(), Worker(), Worker()
        async with (
            serving(one, f"unix:{tmp_path}/1") as first,
            serving(two, f"unix:{tmp_path}/2") as second,
            serving(three, f"unix:{tmp_path}/3") as third,
            remote_tools() as tools,
        ):
            hanging = asyncio.create_task(tools.execute(call_of("hang", first)))
            await one.begun.wait()
            for address in (second, third, second, first):
                assert await tools.execute(call_of("greet", address))
            assert set(tools._peers) == {first, second}
            also_hanging = asyncio.create_task(tools.execute(call_of("hang", second)))
            await two.begun.wait()
            error = await failure(tools, call_of("greet", third))
            assert error.reason == "2 other addresses are being called; call it again later"
            for task in (hanging, also_hanging):
                task.cancel()
            await asyncio.wait((hanging, also_hanging))
            # The pings that follow use the connections for a moment.
            await until(lambda: all(peer.idle for peer in tools._peers.values()))
            assert await tools.execute(call_of("greet", third))

    run(test())


# --- Streams ---


async def streamed(tools: RemoteTools, call: RemoteCall) -> list[str]:
    chunks: list[str] = []

    async def emit(value: Value) -> None:
        chunks.append(value.json)

    assert await tools.stream(call, emit) is None
    return chunks


def test_a_slow_receiver_gets_every_chunk_in_order() -> None:
    async def test() -> None:
        worker = Worker()
        async with serving(worker) as address, remote_tools() as tools:
            chunks: list[str] = []

            async def emit(value: Value) -> None:
                if len(chunks) % 50 == 0:
                    await asyncio.sleep(0.01)
                chunks.append(value.json)

            await tools.stream(call_of("count", address, metadata={"to": "500"}), emit)
            assert chunks == [str(number) for number in range(500)]
            assert worker.requests[0].stream
            assert worker.headers[0][EXECUTION_ID] == "exec-1"

    run(test())


def test_a_last_chunk_with_content_counts_and_an_earlier_empty_one_is_null() -> None:
    async def test() -> None:
        async with serving(Worker()) as address, remote_tools() as tools:
            assert await streamed(tools, call_of("last has data", address)) == ['"first"', "null", '"last"']

    run(test())


def test_chunks_of_text_or_bytes_are_converted_to_json() -> None:
    async def test() -> None:
        async with serving(Worker()) as address, remote_tools() as tools:
            chunks = await streamed(tools, call_of("no json", address))
            assert list(map(json.loads, chunks)) == ["plain text", {"raw_data_base64": "/wA="}, '{"a": NaN}']

    run(test())


def test_a_receiver_that_stops_holds_the_worker_back() -> None:
    async def test() -> None:
        worker, release = Worker(), asyncio.Event()
        async with serving(worker) as address, remote_tools() as tools:
            received = 0

            async def emit(_: Value) -> None:
                nonlocal received
                received += 1
                await release.wait()

            streaming = asyncio.create_task(tools.stream(call_of("flood", address), emit))
            await until(lambda: received == 1)
            sent = -1
            while sent != worker.sent:
                sent = worker.sent
                await asyncio.sleep(0.3)
            assert sent < 500  # of 1000, 100 KB each
            release.set()
            await streaming
            assert (received, worker.sent) == (1000, 1000)

    run(test())


def test_a_receiver_that_fails_ends_the_workers_call() -> None:
    async def test() -> None:
        worker = Worker()
        async with serving(worker) as address, remote_tools(failures=1) as tools:
            for error in (ZeroDivisionError(), TimeoutError()):

                async def emit(_: Value, error: Exception = error) -> None:
                    raise error

                worker.cancelled.clear()
                with pytest.raises(type(error)):
                    await tools.stream(call_of("flood", address), emit)
                await worker.cancelled.wait()
                assert tools.state_of(address) == "closed"

    run(test())


@pytest.mark.parametrize(
    ("tool", "reason"),
    [("too large", "a chunk is not a value: .*value_size_bytes"), ("break", "INTERNAL: it broke")],
)
def test_a_stream_that_fails(tool: str, reason: str) -> None:
    async def test() -> None:
        async with serving(Worker()) as address, remote_tools(failures=1) as tools:
            with pytest.raises(ToolFailedError, match=reason):
                await streamed(tools, call_of(tool, address))
            assert tools.state_of(address) == "closed"

    run(test())


# --- No call hangs ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_tool_is_cut_off_and_its_address_stays_in_use(stream: bool) -> None:
    async def test() -> None:
        worker = Worker()
        async with serving(worker) as address, remote_tools(failures=1) as tools:
            call = call_of("hang", address, timeout_s=0.3)
            with pytest.raises(RemoteToolError, match=r"no answer within 0\.3 s"):
                await (streamed(tools, call) if stream else tools.execute(call))
            await worker.cancelled.wait()
            # A ping afterwards finds it alive.
            await until(lambda: worker.pings == 1)
            await until(lambda: tools._peers[address].idle)
            assert tools.state_of(address) == "closed"

    run(test())


def test_a_call_without_a_timeout_has_the_default_one() -> None:
    async def test() -> None:
        async with serving(Worker()) as address, remote_tools(call_timeout_s=0.2) as tools:
            assert (await failure(tools, call_of("hang", address))).reason == "no answer within 0.2 s"

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_the_caller_cancels_the_workers_call(stream: bool) -> None:
    async def test() -> None:
        worker = Worker()
        async with serving(worker) as address, remote_tools(failures=1) as tools:
            call = call_of("hang", address)
            task = asyncio.create_task(streamed(tools, call) if stream else tools.execute(call))
            await worker.begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await worker.cancelled.wait()
            assert tools.state_of(address) == "closed"

    run(test())


def test_a_server_that_accepts_connections_and_stays_silent_is_given_up() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            async with remote_tools(connect_timeout_s=0.3, failures=2) as tools:
                for _ in range(2):
                    error = await failure(tools, call_of("greet", address))
                    assert error.reason == "no connection within 0.3 s"
                assert tools.state_of(address) == "open"

    run(test())


def test_a_frozen_worker_is_detected_and_used_again_when_it_wakes(process: ServerProcess) -> None:
    async def test() -> None:
        address = f"127.0.0.1:{process.port}"
        async with remote_tools(connect_timeout_s=3, pause_s=0.8, longest_pause_s=0.8, failures=2) as tools:
            assert await tools.execute(call_of("greet", address))
            process.send_signal(signal.SIGSTOP)
            try:
                error = await failure(tools, call_of("greet", address, timeout_s=0.3))
                assert error.reason == "no answer within 0.3 s"
                # First the ping fails, then the next connection.
                await until(lambda: tools._peers[address].circuit._failures == 1)
                error = await failure(tools, call_of("greet", address))
                assert error.reason == "no connection within 3 s"
                assert tools.state_of(address) == "open"
            finally:
                process.send_signal(signal.SIGCONT)
            await until(lambda: tools.state_of(address) == "half_open")
            assert await tools.execute(call_of("greet", address))
            assert tools.state_of(address) == "closed"

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_killing_a_worker_ends_its_call(stream: bool, process: ServerProcess) -> None:
    async def test() -> None:
        address = f"127.0.0.1:{process.port}"
        async with remote_tools(failures=2) as tools:
            begun = asyncio.Event()

            async def emit(_: Value) -> None:
                begun.set()

            call = call_of("hang", address)
            task = asyncio.create_task(tools.stream(call, emit) if stream else tools.execute(call))
            if stream:
                await begun.wait()
            else:
                await until(lambda: bool(tools._peers.get(address) and not tools._peers[address].idle))
                assert await tools.execute(call_of("greet", address))
            process.kill()
            with pytest.raises(RemoteToolError, match="the call was not answered"):
                await task
            assert "refused" in (await failure(tools, call_of("greet", address))).reason
            assert tools.state_of(address) == "open"

    run(test())


def test_closing_ends_calls_in_progress_and_refuses_later_ones() -> None:
    async def test() -> None:
        worker = Worker()
        async with serving(worker) as address, remote_tools() as tools:
            calls = [
                asyncio.create_task(failure(tools, call_of("hang", address))),
                asyncio.create_task(_stream_failure(tools, call_of("hang", address))),
            ]
            await until(lambda: len(worker.requests) == 2)
            await tools.close()
            for error in (*await asyncio.gather(*calls), await failure(tools, call_of("greet", address))):
                assert error.reason == "this process makes no more calls"

    run(test())


async def _stream_failure(tools: RemoteTools, call: RemoteCall) -> RemoteToolError:
    with pytest.raises(RemoteToolError) as caught:
        await streamed(tools, call)
    return caught.value


def test_closing_ends_connection_attempts_and_pings() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            async with remote_tools(connect_timeout_s=DEADLINE_S) as tools:
                connecting = asyncio.create_task(failure(tools, call_of("greet", address)))
                await failure(tools, call_of("greet", address, timeout_s=0.1))  # a ping follows
                await tools.close()
                assert (await connecting).reason == "this process makes no more calls"
            assert len(asyncio.all_tasks()) == 1

    run(test())


# --- The circuit breaker ---


def test_the_circuit_of_a_dead_address_opens_and_closes_by_itself(tmp_path: Path) -> None:
    async def test() -> None:
        address, worker = f"unix:{tmp_path}/worker.sock", Worker()
        async with remote_tools(pause_s=0.8, longest_pause_s=0.9) as tools:
            for _ in range(3):
                assert tools.state_of(address) == "closed"
                error = await failure(tools, call_of("greet", address))
                assert "the call was not answered" in error.reason
            assert tools.state_of(address) == "open"
            error = await failure(tools, call_of("greet", address))
            assert error.reason.startswith("3 failures in a row; it is tried again in 0.")
            assert error.retryable
            # The next trial fails as well.
            await until(lambda: tools.state_of(address) == "half_open")
            assert "the call was not answered" in (await failure(tools, call_of("greet", address))).reason
            assert "4 failures in a row" in (await failure(tools, call_of("greet", address))).reason
            async with serving(worker, address):
                await until(lambda: tools.state_of(address) == "half_open")
                assert await tools.execute(call_of("greet", address))
                assert tools.state_of(address) == "closed"

    with capture_logs() as logs:
        run(test())
    address = f"unix:{tmp_path}/worker.sock"
    assert [(log["event"], log["address"], log.get("retry_in_s")) for log in logs] == [
        ("tools cannot be reached", address, 0.8),
        ("tools cannot be reached", address, 0.9),
        ("tools can be reached again", address, None),
    ]


def test_a_restarted_worker_is_called_at_once() -> None:
    async def test() -> None:
        address = free_address()
        async with remote_tools() as tools:
            for _ in range(4):
                async with serving(Worker(), address):
                    assert await tools.execute(call_of("greet", address))
                error = await failure(tools, call_of("greet", address))
                if "Broken pipe" in error.reason:
                    # The client had not noticed yet that the connection was gone.
                    error = await failure(tools, call_of("greet", address))
                assert "refused" in error.reason

    run(test())


def test_a_broken_connection_with_many_calls_counts_as_one_failure() -> None:
    async def test() -> None:
        worker, address = Worker(), free_address()
        async with remote_tools(failures=2) as tools:
            async with serving(worker, address):
                calls = [asyncio.create_task(failure(tools, call_of("hang", address))) for _ in range(20)]
                await until(lambda: len(worker.requests) == 20)
            for error in await asyncio.gather(*calls):
                assert "the call was not answered" in error.reason
            assert tools.state_of(address) == "closed"

    run(test())


def test_concurrent_calls_make_one_trial_of_an_open_circuit() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            async with remote_tools(connect_timeout_s=0.3, failures=1, pause_s=0.1) as tools:
                await failure(tools, call_of("greet", address))
                await until(lambda: tools.state_of(address) == "half_open")
                errors = await asyncio.gather(*(failure(tools, call_of("greet", address)) for _ in range(5)))
        reasons = sorted(error.reason for error in errors)
        last = "1 failures in a row; it is being tried again now (the last: no connection within 0.3 s)"
        assert reasons == [*[last] * 4, "no connection within 0.3 s"]

    run(test())


def test_after_a_cancelled_trial_the_next_call_is_one() -> None:
    async def test() -> None:
        address = free_address()
        async with remote_tools(failures=1, pause_s=0.05) as tools:
            await failure(tools, call_of("greet", address))
            host, _, port = address.rpartition(":")
            with socket.create_server((host, int(port))):
                await until(lambda: tools.state_of(address) == "half_open")
                trial = asyncio.create_task(tools.execute(call_of("greet", address)))
                await asyncio.sleep(0.05)
                trial.cancel()
                await asyncio.wait((trial,))
            async with serving(Worker(), address):
                assert tools.state_of(address) == "half_open"
                while tools.state_of(address) != "closed":
                    # The first call may still get the connection that the trial was waiting for.
                    with suppress(RemoteToolError):
                        assert await tools.execute(call_of("greet", address))
                    await asyncio.sleep(0.01)

    run(test())


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED"])
def test_a_call_that_the_worker_breaks_off_counts_as_a_failure(code: str) -> None:
    async def test() -> None:
        async with serving(Worker()) as address, remote_tools(failures=1) as tools:
            error = await failure(tools, call_of("abort", address, metadata={"code": code}))
            assert error.reason == "the call was not answered: its own words"
            assert tools.state_of(address) == "open"

    run(test())


def test_the_pause_doubles_up_to_a_maximum_and_restarts_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    circuit = Circuit(failures=2, pause_s=1.0, longest_pause_s=5.0)
    assert circuit.failed("a") is None
    assert not circuit.succeeded()
    assert circuit.failed("b") is None
    pauses = [circuit.failed("c")]
    assert circuit.failed("of a call that began before") is None
    for _ in range(4):
        now += pauses[-1] or 0
        assert circuit.state == "half_open"
        assert circuit.admit()
        pauses.append(circuit.failed("d"))
        assert circuit.state == "open"
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert circuit.succeeded()
    assert circuit.state == "closed"
    assert not circuit.admit()
    assert [circuit.failed("e"), circuit.failed("f")] == [None, 1.0]


# --- Values without a declared type ---


@pytest.mark.parametrize(
    ("document", "type_name"),
    [
        (True, "boolean"),
        (1, "integer"),
        (1.0, "float"),
        ("NaN", "string"),
        (None, "map"),
        ([1], "list"),
        ({}, "map"),
        ({"shape": [1], "data": [1]}, "tensor"),
        ({"shape": [1], "data": [1], "more": 1}, "map"),
    ],
)
def test_a_json_value_is_sent_with_its_inferred_type_or_as_a_string_value(document: object, type_name: str) -> None:
    value = Value(json.dumps(document))
    wire = codec.loose_any_of(value)
    assert wire == AnyMessage(type_url=JSON_URL + type_name, value=value.json.encode())
    assert codec.value_of("x", wire) == value
    wire = codec.loose_any_of(value, codec.STRING_VALUE_STYLE)
    assert wire == AnyMessage(type_url=STRING_VALUE_URL, value=value.json.encode())
    assert codec.value_of("x", wire) == value


@pytest.mark.parametrize("text", ["{oops", "[" * 100_000])
def test_text_that_is_not_json_is_sent_for_the_receiver_to_refuse(text: str) -> None:
    assert codec.loose_any_of(Value(text)).type_url == JSON_URL + "string"


@pytest.mark.parametrize("style", [codec.JSON_STYLE, codec.STRING_VALUE_STYLE])
@pytest.mark.parametrize(
    ("description", "type_name"),
    [('{"type":"embedding"}', "embedding"), ('{"type":"tensor"}', "tensor"), ("{}", "tensor"), ("1", "tensor")],
)
def test_a_binary_value_has_its_type_in_both_styles(description: str, type_name: str, style: str) -> None:
    value = Value(description, b"\1")
    wire = codec.loose_any_of(value, style)
    assert wire.type_url == f"{JSON_URL}{type_name}.binary"
    assert codec.value_of("x", wire, b"\1") == value


def test_the_style_is_that_of_the_parameters() -> None:
    packed = AnyMessage()
    packed.Pack(StringValue(value="x"))
    unpacked = AnyMessage(type_url=STRING_VALUE_URL, value=b'"x"')
    plain = AnyMessage(type_url=JSON_URL + "float", value=b"1")
    assert codec.style_of([]) == codec.style_of([plain]) == codec.style_of([plain, packed]) == codec.JSON_STYLE
    assert codec.style_of([plain, packed, unpacked]) == codec.STRING_VALUE_STYLE


# --- TLS ---


def test_an_address_with_tls_is_called_with_the_certificates_of_the_moment(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    worker_pair, ours, theirs = authority.issue("worker"), authority.issue("server"), other.issue("server")
    material = (worker_pair.key.read_bytes(), worker_pair.cert.read_bytes())
    credentials = grpc.ssl_server_credentials([material], authority.cert.read_bytes(), require_client_auth=True)
    trusted = tmp_path / "trusted.pem"

    async def test() -> None:
        worker = Worker()
        async with serving(worker, credentials=credentials) as address:
            assert address.startswith("grpcs://127.0.0.1:")
            plain = address.removeprefix("grpcs://")
            async with remote_tools(tls=CallerFiles(trusted, ours.cert, ours.key), pause_s=0.001) as tools:
                assert (
                    "trusted.pem: cannot read it: No such file" in (await failure(tools, call_of("t", address))).reason
                )
                trusted.write_bytes(other.cert.read_bytes())
                assert "CERTIFICATE_VERIFY_FAILED" in (await failure(tools, call_of("t", address))).reason
                shutil.copy(authority.cert, trusted)
                result = await tools.execute(call_of("t", address))
                assert result == Value('{"tool":"t"}') or result == Value('{"tool": "t"}')
                await failure(tools, call_of("t", plain))
            for files in (CallerFiles(trusted), CallerFiles(trusted, theirs.cert, theirs.key)):
                async with remote_tools(tls=files) as tools:
                    await failure(tools, call_of("t", address))
            async with remote_tools(tls=CallerFiles(trusted), allow=lambda _: False) as tools:
                assert "are refused" in (await failure(tools, call_of("t", address))).reason
        assert len(worker.requests) == 1

    run(test())
