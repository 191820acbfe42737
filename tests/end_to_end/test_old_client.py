"""A client as they exist in the field: the protocol page and the generated stubs, nothing of this package."""

import json
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dspex_persist.infra.process import ServerProcess
from tests.deadline import within

SESSION = "session_1"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path: Path = tmp_path_factory.mktemp("old-client") / "sessions.db"
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--db", str(path), "--listen", "127.0.0.1:0"]
    with ServerProcess.start(argv) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def stub(target: str) -> Iterator[Any]:
    with grpc.insecure_channel(target) as channel:
        stub = bridge.BridgeServiceStub(channel)
        stub.InitializeSession(pb.InitializeSessionRequest(session_id=SESSION))
        yield stub
        stub.CleanupSession(pb.CleanupSessionRequest(session_id=SESSION, force=True))


def packed(type_name: str, value: object) -> AnyMessage:
    return AnyMessage(type_url=f"type.googleapis.com/snakepit.{type_name}", value=json.dumps(value).encode())


def register(stub: Any, name: str, type_name: str, value: object, **more: Any) -> str:
    request = pb.RegisterVariableRequest(
        session_id=SESSION, name=name, type=type_name, initial_value=packed(type_name, value), **more
    )
    response = stub.RegisterVariable(request)
    assert response.success
    return str(response.variable_id)


def set_value(stub: Any, identifier: str, type_name: str, value: object, **more: Any) -> int:
    request = pb.SetVariableRequest(
        session_id=SESSION, variable_identifier=identifier, value=packed(type_name, value), **more
    )
    return int(stub.SetVariable(request).new_version)


def get(stub: Any, identifier: str) -> Any:
    return stub.GetVariable(pb.GetVariableRequest(session_id=SESSION, variable_identifier=identifier)).variable


