"""Tools, as a client sees them that has only the protocol page and the generated stubs; and what the journal keeps."""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import ExecuteTool
from dspex_persist.state.errors import OutcomeUnknownError
from dspex_persist.state.model import Origin
from dspex_persist.state.values import encode
from tests.deadline import within
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import (
    Entry,
    Gate,
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
from tests.prepared import commands

TOOLS = ("--tools", "tests.end_to_end.served_tools")
STALL_S = str(within(1.5))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools") / "sessions.db"


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[ServerProcess]:
    with serve(path, *TOOLS, "--stall-timeout", STALL_S) as process:
        yield process


def status_of(call: Any) -> Any:
    """With what a call under way ends, once it does."""
    return refused(call.result).code()


UNTOUCHED = {"a": 0, "b": 0, "c": 0}


# --- What there is ---


def test_schemas_are_in_available_tools(client: OldClient) -> None:
    available = client.view.available_tools
    spec = available["describe"]
    assert spec.description == "Says what it was given."
    parameters = [(each.name, each.type, each.required, each.description) for each in spec.parameters]
    assert parameters == [
        ("city", "string", True, "Which city."),
        ("days", "integer", False, "How many days."),
        ("scale", "choice", False, ""),
        ("ratio", "float", False, ""),
        ("wet", "boolean", False, ""),
        ("tags", "list", False, ""),
        ("extra", "map", False, ""),
    ]
    assert json.loads(spec.parameters[1].default_value.value) == 3
    assert json.loads(spec.parameters[2].validation_json) == {"choices": ["c", "f"]}
    declared = {"team": "red", "dspex.isolation": "snapshot", "dspex.retries": "2", "dspex.timeout_s": "20"}
    assert dict(spec.metadata) == {**declared, "dspex.where": "server"}
    assert list(available["demanding"].required_variables) == ["a", "missing_one", "missing_two"]
    streaming = {name for name, each in available.items() if each.supports_streaming}
    assert streaming == {"count", "count_later", "receipts", "stream_at_gate", "flood", "stumble"}
    assert available["add"].description == "Add to a variable."
    summary = client.stub.GetSession(pb.GetSessionRequest(session_id=client.session))
    assert summary.tool_count == len(available)


def test_exposed_tools(client: OldClient) -> None:
    listed = client.stub.GetExposedElixirTools(pb.GetExposedElixirToolsRequest(session_id=client.session)).tools
    assert [tool.name for tool in listed] == ["helper"]
    assert [parameter.name for parameter in listed[0].parameters] == ["amount"]

    def execute(name: str, amount: object) -> Outcome:
        request = pb.ExecuteElixirToolRequest(
            session_id=client.session, tool_name=name, parameters={"amount": packed(amount)}
        )
        return Outcome(client.stub.ExecuteElixirTool(request))

    done = execute("helper", 4)
    assert (done.result, done.attempts, client.get()) == (4, 1, 4)
    hidden = execute("add", 4)
    assert hidden.code == "UNKNOWN_TOOL"
    assert "exposed are: helper" in hidden.error
    assert execute("helper", "much").code == "INVALID_PARAMETERS"


def test_an_unknown_tool_and_an_unknown_session(client: OldClient) -> None:
    unknown = client.execute("ad")
    assert unknown.code == "UNKNOWN_TOOL"
    assert "unknown tool" in unknown.error
    assert "add" in unknown.error
    assert refused(lambda: next(client.stream("ad"))).code() == grpc.StatusCode.NOT_FOUND
    client.session = "missing"
    exposed = pb.ExecuteElixirToolRequest(session_id="missing", tool_name="helper", parameters={"amount": packed(1)})
    for call in (
        lambda: client.execute("echo", value=1),
        lambda: next(client.stream("count", to=1)),
        lambda: client.stub.ExecuteElixirTool(exposed),
    ):
        error = refused(call)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert "session not found: 'missing'" in error.details().lower()


# --- Parameters and results ---


@pytest.mark.parametrize(
    ("parameters", "name", "words"),
    [
        ({}, "city", "required"),
        ({"city": 3}, "city", "string"),
        ({"city": "Bern", "days": True}, "days", ""),
        ({"city": "Bern", "days": "2"}, "days", ""),
        ({"city": "Bern", "days": 1.5}, "days", "1.5"),
        ({"city": "Bern", "scale": "k"}, "scale", "'c'"),
        ({"city": "Bern", "tags": [1]}, "tags", ""),
        ({"city": "Bern", "dais": 1}, "dais", "days"),
        ({"city": AnyMessage(type_url="type.googleapis.com/snakepit.string", value=b"{oops")}, "city", "JSON"),
        ({"city": AnyMessage(type_url="acme.Thing", value=b'"x"')}, "city", "acme.Thing"),
    ],
    ids=lambda _: None,
)
def test_a_wrong_argument_is_named_and_nothing_begins(
    client: OldClient, journal: Journal, parameters: dict[str, Any], name: str, words: str
) -> None:
    wrong = client.execute("describe", **parameters)
    assert wrong.code == "INVALID_PARAMETERS"
    assert f"'{name}'" in wrong.error
    assert "'describe'" in wrong.error
    assert words in wrong.error
    assert wrong.execution_id == ""
    assert journal.of_session(client.session) == []


@pytest.mark.parametrize("value", [None, True, 2**70, 0.1, "naïve 🦜", [1, "two", None], {"a": {"b": []}}], ids=repr)
def test_string_value_style(client: OldClient, value: object) -> None:
    answer = client.stub.ExecuteTool(client.request("echo", {"value": value}, style="string_value"))
    assert answer.success
    assert answer.result.type_url == "type.googleapis.com/google.protobuf.StringValue"
    assert json.loads(answer.result.value) == value
    plain = client.execute("echo", value=value)
    assert plain.result == value
    assert plain.message.result.type_url.startswith("type.googleapis.com/snakepit.")


def test_a_really_packed_string_value(client: OldClient) -> None:
    wire = AnyMessage()
    wire.Pack(StringValue(value="plain text"))
    answer = client.execute("echo", value=wire)
    assert answer.result == "plain text"
    # Who packs does not read JSON that calls itself a StringValue.
    assert answer.message.result.type_url == "type.googleapis.com/snakepit.string"


def test_no_result_is_null_under_a_type_that_takes_it(client: OldClient) -> None:
    answer = client.execute("echo", value=None)
    assert answer.result is None
    assert answer.message.result.type_url == "type.googleapis.com/snakepit.map"


def test_binary_parameters(client: OldClient) -> None:
    description = {"shape": [3], "dtype": "float64", "binary_format": "float64", "type": "embedding"}
    wire = AnyMessage(type_url="type.googleapis.com/snakepit.embedding.binary", value=json.dumps(description).encode())
    request = client.request("total", {"numbers": wire})
    request.binary_parameters["numbers"] = struct.pack("<3d", 1.0, 2.0, 3.5)
    assert Outcome(client.stub.ExecuteTool(request)).result == 6.5
    del request.parameters["numbers"]
    alone = Outcome(client.stub.ExecuteTool(request))
    assert (alone.code, "'numbers'" in alone.error) == ("INVALID_PARAMETERS", True)


# --- The kinds of code ---


def test_methods_share_their_instance(client: OldClient) -> None:
    client.execute("restock", name="a", amount=5)
    before = client.execute("restock", name="a", amount=5).result
    assert client.execute("sell", name="a").result == before + 1
    assert client.get() == 9
    assert len(client.execute("receipts").result) == before + 1


def test_every_answer_describes_its_execution(client: OldClient, journal: Journal) -> None:
    done = client.execute("add", name="a")
    assert done.execution_id.startswith("exec_")
    assert (done.attempts, done.code) == (1, "")
    (newest, _) = client.history()
    assert done.sequence == int(newest.metadata["commit_sequence"])
    assert newest.metadata["dspex.cause"] == done.execution_id
    assert newest.metadata["dspex.source"] == "python"
    assert done.message.execution_time_ms >= 0
    entry = journal.of_id(done.execution_id)
    assert (entry.status, entry.row["ended_sequence"]) == ("committed", done.sequence)
    assert entry.ended["writes"] == [["a", 1]]
    assert entry.ended["reads"]["a"][2] == 0
    assert json.loads(entry.began["parameters"]["name"]["json"]) == "a"
    failed = client.execute("fail")
    assert (failed.attempts, failed.sequence) == (1, None)
    assert journal.of_id(failed.execution_id).status == "failed"


# --- Transactions ---


def test_writes_appear_all_at_once_and_are_seen_by_the_tool_before(client: OldClient, gate: Gate) -> None:
    updates = client.watch()
    call = client.begin("write_three", gate=gate, value=8)
    gate.wait()
    assert client.values() == UNTOUCHED
    gate.open()
    assert Outcome(call.result()).result == [8, 8, 1]
    assert client.values() == {"a": 8, "b": 8, "c": 8}
    received = [next(updates) for _ in range(3)]
    updates.cancel()
    assert {update.variable.name for update in received} == {"a", "b", "c"}
    assert {update.update_metadata["commit_sequence"] for update in received} == {
        Outcome(call.result()).message.metadata["commit_sequence"]
    }
    assert [update.update_metadata["dspex.part"] for update in received] == ["1/3", "2/3", "3/3"]


def test_every_way_of_working_with_variables(client: OldClient) -> None:
    done = client.execute("all_variables").result
    assert "above maximum" in done.pop("refused")
    assert done == {
        "get": "default",
        "batch": {"a": 0, "new": 2},
        "list": ["a", "b", "c", "new"],
        "history": [1, 0],
    }
    assert client.values() == {**UNTOUCHED, "new": 2}
    assert client.history("new")[0].metadata["why"] == "because"
    assert [entry.metadata["dspex.change"] for entry in client.history("brief")] == ["deleted", "registered"]


def test_reads_come_from_the_snapshot_and_a_read_that_changed_is_a_conflict(
    client: OldClient, gate: Gate, journal: Journal
) -> None:
    call = client.begin("look_twice", gate=gate)
    gate.wait()
    client.set("a", 9)
    gate.open()
    outcome = Outcome(call.result())
    assert (outcome.code, outcome.attempts, outcome.sequence) == ("CONFLICT", 1, None)
    assert "a (was at version 0, is at version 1)" in outcome.error
    assert "version 0" in outcome.error
    assert "version 1" in outcome.error or "now 1" in outcome.error
    entry = journal.of_id(outcome.execution_id)
    assert entry.status == "conflict"
    (conflict,) = entry.ended["conflicts"]
    assert (conflict["name"], conflict["expected"], conflict["actual"]) == ("a", 0, 1)


def test_retries_run_again_on_the_current_values(client: OldClient, gate: Gate, journal: Journal) -> None:
    call = client.begin("add_with_retries", gate=gate)
    gate.wait()
    client.set("a", 5)
    gate.open()
    outcome = Outcome(call.result())
    assert outcome.result == [2, 6]
    assert outcome.attempts == 2
    entries = journal.of_session(client.session)
    assert [(entry.status, entry.row["attempt"]) for entry in entries] == [("conflict", 1), ("committed", 2)]
    assert entries[1].row["execution_id"] == outcome.execution_id


def test_a_total_of_many_is_exact_and_sessions_are_apart(server: ServerProcess, client: OldClient) -> None:
    other = OldClient(target_of(server), f"{client.session}-other")
    mine, sessions = 32, (client, other)

    def work(number: int) -> list[int]:
        return [sessions[number % 2].execute("add_stubbornly", name="a").attempts for _ in range(2)]

    with ThreadPoolExecutor(mine) as threads:
        attempts = list(threads.map(work, range(mine)))
    assert client.get() == other.get() == mine
    assert len(attempts) == mine
    # One client in each of two sessions, at the same time: there are no conflicts.
    with ThreadPoolExecutor(2) as threads:
        apart = threads.map(lambda one: [one.execute("add", name="b").code for _ in range(10)], sessions)
    assert [code for codes in apart for code in codes] == [""] * 20
    other.close()


def test_required_variables(client: OldClient, journal: Journal) -> None:
    missing = client.execute("demanding")
    assert missing.code == "MISSING_VARIABLES"
    assert "missing_one, missing_two" in missing.error
    assert refused(lambda: next(client.stream("demanding"))).code() == grpc.StatusCode.FAILED_PRECONDITION
    assert journal.of_session(client.session) == []
    for name in ("missing_one", "missing_two"):
        client.register(name, 0)
    assert client.execute("demanding").success
    assert client.get() == -1


# --- Endings ---


def test_an_exception(client: OldClient, journal: Journal) -> None:
    failed = client.execute("fail")
    assert (failed.code, failed.error) == ("TOOL_FAILED", "ValueError: it went wrong")
    assert client.values() == UNTOUCHED
    entry = journal.of_id(failed.execution_id)
    assert entry.status == "failed"
    failure = entry.ended["failure"]
    assert (failure["type"], failure["message"]) == ("ValueError", "it went wrong")
    assert 'raise ValueError("it went wrong")' in failure["traceback"]
    assert [(line["message"], line["fields"]) for line in entry.ended["log"]] == [("about to fail", {"why": "test"})]
    assert entry.ended["writes"] == []


@pytest.mark.parametrize("last", ["one", "tell_mood_later"])
@pytest.mark.parametrize(
    ("first", "more"), [("ask_server", {}), ("ask_server", {"depth": 3}), ("ask_server_later", {})]
)
def test_a_tool_can_ask_the_server_that_runs_it(tmp_path: Path, first: str, more: dict[str, object], last: str) -> None:
    """Though it holds the only thread, or the event loop."""
    with serve(tmp_path / "asked.db", "--tools", "tests.end_to_end.served_tools", "--tool-threads", "1") as process:
        client = OldClient(target_of(process), "asked")
        done = client.execute(first, target=target_of(process), session="asked", tool=last, **more)
        assert done.result == 1
        client.close()


def test_the_log_has_the_kind_and_the_text_of_an_error(tmp_path: Path) -> None:
    with serve(tmp_path / "logged.db", "--tools", "tests.end_to_end.served_tools", "--log-level", "info") as process:
        client = OldClient(target_of(process), "logged")
        assert client.execute("fail").code == "TOOL_FAILED"
        assert client.execute("slow", gate=tmp_path).code == "TIMED_OUT"
        assert client.execute("describe", city=3).code == "INVALID_PARAMETERS"
        client.close()
        process.terminate(DEADLINE_S)
        logs = process.stderr_tail
    lines = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    failed = [line for line in lines if line["event"] == "tool failed"]
    assert [(line["tool"], line["code"], line["error"]) for line in failed] == [
        ("fail", "TOOL_FAILED", "ValueError"),
        ("slow", "TIMED_OUT", "ToolTimedOutError"),
        ("describe", "INVALID_PARAMETERS", "ToolArgumentError"),
    ]
    assert [line["reason"].partition(":")[0] for line in failed] == [
        "it went wrong",
        "timed out",
        "invalid parameter 'city' of tool 'describe'",
    ]
    assert {line["session_id"] for line in failed} == {"logged"}
    assert [bool(line["execution_id"]) for line in failed] == [True, True, False]
    assert all(line["duration_s"] > 0 for line in failed)


@pytest.mark.parametrize(("tool", "words"), [("leave", "end the process"), ("no_json", "object")])
def test_other_faults_of_a_tool(client: OldClient, journal: Journal, tool: str, words: str) -> None:
    failed = client.execute(tool)
    assert failed.code == "TOOL_FAILED"
    assert words in failed.error
    assert "Traceback" not in failed.error
    assert client.values() == UNTOUCHED
    assert journal.of_id(failed.execution_id).status == "failed"
    assert client.execute("add", name="a").result == 1


@pytest.mark.parametrize("tool", ["slow", "slow_later"])
def test_a_timeout_of_the_tool(client: OldClient, gate: Gate, journal: Journal, tool: str) -> None:
    failed = client.execute(tool, gate=gate)
    assert failed.code == "TIMED_OUT"
    assert "0.2 s" in failed.error
    assert journal.of_id(failed.execution_id).status == "timed_out"
    # A thread cannot be stopped, but its context reports the cancellation; a coroutine is cancelled.
    gate.wait("cancelled")
    assert client.values() == UNTOUCHED


@pytest.mark.parametrize("tool", ["hold", "hold_later"])
def test_a_deadline_of_the_client(client: OldClient, gate: Gate, journal: Journal, tool: str) -> None:
    call = client.begin(tool, _timeout_s=1.0, gate=gate)
    gate.wait()
    try:
        assert Outcome(call.result()).code == "TIMED_OUT"
    except grpc.RpcError:
        # So late that the answer did not arrive in time.
        assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    gate.wait("cancelled")
    (entry,) = journal.ended(client.session)
    assert entry.status in ("timed_out", "cancelled")
    assert client.values() == UNTOUCHED


@pytest.mark.parametrize("tool", ["hold", "hold_later"])
def test_a_client_that_cancels(client: OldClient, gate: Gate, journal: Journal, tool: str) -> None:
    call = client.begin(tool, gate=gate)
    gate.wait()
    assert call.cancel()
    gate.wait("cancelled")
    (entry,) = journal.ended(client.session)
    assert entry.status == "cancelled"
    assert client.values() == UNTOUCHED


LOST = """
import sys, grpc
import snakepit_bridge_pb2 as pb, snakepit_bridge_pb2_grpc as bridge
from tests.end_to_end.old_style import packed
target, session, gate = sys.argv[1:]
stub = bridge.BridgeServiceStub(grpc.insecure_channel(target))
stub.ExecuteTool(pb.ExecuteToolRequest(session_id=session, tool_name="hold", parameters={"gate": packed(gate)}))
"""


def test_a_lost_connection(server: ServerProcess, client: OldClient, gate: Gate, journal: Journal) -> None:
    argv = [sys.executable, "-c", LOST, target_of(server), client.session, str(gate)]
    with subprocess.Popen(argv, env=environment()) as other:
        gate.wait()
        other.kill()
    gate.wait("cancelled")
    (entry,) = journal.ended(client.session)
    assert entry.status == "cancelled"
    assert client.values() == UNTOUCHED


# --- The server's end ---


def test_sigterm_lets_a_tool_finish(tmp_path: Path, gate: Gate) -> None:
    path = tmp_path / "sessions.db"
    with serve(path, *TOOLS) as server:
        client = OldClient(target_of(server), "s")
        call = client.begin("write_three", gate=gate, value=8)
        gate.wait()
        server.send_signal(signal.SIGTERM)
        late = wait_until(lambda: refusal_of(lambda: client.execute("echo", value=1)), "new calls are refused")
        assert late.code() == grpc.StatusCode.UNAVAILABLE
        gate.open()
        outcome = Outcome(call.result())
        assert outcome.result == [8, 8, 1]
        assert server.wait(DEADLINE_S) == 0
        client.close()
    entry = Journal(path).of_id(outcome.execution_id)
    assert (entry.status, len(entry.ended["writes"])) == ("committed", 3)


@pytest.mark.parametrize("where", ["thread", "pool", "process pool"])
def test_work_that_a_tool_left_running_does_not_delay_the_server(tmp_path: Path, gate: Gate, where: str) -> None:
    """The interpreter itself would wait for it."""
    with serve(tmp_path / "sessions.db", *TOOLS) as server:
        client = OldClient(target_of(server), "s")
        call = client.begin("leave_running", gate=gate, where=where)
        gate.wait()
        assert Outcome(call.result()).result == where
        server.send_signal(signal.SIGTERM)
        try:
            assert server.wait(DEADLINE_S) == 0
        finally:
            gate.open()
        client.close()


def test_a_python_client_does_not_wait_for_a_server_that_is_gone_as_long_as_for_a_tool(
    tmp_path: Path, gate: Gate
) -> None:
    """Its key lets it repeat the request, but the tool's time is not the server's."""
    with serve(tmp_path / "sessions.db", *TOOLS) as server, BridgedState(target_of(server), timeout_s=0.5) as state:
        state.initialize_session("s")
        state.register_variable("s", "a", "integer", 0)
        arguments = {"gate": encode(str(gate)), "name": encode("a")}
        command = ExecuteTool("s", "add_at_gate", arguments, timeout_s=10 * DEADLINE_S)
        future = state.submit(command, Origin("tester", "ExecuteTool", idempotency_key="k"))
        gate.wait()
        server.kill()
        # It may have committed, for all that the client knows.
        with pytest.raises(OutcomeUnknownError):
            future.result(DEADLINE_S)


@pytest.mark.parametrize("how", ["beyond the grace", "killed"])
def test_executions_interrupted_by_the_end_of_the_server_leave_nothing_and_run_again(
    tmp_path: Path, gate: Gate, how: str
) -> None:
    path = tmp_path / "sessions.db"
    journal = Journal(path)
    with serve(path, *TOOLS, "--grace", "0.2") as server:
        client = OldClient(target_of(server), "s")
        calls = [client.begin("add_at_gate", _key="k", gate=gate)]
        gate.wait()
        stream = client.stream("stream_at_gate", gate=gate)
        assert [next(stream).is_final for _ in range(2)] == [False, False]
        if how == "killed":
            server.kill()
            # The journal's entry was durable before the code ran.
            assert [entry.status for entry in journal.of_session("s")] == ["running", "running"]
        else:
            assert server.terminate(DEADLINE_S) == 0
        assert status_of(calls[0]) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert refused(lambda: next(stream)).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        client.close()
    gate.open()
    with serve(path, *TOOLS) as server:
        assert [entry.status for entry in journal.of_session("s")] == ["interrupted", "interrupted"]
        client = OldClient(target_of(server), "s")
        assert client.values() == UNTOUCHED
        again = [client.execute("add_at_gate", _key="k", gate=gate) for _ in range(2)]
        assert [outcome.result for outcome in again] == [1, 1]
        assert client.get() == 1
        statuses = [entry.status for entry in journal.of_session("s")]
        assert statuses == ["interrupted", "interrupted", "committed"]
        client.close()
    check = commands().run(["db", "check", "--db", str(path)], cwd=path.parent, env=environment(), timeout_s=within(60))
    assert check.returncode == 0, check.stdout + check.stderr


# --- Idempotency ---


def test_a_key_runs_a_tool_once(server: ServerProcess, client: OldClient, journal: Journal) -> None:
    first, second = (client.execute("add", _key="k", name="a") for _ in range(2))
    assert first.result == second.result == 1
    assert client.get() == 1
    assert second.execution_id == first.execution_id
    assert (second.sequence, second.attempts) == (first.sequence, 1)
    assert second.message.metadata["repeated"] == "true"
    assert "repeated" not in first.message.metadata
    assert len(journal.of_session(client.session)) == 1
    for other in (client.execute("add", _key="k", name="b"), client.execute("echo", _key="k", value=1)):
        assert other.code == "IDEMPOTENCY_CONFLICT"
        assert "'k'" in other.error
    elsewhere = OldClient(target_of(server), f"{client.session}-elsewhere")
    assert elsewhere.execute("add", _key="k", name="b").result == 1
    elsewhere.close()


def test_a_key_repeats_a_stream(client: OldClient) -> None:
    first, second = (list(client.stream("count", _key="k", to=3, name="a")) for _ in range(2))
    assert [chunk.data for chunk in second] == [chunk.data for chunk in first]
    assert second[-1].metadata["execution_id"] == first[-1].metadata["execution_id"]
    assert client.history()[0].version == 3


def test_a_key_of_a_running_tool_joins_it(client: OldClient, gate: Gate, journal: Journal) -> None:
    calls = [client.begin("add_at_gate", _key="k", gate=gate)]
    gate.wait()
    calls += [client.begin("add_at_gate", _key="k", gate=gate) for _ in range(3)]
    # On the same connection, so behind them.
    client.execute("echo", value=1)
    other = client.execute("add_at_gate", _key="k", gate=gate, name="b")
    assert other.code == "IDEMPOTENCY_CONFLICT"
    assert not any(call.done() for call in calls)
    gate.open()
    outcomes = [Outcome(call.result()) for call in calls]
    assert {outcome.execution_id for outcome in outcomes} == {outcomes[0].execution_id}
    assert [outcome.result for outcome in outcomes] == [1] * 4
    assert client.get() == 1
    assert len(journal.of_session(client.session)) == 2


def test_a_caller_that_joined_runs_the_tool_when_the_first_leaves(
    client: OldClient, gate: Gate, journal: Journal
) -> None:
    first = client.begin("hold", _key="k", gate=gate)
    gate.wait()
    second = client.begin("hold", _key="k", gate=gate)
    client.execute("echo", value=1)
    first.cancel()
    gate.wait("cancelled")
    gate.open()
    assert Outcome(second.result()).result == "held"
    statuses = [entry.status for entry in journal.of_session(client.session) if entry.row["tool"] == "hold"]
    assert statuses == ["cancelled", "committed"]


# --- Streaming ---


def test_chunks_come_as_they_are_yielded_and_the_commit_before_the_last(
    client: OldClient, gate: Gate, journal: Journal
) -> None:
    chunks = client.stream("stream_at_gate", gate=gate)
    first, second = next(chunks), next(chunks)
    gate.wait()
    assert client.values() == UNTOUCHED
    gate.open()
    last = next(chunks)
    assert client.get() == 7
    assert list(chunks) == []
    assert [chunk.chunk_id for chunk in (first, second, last)] == [f"stream_at_gate-{n}" for n in (1, 2, 3)]
    assert [json.loads(chunk.data) for chunk in (first, second, last)] == [1, 2, None]
    assert [chunk.is_final for chunk in (first, second, last)] == [False, False, True]
    assert int(last.metadata["commit_sequence"]) == int(client.history()[0].metadata["commit_sequence"])
    assert last.metadata["attempts"] == "1"
    entry = journal.of_id(last.metadata["execution_id"])
    assert entry.status == "committed"
    assert json.loads(entry.ended["result"]["json"]) == [1, 2]


def test_streaming_a_tool_that_does_not_stream(client: OldClient) -> None:
    (only,) = client.stream("add", name="a")
    assert (json.loads(only.data), only.is_final, only.chunk_id) == (1, True, "add-1")
    assert only.metadata["execution_id"]


def test_an_async_generator_streams(client: OldClient) -> None:
    *chunks, last = client.stream("count_later", to=3)
    assert [json.loads(chunk.data) for chunk in chunks] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert last.is_final


def test_a_stream_that_fails_ends_with_a_status(client: OldClient, journal: Journal) -> None:
    chunks = client.stream("stumble")
    assert not next(chunks).is_final
    error = refused(lambda: next(chunks))
    assert error.code() == grpc.StatusCode.ABORTED
    assert error.details() == "ValueError: it stumbled"
    assert client.values() == UNTOUCHED
    assert [entry.status for entry in journal.of_session(client.session)] == ["failed"]
    wrong = refused(lambda: next(client.stream("count", to="many")))
    assert wrong.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "'to'" in wrong.details()


def test_a_conflict_of_a_stream_is_aborted(client: OldClient, gate: Gate) -> None:
    chunks = client.stream("stream_at_gate", gate=gate)
    assert [json.loads(next(chunks).data) for _ in range(2)] == [1, 2]
    client.set("a", 3)
    gate.open()
    error = refused(lambda: next(chunks))
    assert error.code() == grpc.StatusCode.ABORTED
    assert "conflict" in error.details()
    assert client.get() == 3


def taken(gate: Gate) -> int:
    file = gate.folder / "taken"
    return file.stat().st_size if file.exists() else 0


def test_a_client_that_does_not_read_stops_only_its_tool(client: OldClient, gate: Gate) -> None:
    count = 200
    chunks = client.stream("flood", gate=gate, chunks=count)
    next(chunks)
    # 64 KiB each: far less than all of them fits into the buffers between here and there.
    before = -1
    while taken(gate) != before:
        before = taken(gate)
        for _ in range(50):
            client.execute("echo", value=1)
    assert 0 < before < count - 1
    assert sum(1 for _ in chunks) == count
    assert taken(gate) == count
    assert client.get() == -1


def test_a_client_that_goes_away_from_a_stream_ends_the_tool(client: OldClient, gate: Gate, journal: Journal) -> None:
    chunks = client.stream("flood", gate=gate)
    for _ in range(3):
        next(chunks)
    chunks.cancel()
    gate.wait("closed")
    (entry,) = journal.ended(client.session)
    assert entry.status == "cancelled"
    assert client.values() == UNTOUCHED


def test_a_client_that_stops_reading_for_long_ends_the_tool(client: OldClient, gate: Gate, journal: Journal) -> None:
    chunks = client.stream("flood", gate=gate)
    next(chunks)
    gate.wait("closed")
    (entry,) = journal.ended(client.session)
    assert entry.status == "cancelled"
    error = refused(lambda: [None for _ in chunks])
    assert error.code() == grpc.StatusCode.ABORTED
    assert "read no chunk" in error.details()
    assert client.values() == UNTOUCHED


# --- From tool to tool ---


def by_tool(entries: list[Entry]) -> dict[str, Entry]:
    return {entry.row["tool"]: entry for entry in entries}


def test_a_called_tool_is_part_of_the_transaction(client: OldClient, journal: Journal) -> None:
    done = client.execute("parent", child_fails=False, caught=False)
    assert done.result == [2, 1]
    assert client.values() == {"a": 1, "b": 1, "c": 1}
    entries = by_tool(journal.of_session(client.session))
    child, parent = entries["child"], entries["parent"]
    assert child.row["parent_id"] == parent.row["execution_id"] == done.execution_id
    assert parent.row["parent_id"] is None
    assert (child.status, parent.status) == ("committed", "committed")
    assert child.row["ended_sequence"] == parent.row["ended_sequence"] == done.sequence
    assert (child.ended["writes"], parent.ended["writes"]) == ([["b", 1]], [["a", 1], ["c", 1]])


def test_a_called_tool_that_fails_is_undone_alone_if_its_caller_bears_it(client: OldClient, journal: Journal) -> None:
    done = client.execute("parent", child_fails=True, caught=True)
    assert done.result == ["the child failed", 0]
    assert client.values() == {"a": 1, "b": 0, "c": 1}
    entries = by_tool(journal.ended(client.session, 2))
    assert {name: entry.status for name, entry in entries.items()} == {"parent": "committed", "child": "failed"}


def test_a_called_tool_that_fails_fails_its_caller(client: OldClient, journal: Journal) -> None:
    failed = client.execute("parent", child_fails=True, caught=False)
    assert failed.error == "ValueError: the child failed"
    assert client.values() == UNTOUCHED
    entries = by_tool(journal.ended(client.session, 2))
    assert {name: entry.status for name, entry in entries.items()} == {"parent": "failed", "child": "failed"}


def test_a_caller_that_fails_discards_the_writes_of_its_calls(client: OldClient, journal: Journal) -> None:
    failed = client.execute("parent", child_fails=False, caught=False, fails=True)
    assert failed.error == "RuntimeError: the parent failed"
    assert client.values() == UNTOUCHED
    entries = by_tool(journal.of_session(client.session))
    assert {name: entry.status for name, entry in entries.items()} == {"parent": "failed", "child": "aborted"}


def test_context_variables_are_kept(client: OldClient) -> None:
    assert client.execute("in_a_mood").result == ["cheerful", "cheerful"]
    assert client.execute("in_a_mood_later").result == ["thoughtful", "thoughtful"]
    assert client.execute("tell_mood").result == ["none"]


# --- Recorded inputs and published values ---


def test_time_chance_and_logs_are_in_the_journal(client: OldClient, journal: Journal) -> None:
    first, second = (Outcome(client.stub.ExecuteTool(client.request("recorder", {}, origin="test"))) for _ in range(2))
    recorded, other = first.result, second.result
    assert recorded["ids"] == [client.session, first.execution_id]
    assert recorded["metadata"]["origin"] == "test"
    entry = journal.of_id(first.execution_id)
    assert entry.began["seed"]
    assert entry.began["metadata"] == {"origin": "test"}
    assert [moment / 1e6 for moment in entry.ended["recorded"]["now"]] == pytest.approx(recorded["now"])
    assert [(line["message"], line["fields"]) for line in entry.ended["log"]] == [
        ("first line", {"step": 1}),
        ("second line", {}),
    ]
    assert not set(recorded["random"] + recorded["uuid"]) & set(other["random"] + other["uuid"])


def test_published_values_are_seen_at_once_and_stay(client: OldClient, gate: Gate, journal: Journal) -> None:
    updates = client.watch()
    call = client.begin("progress", gate=gate)
    seen = next(updates)
    updates.cancel()
    assert (seen.variable.name, json.loads(seen.variable.value.value)) == ("a", 50)
    assert seen.update_metadata["dspex.change"] == "published"
    assert seen.update_metadata["step"] == "half"
    assert not call.done()
    gate.wait()
    assert client.values() == {"a": 50, "b": 0, "c": 0}
    call.cancel()
    (entry,) = journal.ended(client.session)
    assert entry.status == "cancelled"
    assert entry.ended["published"] == [["a", 1]]
    assert client.values() == {"a": 50, "b": 0, "c": 0}
    newest = client.history()[0]
    assert newest.metadata["dspex.change"] == "published"
    assert newest.metadata["dspex.cause"] == entry.row["execution_id"]


# --- The command line ---


def test_tools_list_of_a_module_and_of_a_server_agree(server: ServerProcess, client: OldClient, tmp_path: Path) -> None:
    listed = tools_list(*TOOLS, "--target", target_of(server), "--session", client.session, "--json", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    document = json.loads(listed.stdout)
    assert document["ok"]
    found: dict[str, list[Any]] = {"module": [], "server": []}
    for each in document["tools"]:
        found[each.pop("where")].append(each)
    assert {each.pop("reference") for each in found["module"]} == {"tests.end_to_end.served_tools"}
    assert {each.pop("reference") for each in found["server"]} == {None}
    assert found["module"] == found["server"]
    assert len(found["server"]) == len(client.view.available_tools)
    (described,) = [each for each in found["server"] if each["name"] == "describe"]
    assert (described["isolation"], described["retries"], described["timeout_s"]) == ("snapshot", 2, 20)
    assert described["metadata"] == {"team": "red"}
    assert described["parameters"][2] == {
        "name": "scale",
        "type": "choice",
        "description": "",
        "required": False,
        "default": "c",
        "validation": {"choices": ["c", "f"]},
    }
    assert [each["name"] for each in found["server"] if each["exposed"]] == ["helper"]


def test_tools_list_for_people(tmp_path: Path) -> None:
    listed = tools_list("--tools", "tests.end_to_end.served_tools:describe", cwd=tmp_path)
    assert listed.returncode == 0
    for words in ("1 tool", "city: string", "days: integer = 3", "snapshot, retries: 2, within 20 s"):
        assert words in listed.stdout
    (tmp_path / "dspex-persist.toml").write_text('tools = ["tests.end_to_end.served_tools:shop"]\n')
    listed = tools_list("--config", "dspex-persist.toml", cwd=tmp_path)
    assert "3 tools" in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tools", "no_such_module"], 2, "'no_such_module': the import failed with ModuleNotFoundError"),
        (["--tools", "json:loads"], 2, "it is not a tool"),
        (["--target", "nowhere"], 2, "flag --target"),
        (["--session", "s"], 2, "--target"),
        (["--target", "127.0.0.1:1"], 1, "127.0.0.1:1"),
    ],
)
def test_tools_list_says_what_is_wrong_in_a_sentence(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    failed = tools_list(*arguments, "--json", cwd=tmp_path)
    assert failed.returncode == code
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert words in failed.stderr
    document = json.loads(failed.stdout)
    assert document == {"ok": False, "error": failed.stderr.removeprefix("error: ").strip()}


def test_tools_list_of_a_session_that_is_not_there(server: ServerProcess, tmp_path: Path) -> None:
    failed = tools_list("--target", target_of(server), "--session", "missing", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: session not found: 'missing'; it never began, or has ended: begin it first\n"


def test_tools_that_cannot_be_imported_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import dspex_persist\n1 / 0\n")
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--tools", "broken", "--listen", "127.0.0.1:0"]
    failed = subprocess.run(
        argv, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=within(60), check=False
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    expected = "error: cannot load tools from 'broken': the import failed with ZeroDivisionError: division by zero\n"
    assert failed.stderr == expected
    assert not (tmp_path / "sessions.db").exists()
