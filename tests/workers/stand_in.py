"""Stands in for existing workers of two generations: `python -m tests.workers.stand_in --generation old|new ...`.

It does what such workers were seen to do, with the generated stubs and nothing of this package. The old generation says
on stdout that it is ready, does one call at a time, registers with each call under another id, unpickles binary
parameters, and ends the session when its code is done with it. The new one pings the server first, says by a file that
it is ready, registers once for each session, and reports errors as JSON. Both listen on a port that they are given,
call back without any metadata, and ignore SIGTERM for a while. With `--session-context` the tools use the
SessionContext of this package, over the stub of the worker.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge
from google.protobuf.any_pb2 import Any as AnyMessage

IGNORES_TERM_S = 3.0


def packed(value: Any) -> AnyMessage:
    return AnyMessage(type_url="type.googleapis.com/google.protobuf.StringValue", value=json.dumps(value).encode())


class Session:
    """What adapters use: a client of the server, which knows the session and nothing of executions."""

    def __init__(self, stub: bridge.BridgeServiceStub, session_id: str) -> None:
        self.stub = stub
        self.id = session_id

    def __getitem__(self, name: str) -> Any:
        answer = self.stub.GetVariable(pb.GetVariableRequest(session_id=self.id, variable_identifier=name))
        return json.loads(answer.variable.value.value)

    def __setitem__(self, name: str, value: Any) -> None:
        wire = AnyMessage(type_url="type.googleapis.com/snakepit.integer", value=json.dumps(value).encode())
        self.stub.SetVariable(pb.SetVariableRequest(session_id=self.id, variable_identifier=name, value=wire))

    def set(self, name: str, text: str, token: str) -> int:
        wire = AnyMessage(type_url="type.googleapis.com/snakepit.string", value=json.dumps(text).encode())
        request = pb.SetVariableRequest(
            session_id=self.id, variable_identifier=name, value=wire, metadata={"token": token}
        )
        return int(self.stub.SetVariable(request).new_version)

    def call(self, tool: str, **parameters: Any) -> Any:
        wires = {
            name: AnyMessage(
                type_url="type.googleapis.com/google.protobuf.StringValue", value=json.dumps(each).encode()
            )
            for name, each in parameters.items()
        }
        request = pb.ExecuteToolRequest(session_id=self.id, tool_name=tool, parameters=wires)
        answer = self.stub.ExecuteTool(request)
        if not answer.success:
            raise RuntimeError(answer.error_message)
        return json.loads(answer.result.value)


def increase(session: Session, amount: int) -> int:
    session["a"] = session["a"] + int(amount)
    return int(session["a"])


def fail(session: Session) -> None:
    session["a"] = -1
    raise ValueError("it went wrong")


def hold(session: Session, gate: str) -> int:
    before = session["a"]
    Path(f"{gate}.at").touch()
    while not Path(gate).exists():
        time.sleep(0.005)
    session["a"] = before + 1
    return before


def late(session: Session, gate: str) -> str:
    """Go on after the caller's time is up."""
    Path(f"{gate}.at").touch()
    while not Path(gate).exists():
        time.sleep(0.005)
    try:
        session["a"] = -1
        done = "written"
    except grpc.RpcError as error:
        done = error.code().name
    Path(f"{gate}.late").write_text(done)
    return done


def below(session: Session, amount: int) -> list[Any]:
    return [session.call("increase", amount=amount), session["a"]]


def crash(session: Session) -> None:
    session["a"] = -1
    print("last words", file=sys.stderr, flush=True)
    os._exit(9)


def pickled(session: Session) -> bytes:
    return b"\x80\x04K\x01."


def nonsense(session: Session) -> Any:
    return AnyMessage(type_url="type.googleapis.com/snakepit.integer", value=b"\xff{")


def write_together(session: Any, fails: bool) -> list[Any]:
    """What only a SessionContext can do."""
    with session.batch_updates() as batch:
        batch["a"] = 7
        batch["b"] = "x" if fails else 8
    return [session.v.a, session.variable("b").value, "c" in session, sorted(session.get_variables(["a", "b"]))]


def count(session: Session, to: int) -> Iterator[Any]:
    for number in range(int(to)):
        session["a"] = number
        yield number


def count_and_fail(session: Session) -> Iterator[Any]:
    yield 1
    raise ValueError("half way")


# For the chaos test: they write one text to several variables, and return or yield the versions.


def spread_there(session: Session, targets: list[str], value: str, token: str, pause_s: float = 0.0) -> dict[str, int]:
    versions = {}
    for target in targets:
        versions[target] = session.set(target, value, token)
        time.sleep(pause_s)
    return versions


def spread_and_call(
    session: Session, targets: list[str], value: str, token: str, pause_s: float = 0.0
) -> dict[str, int]:
    """Half by itself, and half by a tool of the server's own."""
    half = len(targets) // 2
    versions = spread_there(session, targets[:half], value, token, pause_s)
    rest: dict[str, int] = session.call("spread", targets=targets[half:], value=value, token=token)
    return versions | rest


def spread_further(
    session: Session, targets: list[str], value: str, token: str, pause_s: float = 0.0
) -> dict[str, int]:
    """Half by itself, and half by another worker of its pool."""
    half = len(targets) // 2
    versions = spread_there(session, targets[:half], value, token, pause_s)
    rest: dict[str, int] = session.call("spread_there", targets=targets[half:], value=value, token=token)
    return versions | rest


