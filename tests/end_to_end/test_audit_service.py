"""The audit service of a real server, used by clients that have only its proto file, and by ours."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dspex_persist_audit_pb2 as pb
import dspex_persist_audit_pb2_grpc as audit_stubs
import grpc
import pytest
import snakepit_bridge_pb2 as bridge_pb
import snakepit_bridge_pb2_grpc as bridge_stubs
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from dspex_persist import connect, open_audit
from dspex_persist.audit import HistoryQuery
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as ours
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    LimitExceededError,
    NotInHistoryError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.model import PrunePolicy, Value
from dspex_persist.state.recording import read_recording
from tests.deadline import within
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import OldClient, environment, serve, target_of, wait_until
from tests.prepared import commands

pytestmark = pytest.mark.usefixtures("own_interpreters")

SERVICE = "dspex.persist.v1.AuditService"
SECRET = "0451"
VERSIONS = 5_000
VALUE_BYTES = 4_000


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variable with 5,000 versions that weigh 20 MB, and a sensitive one."""
    path = tmp_path_factory.mktemp("large") / "sessions.db"
    with EmbeddedState(path) as state:
        state.initialize_session("large")
        state.register_variable("large", "text", "string", "")
        values = (Value(f'"{number}{"y" * VALUE_BYTES}"') for number in range(1, VERSIONS))
        for future in [state.submit(SetVariable("large", "text", value)) for value in values]:
            future.result()
        state.register_variable("large", "secret", "string", SECRET, metadata={"sensitive": "true"})
    return path


@pytest.fixture(scope="module")
def server(filled: Path) -> Iterator[ServerProcess]:
    with serve(filled) as server:
        yield server


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target_of(server)) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return audit_stubs.AuditServiceStub(channel)


def of_process(server: ServerProcess, field: str) -> int:
    """A number in what the kernel says of the process."""
    return int(Path(f"/proc/{server.pid}/status").read_text().split(f"{field}:")[1].split()[0])


def versions_in(responses: Any) -> list[int]:
    return [entry.version for response in responses for entry in response.entries]


def text_history(**more: Any) -> pb.ListHistoryRequest:
    return pb.ListHistoryRequest(session="large", variable="text", **more)


# Beside the bridge


def test_health_and_reflection_know_it(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflected = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE, "snakepit.bridge.BridgeService"} <= set(reflected.get_services())
    assert reflected.FindFileByName("dspex_persist_audit.proto").package == "dspex.persist.v1"


def test_a_clients_own_generated_module_loads_beside_ours() -> None:
    assert pb.DESCRIPTOR.serialized_pb == ours.DESCRIPTOR.serialized_pb
    assert pb.DESCRIPTOR.name == "dspex_persist_audit.proto"


def test_old_clients_notice_nothing_but_are_in_the_history(server: ServerProcess, stub: Any) -> None:
    client = OldClient(target_of(server), "old")
    client.register("x", 1)
    client.set("x", 2)
    entries = [e for r in stub.ListHistory(pb.ListHistoryRequest(session="old", variable="x")) for e in r.entries]
    assert [(entry.name, entry.version, entry.value.json) for entry in entries] == [("x", 1, "2"), ("x", 0, "1")]
    assert entries[0].cause == "SetVariable"
    client.close()


# Large answers


def test_a_large_history_streams_in_small_messages_and_little_memory(server: ServerProcess, stub: Any) -> None:
    before = of_process(server, "VmHWM")
    sizes, versions = [], []
    for response in stub.ListHistory(text_history()):
        sizes.append(response.ByteSize())
        versions += versions_in([response])
    assert versions == list(range(VERSIONS))[::-1]
    assert max(sizes) < 1_000_000
    assert of_process(server, "VmHWM") - before < 10_000  # KiB, of 20,000 that went out


