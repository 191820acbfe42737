"""What tests of tools share: a client as they exist in the field (generated stubs, nothing of this package), and an
eye on the journal in the database file."""

import functools
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge
from google.protobuf.any_pb2 import Any as AnyMessage

from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.end_to_end.gates import DEADLINE_S
from tests.prepared import commands

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "tests/assets/stubs"
EXECUTION_ID = "x-dspex-execution-id"
_PLAIN = "type.googleapis.com/snakepit."
_STRING_VALUE = "type.googleapis.com/google.protobuf.StringValue"
_TYPES = {bool: "boolean", int: "integer", float: "float", str: "string", dict: "map", list: "list"}


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which `tests` and the stubs can be imported, without settings other than `more`."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")}
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{STUBS}", "COLUMNS": "200", "NO_COLOR": "1"} | more


def serve(path: Path, *arguments: str) -> ServerProcess:
    """Start a server on the file `path`, and return when it is ready."""
    listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
    argv = (sys.executable, "-m", "dspex_persist", "serve", "--db", str(path), *listen, *arguments)
    return ServerProcess.start(argv, env=environment(), cwd=path.parent, ready_timeout_s=DEADLINE_S)


def target_of(server: ServerProcess) -> str:
    return f"127.0.0.1:{server.port}"


def wait_until(condition: Callable[[], T], what: str) -> T:
    """Poll for what no event tells; the first true answer."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.005)
    return answer


class Gate:
    """Where a tool announces itself and waits: a folder, which is the tool's parameter `gate`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def wait(self, name: str = "at") -> None:
        """Wait until the tool announces that it is at this point."""
        wait_until((self.folder / name).exists, f"the tool says {name!r}")

    def open(self) -> None:
        """Let the tool continue."""
        (self.folder / "go").touch()


def packed(value: object, *, style: str = "json") -> AnyMessage:
    if style == "string_value":
        return AnyMessage(type_url=_STRING_VALUE, value=json.dumps(value).encode())
    return AnyMessage(type_url=_PLAIN + _TYPES.get(type(value), "string"), value=json.dumps(value).encode())


@dataclass(frozen=True)
class Outcome:
    """What ExecuteTool answered."""

    message: Any

    @property
    def success(self) -> bool:
        return bool(self.message.success)

    @property
    def result(self) -> Any:
        assert self.message.success, self.message
        assert not self.message.error_message
        return json.loads(self.message.result.value)

    @property
    def error(self) -> str:
        assert not self.message.success
        assert not self.message.HasField("result")
        return str(self.message.error_message)

    @property
    def code(self) -> str:
        return str(self.message.metadata["error_code"])

    @property
    def execution_id(self) -> str:
        return str(self.message.metadata["execution_id"])

    @property
    def attempts(self) -> int:
        return int(self.message.metadata["attempts"])

    @property
    def sequence(self) -> int | None:
        text = self.message.metadata["commit_sequence"]
        return int(text) if text else None


class Caller:
    """One session, as old clients and old workers call it."""

    def __init__(self, stub: Any, session: str) -> None:
        self.stub = stub
        self.session = session

    def register(self, name: str, value: int) -> None:
        request = pb.RegisterVariableRequest(
            session_id=self.session, name=name, type="integer", initial_value=packed(value)
        )
        self.stub.RegisterVariable(request)

    def get(self, name: str = "a") -> Any:
        request = pb.GetVariableRequest(session_id=self.session, variable_identifier=name)
        return json.loads(self.stub.GetVariable(request).variable.value.value)

    def values(self) -> dict[str, Any]:
        listed = self.stub.ListVariables(pb.ListVariablesRequest(session_id=self.session)).variables
        return {variable.name: json.loads(variable.value.value) for variable in listed}

    def set(self, name: str, value: object) -> None:
        self.stub.SetVariable(
            pb.SetVariableRequest(session_id=self.session, variable_identifier=name, value=packed(value))
        )

    def set_all(self, **values: object) -> None:
        updates = {name: packed(value) for name, value in values.items()}
        request = pb.BatchSetVariablesRequest(session_id=self.session, updates=updates, atomic=True)
        assert self.stub.SetVariables(request).success

    def delete(self, name: str) -> None:
        self.stub.DeleteVariable(pb.DeleteVariableRequest(session_id=self.session, variable_identifier=name))

    def roll_back(self, name: str, version: int) -> None:
        self.stub.RollbackVariable(
            pb.RollbackVariableRequest(session_id=self.session, variable_identifier=name, target_version=version)
        )

    def history(self, name: str = "a") -> list[Any]:
        request = pb.GetVariableHistoryRequest(session_id=self.session, variable_identifier=name)
        return list(self.stub.GetVariableHistory(request).entries)

    def watch(self, **more: Any) -> Any:
        """The updates from now on."""
        updates = self.stub.WatchVariables(
            pb.WatchVariablesRequest(session_id=self.session, **more), timeout=DEADLINE_S
        )
        updates.initial_metadata()
        return updates

    def request(
        self, tool: str, parameters: Mapping[str, Any], *, key: str = "", style: str = "json", **metadata: str
    ) -> Any:
        values = {
            name: value if isinstance(value, AnyMessage) else packed(_plain(value), style=style)
            for name, value in parameters.items()
        }
        metadata |= {"idempotency_key": key} if key else {}
        return pb.ExecuteToolRequest(
            session_id=self.session, tool_name=tool, parameters=values, metadata=metadata, stream=False
        )

    def execute(self, tool: str, /, _key: str = "", **parameters: Any) -> Outcome:
        return Outcome(self.stub.ExecuteTool(self.request(tool, parameters, key=_key), timeout=DEADLINE_S))

    def begin(self, tool: str, /, _key: str = "", _timeout_s: float = DEADLINE_S, **parameters: Any) -> Any:
        """The same without waiting: a gRPC future of the answer."""
        return self.stub.ExecuteTool.future(self.request(tool, parameters, key=_key), timeout=_timeout_s)

    def stream(self, tool: str, /, _key: str = "", **parameters: Any) -> Any:
        """The chunks, as they come."""
        return self.stub.ExecuteStreamingTool(self.request(tool, parameters, key=_key), timeout=DEADLINE_S)


