"""A worker as they exist in the field: a process that runs tools for a server and calls it back, with the generated
stubs and nothing of this package. `python -m tests.end_to_end.worker_process SERVER ADDRESS...` serves the tools below
at the addresses; the callbacks go to the server.

A callback belongs to the execution whose id came with the call, which is all that a worker has to do for its tools to
be transactions.
"""

import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

from tests.end_to_end.gates import announce, wait_at
from tests.end_to_end.old_style import EXECUTION_ID, Caller, Inside, Outcome, packed

WORKER_ID = "worker-1"


# Variables


def increase(inside: Inside, amount: int) -> int:
    """Add to a."""
    inside.set("a", inside.get("a") + amount)
    return int(inside.get("a"))


def increase_at_gate(inside: Inside, gate: str) -> int:
    """Read a, wait, add to what it was."""
    before = inside.get("a")
    wait_at(gate)
    inside.set("a", before + 1)
    return int(inside.get("a"))


def use_everything(inside: Inside, gate: str, fails: bool = False) -> dict[str, Any]:
    """Every rpc on variables; each sees what those before it have done."""
    inside.register("new", 1)
    inside.set("a", 5)
    inside.set("a", 6)
    inside.roll_back("a", 1)
    inside.set_all(b=7, new=2)
    inside.delete("c")
    inside.stub.AddDependency(
        pb.AddDependencyRequest(session_id=inside.session, from_variable="new", to_variable="b", dependency_type="uses")
    )
    names = {"session_id": inside.session, "variable_identifier": "b"}
    inside.stub.StartOptimization(pb.StartOptimizationRequest(optimizer_id="optimizer-1", **names))
    optimized = inside.stub.StopOptimization(pb.StopOptimizationRequest(**names)).final_value
    batch = inside.stub.GetVariables(
        pb.BatchGetVariablesRequest(session_id=inside.session, variable_identifiers=["new", "c"])
    )
    seen = {
        "get": inside.get("a"),
        "batch": [json.loads(batch.variables["new"].value.value), list(batch.missing_variables)],
        "list": inside.values(),
        "history": [entry.version for entry in inside.history("a")],
        "optimized": json.loads(optimized.value),
    }
    wait_at(gate)
    if fails:
        raise ValueError("it went wrong")
    return seen


# Those that are caught in the act


def write_around(inside: Inside, gate: str) -> None:
    """Write, wait, write again; say what came of that."""
    inside.set("a", -1)
    wait_at(gate)
    write_late(inside, gate)


def leave_behind(inside: Inside, gate: str) -> None:
    """End, but leave a thread that writes later."""
    inside.set("a", 1)

    def write_when_allowed() -> None:
        wait_at(gate)
        write_late(inside, gate)

    threading.Thread(target=write_when_allowed, daemon=True).start()


def write_late(inside: Inside, gate: str) -> None:
    """Write b, and announce how that was answered."""
    try:
        inside.set("b", -1)
    except grpc.RpcError as error:
        announce(gate, error.code().name)
        raise
    announce(gate, "OK")


def begin_late(inside: Inside, gate: str) -> list[int]:
    """Wait, and only then call back for the first time."""
    wait_at(gate)
    inside.set("a", inside.get("a") + 1)
    inside.set("b", call_helper(inside, 10))
    return [inside.get("a"), inside.get("b")]


# From tool to tool


def call_helper(inside: Inside, amount: int, fails: bool = False) -> int:
    """Have a tool of the server's add to a, within the same transaction."""
    exposed = inside.stub.GetExposedElixirTools(pb.GetExposedElixirToolsRequest(session_id=inside.session))
    (helper,) = exposed.tools
    request = pb.ExecuteElixirToolRequest(
        session_id=inside.session, tool_name=helper.name, parameters={"amount": packed(amount)}
    )
    result = Outcome(inside.stub.ExecuteElixirTool(request)).result
    if fails:
        raise ValueError("it went wrong")
    return int(result)


def call_each_other(inside: Inside, amount: int) -> list[int]:
    """Set a, and have a tool of the server's and one of a worker's add to it."""
    inside.set("a", 100)
    return [call_helper(inside, amount), inside.execute("increase", amount=amount).result, inside.get("a")]


# Streams


def stream(inside: Inside, gate: str) -> Iterator[int]:
    """Two chunks; what it wrote comes with the end."""
    inside.set("a", 7)
    yield 1
    yield 2
    wait_at(gate)


def break_off(inside: Inside) -> Iterator[int]:
    """A chunk, then nothing but an error."""
    inside.set("a", -1)
    yield 1
    raise ValueError("it broke off")


_CODES: tuple[Callable[..., Any], ...] = (
    *(increase, increase_at_gate, use_everything, write_around, leave_behind, begin_late, call_helper, call_each_other),
    *(stream, break_off),
)
TOOLS = {code.__name__: code for code in _CODES}


def register_tools(client: Caller, address: str | None) -> Any:
    """Tell a session's server of all tools here, and where they can be reached."""
    registrations = [
        pb.ToolRegistration(
            name=name,
            description=code.__doc__ or "",
            metadata={} if address is None else {"address": address},
            supports_streaming=inspect.isgeneratorfunction(code),
        )
        for name, code in TOOLS.items()
    ]
    request = pb.RegisterToolsRequest(session_id=client.session, tools=registrations, worker_id=WORKER_ID)
    return client.stub.RegisterTools(request)


class Worker(bridge.BridgeServiceServicer):
    """The rpcs that a server calls. `server`: where callbacks go."""

    def __init__(self, server: str) -> None:
        self._server = bridge.BridgeServiceStub(grpc.insecure_channel(server))

    def Ping(self, request: Any, _context: Any) -> Any:
        return pb.PingResponse(message=request.message)

    def ExecuteTool(self, request: Any, context: Any) -> Any:
        try:
            result = self._start(request, context)
        except Exception as error:  # noqa: BLE001 -- the tool's; the caller gets it
            return pb.ExecuteToolResponse(success=False, error_message=_message_of(error))
        return pb.ExecuteToolResponse(success=True, result=packed(result))

    def ExecuteStreamingTool(self, request: Any, context: Any) -> Iterator[Any]:
        try:
            for chunk in self._start(request, context):
                yield pb.ToolChunk(data=json.dumps(chunk).encode())
        except Exception as error:  # noqa: BLE001 -- the same
            context.abort(grpc.StatusCode.ABORTED, _message_of(error))
        yield pb.ToolChunk(is_final=True)

    def _start(self, request: Any, context: Any) -> Any:
        execution_id = dict(context.invocation_metadata())[EXECUTION_ID]
        inside = Inside(self._server, request.session_id, execution_id)
        arguments = {name: json.loads(value.value) for name, value in request.parameters.items()}
        return TOOLS[request.tool_name](inside, **arguments)


def _message_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main(server: str, *addresses: str) -> None:
    """Serve until the process is ended."""
    worker = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    bridge.add_BridgeServiceServicer_to_server(Worker(server), worker)
    port, *_ = [worker.add_insecure_port(address) for address in addresses]
    worker.start()
    print(f"GRPC_READY:{port}", flush=True)
    worker.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
