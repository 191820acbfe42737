"""Tools in other processes, registered over the unchanged protocol: a real server, real workers that call it back from
inside the executions, and a client that knows nothing of all this."""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import RegisterTools
from dspex_persist.state.model import RegisteredTool, ToolSpec
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import (
    ROOT,
    Entry,
    Gate,
    Inside,
    Journal,
    OldClient,
    Outcome,
    environment,
    packed,
    refusal_of,
    refused,
    serve,
    target_of,
    tools_list,
    wait_until,
)
from tests.end_to_end.worker_process import TOOLS, WORKER_ID, register_tools

SERVED = ("--tools", "tests.end_to_end.served_tools")
UNTOUCHED = {"a": 0, "b": 0, "c": 0}
FREE = "127.0.0.1:0"


def start_worker(server: str, *addresses: str) -> ServerProcess:
    """A worker that calls back to `server`, ready."""
    argv = [sys.executable, "-m", "tests.end_to_end.worker_process", server, *(addresses or (FREE,))]
    return ServerProcess.start(argv, env=environment(), cwd=ROOT)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote") / "sessions.db"


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[ServerProcess]:
    with serve(path, *SERVED) as process:
        yield process


@pytest.fixture(scope="module")
def addresses(server: ServerProcess, path: Path) -> Iterator[dict[str, str]]:
    """Those of one worker, for the tests that leave it as it was."""
    socket = f"unix:{path.with_name('worker.sock')}"
    with start_worker(target_of(server), FREE, socket) as process:
        yield {"tcp": target_of(process), "unix": socket}


@pytest.fixture
def worker(server: ServerProcess) -> Iterator[ServerProcess]:
    """One that the test may end, or freeze."""
    with start_worker(target_of(server)) as process:
        yield process


@pytest.fixture
def client(client: OldClient, request: pytest.FixtureRequest) -> OldClient:
    """A session in which the worker's tools are registered: the test's own worker, if it has one."""
    own = "worker" in request.fixturenames
    address = target_of(request.getfixturevalue("worker")) if own else request.getfixturevalue("addresses")["tcp"]
    register_tools(client, address)
    return client


@contextmanager
def inside(target: str, session: str, execution_id: str) -> Iterator[Inside]:
    """A caller that says it belongs to an execution."""
    with grpc.insecure_channel(target) as channel:
        yield Inside(bridge.BridgeServiceStub(channel), session, execution_id)


def running(journal: Journal, client: OldClient) -> str:
    """The id of the session's execution under way."""
    (entry,) = [entry for entry in journal.of_session(client.session) if entry.status == "running"]
    return str(entry.row["execution_id"])


def by_tool(entries: list[Entry]) -> dict[str, Entry]:
    return {entry.row["tool"]: entry for entry in entries}


def circuit_of(client: OldClient, tool: str = "increase") -> str:
    """Whether the server calls the tool's worker."""
    request = pb.GetExposedElixirToolsRequest(session_id=client.session)
    tools = client.stub.GetExposedElixirTools(request, metadata=(("x-dspex-tools", "all"),)).tools
    (found,) = [each for each in tools if each.name == tool]
    return str(found.metadata["dspex.circuit"])


def listed_tool(server: ServerProcess, client: OldClient, cwd: Path, tool: str = "increase") -> dict[str, Any]:
    """The tool as the command line shows it."""
    listed = tools_list("--target", target_of(server), "--session", client.session, "--json", cwd=cwd)
    assert listed.returncode == 0, listed.stderr
    (found,) = [each for each in json.loads(listed.stdout)["tools"] if each["name"] == tool]
    return dict(found)


# --- What there is ---


def test_registered_tools_are_counted_and_listed(
    server: ServerProcess, client: OldClient, addresses: dict[str, str], tmp_path: Path
) -> None:
    ids = register_tools(client, addresses["tcp"]).tool_ids
    assert ids == {name: f"{client.session}:{name}" for name in TOOLS}
    resumed = OldClient(target_of(server), client.session)
    available = resumed.view.available_tools
    resumed.close()
    assert set(available) == {*client.view.available_tools, *TOOLS}
    assert len(available) == len(client.view.available_tools) + len(TOOLS)
    summary = client.stub.GetSession(pb.GetSessionRequest(session_id=client.session))
    assert summary.tool_count == len(available)
    assert {name for name in TOOLS if available[name].supports_streaming} == {"stream", "break_off"}
    assert available["increase"].description == "Add to a."
    listed = listed_tool(server, client, tmp_path)
    facts = [listed[key] for key in ("where", "worker_id", "address", "circuit")]
    assert facts == ["worker", WORKER_ID, addresses["tcp"], "closed"]


