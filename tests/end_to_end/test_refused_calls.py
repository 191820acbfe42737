"""A call that was refused keeps nothing of its request in the server, even if no garbage is collected."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dspex_persist_audit_pb2 as audit_pb
import dspex_persist_audit_pb2_grpc as audit
import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.end_to_end.old_style import environment, target_of
from tests.faults.crash_test import server_argv

pytestmark = pytest.mark.usefixtures("own_interpreters")

CALLS, ROUNDS = int(os.environ.get("REFUSED_CALLS", "8")), 5
LARGE_MIB = int(os.environ.get("REFUSED_MIB", "10"))
"""`make refused-test` says more calls, and larger ones."""
MIB = 1024 * 1024
LARGE = "n" * (LARGE_MIB * MIB)
MANY = {f"k{number}": "v" for number in range(100_000)}
PREDICATE = audit_pb.Predicate(operator=7, operand="a")
METHODS = [
    health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"],
    *pb.DESCRIPTOR.services_by_name["BridgeService"].methods,
    *audit_pb.DESCRIPTOR.services_by_name["AuditService"].methods,
]
# The server as it is, but for the collector.
WITHOUT_COLLECTOR = """if True:
    import gc
    gc.disable()
    from dspex_persist.cli import main
    main()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("refused")
    arguments = ("serve", "--db", str(folder / "s.db"), "--listen", "127.0.0.1:0")
    argv = (sys.executable, "-c", WITHOUT_COLLECTOR, *arguments)
    with ServerProcess.start(argv, env=environment(), cwd=folder) as process:
        yield process


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(target_of(server)) as channel:
        stub = bridge.BridgeServiceStub(channel)
        stub.InitializeSession(pb.InitializeSessionRequest(session_id="s"))
        text = pb.RegisterVariableRequest(session_id="s", name="text", type="string", initial_value=large_value('""'))
        stub.RegisterVariable(text)
        yield stub


def string_value(content: bytes) -> AnyMessage:
    """JSON that goes by the name of a packed message."""
    return AnyMessage(type_url="type.googleapis.com/google.protobuf.StringValue", value=content)


DEEP = pb.ToolRegistration(
    name="t", parameters=[pb.ParameterSpec(name="p", default_value=string_value(b"[" * 20_000 + b"]" * 20_000))]
)


def large_value(content: str = LARGE) -> AnyMessage:
    return AnyMessage(type_url="type.googleapis.com/snakepit.string", value=content.encode())