def refusal(call: Any, request: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value


def details_of(error: Any) -> list[AnyMessage]:
    trailers = dict(error.trailing_metadata())
    return list(Status.FromString(trailers["grpc-status-details-bin"]).details)


def test_ping_echoes(stub: Any) -> None:
    answer = stub.Ping(pb.PingRequest(message="hello"))
    assert "hello" in answer.message
    assert answer.server_time.seconds > 1_600_000_000


def test_session_life(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        stub = bridge.BridgeServiceStub(channel)
        config = pb.SessionConfig(enable_caching=True, cache_ttl_seconds=60)
        begun = stub.InitializeSession(
            pb.InitializeSessionRequest(session_id="life", metadata={"client": "old"}, config=config)
        )
        assert begun.success
        assert not begun.initial_variables
        request = pb.RegisterVariableRequest(
            session_id="life", name="k", type="integer", initial_value=packed("integer", 3)
        )
        stub.RegisterVariable(request)
        resumed = stub.InitializeSession(pb.InitializeSessionRequest(session_id="life"))
        assert resumed.success
        assert json.loads(resumed.initial_variables["k"].value.value) == 3
        summary = stub.GetSession(pb.GetSessionRequest(session_id="life"))
        assert (summary.session_id, summary.variable_count, summary.tool_count) == ("life", 1, 0)
        assert summary.metadata["client"] == "old"
        assert summary.created_at.seconds > 1_600_000_000
        assert stub.Heartbeat(pb.HeartbeatRequest(session_id="life")).session_valid
        cleaned = stub.CleanupSession(pb.CleanupSessionRequest(session_id="life"))
        assert cleaned.success
        assert cleaned.resources_cleaned == 1
        again = stub.CleanupSession(pb.CleanupSessionRequest(session_id="life"))
        assert again.success
        assert again.resources_cleaned == 0
        assert not stub.Heartbeat(pb.HeartbeatRequest(session_id="life")).session_valid
        error: Any = refusal(stub.GetSession, pb.GetSessionRequest(session_id="life"))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert "not found" in error.details().lower()


def test_every_call_on_an_unknown_session_is_not_found(stub: Any) -> None:
    where = {"session_id": "missing"}
    which = {**where, "variable_identifier": "x"}
    requests = [
        (stub.GetSession, pb.GetSessionRequest(**where)),
        (stub.GetVariable, pb.GetVariableRequest(**which)),
        (stub.GetVariables, pb.BatchGetVariablesRequest(**where, variable_identifiers=["x"])),
        (stub.SetVariable, pb.SetVariableRequest(**which, value=packed("float", 1))),
        (stub.SetVariables, pb.BatchSetVariablesRequest(**where, updates={"x": packed("float", 1)})),
        (
            stub.RegisterVariable,
            pb.RegisterVariableRequest(**where, name="x", type="float", initial_value=packed("float", 1)),
        ),
        (stub.ListVariables, pb.ListVariablesRequest(**where)),
        (stub.DeleteVariable, pb.DeleteVariableRequest(**which)),
        (stub.GetVariableHistory, pb.GetVariableHistoryRequest(**which)),
        (stub.RollbackVariable, pb.RollbackVariableRequest(**which)),
        (stub.AddDependency, pb.AddDependencyRequest(**where, from_variable="x", to_variable="y")),
        (stub.StartOptimization, pb.StartOptimizationRequest(**which, optimizer_id="o")),
        (stub.StopOptimization, pb.StopOptimizationRequest(**which)),
        (lambda request: next(stub.WatchVariables(request)), pb.WatchVariablesRequest(**where)),
    ]
    for call, request in requests:
        error: Any = refusal(call, request)
        assert error.code() == grpc.StatusCode.NOT_FOUND, request
        assert "not found" in error.details().lower()


def test_register_get_set(stub: Any) -> None:
    constraints = json.dumps({"min": 0.0, "max": 1.0})
    variable_id = register(
        stub, "temperature", "float", 0.7, constraints_json=constraints, metadata={"source": "python", "unit": "none"}
    )
    assert variable_id.startswith("var_temperature_")
    for identifier in ("temperature", variable_id):
        variable = get(stub, identifier)
        assert (variable.id, variable.name, variable.type) == (variable_id, "temperature", "float")
        assert variable.value.type_url == "type.googleapis.com/snakepit.float"
        assert json.loads(variable.value.value) == 0.7
        assert variable.version == 0
        assert variable.source == pb.Variable.PYTHON
        assert json.loads(variable.constraints_json) == {"min": 0.0, "max": 1.0}
    assert set_value(stub, variable_id, "float", 0.9, metadata={"reason": "try"}) == 1
    variable = get(stub, "temperature")
    assert dict(variable.metadata) == {"source": "python", "unit": "none", "reason": "try"}
    assert variable.source == pb.Variable.ELIXIR
    assert variable.last_updated_at.seconds > 1_600_000_000


def test_a_client_that_starts_again_resumes(stub: Any) -> None:
    first = register(stub, "n", "integer", 1, constraints_json='{"min": 0}')
    set_value(stub, "n", "integer", 5)
    assert register(stub, "n", "integer", 1, constraints_json='{ "min":0 }') == first
    assert json.loads(get(stub, "n").value.value) == 5
    request = pb.RegisterVariableRequest(session_id=SESSION, name="n", type="float", initial_value=packed("float", 1))
    error: Any = refusal(stub.RegisterVariable, request)
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "integer" in error.details()


@pytest.mark.parametrize(
    ("type_name", "constraints", "value", "words"),
    [
        ("float", '{"max": 1.0}', 1.5, "value 1.5 is above maximum 1.0"),
        ("float", '{"min": 0}', -1.5, "below minimum"),
        ("integer", "", 1.5, ""),
        ("integer", "", True, ""),
        ("string", '{"max_length": 2}', "abc", ""),
        ("string", '{"pattern": "^a+$"}', "b", ""),
        ("string", "", None, ""),
        ("choice", '{"choices": ["a", "b"]}', "c", "must be one of: a, b"),
        ("module", '{"namespace": "DSPy"}', "Other.Predict", ""),
        ("embedding", '{"dimensions": 3}', [1.0, 2.0], ""),
        ("tensor", "", {"shape": [2, 2], "data": [1, 2, 3]}, ""),
        ("map", "", [1], ""),
        ("list", "", {"a": 1}, ""),
        ("boolean", "", 2, ""),
        ("gizmo", "", 2, "gizmo"),
        ("float", "{not json", 1.0, "Invalid constraints"),
    ],
)
def test_values_that_violate_their_type_are_refused(
    stub: Any, type_name: str, constraints: str, value: Any, words: str
) -> None:
    request = pb.RegisterVariableRequest(
        session_id=SESSION,
        name="x",
        type=type_name,
        initial_value=packed(type_name, value),
        constraints_json=constraints,
    )
    error: Any = refusal(stub.RegisterVariable, request)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()
    info, bad = ErrorInfo(), BadRequest()
    first, second = details_of(error)
    assert first.Unpack(info)
    assert second.Unpack(bad)
    assert info.domain == "dspex-persist"
    assert bad.field_violations[0].description == error.details()


@pytest.mark.parametrize(
    ("type_name", "value"),
    [
        ("float", 0.1),
        ("float", "NaN"),
        ("float", "-Infinity"),
        ("integer", 2**200),
        ("string", "naïve 🦜 \u0000 text"),
        ("string", ""),
        ("boolean", True),
        ("module", "DSPy.Predict"),
        ("embedding", [0.5, -1.0]),
        ("tensor", {"shape": [2, 2], "data": [[1, 2], [3, 4]]}),
        ("map", {"a": [1, {"b": None}]}),
        ("list", [1, "two", None]),
    ],
)
def test_values_come_back_as_they_went_in(stub: Any, type_name: str, value: Any) -> None:
    register(stub, "x", type_name, value)
    variable = get(stub, "x")
    assert variable.value.type_url == f"type.googleapis.com/snakepit.{type_name}"
    assert json.loads(variable.value.value) == value


def test_constraints_as_programs_have_them(stub: Any) -> None:
    stated = {"min": 0, "max": None, "step": 0.1, "required": True}
    identifier = register(stub, "t", "float", 0.5, constraints_json=json.dumps(stated))
    assert json.loads(get(stub, "t").constraints_json) == {"min": 0, "step": 0.1, "required": True}
    del stated["max"]
    assert register(stub, "t", "float", 0.7, constraints_json=json.dumps(stated)) == identifier
    assert set_value(stub, "t", "float", 99.0) == 1
    request = pb.SetVariableRequest(session_id=SESSION, variable_identifier="t", value=packed("float", -1.0))
    assert refusal(stub.SetVariable, request).code() == grpc.StatusCode.INVALID_ARGUMENT
    identifier = register(stub, "m", "module", "A", constraints_json='{"choices": [], "allowed_modules": null}')
    assert register(stub, "m", "module", "A") == identifier


def test_other_type_urls(stub: Any) -> None:
    register(stub, "f", "float", 0.5)
    for type_url, content, expected in (
        ("dspex.variables/float", b"0.25", 0.25),
        ("type.googleapis.com/google.protobuf.StringValue", b"0.75", 0.75),
    ):
        request = pb.SetVariableRequest(
            session_id=SESSION, variable_identifier="f", value=AnyMessage(type_url=type_url, value=content)
        )
        assert stub.SetVariable(request).success
        assert json.loads(get(stub, "f").value.value) == expected
    register(stub, "s", "string", "")
    really_packed = AnyMessage()
    really_packed.Pack(StringValue(value="plain"))
    stub.SetVariable(pb.SetVariableRequest(session_id=SESSION, variable_identifier="s", value=really_packed))
    assert json.loads(get(stub, "s").value.value) == "plain"


@pytest.mark.parametrize("text", ["12345678", "123456789", "5551234567", "4006381333931", "[1, 2, 3]", "", "true"])
def test_a_packed_string_stays_a_string(stub: Any, text: str) -> None:
    wire = AnyMessage()
    wire.Pack(StringValue(value=text))
    stub.RegisterVariable(pb.RegisterVariableRequest(session_id=SESSION, name="s", type="string", initial_value=wire))
    assert json.loads(get(stub, "s").value.value) == text
    set_value(stub, "s", "string", "else")
    stub.SetVariables(pb.BatchSetVariablesRequest(session_id=SESSION, updates={"s": wire}, atomic=True))
    assert json.loads(get(stub, "s").value.value) == text


def test_a_list_in_a_string_is_taken_where_a_list_is_wanted(stub: Any) -> None:
    wire = AnyMessage()
    wire.Pack(StringValue(value="[1, 2, 3]"))
    for name, type_name in (("l", "list"), ("e", "embedding")):
        stub.RegisterVariable(
            pb.RegisterVariableRequest(session_id=SESSION, name=name, type=type_name, initial_value=wire)
        )
        assert json.loads(get(stub, name).value.value) == [1, 2, 3]
    register(stub, "m", "map", '{"a": 1}')
    assert json.loads(get(stub, "m").value.value) == {"a": 1}
    request = pb.RegisterVariableRequest(
        session_id=SESSION, name="n", type="list", initial_value=packed("string", "one, two")
    )
    error: Any = refusal(stub.RegisterVariable, request)
    assert 'a list is a JSON array, not "one, two"' in error.details()


@pytest.mark.parametrize("shape", [[1500], None])
def test_binary_values_without_their_bytes_are_refused(stub: Any, shape: list[int] | None) -> None:
    description = json.dumps(
        {"dtype": "float64", "binary_format": "erlang_binary"} | ({"shape": shape} if shape else {})
    )
    wire = AnyMessage(type_url="type.googleapis.com/snakepit.tensor.binary", value=description.encode())
    register(stub, "t", "tensor", {"shape": [1], "data": [1.0]})
    requests = [
        (
            stub.RegisterVariable,
            pb.RegisterVariableRequest(session_id=SESSION, name="u", type="tensor", initial_value=wire),
        ),
        (stub.SetVariable, pb.SetVariableRequest(session_id=SESSION, variable_identifier="t", value=wire)),
    ]
    for call, request in requests:
        error: Any = refusal(call, request)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "its bytes are missing" in error.details()
    batch = stub.SetVariables(pb.BatchSetVariablesRequest(session_id=SESSION, updates={"t": wire}, atomic=True))
    assert not batch.success
    assert "its bytes are missing" in batch.errors["t"]
    assert get(stub, "t").version == 0


@pytest.mark.parametrize("binary_format", ["pickle", "erlang_binary", "float64"])
def test_binary_values_come_back_as_they_came(stub: Any, binary_format: str) -> None:
    content = struct.pack("<1500d", *range(1500))
    description = json.dumps(
        {"shape": [1500], "dtype": "float64", "binary_format": binary_format, "type": "embedding"}
    ).encode()
    wire = AnyMessage(type_url="type.googleapis.com/snakepit.embedding.binary", value=description)
    stub.RegisterVariable(
        pb.RegisterVariableRequest(
            session_id=SESSION, name="e", type="embedding", initial_value=wire, initial_binary_value=content
        )
    )
    variable = get(stub, "e")
    assert variable.value.type_url.endswith("snakepit.embedding.binary")
    assert variable.value.value == description
    assert variable.binary_value == content
    batch = pb.BatchSetVariablesRequest(
        session_id=SESSION, updates={"e": wire}, binary_updates={"e": content[::-1]}, atomic=True
    )
    assert stub.SetVariables(batch).success
    assert get(stub, "e").binary_value == content[::-1]


def test_expected_version(stub: Any) -> None:
    register(stub, "n", "integer", 0)
    set_value(stub, "n", "integer", 1)
    assert set_value(stub, "n", "integer", 2, expected_version=1) == 2
    request = pb.SetVariableRequest(
        session_id=SESSION, variable_identifier="n", value=packed("integer", 3), expected_version=1
    )
    error: Any = refusal(stub.SetVariable, request)
    assert error.code() == grpc.StatusCode.ABORTED
    assert "1" in error.details()
    assert "2" in error.details()


def test_an_expected_version_is_never_ignored(stub: Any) -> None:
    """A call that cannot check it refuses it, because the client relies on the check."""
    register(stub, "guarded", "integer", 1)
    names = {"session_id": SESSION, "variable_identifier": "guarded"}
    batch = pb.BatchSetVariablesRequest(session_id=SESSION, updates={"guarded": packed("integer", 2)})
    calls = [
        (stub.SetVariables, batch),
        (stub.DeleteVariable, pb.DeleteVariableRequest(**names)),
        (stub.RollbackVariable, pb.RollbackVariableRequest(**names)),
    ]
    for call, request in calls:
        with pytest.raises(grpc.RpcError) as error:
            call(request, metadata=(("x-dspex-expected-version", "0"),))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "only SetVariable does" in error.value.details()
    request = pb.SetVariableRequest(value=packed("integer", 2), **names)
    with pytest.raises(grpc.RpcError) as error:
        stub.SetVariable(request, metadata=(("x-dspex-expected-version-bin", b"7"),))
    assert error.value.code() == grpc.StatusCode.ABORTED
    with pytest.raises(grpc.RpcError) as error:
        stub.SetVariable(request, metadata=(("x-dspex-execution-id-bin", b"exec_1"),))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert get(stub, "guarded").version == 0


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("x-dspex-actor", "ann", "bob"),
        ("x-dspex-idempotency-key", "one", "two"),
        ("x-dspex-expected-version", "0", "1"),
        ("x-dspex-execution-id", "exec_1", "exec_2"),
        ("x-dspex-rpc-id", "one", "two"),
    ],
)
def test_a_header_that_says_two_things_is_refused(stub: Any, name: str, first: str, second: str) -> None:
    register(stub, "twice", "integer", 1)
    request = pb.SetVariableRequest(session_id=SESSION, variable_identifier="twice", value=packed("integer", 2))
    for metadata in (((name, first), (name, second)), ((f"{name}-bin", first.encode()), (name, second))):
        with pytest.raises(grpc.RpcError) as error:
            stub.SetVariable(request, metadata=metadata)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"it has two values, '{first}' and '{second}'" in error.value.details()
    assert get(stub, "twice").version == 0


