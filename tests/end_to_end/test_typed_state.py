"""Typed state and rules from outside: a server, a client of the old kind, and the command line."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.store import maintenance
from tests.deadline import within
from tests.end_to_end.old_style import environment, packed, serve, target_of
from tests.prepared import commands

MODELS = """
from pydantic import BaseModel
from dspex_persist import migration, model


@model("profile")
class Profile(BaseModel):
    first: str
    last: str = ""


@migration("profile", from_=1, to=2)
def split(old):
    first, _, last = old["name"].partition(" ")
    return {"first": first, "last": last}
"""
FIRST = {
    "schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    "schema_version": 1,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, BridgedState]]:
    path = tmp_path_factory.mktemp("typed") / "sessions.db"
    with serve(path) as server, BridgedState(target_of(server)) as state:
        yield target_of(server), state
    assert maintenance.check(path).problems == ()


@pytest.fixture(scope="module")
def old(served: tuple[str, BridgedState]) -> Iterator[Any]:
    """A client that was built against the bridge's protocol alone."""
    with grpc.insecure_channel(served[0]) as channel:
        yield bridge.BridgeServiceStub(channel)


def refused(call: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call(request)
    return error.value.code(), error.value.details()  # type: ignore[attr-defined]


def write(session: str, name: str, value: object) -> pb.SetVariableRequest:
    return pb.SetVariableRequest(session_id=session, variable_identifier=name, value=packed(value))


def test_an_old_client_writes_what_the_schema_allows(served: tuple[str, BridgedState], old: Any) -> None:
    _, state = served
    state.initialize_session("schemas")
    state.register_variable("schemas", "profile", "map", {"name": "Ada"}, constraints=FIRST)
    code, text = refused(old.SetVariable, write("schemas", "profile", {"name": 5}))
    assert (code, text) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid value for 'profile': at name: 5 is not of type \"string\"",
    )
    assert old.SetVariable(write("schemas", "profile", {"name": "Grace"})).new_version == 1
    assert state.get_value("schemas", "profile") == {"name": "Grace"}


def test_an_old_client_registers_a_schema(served: tuple[str, BridgedState], old: Any) -> None:
    _, state = served
    state.initialize_session("registered")
    request = pb.RegisterVariableRequest(
        session_id="registered",
        name="profile",
        type="map",
        initial_value=packed({"name": "Ada"}),
        constraints_json=json.dumps({"schema": {"$ref": "http://127.0.0.1:1/schema.json"}}),
    )
    code, text = refused(old.RegisterVariable, request)
    assert (code, "leaves the schema" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    request.constraints_json = json.dumps(FIRST)
    assert old.RegisterVariable(request).success


def test_an_old_client_keeps_the_rules(served: tuple[str, BridgedState], old: Any) -> None:
    _, state = served
    state.initialize_session("rules")
    state.register_variable("rules", "max_tokens", "integer", 1000)
    state.register_variable("rules", "context_window", "integer", 8000)
    state.add_rule("rules", "fits", "max_tokens <= context_window - 500", "the prompt needs 500 tokens")
    code, text = refused(old.SetVariable, write("rules", "max_tokens", 7501))
    assert (code, text) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "rule 'fits' refuses the change: it is false: max_tokens <= context_window - 500 with "
        "context_window = 8000, max_tokens = 7501; the prompt needs 500 tokens",
    )
    batch = pb.BatchSetVariablesRequest(
        session_id="rules",
        updates={"max_tokens": packed(9000), "context_window": packed(9499)},
        atomic=True,
    )
    response = old.SetVariables(batch)
    assert not response.success
    assert set(response.errors) == {"max_tokens", "context_window"}
    batch.updates["context_window"].CopyFrom(packed(9500))
    assert old.SetVariables(batch).success
    assert state.get_value("rules", "max_tokens") == 9000


def migrate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "shop_models.py").write_text(MODELS)
    words = ["session", "migrate", "shop_models", *arguments]
    return commands().run(words, cwd=folder, env=environment(), timeout_s=within(60))


def test_sessions_are_migrated_while_the_server_runs(served: tuple[str, BridgedState], tmp_path: Path) -> None:
    target, state = served
    for number in (1, 2):
        state.initialize_session(f"shop-{number}")
        state.register_variable(f"shop-{number}", "profile", "map", {"name": f"Ada {number}"}, constraints=FIRST)
    where = ("--session", "shop-*", "--target", target)
    result = migrate(tmp_path, *where, "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"grpc://{target}: 2 variables of 2 sessions can be migrated"
    assert state.get_variable("shop-1", "profile").version == 0
    state.constrain_variable("shop-2", "profile", {"schema_version": 1}, {"nickname": "A."})
    result = migrate(tmp_path, *where, "--json")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["migrated"] == [
        {"session_id": "shop-1", "name": "profile", "from_version": 1, "to_version": 2, "version": 1}
    ]
    ((failed),) = report["failed"]
    assert failed["error"] == (
        "cannot migrate variable 'profile' from version 1 to 2: it raised KeyError: 'name'; "
        "its value is {'nickname': 'A.'} (see .raw)"
    )
    newest = state.get_variable_history("shop-1", "profile")[0]
    assert (newest.cause, newest.value and newest.value.json) == (
        "migration profile 1->2",
        '{"first":"Ada","last":"1"}',
    )
    assert state.get_value("shop-2", "profile") == {"nickname": "A."}


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty_models.py").write_text("")
    for module, reason in (("no_models", "No module named"), ("empty_models", "it declares no models")):
        words = ["session", "migrate", module]
        result = commands().run(words, cwd=tmp_path, env=environment(), timeout_s=within(60))
        assert result.returncode == 2
        assert f"cannot load models from '{module}': " in result.stderr
        assert reason in result.stderr
