"""Large values are parsed off the event loop and the writer: neither Pings nor writes of other clients wait."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge
from google.protobuf.any_pb2 import Any as AnyMessage

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.limits import Limits
from tests.end_to_end.noting_server import LARGE
from tests.end_to_end.old_style import DEADLINE_S, EXECUTION_ID, Gate, environment, target_of

NAMES: Final = [f"v{number}" for number in range(8)]
EVERYBODY_S: Final = {"MainThread", "dspex-persist-writer"}
LARGEST = "[" + ",".join("1" * 7 for _ in range(Limits().value_size_bytes // 8 - 1)) + "]"
KEY = "x-dspex-idempotency-key"


class Noted:
    """A server that notes what it reads, in the folder of a gate."""

    def __init__(self, gate: Gate, stub: Any) -> None:
        self.gate = gate
        self.stub = stub

    def threads(self) -> list[str]:
        """Those that have read large texts since the last time."""
        notes = self.gate.folder / "notes"
        names = notes.read_text().split("\n")[:-1] if notes.exists() else []
        notes.unlink(missing_ok=True)
        return names


def start(folder: Path, gate: Gate) -> ServerProcess:
    serve = (
        "serve",
        "--db",
        str(folder / "s.db"),
        "--listen",
        "127.0.0.1:0",
        "--tools",
        "tests.end_to_end.noting_server",
    )
    argv = (sys.executable, "-m", "tests.end_to_end.noting_server", str(gate), *serve)
    return ServerProcess.start(argv, env=environment(), cwd=folder, ready_timeout_s=DEADLINE_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Gate]]:
    folder: Path = tmp_path_factory.mktemp("large")
    gate = Gate(folder / "gate")
    with start(folder, gate) as process:
        yield process, gate


@pytest.fixture
def noted(server: tuple[ServerProcess, Gate]) -> Iterator[Noted]:
    process, gate = server
    for name in ("at", "end", "go", "hold", "inside", "notes"):
        (gate.folder / name).unlink(missing_ok=True)
    with grpc.insecure_channel(target_of(process)) as channel:
        stub = bridge.BridgeServiceStub(channel)
        stub.CleanupSession(pb.CleanupSessionRequest(session_id="s", force=True))
        stub.InitializeSession(pb.InitializeSessionRequest(session_id="s"))
        for name in NAMES:
            register(stub, name, "list", "[]")
        register(stub, "small", "integer", "0")
        yield Noted(gate, stub)


def wire(text: str) -> AnyMessage:
    return AnyMessage(type_url="type.googleapis.com/snakepit.list", value=text.encode())


def register(stub: Any, name: str, type_name: str, text: str) -> None:
    value = wire(text)
    stub.RegisterVariable(pb.RegisterVariableRequest(session_id="s", name=name, type=type_name, initial_value=value))


def batch(texts: Mapping[str, str], *, atomic: bool = True) -> pb.BatchSetVariablesRequest:
    updates = {name: wire(text) for name, text in texts.items()}
    return pb.BatchSetVariablesRequest(session_id="s", updates=updates, atomic=atomic)


def set_one(name: str, text: str) -> pb.SetVariableRequest:
    return pb.SetVariableRequest(session_id="s", variable_identifier=name, value=wire(text))


def test_no_caller_waits_while_the_largest_values_are_parsed(noted: Noted) -> None:
    stub, gate = noted.stub, noted.gate
    (gate.folder / "hold").touch()
    with ThreadPoolExecutor(1) as writing:
        written = writing.submit(stub.SetVariables, batch(dict.fromkeys(NAMES, LARGEST)), timeout=DEADLINE_S)
        gate.wait()
        assert stub.Ping(pb.PingRequest(message="there?"), timeout=DEADLINE_S).message == "there?"
        assert stub.SetVariable(set_one("small", "1"), timeout=DEADLINE_S).new_version == 1
        assert not written.done()
        (gate.folder / "go").touch()
        assert dict(written.result().new_versions) == dict.fromkeys(NAMES, 1)
    threads = noted.threads()
    assert len(threads) == len(NAMES)
    assert not EVERYBODY_S & set(threads)


PACKED = AnyMessage(type_url="type.googleapis.com/google.protobuf.StringValue", value=b'"%s"' % (b"x" * 100_000))
CALLS: dict[str, tuple[Callable[[Any], object], int]] = {
    "set": (lambda stub: stub.SetVariable(set_one("v0", LARGEST)), 1),
    "set under a key": (lambda stub: stub.SetVariable(set_one("v0", LARGEST), metadata=[(KEY, "a")]), 1),
    "batch under a key": (lambda stub: stub.SetVariables(batch({"v0": LARGEST}), metadata=[(KEY, "b")]), 1),
    "register": (lambda stub: register(stub, "new", "list", LARGEST), 1),
    "register again": (lambda stub: register(stub, "v0", "list", LARGEST), 0),
    "refused by the type": (lambda stub: stub.SetVariables(batch({"small": LARGEST})), 1),
    "unknown variable": (lambda stub: stub.SetVariables(batch({"missing": LARGEST})), 0),
    "a text that is read as a list": (lambda stub: stub.SetVariable(set_one("v0", json.dumps(LARGEST))), 2),
    "a text of another kind of client": (
        lambda stub: stub.SetVariables(pb.BatchSetVariablesRequest(session_id="s", updates={"v0": PACKED})),
        1,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_is_read_as_often_as_need_be_and_not_on_a_thread_of_all(noted: Noted, name: str) -> None:
    call, times = CALLS[name]
    call(noted.stub)
    threads = noted.threads()
    assert len(threads) == times
    assert not EVERYBODY_S & set(threads)


def test_a_repetition_under_a_key_too_of_a_variable_that_is_gone(noted: Noted) -> None:
    stub, metadata = noted.stub, [(KEY, "gone")]
    first = stub.SetVariable(set_one("v1", LARGEST), metadata=metadata)
    stub.DeleteVariable(pb.DeleteVariableRequest(session_id="s", variable_identifier="v1"))
    noted.threads()
    again = stub.SetVariable(set_one("v1", LARGEST.replace(",", ", ", 1)), metadata=metadata)
    assert again.new_version == first.new_version == 1
    threads = noted.threads()
    assert threads
    assert not EVERYBODY_S & set(threads)


def test_a_variable_that_is_replaced_meanwhile_has_the_value_read_again(noted: Noted) -> None:
    stub, gate = noted.stub, noted.gate
    (gate.folder / "hold").touch()
    text = "[" + ",".join(["1"] * LARGE) + "]"
    with ThreadPoolExecutor(1) as writing:
        written = writing.submit(stub.SetVariables, batch({"v0": text, "v1": text}), timeout=DEADLINE_S)
        gate.wait()
        stub.DeleteVariable(pb.DeleteVariableRequest(session_id="s", variable_identifier="v0"), timeout=DEADLINE_S)
        register(stub, "v0", "embedding", "[]")
        (gate.folder / "go").touch()
        assert dict(written.result().new_versions) == {"v0": 1, "v1": 1}
    kept = stub.GetVariable(pb.GetVariableRequest(session_id="s", variable_identifier="v0")).variable
    assert (kept.type, kept.value.value[:9]) == ("embedding", b"[1.0,1.0,")
    assert not EVERYBODY_S & set(noted.threads())


def test_inside_an_execution_each_is_read_once_for_its_own_memory_and_for_the_commit(noted: Noted) -> None:
    stub, gate = noted.stub, noted.gate
    with ThreadPoolExecutor(1) as executing:
        where = {"gate": AnyMessage(value=json.dumps(str(gate)).encode())}
        request = pb.ExecuteToolRequest(session_id="s", tool_name="stay", parameters=where)
        ended = executing.submit(stub.ExecuteTool, request, timeout=DEADLINE_S)
        gate.wait("inside")
        inside = [(EXECUTION_ID, (gate.folder / "id").read_text())]
        stub.SetVariables(batch({"v0": LARGEST, "v1": LARGEST}), metadata=inside)
        stub.SetVariable(set_one("v2", LARGEST), metadata=inside)
        (gate.folder / "end").touch()
        assert ended.result().success
    kept = stub.GetVariable(pb.GetVariableRequest(session_id="s", variable_identifier="v2")).variable
    assert kept.value.value == LARGEST.encode()
    threads = noted.threads()
    assert len(threads) == 3
    assert not EVERYBODY_S & set(threads)


def test_after_a_start_the_types_of_variables_come_from_the_file(tmp_path: Path) -> None:
    """No session is in memory then, and only the writer brings one there."""
    gate = Gate(tmp_path / "gate")
    for version in (1, 2):
        with start(tmp_path, gate) as server, grpc.insecure_channel(target_of(server)) as channel:
            noted = Noted(gate, bridge.BridgeServiceStub(channel))
            if version == 1:
                noted.stub.InitializeSession(pb.InitializeSessionRequest(session_id="s"))
                register(noted.stub, "v0", "list", "[]")
            assert noted.stub.SetVariable(set_one("v0", LARGEST)).new_version == version
            threads = noted.threads()
            assert len(threads) == 1
            assert not EVERYBODY_S & set(threads)