def test_a_header_that_says_the_same_twice_is_taken(stub: Any) -> None:
    register(stub, "same", "integer", 1)
    request = pb.SetVariableRequest(session_id=SESSION, variable_identifier="same", value=packed("integer", 2))
    metadata = (("x-dspex-actor", "ann"), ("x-dspex-actor", "ann"), ("x-other", "1"), ("x-other", "2"))
    stub.SetVariable(request, metadata=metadata)
    history = stub.GetVariableHistory(pb.GetVariableHistoryRequest(session_id=SESSION, variable_identifier="same"))
    assert history.entries[0].changed_by == "ann"


def test_batches(stub: Any) -> None:
    register(stub, "a", "float", 0.0, constraints_json='{"max": 1.0}')
    b_id = register(stub, "b", "float", 0.0)
    response = stub.GetVariables(
        pb.BatchGetVariablesRequest(session_id=SESSION, variable_identifiers=["a", "zz", b_id, "yy"])
    )
    assert set(response.variables) == {"a", b_id}
    assert list(response.missing_variables) == ["zz", "yy"]
    updates = {"a": packed("float", 2.0), "b": packed("float", 2.0)}
    refused = stub.SetVariables(pb.BatchSetVariablesRequest(session_id=SESSION, updates=updates, atomic=True))
    assert not refused.success
    assert set(refused.errors) == {"a"}
    assert not refused.new_versions
    assert get(stub, "b").version == 0
    partly = stub.SetVariables(pb.BatchSetVariablesRequest(session_id=SESSION, updates=updates))
    assert partly.success
    assert dict(partly.new_versions) == {"b": 1}
    assert "above maximum" in partly.errors["a"]