def test_a_recording_streams_in_small_messages_and_little_memory(server: ServerProcess, stub: Any) -> None:
    """A client with nothing but the proto file writes the lines to a file, which is a recording."""
    before, sizes, lines = of_process(server, "VmHWM"), [], list[Any]()
    for response in stub.RecordSession(pb.RecordSessionRequest(session="large", reveal=True)):
        sizes.append(response.ByteSize())
        lines += response.lines
    assert max(sizes) < 1_000_000
    assert of_process(server, "VmHWM") - before < 20_000  # KiB, of 20,000 that went out
    header, commits = read_recording(line.json + "\n" for line in lines)
    assert (header.session_id, header.masked) == ("large", True)
    read = list(commits)
    assert [commit.number for commit in read] == list(range(1, VERSIONS + 3))
    assert (read[-1].versions[0].value, read[-1].versions[0].masked) == (None, True)
    assert lines[0].sequence == 0
    assert [line.sequence for line in lines[1:]] == sorted(line.sequence for line in lines[1:])
    assert read[1].versions[0].name == "text"


def test_the_actor_of_a_fork_is_in_the_history(stub: Any) -> None:
    actor = (("x-dspex-actor", "ann"), ("x-dspex-idempotency-key", "k"))
    request = pb.ForkSessionRequest(session="large", new_session="forked", at="3")
    (variable,) = stub.ForkSession(request, metadata=actor).variables
    assert (variable.name, variable.value.json[:5]) == ("text", '"1yyy')
    (entry,) = [e for r in stub.ListHistory(pb.ListHistoryRequest(session="forked")) for e in r.entries]
    assert (entry.actor, entry.cause, entry.source) == ("ann", "ForkSession", pb.SOURCE_PYTHON)  # of the value
    for at, code in (("", "UNIMPLEMENTED"), ("3", "ALREADY_EXISTS"), ("soon", "INVALID_ARGUMENT")):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ForkSession(pb.ForkSessionRequest(session="large", new_session="forked", at=at))
        assert caught.value.code().name == code


def test_a_stream_goes_on_after_its_cursor(stub: Any, server: ServerProcess) -> None:
    with BridgedState(target_of(server)) as state:
        state.initialize_session("broken")
        state.register_variable("broken", "n", "integer", 0)
        for number in range(1, 60):
            state.set_variable("broken", "n", number)
        request = pb.ListHistoryRequest(session="broken", range=pb.Range(oldest_first=True, until="now"))
        stream = stub.ListHistory(request)
        first = next(stream)
        stream.cancel()
        state.set_variable("broken", "n", 60)
    request.range.after.CopyFrom(first.next)
    # As of the beginning of the first stream: neither twice nor newer.
    assert versions_in([first]) + versions_in(stub.ListHistory(request)) == list(range(60))


def test_a_client_that_does_not_read_holds_only_one_message(server: ServerProcess, channel: grpc.Channel) -> None:
    stub = audit_stubs.AuditServiceStub(channel)
    threads, memory = of_process(server, "Threads"), of_process(server, "VmHWM")
    streams = [stub.ListHistory(text_history()) for _ in range(32)]
    for stream in streams:
        assert next(stream).entries
    assert of_process(server, "Threads") - threads <= 4
    assert of_process(server, "VmHWM") - memory < 60_000
    with BridgedState(target_of(server)) as state:
        assert state.get_variable("large", "text").version == VERSIONS - 1
    for stream in streams:
        stream.cancel()


def test_reads_go_on_beside_a_fleet_of_streams(server: ServerProcess) -> None:
    streaming, reads = 8, 100
    over = threading.Event()
    streams: list[int] = []

    def ask_again_and_again() -> None:
        with grpc.insecure_channel(target_of(server)) as channel:
            stub = audit_stubs.AuditServiceStub(channel)
            while not over.is_set():
                streams.append(sum(1 for _ in stub.ListHistory(text_history(range=pb.Range(limit=500)))))

    with futures.ThreadPoolExecutor(streaming) as pool, BridgedState(target_of(server)) as state:
        state.get_variable("large", "text")
        fleet = [pool.submit(ask_again_and_again) for _ in range(streaming)]
        wait_until(lambda: len(streams) >= streaming, "streams that were read")
        before = len(streams)
        for _ in range(reads):
            state.get_variable("large", "text")
        meanwhile = len(streams) - before
        over.set()
        for asking in fleet:
            asking.result()
    assert all(streams)
    # If each read waited its turn among the streams, all of them would end meanwhile, on any machine.
    assert meanwhile < streaming * reads