def test_a_worker_that_registers_again_without_its_address_is_still_reached(client: OldClient) -> None:
    """As old workers do before every call, and under another id each time."""
    for number in range(2):
        tools = [pb.ToolRegistration(name=name) for name in ("increase", "echo")]
        request = pb.RegisterToolsRequest(session_id=client.session, tools=tools, worker_id=f"w{number}")
        # The server itself has an echo.
        assert dict(client.stub.RegisterTools(request).tool_ids) == {"increase": f"{client.session}:increase"}
        assert client.execute("increase", amount=1).success


def test_proxies_of_the_environment_stand_before_other_machines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before our own client, nor before a worker that the server calls; in the way of a plain stub."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    path = tmp_path / "s.db"
    with serve(path, "--tools", "tests.end_to_end.served_tools") as server:
        with BridgedState(target_of(server), timeout_s=DEADLINE_S) as state:
            state.initialize_session("s")
            for name in ("a", "b", "c"):
                state.register_variable("s", name, "integer", 0)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        connected = BridgedState(target_of(server), timeout_s=DEADLINE_S)
        with start_worker(target_of(server)) as worker, connected as state:
            increase = RegisteredTool(ToolSpec("increase"), "w", target_of(worker))
            state.run(RegisterTools("s", "w", (increase,)))
            assert state.execute_tool("s", "increase", {"amount": 2}).success
        monkeypatch.delenv("no_proxy")
        with grpc.insecure_channel(target_of(server)) as channel:
            stub = bridge.BridgeServiceStub(channel)
            assert refused(lambda: stub.Ping(pb.PingRequest())).code() == grpc.StatusCode.UNAVAILABLE


# --- Each call is a transaction ---


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_writes_of_a_worker_appear_all_at_once_and_are_seen_by_it_before(
    client: OldClient, gate: Gate, journal: Journal, addresses: dict[str, str], kind: str
) -> None:
    register_tools(client, addresses[kind])
    updates = client.watch()
    call = client.begin("use_everything", gate=gate)
    gate.wait()
    assert client.values() == UNTOUCHED
    gate.open()
    done = Outcome(call.result())
    after = {"a": 5, "b": 7, "new": 2}
    assert done.result == {"get": 5, "batch": [2, ["c"]], "list": after, "history": [3, 2, 1, 0], "optimized": 7}
    assert client.values() == after
    assert [json.loads(entry.value.value) for entry in client.history()] == [5, 6, 5, 0]
    newest = [client.history(name)[0].metadata for name in ("a", "b", "c", "new")]
    assert {each["dspex.cause"] for each in newest} == {done.execution_id}
    metadata = [next(updates).update_metadata for _ in range(7)]
    assert {each["commit_sequence"] for each in metadata} == {str(done.sequence)}
    assert [each["dspex.part"] for each in metadata] == [f"{number}/7" for number in range(1, 8)]
    # The optimization of b has ended, and new depends on b.
    client.set("b", 8)
    assert [next(updates).update_type for _ in range(2)] == ["value_change", "dependency_changed"]
    updates.cancel()
    entry = journal.of_id(done.execution_id)
    assert (entry.status, entry.row["ended_sequence"]) == ("committed", done.sequence)
    assert entry.began["worker_id"] == WORKER_ID


def test_writes_of_a_worker_are_discarded_if_it_fails(client: OldClient, gate: Gate, journal: Journal) -> None:
    gate.open()
    failed = client.execute("use_everything", gate=gate, fails=True)
    assert (failed.code, failed.error) == ("TOOL_FAILED", "ValueError: it went wrong")
    assert client.values() == UNTOUCHED
    assert len(client.history()) == 1
    entry = journal.of_id(failed.execution_id)
    assert (entry.status, entry.ended["writes"]) == ("failed", [])
    assert entry.ended["failure"]["message"] == "ValueError: it went wrong"


def test_values_that_a_worker_read_must_be_unchanged_at_its_end(client: OldClient, gate: Gate) -> None:
    call = client.begin("increase_at_gate", gate=gate)
    gate.wait()
    client.set("a", 9)
    gate.open()
    outcome = Outcome(call.result())
    assert outcome.code == "CONFLICT"
    assert "a (was at version 0, is at version 1)" in outcome.error
    assert client.get() == 9


def test_a_key_runs_a_workers_tool_once(client: OldClient) -> None:
    first, second = (client.execute("increase", _key="k", amount=2) for _ in range(2))
    assert first.result == second.result == client.get() == 2
    assert second.execution_id == first.execution_id