def test_list_and_delete(stub: Any) -> None:
    for name in ("model.temperature", "model.top_p", "retriever.k"):
        register(stub, name, "float", 1.0)

    def names(pattern: str) -> list[str]:
        listed = stub.ListVariables(pb.ListVariablesRequest(session_id=SESSION, pattern=pattern))
        return [variable.name for variable in listed.variables]

    assert names("") == ["model.temperature", "model.top_p", "retriever.k"]
    assert names("model.*") == ["model.temperature", "model.top_p"]
    assert names("*.?") == ["retriever.k"]
    assert names("model") == []
    where = {"session_id": SESSION, "variable_identifier": "retriever.k"}
    assert stub.DeleteVariable(pb.DeleteVariableRequest(**where)).success
    assert names("retriever*") == []
    assert refusal(stub.DeleteVariable, pb.DeleteVariableRequest(**where)).code() == grpc.StatusCode.NOT_FOUND
    assert refusal(stub.GetVariable, pb.GetVariableRequest(**where)).code() == grpc.StatusCode.NOT_FOUND


def test_history_and_rollback(stub: Any) -> None:
    register(stub, "t", "float", 0.0)
    for step in (1, 2, 3):
        set_value(stub, "t", "float", step / 10, metadata={"step": str(step)})
    where = {"session_id": SESSION, "variable_identifier": "t"}
    entries = stub.GetVariableHistory(pb.GetVariableHistoryRequest(**where)).entries
    assert [entry.version for entry in entries] == [3, 2, 1, 0]
    assert json.loads(entries[0].value.value) == 0.3
    assert entries[0].metadata["step"] == "3"
    assert entries[0].changed_by
    assert entries[0].timestamp.seconds > 1_600_000_000
    assert len(stub.GetVariableHistory(pb.GetVariableHistoryRequest(**where, limit=2)).entries) == 2
    rolled = stub.RollbackVariable(pb.RollbackVariableRequest(**where, target_version=1))
    assert rolled.success
    assert rolled.variable.version == 4
    assert json.loads(rolled.variable.value.value) == 0.1
    assert len(stub.GetVariableHistory(pb.GetVariableHistoryRequest(**where)).entries) == 5
    missing = pb.RollbackVariableRequest(**where, target_version=99)
    assert refusal(stub.RollbackVariable, missing).code() == grpc.StatusCode.NOT_FOUND


