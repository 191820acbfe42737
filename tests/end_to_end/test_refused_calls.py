"""A call that was refused keeps nothing of its request in the server, even if no garbage is collected."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge
from google.protobuf.any_pb2 import Any as AnyMessage

from dspex_persist.infra.process import ServerProcess
from tests.end_to_end.old_style import environment, target_of

CALLS = 20
MIB = 1024 * 1024
LARGE = "n" * (10 * MIB)
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
        yield stub


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

    # What one call needs is there from then on.
    call()
    call()
    before = rss_mib(server)
    for _ in range(CALLS):
        call()
    assert rss_mib(server) - before < 50


def test_bytes_that_are_no_message_leave_nothing_behind(server: ServerProcess) -> None:
    with grpc.insecure_channel(target_of(server)) as channel:
        for rpc in ("/snakepit.bridge.BridgeService/SetVariable", "/snakepit.bridge.BridgeService/WatchVariables"):
            call = channel.unary_unary(rpc)
            content = b"\xff" * len(LARGE)
            before = 0
            for number in range(CALLS + 2):
                with pytest.raises(grpc.RpcError):
                    call(content)
                if number == 1:
                    before = rss_mib(server)
            assert rss_mib(server) - before < 50


def _taken(answer: Any) -> None:
    """Take the answer; of a stream, all that comes."""
    if isinstance(answer, Iterator):
        list(answer)


def rss_mib(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024