def stream_there(
    session: Session, targets: list[str], value: str, token: str, pause_s: float = 0.0
) -> Iterator[dict[str, int]]:
    for target in targets:
        yield spread_there(session, [target], value, token, pause_s)


_ALL = (increase, fail, hold, late, below, crash, pickled, nonsense, spread_there, spread_and_call, spread_further)
TOOLS: dict[str, Any] = {each.__name__: each for each in _ALL}
TOOLS["write_together"] = write_together
STREAMS: dict[str, Any] = {each.__name__: each for each in (count, count_and_fail, stream_there)}


def session_context(stub: bridge.BridgeServiceStub, session_id: str) -> Any:
    from dspex_persist.compat import SessionContext

    class WithCall(SessionContext):
        call = SessionContext.call_tool
        # The worker ends the session itself.
        id = property(lambda self: self.session_id)

    return WithCall(stub, session_id)


class Worker(bridge.BridgeServiceServicer):
    def __init__(self, generation: str, address: str, new_session: Any = Session) -> None:
        self.is_old = generation == "old"
        self.new_session = new_session
        self.stub = bridge.BridgeServiceStub(grpc.insecure_channel(address))
        self.known: set[str] = set()
        self.one_at_a_time = threading.Lock()

    def Ping(self, request: Any, context: Any) -> Any:
        if self.is_old:
            with self.one_at_a_time:
                return pb.PingResponse(message=request.message)
        return pb.PingResponse(message=request.message)

    def _register(self, session_id: str) -> None:
        if not self.is_old and session_id in self.known:
            return
        if self.is_old or session_id not in self.known:
            self.stub.InitializeSession(pb.InitializeSessionRequest(session_id=session_id))
        self.known.add(session_id)
        worker_id = f"worker_{time.monotonic_ns()}" if self.is_old else f"python-{os.getpid()}"
        tools = [pb.ToolRegistration(name="increase"), pb.ToolRegistration(name="extra", description="One more.")]
        answer = self.stub.RegisterTools(
            pb.RegisterToolsRequest(session_id=session_id, worker_id=worker_id, tools=tools)
        )
        assert answer.success

    def _begin(self, request: Any) -> tuple[Session, dict[str, Any]]:
        self._register(request.session_id)
        self.stub.Heartbeat(pb.HeartbeatRequest(session_id=request.session_id))
        parameters = {name: json.loads(wire.value) for name, wire in request.parameters.items()}
        if self.is_old and request.binary_parameters:
            os._exit(17)
        return self.new_session(self.stub, request.session_id), parameters

    def _end(self, session: Session) -> None:
        if self.is_old:
            self.stub.CleanupSession(pb.CleanupSessionRequest(session_id=session.id))

    def _text(self, error: Exception) -> str:
        if self.is_old:
            return str(error)
        said = {"type": type(error).__name__, "message": str(error), "stacktrace": ["in the worker"], "context": {}}
        return json.dumps(said)

    def ExecuteTool(self, request: Any, context: Any) -> Any:
        with self.one_at_a_time:
            session, parameters = self._begin(request)
            try:
                result = (TOOLS.get(request.tool_name) or (lambda _: "extra"))(session, **parameters)
            except Exception as error:  # noqa: BLE001 -- as an adapter does
                return pb.ExecuteToolResponse(success=False, error_message=self._text(error))
            finally:
                self._end(session)
        if isinstance(result, bytes):
            wire = AnyMessage(type_url="type.googleapis.com/snakepit.tensor.binary", value=result)
        elif isinstance(result, AnyMessage):
            wire = result
        else:
            wire = AnyMessage(
                type_url="type.googleapis.com/google.protobuf.StringValue", value=json.dumps(result).encode()
            )
        return pb.ExecuteToolResponse(success=True, result=wire)

    def ExecuteStreamingTool(self, request: Any, context: Any) -> Iterator[Any]:
        session, parameters = self._begin(request)
        try:
            for chunk in STREAMS[request.tool_name](session, **parameters):
                yield pb.ToolChunk(chunk_id="c", data=json.dumps(chunk).encode())
            yield pb.ToolChunk(chunk_id="c", is_final=True)
        except ValueError as error:
            context.abort(grpc.StatusCode.INTERNAL, self._text(error))
        finally:
            self._end(session)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--generation", choices=["old", "new"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--elixir-address", required=True)
    parser.add_argument("--snakepit-run-id", default="")
    parser.add_argument("--session-context", action="store_true")
    parser.add_argument("--ignores-term-s", type=float, default=IGNORES_TERM_S)
    arguments = parser.parse_args()
    ends_at: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: ends_at.append(time.monotonic() + arguments.ignores_term_s))
    new_session = session_context if arguments.session_context else Session
    worker = Worker(arguments.generation, arguments.elixir_address, new_session)
    server = grpc.server(ThreadPoolExecutor(8))
    bridge.add_BridgeServiceServicer_to_server(worker, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port(f"127.0.0.1:{arguments.port}")
    if not worker.is_old:
        worker.stub.Ping(pb.PingRequest(message="coordinator?"), wait_for_ready=True, timeout=60)
    server.start()
    if worker.is_old:
        print(f"GRPC_READY:{port}", flush=True)
    else:
        file = Path(os.environ["SNAKEPIT_READY_FILE"])
        file.with_suffix(".new").write_text(str(port))
        file.with_suffix(".new").rename(file)
    while not ends_at or time.monotonic() < ends_at[0]:
        time.sleep(0.02)
    # As the old one does, although all is well.
    os._exit(1 if worker.is_old else 0)


if __name__ == "__main__":
    main()