def test_watch(stub: Any) -> None:
    for name in ("a", "b"):
        register(stub, name, "float", 0.0)
    stub.AddDependency(
        pb.AddDependencyRequest(session_id=SESSION, from_variable="b", to_variable="a", dependency_type="data")
    )
    updates = stub.WatchVariables(
        pb.WatchVariablesRequest(session_id=SESSION, include_initial_values=True), timeout=within(20)
    )
    first, second = next(updates), next(updates)
    assert [u.update_type for u in (first, second)] == ["initial_value", "initial_value"]
    assert {u.variable.name for u in (first, second)} == {"a", "b"}
    set_value(stub, "a", "float", 1.0, metadata={"why": "test"})
    changed = next(updates)
    assert changed.update_type == "value_change"
    assert changed.variable_id == changed.variable.id
    assert json.loads(changed.variable.value.value) == 1.0
    assert changed.update_metadata["why"] == "test"
    sequence = int(changed.update_metadata["commit_sequence"])
    dependant = next(updates)
    assert (dependant.update_type, dependant.variable.name) == ("dependency_changed", "b")
    stub.DeleteVariable(pb.DeleteVariableRequest(session_id=SESSION, variable_identifier="b"))
    deleted = next(updates)
    assert (deleted.update_type, deleted.variable.name) == ("deleted", "b")
    updates.cancel()
    resumed = stub.WatchVariables(
        pb.WatchVariablesRequest(session_id=SESSION),
        metadata=(("x-dspex-after-sequence", str(sequence)),),
        timeout=within(20),
    )
    assert next(resumed).update_type == "deleted"
    resumed.cancel()