class OldClient(Caller):
    """A client that knows only the old protocol, with one session, in which the integers a, b and c are 0 at first."""

    def __init__(self, target: str, session: str, *, variables: tuple[str, ...] = ("a", "b", "c")) -> None:
        self._channel = grpc.insecure_channel(target)
        super().__init__(bridge.BridgeServiceStub(self._channel), session)
        self.view = self.stub.InitializeSession(pb.InitializeSessionRequest(session_id=session))
        for name in variables:
            self.register(name, 0)

    def close(self) -> None:
        self._channel.close()


class Inside(Caller):
    """The same from inside an execution: each call says which one it belongs to."""

    def __init__(self, stub: Any, session: str, execution_id: str) -> None:
        super().__init__(_Marked(stub, execution_id), session)
        self.execution_id = execution_id


class _Marked:
    """A stub each of whose calls carries the id of an execution."""

    def __init__(self, stub: Any, execution_id: str) -> None:
        self._stub = stub
        self._metadata = ((EXECUTION_ID, execution_id),)

    def __getattr__(self, rpc: str) -> Any:
        return functools.partial(getattr(self._stub, rpc), metadata=self._metadata)


def refusal_of(call: Callable[[], object]) -> Any:
    """The error with which a call ends; None if it is answered."""
    try:
        call()
    except grpc.RpcError as error:
        return error
    return None


def refused(call: Callable[[], object]) -> Any:
    """The same where it must not be answered."""
    error = refusal_of(call)
    assert error is not None, "it was answered"
    return error


def tools_list(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What `dspex-persist tools list` says."""
    return commands().run(["tools", "list", *arguments], cwd=cwd, env=environment(), timeout_s=within(60))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Gate | Path) else value


@dataclass(frozen=True)
class Entry:
    """One execution in the journal: its row, and what the events of its begin and its end say."""

    row: sqlite3.Row
    began: Mapping[str, Any]
    ended: Mapping[str, Any]

    @property
    def status(self) -> str:
        return str(self.row["status"])


class Journal:
    """The tool executions in a database file, read while the server runs."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _query(self, text: str, *parameters: Any) -> list[sqlite3.Row]:
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(text, parameters).fetchall()

    def of_session(self, session: str) -> list[Entry]:
        """Its executions, oldest first."""
        rows = self._query(
            "SELECT executions.* FROM executions JOIN sessions USING (session_key) WHERE session_id = ? "
            "ORDER BY began_sequence",
            session,
        )
        return [Entry(row, *self._bodies(row)) for row in rows]

    def of_id(self, execution_id: str) -> Entry:
        (row,) = self._query("SELECT * FROM executions WHERE execution_id = ?", execution_id)
        return Entry(row, *self._bodies(row))

    def ended(self, session: str, count: int = 1) -> list[Entry]:
        """The session's executions once there are `count`, all of them at their end: no answer tells a client that
        has gone."""

        def settled() -> list[Entry]:
            entries = self.of_session(session)
            return entries if len(entries) >= count and all(e.row["ended_sequence"] for e in entries) else []

        return wait_until(settled, f"{count} executions have ended")

    def _bodies(self, row: sqlite3.Row) -> Iterator[Mapping[str, Any]]:
        for kind, sequence in (
            ("execution_began", row["began_sequence"]),
            ("execution_ended", row["ended_sequence"]),
        ):
            bodies = self._query("SELECT body FROM events WHERE sequence = ? AND kind = ?", sequence, kind)
            documents = [json.loads(each["body"]) for each in bodies]
            yield next((body for body in documents if body["execution_id"] == row["execution_id"]), {})