def test_chunks_come_as_they_are_made_and_the_commit_before_the_last(
    client: OldClient, gate: Gate, journal: Journal
) -> None:
    chunks = client.stream("stream", gate=gate)
    first, second = next(chunks), next(chunks)
    gate.wait()
    assert client.values() == UNTOUCHED
    gate.open()
    last = next(chunks)
    assert client.get() == 7
    assert list(chunks) == []
    assert [json.loads(chunk.data) for chunk in (first, second, last)] == [1, 2, None]
    assert [chunk.is_final for chunk in (first, second, last)] == [False, False, True]
    assert last.metadata["commit_sequence"] == client.history()[0].metadata["commit_sequence"]
    assert json.loads(journal.of_id(last.metadata["execution_id"]).ended["result"]["json"]) == [1, 2]


def test_a_stream_that_breaks_off_writes_nothing(client: OldClient, journal: Journal) -> None:
    chunks = client.stream("break_off")
    assert json.loads(next(chunks).data) == 1
    error = refused(lambda: next(chunks))
    assert error.code() == grpc.StatusCode.ABORTED
    assert "ValueError: it broke off" in error.details()
    assert client.values() == UNTOUCHED
    assert [entry.status for entry in journal.of_session(client.session)] == ["failed"]


# --- From tool to tool ---


def test_tools_that_a_worker_calls_are_part_of_its_transaction(client: OldClient, journal: Journal) -> None:
    done = client.execute("call_each_other", amount=1)
    assert done.result == [101, 102, 102]
    assert [json.loads(entry.value.value) for entry in client.history()] == [102, 101, 100, 0]
    assert {entry.metadata["commit_sequence"] for entry in client.history()[:3]} == {str(done.sequence)}
    entries = by_tool(journal.of_session(client.session))
    assert {name: entry.status for name, entry in entries.items()} == dict.fromkeys(
        ("call_each_other", "helper", "increase"), "committed"
    )
    assert entries["helper"].row["parent_id"] == entries["increase"].row["parent_id"] == done.execution_id


def test_calls_of_a_worker_are_discarded_if_it_fails(client: OldClient, journal: Journal) -> None:
    failed = client.execute("call_helper", amount=1, fails=True)
    assert failed.error == "ValueError: it went wrong"
    assert client.values() == UNTOUCHED
    entries = by_tool(journal.of_session(client.session))
    assert {name: entry.status for name, entry in entries.items()} == {"call_helper": "failed", "helper": "aborted"}


# --- Who does not belong to an execution ---


def test_a_callback_after_the_end_is_refused(client: OldClient, gate: Gate) -> None:
    assert client.execute("leave_behind", gate=gate).success
    gate.wait()
    gate.open()
    gate.wait("FAILED_PRECONDITION")
    assert client.values() == {**UNTOUCHED, "a": 1}


@pytest.mark.parametrize("kind", ["ended", "never began"])
def test_calls_with_an_id_that_is_not_running_are_refused(server: ServerProcess, client: OldClient, kind: str) -> None:
    execution_id = client.execute("increase", amount=1).execution_id if kind == "ended" else "exec_1_unknown"
    before = client.values()
    with inside(target_of(server), client.session, execution_id) as late:
        helper = pb.ExecuteElixirToolRequest(session_id=late.session, tool_name="helper", parameters={})
        for call in (
            lambda: late.set("a", -1),
            lambda: late.get("a"),
            lambda: late.register("new", 1),
            lambda: late.delete("a"),
            lambda: late.execute("increase", amount=1),
            lambda: late.stub.ExecuteElixirTool(helper),
        ):
            error = refused(call)
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert f"no execution '{execution_id}' is running" in error.details()
    assert client.values() == before


def test_an_execution_is_of_no_use_in_another_session(
    server: ServerProcess, client: OldClient, gate: Gate, journal: Journal
) -> None:
    other = OldClient(target_of(server), f"{client.session}-other")
    call = client.begin("write_around", gate=gate)
    gate.wait()
    with inside(target_of(server), other.session, running(journal, client)) as stranger:
        for attempt in (lambda: stranger.set("a", -1), lambda: stranger.execute("add", name="a")):
            error = refused(attempt)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "belongs to another session" in error.details()
    gate.open()
    assert Outcome(call.result()).success
    assert other.values() == UNTOUCHED
    other.close()


def execute_elixir(caller: Inside, tool: str, **parameters: object) -> Any:
    wires = {name: packed(value) for name, value in parameters.items()}
    request = pb.ExecuteElixirToolRequest(session_id=caller.session, tool_name=tool, parameters=wires)
    # Without a deadline, as some workers call.
    return caller.stub.ExecuteElixirTool(request)