def test_watch_from_ahead_of_the_store_names_the_header(stub: Any) -> None:
    ahead = stub.WatchVariables(
        pb.WatchVariablesRequest(session_id=SESSION),
        metadata=(("x-dspex-after-sequence", "999999"),),
        timeout=within(20),
    )
    with pytest.raises(grpc.RpcError, match=r"invalid x-dspex-after-sequence: 999999 is not between 0 and") as caught:
        next(ahead)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_watch_of_one_variable(stub: Any) -> None:
    register(stub, "a", "float", 0.0)
    wanted = register(stub, "b", "float", 0.0)
    updates = stub.WatchVariables(
        pb.WatchVariablesRequest(session_id=SESSION, variable_identifiers=[wanted]), timeout=within(20)
    )
    updates.initial_metadata()
    writer = threading.Thread(target=lambda: [set_value(stub, name, "float", 1.0) for name in ("a", "b")])
    writer.start()
    assert next(updates).variable.name == "b"
    writer.join()
    updates.cancel()


def test_dependencies_refuse_cycles(stub: Any) -> None:
    for name in ("a", "b", "c"):
        register(stub, name, "float", 0.0)
    for user, used in (("a", "b"), ("b", "c")):
        request = pb.AddDependencyRequest(session_id=SESSION, from_variable=user, to_variable=used)
        assert stub.AddDependency(request).success
    closing = pb.AddDependencyRequest(session_id=SESSION, from_variable="c", to_variable="a")
    error: Any = refusal(stub.AddDependency, closing)
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert all(f"{user} -> {used}" in error.details() for user, used in (("a", "b"), ("b", "c"), ("c", "a")))