REFUSED = {
    "unknown session": lambda: ("GetSession", pb.GetSessionRequest(session_id=LARGE)),
    "unknown variable": lambda: ("GetVariable", pb.GetVariableRequest(session_id="s", variable_identifier=LARGE)),
    "history of an unknown one": lambda: (
        "GetVariableHistory",
        pb.GetVariableHistoryRequest(session_id="s", variable_identifier=LARGE),
    ),
    "write to an unknown one": lambda: (
        "SetVariable",
        pb.SetVariableRequest(session_id="s", variable_identifier="x", value=large_value(f'"{LARGE}"')),
    ),
    "no JSON": lambda: (
        "RegisterVariable",
        pb.RegisterVariableRequest(session_id="s", name="x", type="string", initial_value=large_value()),
    ),
    "too long a name": lambda: (
        "RegisterVariable",
        pb.RegisterVariableRequest(session_id="s", name=LARGE, type="integer", initial_value=large_value("1")),
    ),
    "too much metadata": lambda: (
        "InitializeSession",
        pb.InitializeSessionRequest(session_id="s", metadata={"a": LARGE}),
    ),
    "rollback": lambda: ("RollbackVariable", pb.RollbackVariableRequest(session_id="s", variable_identifier=LARGE)),
    "watch": lambda: ("WatchVariables", pb.WatchVariablesRequest(session_id=LARGE)),
    "stream": lambda: ("ExecuteStreamingTool", pb.ExecuteToolRequest(session_id="s", tool_name=LARGE)),
    "tool": lambda: ("ExecuteTool", pb.ExecuteToolRequest(session_id=LARGE, tool_name="x")),
    "registration": lambda: (
        "RegisterTools",
        pb.RegisterToolsRequest(session_id="s", tools=[pb.ToolRegistration(name="x", description=LARGE)]),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_calls_leave_nothing_behind(server: ServerProcess, stub: Any, name: str) -> None:
    rpc, request = REFUSED[name]()

    def call() -> None:
        with pytest.raises(grpc.RpcError) as caught:
            _taken(getattr(stub, rpc)(request))
        assert caught.value.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

    assert_nothing_is_kept(server, call, LARGE_MIB)


@pytest.mark.parametrize("name", ["write to an unknown one", "stream"])
def test_the_check_notices_a_server_that_keeps_refused_requests(tmp_path: Path, name: str) -> None:
    rpc, request = REFUSED[name]()
    argv = server_argv(tmp_path / "s.db", "keep-refused")
    with ServerProcess.start(argv, env=environment()) as server, grpc.insecure_channel(target_of(server)) as channel:
        stub = bridge.BridgeServiceStub(channel)
        stub.InitializeSession(pb.InitializeSessionRequest(session_id="s"))

        def call() -> None:
            with pytest.raises(grpc.RpcError):
                _taken(getattr(stub, rpc)(request))

        with pytest.raises(AssertionError, match="it grew by"):
            assert_nothing_is_kept(server, call, LARGE_MIB, rounds=2)


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
def test_no_rpc_keeps_anything_of_a_request_full_of_long_texts(
    server: ServerProcess, stub: Any, method: MethodDescriptor
) -> None:
    """Every rpc of both services: one that is added is among them."""
    assert stub is not None, "the session is there"
    request = GetMessageClass(method.input_type)()
    _fill(request)
    content = request.SerializeToString()
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(target_of(server), options) as channel:
        path = f"/{method.containing_service.full_name}/{method.name}"

        def call() -> None:
            # A stream of one message is the same as that message.
            answered = channel.unary_stream(path)(content, timeout=within(10))
            with contextlib.suppress(grpc.RpcError):
                list(answered)
            assert answered.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), answered.details()

        assert_nothing_is_kept(server, call, 4)


HOSTILE = {
    "predicates": lambda: ("ListHistory", audit_pb.ListHistoryRequest(where=[PREDICATE] * 100_000)),
    "conditions": lambda: ("ListHistory", audit_pb.ListHistoryRequest(metadata=MANY)),
    "conditions on executions": lambda: ("ListExecutions", audit_pb.ListExecutionsRequest(metadata=MANY)),
    "conditions on sessions": lambda: ("ListSessions", audit_pb.ListSessionsRequest(metadata=MANY)),
    "a text to look for": lambda: (
        "ListHistory",
        audit_pb.ListHistoryRequest(where=[audit_pb.Predicate(operator=7, operand="a" * 100_000)]),
    ),
    "a deep operand": lambda: (
        "ListHistory",
        audit_pb.ListHistoryRequest(session="s", where=[audit_pb.Predicate(operator=5, operand="[" * 60_000)]),
    ),
    "a long pattern": lambda: ("ListSessions", audit_pb.ListSessionsRequest(session="*a" * 60_000)),
    "metadata": lambda: ("InitializeSession", pb.InitializeSessionRequest(session_id="m", metadata=MANY)),
    "a deep default": lambda: ("RegisterTools", pb.RegisterToolsRequest(session_id="s", tools=[DEEP])),
    "a deep StringValue": lambda: (
        "SetVariable",
        pb.SetVariableRequest(session_id="s", variable_identifier="text", value=string_value(b"[" * 100_000)),
    ),
    "a batch": lambda: (
        "SetVariables",
        pb.BatchSetVariablesRequest(
            session_id="s",
            updates={f"v{number}": string_value(b"[" + b"[]," * 600_000 + b"1]") for number in range(45)},
        ),
    ),
    "parameters": lambda: (
        "ExecuteTool",
        pb.ExecuteToolRequest(
            session_id="s",
            tool_name="t",
            parameters={f"v{number}": string_value(b"[" + b"[]," * 600_000 + b"1]") for number in range(45)},
        ),
    ),
    "a large value": lambda: (
        "SetVariable",
        pb.SetVariableRequest(
            session_id="s", variable_identifier="text", value=string_value(b"[" + b"[]," * 30_000_000 + b"1]")
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_excessive_requests_are_refused_early(server: ServerProcess, stub: Any, name: str) -> None:
    rpc, request = HOSTILE[name]()
    assert stub is not None, "the session is there"
    with grpc.insecure_channel(target_of(server)) as channel:
        stubs = (bridge.BridgeServiceStub(channel), audit.AuditServiceStub(channel))
        call = next(getattr(each, rpc) for each in stubs if hasattr(each, rpc))
        before = _cpu_s(server)
        with contextlib.suppress(grpc.RpcError):
            answer = call(request)
            list(answer if isinstance(answer, Iterator) else ())
            assert name == "a deep operand", "it is a text like any other"
            return
        with pytest.raises(grpc.RpcError) as caught:
            _taken(call(request))
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
        # Twice, and with what the transport takes for 90 MB.
        assert _cpu_s(server) - before < 2


def test_bytes_that_are_no_message_leave_nothing_behind(server: ServerProcess) -> None:
    content = b"\xff" * len(LARGE)

    def call(rpc: Callable[[bytes], object]) -> None:
        with pytest.raises(grpc.RpcError):
            rpc(content)

    with grpc.insecure_channel(target_of(server)) as channel:
        for name in ("SetVariable", "WatchVariables"):
            rpc = channel.unary_unary(f"/snakepit.bridge.BridgeService/{name}")
            assert_nothing_is_kept(server, partial(call, rpc), LARGE_MIB)


def assert_nothing_is_kept(
    server: ServerProcess, call: Callable[[], None], text_mib: int, rounds: int = ROUNDS
) -> None:
    """Of a text this large in each call: in one round of some, the server grows by less than half of them.

    Texts that are kept show in every round. What the allocator has not given back yet does not, however much it is in
    one of them.
    """
    # What one call needs is there from then on.
    call()
    call()
    grown: list[int] = []
    while not grown or grown[-1] >= CALLS * text_mib / 2:
        assert len(grown) < rounds, f"it grew by {grown} MiB in rounds of {CALLS} calls with {text_mib} MiB each"
        before = rss_mib(server)
        for _ in range(CALLS):
            call()
        grown.append(rss_mib(server) - before)


def _fill(message: Any) -> None:
    """Long texts everywhere, but for the session, if there is anything else."""
    texts = [field for field in message.DESCRIPTOR.fields if field.cpp_type == field.CPPTYPE_STRING]
    for field in texts:
        text: Any = "t" * (4 * MIB) if field.type == field.TYPE_STRING else b"t" * (4 * MIB)
        if field.name.startswith("session") and len(texts) > 1:
            text = "s"
        if field.is_repeated:
            getattr(message, field.name).append(text)
        else:
            setattr(message, field.name, text)


def _cpu_s(server: ServerProcess) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _taken(answer: Any) -> None:
    """Take the answer; of a stream, all that comes."""
    if isinstance(answer, Iterator):
        list(answer)


def rss_mib(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024