def test_streams_that_were_abandoned_do_not_hold_up_the_end(filled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sessions.db"
    copy.write_bytes(filled.read_bytes())
    never = f"{100 * DEADLINE_S:g}"
    with serve(copy, "--grace", never, "--stall-timeout", never) as server:
        with grpc.insecure_channel(target_of(server)) as channel:
            stub = audit_stubs.AuditServiceStub(channel)
            for _ in range(8):
                next(stub.ListHistory(text_history()))
        assert server.terminate(DEADLINE_S) == 0


def test_a_stream_in_flight_when_the_server_ends_can_go_on(filled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sessions.db"
    copy.write_bytes(filled.read_bytes())
    with serve(copy) as server, grpc.insecure_channel(target_of(server)) as channel:
        stream = audit_stubs.AuditServiceStub(channel).ListHistory(text_history())
        responses = [next(stream)]
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        server.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as ended:
            responses.extend(stream)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.wait(DEADLINE_S) == 0
    with serve(copy) as server, grpc.insecure_channel(target_of(server)) as channel:
        request = text_history(range=pb.Range(after=responses[-1].next))
        responses += audit_stubs.AuditServiceStub(channel).ListHistory(request)
    assert versions_in(responses) == list(range(VERSIONS))[::-1]


@pytest.fixture(scope="module")
def narrow(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of little patience, with small messages; one session is from a time when they were larger."""
    copy = tmp_path_factory.mktemp("narrow") / "sessions.db"
    copy.write_bytes(filled.read_bytes())
    with EmbeddedState(copy) as state:
        state.initialize_session("wide")
        for number in range(20):
            state.register_variable("wide", f"v{number}", "string", "y" * VALUE_BYTES)
    with serve(copy, "--stall-timeout", "0.2", "--max-message-bytes", "64KiB") as server:
        yield server


def test_a_client_that_does_not_read_is_cut_off(narrow: ServerProcess) -> None:
    with grpc.insecure_channel(target_of(narrow)) as channel:
        stream = audit_stubs.AuditServiceStub(channel).ListHistory(text_history())
        next(stream)
        wait_until(lambda: "client stalled" in narrow.stderr_tail, "the end of the server's patience")
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "read nothing" in ended.value.details()


def test_answers_that_no_message_can_hold_are_errors_and_lists_are_cut_to_fit(narrow: ServerProcess) -> None:
    with open_audit(f"grpc://{target_of(narrow)}") as audit, BridgedState(target_of(narrow)) as state:
        assert len(audit.page(HistoryQuery(variable="text"), most=100).rows) == 100
        for ask in (lambda: audit.state("wide"), lambda: state.list_variables("wide")):
            with pytest.raises(LimitExceededError) as caught:
                ask()
            assert caught.value.setting == "max_message_bytes"
        assert len(list(audit.iterate(HistoryQuery(session="wide")))) == 20


def test_a_session_that_no_message_can_hold_is_resumed_nevertheless(narrow: ServerProcess) -> None:
    with grpc.insecure_channel(target_of(narrow)) as channel:
        bridge = bridge_stubs.BridgeServiceStub(channel)
        response, call = bridge.InitializeSession.with_call(bridge_pb.InitializeSessionRequest(session_id="wide"))
        sent = list(response.initial_variables)
        trailers = dict(call.trailing_metadata())
        assert trailers["x-dspex-resumed"] == "true"
        assert int(trailers["x-dspex-left-out"]) == 20 - len(sent)
        assert 0 < len(sent) < 20
        # All of it can be read, it can shrink, and it does not grow.
        for number in range(20):
            one = bridge_pb.GetVariableRequest(session_id="wide", variable_identifier=f"v{number}")
            assert len(bridge.GetVariable(one).variable.value.value) == VALUE_BYTES + 2
        with BridgedState(target_of(narrow)) as state:
            state.set_variable("wide", "v0", "short")
            with pytest.raises(LimitExceededError, match="session_size_bytes"):
                state.set_variable("wide", "v1", "y" * (VALUE_BYTES + 1))


def test_a_history_stops_where_a_message_is_full_and_says_how_to_continue(narrow: ServerProcess) -> None:
    with grpc.insecure_channel(target_of(narrow)) as channel:
        history = bridge_stubs.BridgeServiceStub(channel).GetVariableHistory
        request = bridge_pb.GetVariableHistoryRequest(session_id="large", variable_identifier="text", limit=30)
        versions: list[int] = []
        headers: tuple[tuple[str, str], ...] = ()
        while len(versions) < 30:
            request.limit = 30 - len(versions)
            response, call = history.with_call(request, metadata=headers)
            assert response.ByteSize() < 32 * 1024
            assert response.entries
            versions += [entry.version for entry in response.entries]
            headers = tuple(each for each in call.trailing_metadata() if each[0] == "x-dspex-before-version")
            assert headers or len(versions) == 30
    assert versions == list(range(VERSIONS - 1, VERSIONS - 31, -1))
    with BridgedState(target_of(narrow)) as state:
        assert [entry.version for entry in state.get_variable_history("large", "text", 30)] == versions


# What may be seen, and errors


def test_sensitive_values_stay_masked_if_the_server_does_not_allow_it(server: ServerProcess, stub: Any) -> None:
    (entry,) = next(stub.ListHistory(pb.ListHistoryRequest(variable="secret", reveal=True))).entries
    assert entry.masked
    assert not entry.HasField("value")
    state = stub.GetState(pb.GetStateRequest(session="large", reveal=True))
    assert [variable.masked for variable in state.variables] == [False, True]
    version = stub.GetVersion(pb.GetVersionRequest(session="large", variable_id=entry.variable_id, reveal=True))
    assert version.entry == entry
    with open_audit(f"grpc://{target_of(server)}", reveal=True) as audit:
        assert not any(SECRET in str(row) for row in audit.iterate(HistoryQuery(session="large", variable="secret")))


def test_errors_are_statuses_with_details(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.ListHistory(pb.ListHistoryRequest(session="larg")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "did you mean 'large'?" in caught.value.details()
    info = ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert info.reason == "NOT_IN_HISTORY"


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (pb.ListHistoryRequest(range=pb.Range(since="soon")), "INVALID_ARGUMENT", "since"),
        (pb.ListHistoryRequest(range=pb.Range(limit=-1)), "INVALID_ARGUMENT", "limit"),
        (pb.ListHistoryRequest(range=pb.Range(after=pb.Cursor(key=[1]))), "INVALID_ARGUMENT", "after"),
        (
            pb.ListHistoryRequest(range=pb.Range(after=pb.Cursor(key=[1, 2, 3], since=-1, until=2))),
            *("INVALID_ARGUMENT", "since"),
        ),
        (pb.ListHistoryRequest(where=[pb.Predicate(operator=1, operand="x")]), "INVALID_ARGUMENT", "where"),
        (pb.ListHistoryRequest(where=[pb.Predicate(operand="x")]), "UNIMPLEMENTED", "Operator 0"),
        (pb.ListHistoryRequest(kind=99), "UNIMPLEMENTED", "ChangeKind 99"),
    ],
)
def test_invalid_requests_are_refused(request_: Any, code: str, words: str, stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.ListHistory(request_))
    assert caught.value.code().name == code
    assert words in caught.value.details()


def test_a_server_that_has_no_such_service_says_so() -> None:
    older = grpc.server(futures.ThreadPoolExecutor(1))
    port = older.add_insecure_port("127.0.0.1:0")
    older.start()
    with open_audit(f"grpc://127.0.0.1:{port}") as audit, pytest.raises(UnsupportedError) as caught:
        audit.head()
    assert SERVICE in str(caught.value)
    older.stop(None)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as left:
        target = f"127.0.0.1:{left.getsockname()[1]}"
    with open_audit(f"grpc://{target}") as audit:
        for ask in (audit.head, lambda: list(audit.iterate(HistoryQuery())), lambda: audit.execution("exec_1_a")):
            with pytest.raises(UnavailableError, match=target):
                ask()


def test_a_closed_source_raises(server: ServerProcess) -> None:
    audit = open_audit(f"grpc://{target_of(server)}")
    audit.close()
    for ask in (audit.head, lambda: audit.page(HistoryQuery())):
        with pytest.raises(EngineClosedError):
            ask()
    state = connect(f"grpc://{target_of(server)}")
    with state.audit() as audit:
        assert audit.head() > VERSIONS
    # The provider's connection outlives the audit that used it.
    assert state.get_variable("large", "text").version == VERSIONS - 1
    state.close()
    with pytest.raises(EngineClosedError):
        state.audit()


def test_text_that_no_message_can_carry_is_refused(server: ServerProcess) -> None:
    with open_audit(f"grpc://{target_of(server)}") as audit:
        for ask in (lambda: audit.state("\ud800"), lambda: list(audit.iterate(HistoryQuery(tool="\ud800")))):
            with pytest.raises(InvalidArgumentError):
                ask()
        with pytest.raises(NotInHistoryError):
            audit.execution("exec_1_a")


# Pruning


@pytest.fixture
def prunable(filled: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    copy = tmp_path / "sessions.db"
    copy.write_bytes(filled.read_bytes())
    with serve(copy, "--audit-prune") as server:
        yield server


def test_clients_cannot_prune_unless_the_server_allows_it(server: ServerProcess) -> None:
    with connect(f"grpc://{target_of(server)}") as state:
        head = state.audit().head()
        assert state.prune(PrunePolicy(keep_versions=10), confirm=False).versions > 0
        with pytest.raises(UnsupportedError, match="--audit-prune"):
            state.prune(PrunePolicy(keep_versions=10), confirm=True)
        assert state.audit().head() == head


def test_a_running_server_prunes_on_request(prunable: ServerProcess) -> None:
    reports: list[tuple[str, int, int]] = []
    with connect(f"grpc://{target_of(prunable)}") as state:
        tried = state.prune(PrunePolicy(keep_versions=10), confirm=False)
        assert (tried.confirmed, tried.sessions, tried.versions) == (False, 1, VERSIONS - 10)
        assert len(list(state.audit().iterate(HistoryQuery(variable="text")))) == VERSIONS
        done = state.prune(PrunePolicy(keep_versions=10), confirm=True, progress=lambda *step: reports.append(step))
        assert (done.confirmed, done.sessions, done.versions) == (True, 1, VERSIONS - 10)
        assert done.markers > 0
        assert reports
        assert reports[-1][1:] == (2, 2)
        left = list(state.audit().iterate(HistoryQuery(variable="text")))
        assert [entry.version for entry in left] == list(range(VERSIONS))[:-11:-1]
        with pytest.raises(InvalidArgumentError, match="it deletes nothing: give keep_versions"):
            state.prune(PrunePolicy(), confirm=True)
        earlier = datetime.now(UTC) - timedelta(days=1)  # noqa: TID251 -- a time for the server to compare
        assert state.prune(PrunePolicy(before=earlier), confirm=True).versions == 0


def test_the_command_has_a_server_prune(prunable: ServerProcess, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        words = ["db", "prune", "--keep-versions", "10", *arguments]
        ended = commands().run(words, cwd=tmp_path, env=environment(), timeout_s=within(60))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    target = ("--target", target_of(prunable))
    assert f"{target[1]}: 4,990 versions and 0 events of 1 session deleted" in run(*target, "--confirm")
    report = json.loads(run(*target, "--json"))
    assert report == {
        "ok": True,
        "target": target[1],
        "confirmed": False,
        **dict.fromkeys(("sessions", "versions", "events", "markers", "denials"), 0),
        "duration_s": report["duration_s"],
    }


def test_pruning_ends_when_its_caller_leaves(prunable: ServerProcess) -> None:
    class LeftError(Exception):
        pass

    def leave(*_: object) -> None:
        raise LeftError

    with connect(f"grpc://{target_of(prunable)}") as state:
        with pytest.raises(LeftError):
            state.prune(PrunePolicy(keep_versions=1), confirm=True, progress=leave)
        # The next pruning waits for the end of the first, and prunes the rest.
        assert state.prune(PrunePolicy(keep_versions=1), confirm=False).versions < VERSIONS


def test_a_policy_beyond_time_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Prune(pb.PruneRequest(before=Timestamp(seconds=2**62))))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
