"""What the log says of tools that fail: in the server, in its workers, and in the processes of others."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import RegisterTools
from dspex_persist.state.model import RegisteredTool, ToolSpec
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import serve, target_of

SECRET, BEFORE, WORD, PLACE = "hunter2-s3cret", "what-it-was", "a wombat", "Melbourne Zoo"


class Quoting(bridge.BridgeServiceServicer):
    """A worker whose tools report an error with the secret, as they please."""

    def ExecuteTool(self, request: pb.ExecuteToolRequest, _context: object) -> pb.ExecuteToolResponse:
        return pb.ExecuteToolResponse(success=False, error_message=f"no {WORD} with {SECRET}, the answer is 42")


@contextmanager
def quoting_worker() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    bridge.add_BridgeServiceServicer_to_server(Quoting(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def call_with_secrets(server: ServerProcess, *registered: str) -> str:
    """Call tools that quote a secret; returns what the server has logged by its end."""
    with BridgedState(target_of(server), timeout_s=DEADLINE_S) as state:
        state.initialize_session("quoted")
        state.register_variable("quoted", "token", "string", BEFORE, metadata={"sensitive": "true"})
        state.set_variable("quoted", "token", SECRET)
        state.register_variable("quoted", "place", "string", PLACE)
        for address in registered:
            tool = RegisteredTool(ToolSpec("quote_there"), "worker", address)
            state.run(RegisterTools("quoted", "worker", (tool,)))
        for tool_name in ("quote", *("quote_there" for _ in registered)):
            outcome = state.execute_tool("quoted", tool_name, {"word": WORD})
            # The caller hears everything: it is its own.
            assert SECRET in str(outcome.error)
    server.terminate(DEADLINE_S)
    return server.stderr_tail


def failures_in(log: str) -> list[dict[str, object]]:
    lines = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
    return [line for line in lines if line["event"] == "tool failed"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_log_says_why_a_tool_failed_without_any_value(tmp_path: Path, workers: int) -> None:
    tools = ("--tools", "tests.end_to_end.pool_tools", "--workers", str(workers), "--log-level", "debug")
    with serve(tmp_path / "logged.db", *tools) as server, quoting_worker() as address:
        log = call_with_secrets(server, *([] if workers else [address]))
    own, *others = failures_in(log)
    assert (own["error"], own["reason"]) == ("LookupError", "no ••• with ••• or ••• at •••, and the answer is 42")
    for line in (own, *others):
        assert (line["session_id"], line["code"]) == ("quoted", "TOOL_FAILED")
        assert str(line["execution_id"]).startswith("exec_")
        assert isinstance(line["duration_s"], float)
    assert [line["reason"] for line in others] == ([] if workers else ["no ••• with •••, the answer is 42"])
    assert not any(value in log for value in (SECRET, BEFORE, WORD, PLACE))