JOINED: dict[str, Callable[[Inside, Gate], Any]] = {
    "ExecuteTool": lambda caller, gate: caller.stub.ExecuteTool(
        pb.ExecuteToolRequest(
            session_id=caller.session, tool_name="hold_for_worker", parameters={"gate": packed(str(gate))}
        )
    ),
    "ExecuteStreamingTool": lambda caller, gate: list(
        caller.stub.ExecuteStreamingTool(
            pb.ExecuteToolRequest(
                session_id=caller.session, tool_name="hold_for_worker", parameters={"gate": packed(str(gate))}
            )
        )
    ),
}
"""Calls from inside an execution, that take as long as a gate is closed."""


@pytest.mark.parametrize("rpc", JOINED)
@pytest.mark.parametrize("end", ["its client cancels", "its time is over", "its session ends"])
def test_a_call_from_inside_is_answered_when_its_execution_ends(
    server: ServerProcess, client: OldClient, gate: Gate, tmp_path: Path, journal: Journal, rpc: str, end: str
) -> None:
    """At once, although the tool that it called still runs, and although it has no deadline."""
    inner = Gate(tmp_path / "inner")
    call = client.begin("hold", gate=gate, **({"_timeout_s": 2.0} if end == "its time is over" else {}))
    gate.wait()
    with inside(target_of(server), client.session, running(journal, client)) as caller, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(refusal_of, lambda: JOINED[rpc](caller, inner))]
        inner.wait()
        # One that waits for its turn.
        answers.append(pool.submit(refusal_of, lambda: execute_elixir(caller, "helper", amount=1)))
        if end == "its client cancels":
            call.cancel()
        elif end == "its session ends":
            client.stub.CleanupSession(pb.CleanupSessionRequest(session_id=client.session))
            inner.open()
        for answer in answers:
            error = answer.result(DEADLINE_S)
            assert error is not None, "it was answered with a success"
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
            assert caller.execution_id in error.details()
        inner.open()
        gate.open()
    with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
        assert not Outcome(call.result()).success


def test_a_call_from_inside_a_session_that_has_ended_fails(
    server: ServerProcess, client: OldClient, gate: Gate, journal: Journal
) -> None:
    call = client.begin("hold", gate=gate)
    gate.wait()
    with inside(target_of(server), client.session, running(journal, client)) as caller:
        client.stub.CleanupSession(pb.CleanupSessionRequest(session_id=client.session))
        for again in (False, True):
            if again:
                client.stub.InitializeSession(pb.InitializeSessionRequest(session_id=client.session))
            error = refused(lambda: execute_elixir(caller, "helper", amount=1))
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
    gate.open()
    assert Outcome(call.result()).code == "INTERRUPTED"


# --- Workers that cannot be called ---


def test_a_tool_without_an_address_says_what_to_do(server: ServerProcess) -> None:
    # In a new session: in the others, its address is known by now.
    client = OldClient(target_of(server), "without-addresses")
    register_tools(client, None)
    failed = client.execute("increase", amount=1)
    assert failed.code == "UNAVAILABLE"
    assert f"worker '{WORKER_ID}' registered it without metadata[\"address\"]" in failed.error
    assert refused(lambda: next(client.stream("stream"))).code() == grpc.StatusCode.UNAVAILABLE
    client.close()


def test_other_machines_are_called_only_if_that_is_allowed(
    client: OldClient, addresses: dict[str, str], tmp_path: Path
) -> None:
    # It reaches this machine, but is not a loopback address.
    address = addresses["tcp"].replace("127.0.0.1", "0.0.0.0")
    register_tools(client, address)
    failed = client.execute("increase", amount=1)
    assert failed.code == "UNAVAILABLE"
    assert f"at {address}: calls to other machines are refused; allow them with --insecure" in failed.error
    with (
        serve(tmp_path / "sessions.db", "--insecure") as insecure,
        start_worker(target_of(insecure)) as worker,
    ):
        allowed = OldClient(target_of(insecure), "s")
        register_tools(allowed, f"0.0.0.0:{worker.port}")
        assert allowed.execute("increase", amount=1).result == 1
        allowed.close()