def test_optimization(stub: Any) -> None:
    register(stub, "t", "float", 0.0)
    where = {"session_id": SESSION, "variable_identifier": "t"}
    started = stub.StartOptimization(
        pb.StartOptimizationRequest(**where, optimizer_id="mipro", optimizer_config={"trials": "3"})
    )
    assert started.success
    assert started.optimization_id
    status = get(stub, "t").optimization_status
    assert (status.optimizing, status.optimizer_id) == (True, "mipro")
    write = pb.SetVariableRequest(**where, value=packed("float", 0.5))
    error: Any = refusal(stub.SetVariable, write)
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "mipro" in error.details()
    other = pb.StartOptimizationRequest(**where, optimizer_id="other")
    assert refusal(stub.StartOptimization, other).code() == grpc.StatusCode.FAILED_PRECONDITION
    delete = pb.DeleteVariableRequest(**where)
    assert refusal(stub.DeleteVariable, delete).code() == grpc.StatusCode.FAILED_PRECONDITION
    assert set_value(stub, "t", "float", 0.5, metadata={"optimizer_id": "mipro"}) == 1
    stopped = stub.StopOptimization(pb.StopOptimizationRequest(**where))
    assert stopped.success
    assert json.loads(stopped.final_value.value) == 0.5
    assert not get(stub, "t").optimization_status.optimizing
    assert set_value(stub, "t", "float", 0.6) == 2


def test_tools(stub: Any) -> None:
    """The server has no tools here; a worker registers one without an address."""
    assert not stub.GetExposedElixirTools(pb.GetExposedElixirToolsRequest(session_id=SESSION)).tools
    unknown = stub.ExecuteTool(pb.ExecuteToolRequest(session_id=SESSION, tool_name="x"))
    assert (unknown.success, unknown.metadata["error_code"]) == (False, "UNKNOWN_TOOL")
    hidden = stub.ExecuteElixirTool(pb.ExecuteElixirToolRequest(session_id=SESSION, tool_name="x"))
    assert (hidden.success, hidden.metadata["error_code"]) == (False, "UNKNOWN_TOOL")
    streamed: Any = refusal(
        lambda request: next(stub.ExecuteStreamingTool(request)),
        pb.ExecuteToolRequest(session_id=SESSION, tool_name="x"),
    )
    assert streamed.code() == grpc.StatusCode.NOT_FOUND
    tool = pb.ToolRegistration(name="far", description="somewhere else")
    registered = stub.RegisterTools(pb.RegisterToolsRequest(session_id=SESSION, tools=[tool], worker_id="w1"))
    assert registered.success
    assert dict(registered.tool_ids) == {"far": f"{SESSION}:far"}
    far = stub.ExecuteTool(pb.ExecuteToolRequest(session_id=SESSION, tool_name="far"))
    assert (far.success, far.metadata["error_code"]) == (False, "UNAVAILABLE")
    assert 'without metadata["address"]' in far.error_message
    assert "far" in stub.InitializeSession(pb.InitializeSessionRequest(session_id=SESSION)).available_tools


NUL = "a\0b"
"""What no text may have that is kept."""


@pytest.mark.parametrize(
    "tool",
    [
        pb.ToolRegistration(name="t", description=NUL),
        pb.ToolRegistration(name="t", metadata={NUL: "x"}),
        pb.ToolRegistration(name="t", metadata={"x": NUL}),
        pb.ToolRegistration(name="t", parameters=[pb.ParameterSpec(name=NUL, type="any")]),
        pb.ToolRegistration(name="t", parameters=[pb.ParameterSpec(name="x", type=NUL)]),
        pb.ToolRegistration(name="t", parameters=[pb.ParameterSpec(name="x", type="any", description=NUL)]),
        pb.ToolRegistration(name="t", parameters=[pb.ParameterSpec(name="x", type="any", validation_json=NUL)]),
    ],
    ids=str,
)
def test_tools_are_described_in_texts(stub: Any, tool: pb.ToolRegistration) -> None:
    error = refusal(stub.RegisterTools, pb.RegisterToolsRequest(session_id=SESSION, tools=[tool], worker_id="w"))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "tool 't': 'a\\x00b' contains NUL" in error.details()


def test_bytes_that_are_no_message(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary("/snakepit.bridge.BridgeService/SetVariable")
        error: Any = refusal(call, b"\xff\xff\xff")
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_health(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "snakepit.bridge.BridgeService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