def test_a_killed_worker_is_left_alone_until_it_is_back(
    server: ServerProcess, worker: ServerProcess, client: OldClient, gate: Gate, journal: Journal, tmp_path: Path
) -> None:
    call = client.begin("write_around", gate=gate)
    gate.wait()
    worker.kill()
    lost = Outcome(call.result())
    assert lost.code == "UNAVAILABLE"
    assert f"unavailable: tool 'write_around' at {target_of(worker)}: the call was not answered" in lost.error
    assert client.values() == UNTOUCHED
    assert journal.of_id(lost.execution_id).status == "failed"

    def left_alone() -> bool:
        # The first call tries the worker out if, on a slow machine, its pause is over; then the second does not.
        failed = [client.execute("increase", amount=1) for _ in range(2)]
        assert {each.code for each in failed} == {"UNAVAILABLE"}
        at_once = "failures in a row" in failed[1].error and failed[1].message.execution_time_ms < 1000
        return at_once and listed_tool(server, client, tmp_path)["circuit"] == "open"

    wait_until(left_alone, "the circuit is open")
    with start_worker(target_of(server), target_of(worker)):
        wait_until(lambda: circuit_of(client) == "half_open", "the worker may be called again")
        assert client.execute("increase", amount=1).result == 1
        assert circuit_of(client) == "closed"
    assert client.get() == 1


def test_a_killed_worker_passes_the_turn_of_its_execution_on(
    worker: ServerProcess, client: OldClient, gate: Gate, server: ServerProcess
) -> None:
    with BridgedState(target_of(server)) as state:
        state.initialize_session(client.session, {"dspex.concurrency": "queue"})
        first = client.begin("increase_at_gate", gate=gate)
        gate.wait()
        waiting = [client.begin("add", name="a") for _ in range(4)]
        waiting.pop().cancel()
        worker.kill()
        assert first.result(DEADLINE_S).metadata["error_code"] == "UNAVAILABLE"
        assert all(each.result(DEADLINE_S).success for each in waiting)
        assert client.values()["a"] == 3


def test_a_frozen_worker_costs_its_caller_no_more_than_its_deadline(
    worker: ServerProcess, client: OldClient, gate: Gate, journal: Journal
) -> None:
    call = client.begin("write_around", _timeout_s=1.0, gate=gate)
    gate.wait()
    worker.send_signal(signal.SIGSTOP)
    try:
        assert Outcome(call.result()).code == "TIMED_OUT"
    except grpc.RpcError:
        # So late that the answer did not arrive in time.
        assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    (entry,) = journal.ended(client.session)
    assert entry.status in ("timed_out", "cancelled")
    assert client.values() == UNTOUCHED
    gate.open()
    worker.send_signal(signal.SIGCONT)
    gate.wait("FAILED_PRECONDITION")
    assert client.values() == UNTOUCHED
    assert client.execute("increase", amount=1).result == 1


# --- The server's end ---


def test_registrations_survive_a_server_that_is_killed(tmp_path: Path) -> None:
    path, target = tmp_path / "sessions.db", f"unix:{tmp_path / 'server.sock'}"
    with start_worker(target) as worker:
        with serve(path, "--listen", target) as server:
            client = OldClient(target, "s")
            register_tools(client, target_of(worker))
            assert client.execute("increase", amount=1).result == 1
            server.kill()
            client.close()
        with serve(path, "--listen", target):
            client = OldClient(target, "s")
            assert set(client.view.available_tools) == set(TOOLS)
            assert client.execute("increase", amount=1).result == 2
            assert client.get() == 2
            client.close()


def test_a_drain_lets_a_worker_call_back_and_commit(tmp_path: Path, gate: Gate) -> None:
    path = tmp_path / "sessions.db"
    with serve(path, *SERVED, "--grace", str(DEADLINE_S)) as server, start_worker(target_of(server)) as worker:
        client = OldClient(target_of(server), "s")
        register_tools(client, target_of(worker))
        call = client.begin("begin_late", gate=gate)
        gate.wait()
        server.send_signal(signal.SIGTERM)
        late = wait_until(lambda: refusal_of(client.get), "new calls are refused")
        assert late.code() == grpc.StatusCode.UNAVAILABLE
        with inside(target_of(server), client.session, "exec_1_unknown") as stranger:
            assert refused(lambda: stranger.set("a", -1)).code() == grpc.StatusCode.UNAVAILABLE
        gate.open()
        done = Outcome(call.result())
        client.close()
        assert server.wait(DEADLINE_S) == 0
    assert done.result == [11, 11]
    entries = by_tool(Journal(path).of_session("s"))
    assert {name: (entry.status, entry.ended["writes"]) for name, entry in entries.items()} == {
        "begin_late": ("committed", [["a", 1], ["b", 1]]),
        "helper": ("committed", [["a", 2]]),
    }
