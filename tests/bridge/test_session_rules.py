"""The rules of a session on every rpc of both services: what owner, administrator, guest and stranger get."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import dspex_persist
from dspex_persist.infra.access.tokens import CALLER, Identity
from dspex_persist.state.access import ACCESS, OWNER, AccessRule, access_control
from dspex_persist.state.audit import CommitQuery, ExecutionQuery, HistoryQuery, SessionQuery
from dspex_persist.state.bridge.access.guard import Guard
from dspex_persist.state.bridge.access.kinds import KIND_OF, InSession, OfServer
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.rpcs.audit import AUDIT_SERVICE
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import (
    CleanupSession,
    GetSession,
    GetVariable,
    ListVariables,
    RegisterTools,
    RegisterVariable,
    SetVariable,
)
from dspex_persist.state.errors import (
    AccessDeniedError,
    DependencyCycleError,
    ExecutionNotFoundError,
    InvalidArgumentError,
    LimitExceededError,
    NotInHistoryError,
    RuleViolatedError,
    SessionNotFoundError,
    StateError,
    VariableNotFoundError,
)
from dspex_persist.state.lm_calls import LmUsageQuery
from dspex_persist.state.model import Origin, RegisteredTool, ToolSpec, Value
from dspex_persist.testing.server import ServedDatabase
from tests.bridge.test_access import line
from tests.bridge.worker import Worker, serving
from tests.deadline import cpu_s_below, within

METHODS = {each.full_name: each for service in (BRIDGE_SERVICE, AUDIT_SERVICE) for each in service.methods}
PEOPLE = {
    "root": "admin",
    "ann": "read,write,execute",
    "bob": "read,write,execute",
    "cat": "read,write,execute",
    "eve": "read,write,execute",
}
"""ann owns the sessions, bob is a guest in some, cat may read everything there, and eve may do nothing."""
RULES = (
    AccessRule("bob", ["read", "observe"], "pub*"),
    AccessRule("bob", ["write", "optimize"], "pub_own"),
    AccessRule("bob", "execute", tools="double"),
    AccessRule("cat", "read"),
)
TOOLS = """
from dspex_persist import ToolContext, tool


@tool
def double(ctx: ToolContext, x: int) -> int:
    ctx["secret"] = 2 * x
    return 2 * x


@tool
def triple(x: int) -> int:
    return 3 * x
"""
_CONSTANTS = {"name": "pub_new", "type": "integer", "variable_identifier": "pub_a", "tool_name": "double"}

NUMBERS = count()
Outcome = tuple[str, str, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    folder = tmp_path_factory.mktemp("ruled")
    file = folder / "tokens"
    file.touch(0o600)
    file.write_text("".join(line(name, scopes, name) for name, scopes in PEOPLE.items()))
    (folder / "ruled_tools.py").write_text(TOOLS)
    # A watch without initial values begins with a heartbeat.
    settings = {"token_file": file, "tools": "ruled_tools", "session_ttl_s": 3600, "heartbeat_s": 0.1}
    with ServedDatabase(folder / "a.db", settings, import_from=folder) as served:
        yield served


@pytest.fixture(scope="module")
def states(served: ServedDatabase) -> Iterator[dict[str, BridgedState]]:
    states = {name: BridgedState(served.target, token=name, cache=False) for name in PEOPLE}
    yield states
    for state in states.values():
        state.close()


@pytest.fixture
def session(states: dict[str, BridgedState]) -> str:
    """A session of ann with rules, as it is in each test."""
    name = f"ruled-{next(NUMBERS):03}"
    ann = states["ann"]
    ann.initialize_session(name, access_control(RULES))
    for variable in ("pub_a", "pub_own", "secret"):
        ann.register_variable(name, variable, "integer", 1)
    ann.set_variable(name, "secret", 42)
    return name


def execute(state: BridgedState, session: str, x: int, **options: Any) -> Any:
    outcome = state.execute_tool(session, "double", {"x": x}, **options)
    assert outcome.result is not None
    return json.loads(outcome.result.json)


# Every rpc


def request_of(rpc: str, fields: dict[str, Any]) -> Message:
    """Return a request with those of the fields that it has."""
    request = GetMessageClass(METHODS[rpc].input_type)()
    for name, value in fields.items():
        if name not in request.DESCRIPTOR.fields_by_name:
            continue
        if isinstance(value, list):
            getattr(request, name).extend(value)
        elif isinstance(value, dict):
            for key, entry in value.items():
                put(getattr(request, name), key, entry)
        else:
            setattr(request, name, value)
    return request


def put(field: Any, key: str, entry: object) -> None:
    if isinstance(entry, bytes):
        field[key].value = entry
    else:
        field[key] = entry


def call(served: ServedDatabase, rpc: str, who: str, fields: dict[str, Any]) -> Outcome:
    """Call an rpc; return the status, the details and the answer, of a stream the first message."""
    method, request = METHODS[rpc], request_of(rpc, fields).SerializeToString()
    path = f"/{method.containing_service.full_name}/{method.name}"
    answer = GetMessageClass(method.output_type).FromString
    options: Any = {"timeout": within(20), "metadata": (("authorization", f"Bearer {who}"),)}
    channel = channel_to(served.target)
    try:
        if not method.server_streaming:
            message = channel.unary_unary(path, None, answer)(request, **options)
        elif method.client_streaming:
            stream = channel.stream_stream(path, None, answer)(iter([request]), **options)
            message = next(stream, None)
            stream.cancel()
        else:
            stream = channel.unary_stream(path, None, answer)(request, **options)
            message = next(stream, None)
            stream.cancel()
    except grpc.RpcError as error:
        raised: Any = error
        return raised.code().name, raised.details(), None
    return "OK", "", None if message is None else plain(message)


@cache
def channel_to(target: str) -> Any:
    return grpc.insecure_channel(target)


def plain(message: Message) -> dict[str, Any]:
    """The fields of a message that are set; values of unknown types as they are."""
    return {field.name: _plain(field, value) for field, value in message.ListFields()}


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is None:
        return list(value) if field.is_repeated else value if not isinstance(value, bytes) else value.decode()
    if field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        return {str(key): _plain(entry, value[key]) for key in value}
    return [plain(each) for each in value] if field.is_repeated else plain(value)


def fields_for(session: str, **others: Any) -> dict[str, Any]:
    return {**_CONSTANTS, "session_id": session, "session": session, "new_session": "a-fork", **others}


MALFORMED: dict[str, dict[str, Any]] = {
    "usual": {},
    "nothing there": {"variable_identifier": "nope", "at": "99999999", "point": "exec_1", "version": 5, "pattern": "*"},
    "malformed": {
        "initial_value": None,
        "constraints_json": "{",
        "updates": {"x": b"{"},
        "where": [],
        "metadata": {"dspex.owner": "eve"},
        "at": "not a point",
        "variable_identifier": "",
    },
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_stranger_cannot_tell_a_session_from_none(served: ServedDatabase, session: str, kind: str) -> None:
    """Every rpc of both services, with requests that fit and that do not: a hidden session is like one never begun."""
    absent = session.replace("ruled", "never")
    told = []
    for rpc, of in KIND_OF.items():
        if isinstance(of, InSession) and (of.always or (rpc.endswith("ForkSession") and kind == "malformed")):
            continue
        fields = {name: value for name, value in MALFORMED[kind].items() if value is not None}
        hidden = call(served, rpc, "eve", {**fields_for(session), **fields})
        nothing = call(served, rpc, "eve", {**fields_for(absent), **fields})
        if _comparable(hidden, session) != _comparable(nothing, absent):
            told.append((rpc, hidden, nothing))
    assert not told, "\n".join(map(str, told))


def _comparable(outcome: Outcome, session: str) -> Any:
    text = json.dumps(outcome).replace(session, "SESSION")
    document = json.loads(text)
    if isinstance(document[2], dict):
        for name in ("server_time", "sequence", "pools", "execution_time_ms"):
            document[2].pop(name, None)
        if isinstance(document[2].get("next"), dict):
            document[2].pop("next")
    return document


ALLOWED = "OK"
DENIED = "PERMISSION_DENIED"
GUEST: dict[str, str] = {
    "InitializeSession": ALLOWED,
    "CleanupSession": DENIED,
    "GetSession": ALLOWED,
    "Heartbeat": ALLOWED,
    "GetVariable": ALLOWED,
    "SetVariable": DENIED,
    "GetVariables": ALLOWED,
    "SetVariables": ALLOWED,
    "RegisterVariable": DENIED,
    "ListVariables": ALLOWED,
    "DeleteVariable": DENIED,
    "ExecuteTool": ALLOWED,
    "ExecuteStreamingTool": ALLOWED,
    "RegisterTools": DENIED,
    "GetExposedElixirTools": ALLOWED,
    "ExecuteElixirTool": ALLOWED,
    "WatchVariables": ALLOWED,
    "AddDependency": DENIED,
    "StartOptimization": DENIED,
    "StopOptimization": DENIED,
    "GetVariableHistory": ALLOWED,
    "RollbackVariable": DENIED,
    "RecordSession": DENIED,
    "ForkSession": DENIED,
    "BeginTransaction": ALLOWED,
    "RestoreSession": DENIED,
    "GetContentHash": DENIED,
    "RegisterVariables": DENIED,
    "RemoveDependency": DENIED,
    "GetDependencies": ALLOWED,
    "ConstrainVariable": DENIED,
    "AddRule": DENIED,
    "RemoveRule": DENIED,
    "ListRules": ALLOWED,
}


NAMED: dict[str, Any] = {
    "name": "new",
    "variable_identifiers": ["pub_a"],
    "definitions": [audit_pb.Definition(name="pub_own"), audit_pb.Definition(name="pub_a")],
    "from_variable": "pub_own",
    "to_variable": "secret",
}


def test_what_a_guest_may_call(served: ServedDatabase, session: str) -> None:
    """Every rpc on a session, with the same request: only where the rules allow it."""
    wrong = []
    for rpc, of in KIND_OF.items():
        name = rpc.rpartition(".")[2]
        if not isinstance(of, InSession):
            continue
        outcome = call(served, rpc, "bob", fields_for(session, **NAMED))
        if (outcome[0] == DENIED) != (GUEST[name] == DENIED):
            wrong.append((name, outcome))
    assert not wrong
    assert {name.rpartition(".")[2] for name, of in KIND_OF.items() if isinstance(of, InSession)} <= GUEST.keys()


def test_the_owner_and_administrators_may_call_everything(served: ServedDatabase, session: str) -> None:
    for rpc, of in KIND_OF.items():
        if isinstance(of, OfServer) or rpc.endswith(("CleanupSession", "DeleteVariable")):
            continue
        for who in ("ann", "root"):
            outcome = call(served, rpc, who, fields_for(session, at="1", name="fine", new_session=f"{session}-{who}"))
            assert outcome[0] != DENIED, (rpc, who, outcome)


def test_an_rpc_without_a_row_is_refused_when_the_server_starts() -> None:
    assert set(KIND_OF) == set(METHODS)


# Values


def test_a_guest_reads_what_the_rules_allow(states: dict[str, BridgedState], session: str) -> None:
    bob = states["bob"]
    assert bob.get_value(session, "pub_a") == 1
    with pytest.raises(AccessDeniedError, match="its rules do not allow read of 'secret'") as denied:
        bob.get_value(session, "secret")
    assert not denied.value.retryable
    with pytest.raises(AccessDeniedError):
        bob.get_value(session, "nope")
    with pytest.raises(VariableNotFoundError) as missing:
        bob.get_value(session, "pub_oen")
    assert missing.value.hint == ""
    assert [each.name for each in bob.run(ListVariables(session))] == ["pub_a", "pub_own"]
    assert [each.name for each in bob.initialize_session(session).variables] == ["pub_a", "pub_own"]
    found = bob.get_variables(session, ["secret", "pub_a", "nope"])
    assert (list(found.variables), found.missing) == (["pub_a"], ("secret", "nope"))
    assert bob.run(GetSession(session)).variable_count == 2
    assert states["cat"].get_value(session, "secret") == 42
    with pytest.raises(SessionNotFoundError):
        states["eve"].get_value(session, "pub_a")


def test_an_id_is_no_way_around(states: dict[str, BridgedState], session: str) -> None:
    secret = states["ann"].get_variable(session, "secret")
    bob = states["bob"]
    for identifier in (secret.id, secret.id[:-1] + "x"):
        with pytest.raises(AccessDeniedError):
            bob.get_variable(session, identifier)
    states["ann"].initialize_session(session, access_control([AccessRule("bob", ["read", "write"], "var*")]))
    for attempt in (bob.get_variable, bob.delete_variable, bob.get_variable_history):
        with pytest.raises(VariableNotFoundError) as hidden:
            attempt(session, secret.id)
        assert "secret'" not in str(hidden.value).replace(secret.id, "")
    # Nor one of a variable that is gone.
    states["ann"].delete_variable(session, "secret")
    with pytest.raises(VariableNotFoundError):
        bob.get_variable_history(session, secret.id)
    with bob.audit() as audit, pytest.raises(NotInHistoryError):
        audit.version(session, secret.id, 0)
    with bob.audit() as audit, pytest.raises(NotInHistoryError):
        audit.version(session, secret.id, 99)


def test_a_guest_writes_what_the_rules_allow(states: dict[str, BridgedState], session: str) -> None:
    bob = states["bob"]
    assert bob.set_variable(session, "pub_own", 5) == 1
    for refused in (
        lambda: bob.set_variable(session, "pub_a", 5),
        lambda: bob.register_variable(session, "pub_b", "integer", 1),
        lambda: bob.delete_variable(session, "pub_a"),
        lambda: bob.set_variables(session, {"pub_own": 6, "secret": 6}, atomic=True),
        lambda: bob.start_optimization(session, "secret", "bob"),
        lambda: bob.initialize_session(session, {"city": "Paris"}),
        lambda: bob.cleanup_session(session),
    ):
        with pytest.raises(AccessDeniedError):
            refused()
    outcome = bob.set_variables(session, {"pub_own": 7, "secret": 7})
    assert (dict(outcome.versions), list(outcome.errors)) == ({"pub_own": 2}, ["secret"])
    assert states["ann"].get_value(session, "secret") == 42
    with pytest.raises(AccessDeniedError, match="write of 'pub_a'"):
        states["cat"].set_variable(session, "pub_a", 1)


def test_dependencies_show_what_may_be_read(states: dict[str, BridgedState], session: str) -> None:
    ann, bob = states["ann"], states["bob"]
    ann.add_dependency(session, "secret", "pub_own")
    ann.add_dependency(session, "pub_a", "pub_own")
    assert set(bob.get_dependencies(session, "pub_own", dependents=True)) == {"pub_a"}
    with pytest.raises(AccessDeniedError):
        bob.get_dependencies(session, "secret")
    ann.initialize_session(session, access_control([AccessRule("bob", ["read", "write"], "pub*")]))
    ann.register_variable(session, "pub_z", "integer", 0)
    ann.add_dependency(session, "pub_z", "secret")
    with pytest.raises(DependencyCycleError) as cycle:
        bob.add_dependency(session, "pub_own", "pub_z")
    assert "secret" not in str(cycle.value)


def test_blame_goes_as_far_as_one_may_see(states: dict[str, BridgedState], session: str) -> None:
    execute(states["ann"], session, 5)
    for who, names in (("bob", {"pub_a", "pub_own"}), ("cat", {"pub_a", "pub_own", "secret"})):
        with states[who].audit() as audit:
            assert {node.entry.name for node in audit.blame(session)} == names


def test_the_errors_of_rules_over_hidden_variables_hide_them(states: dict[str, BridgedState], session: str) -> None:
    states["ann"].add_rule(session, "above", "pub_own < secret")
    states["ann"].add_rule(session, "small", "pub_own < 1000")
    with pytest.raises(RuleViolatedError) as hidden:
        states["bob"].set_variable(session, "pub_own", 50)
    assert "42" not in str(hidden.value)
    assert "secret" not in str(hidden.value)
    outcome = states["bob"].set_variables(session, {"pub_own": 50})
    assert "42" not in str(outcome.errors)
    assert [each.name for each in states["bob"].list_rules(session)] == ["small"]
    with pytest.raises(RuleViolatedError, match="42"):
        states["ann"].set_variable(session, "pub_own", 50)


def test_what_a_tool_does_is_not_limited_but_who_executes_it(states: dict[str, BridgedState], session: str) -> None:
    bob = states["bob"]
    assert execute(bob, session, 4) == 8
    assert states["ann"].get_value(session, "secret") == 8
    with pytest.raises(AccessDeniedError, match="execute of 'triple'"):
        bob.execute_tool(session, "triple", {"x": 4})
    with pytest.raises(AccessDeniedError):
        states["cat"].execute_tool(session, "double", {"x": 4})
    assert [each.name for each in bob.list_tools(session)] == ["double"]


def test_the_message_of_a_variable_has_the_rules_about_it(served: ServedDatabase, session: str) -> None:
    def rules(who: str, rpc: str, part: Callable[[Any], Any]) -> Any:
        outcome = call(served, f"snakepit.bridge.BridgeService.{rpc}", who, fields_for(session))
        return json.loads(part(outcome[2])["access_control_json"])

    own = [{"who": "bob", "may": ["read", "observe"]}]
    whole = [*own, {"who": "bob", "may": ["execute"]}, {"who": "cat", "may": ["read"]}]
    assert rules("ann", "GetVariable", lambda answer: answer["variable"]) == whole
    assert rules("bob", "GetVariable", lambda answer: answer["variable"]) == [*own, whole[1]]
    assert rules("ann", "ListVariables", lambda answer: answer["variables"][0]) == whole
    for who in ("ann", "bob", "root"):
        outcome = call(served, "snakepit.bridge.BridgeService.WatchVariables", who, fields_for(session) | FIRST)
        assert outcome[2]["variable"]["access_control_json"]


FIRST = {"include_initial_values": True, "variable_identifiers": ["pub_a"]}


def test_long_names_and_batches_do_not_keep_the_server(served: ServedDatabase, states: dict[str, BridgedState]) -> None:
    """However many rules with however many stars there are: nothing compares what no variable can be called."""
    session = f"long-{next(NUMBERS):03}"
    rules = [AccessRule("bob", ["read", "write", "observe", "execute"], f"*a?b*c*{n}", f"*a?*{n}") for n in range(100)]
    states["ann"].initialize_session(session, access_control(rules))
    name, many = "ab" * 2_000_000, [f"x{number}" for number in range(20_000)]
    with cpu_s_below(10):
        for rpc in ("GetVariable", "DeleteVariable", "ExecuteTool"):
            fields = {"session_id": session, "variable_identifier": name, "tool_name": name}
            assert call(served, f"snakepit.bridge.BridgeService.{rpc}", "bob", fields)[0] == DENIED
        for service, rpc, fields in (
            ("snakepit.bridge.BridgeService", "SetVariables", {"updates": dict.fromkeys(many, b"1")}),
            ("snakepit.bridge.BridgeService", "WatchVariables", {"variable_identifiers": many}),
        ):
            code, details, _ = call(served, f"{service}.{rpc}", "bob", {"session_id": session, **fields})
            assert (code, "batch_entries" in details) == ("RESOURCE_EXHAUSTED", True)
    with states["root"].audit() as audit:
        denied = {each.rpc.rpartition(".")[2] for each in audit.denials() if each.session_id == session}
    assert denied == {"GetVariable", "DeleteVariable", "ExecuteTool"}, "a batch that is too large is no denial"


def test_only_administrators_see_what_a_failed_worker_wrote() -> None:
    pool = audit_pb.WorkerPool(last_failure="worker a-1 ended with exit code 7; its output ends with:\nsecret 42")

    class Workers:
        async def ListWorkers(self, _request: Any, _context: Any) -> Any:
            response = audit_pb.ListWorkersResponse()
            response.pools.append(pool)
            return response

    async def seen(scope: str) -> str:
        CALLER.set(Identity("who", frozenset({scope})))
        guarded: Any = Guard(Mock(), Mock(), Mock(), Mock()).over(AUDIT_SERVICE, Workers())
        response = await guarded.ListWorkers(None, None)
        return str(response.pools[0].last_failure)

    assert asyncio.run(seen("admin")) == pool.last_failure
    assert asyncio.run(seen("read")) == "worker a-1 ended with exit code 7"


# Owners and rules


def test_the_rules_are_shown_to_those_whom_they_concern(states: dict[str, BridgedState], session: str) -> None:
    shown = states["ann"].run(GetSession(session)).metadata
    assert (shown[OWNER], shown[ACCESS]) == ("ann", access_control(RULES)[ACCESS])
    own = states["bob"].run(GetSession(session)).metadata
    assert own[ACCESS] == access_control(RULES[:3])[ACCESS]
    with states["bob"].audit() as audit:
        (entry,) = audit.iterate(SessionQuery(session=session))
        # Nor can the others be guessed.
        assert not list(audit.iterate(SessionQuery(session=session, metadata={ACCESS: shown[ACCESS]})))
    assert entry.metadata[ACCESS] == own[ACCESS]
    assert entry.variables == 2


def test_only_the_owner_and_administrators_change_the_rules(states: dict[str, BridgedState], session: str) -> None:
    everything = access_control([AccessRule("*", ["read", "write"])])
    for who in ("bob", "cat", "eve"):
        with pytest.raises(AccessDeniedError):
            states[who].initialize_session(session, everything)
    for who in ("bob ", "bób", "b|b"):
        with pytest.raises(InvalidArgumentError, match="no name is like"):
            states["ann"].initialize_session(session, access_control([AccessRule(who)]))
    for key in ("access_control", "Access-Control-JSON", f"{ACCESS} "):
        with pytest.raises(InvalidArgumentError, match=f"rules have the key {ACCESS}"):
            states["ann"].initialize_session(f"{session}-new", {key: "[]"})
    rules = {ACCESS: "[]"}
    for misplaced in (
        lambda: states["ann"].register_variable(session, "x", "integer", 1, metadata=rules),
        lambda: states["ann"].set_variable(session, "secret", 1, metadata=rules),
        lambda: states["ann"].register_variables(
            session, [RegisterVariable(session, "x", "integer", Value("1"), metadata=rules)]
        ),
        lambda: states["ann"].register_variables(
            session,
            [
                *(RegisterVariable(session, f"x{number}", "integer", Value("1")) for number in range(2_500)),
                RegisterVariable(session, "x", "integer", Value("1"), metadata=rules),
            ],
        ),
    ):
        with pytest.raises(InvalidArgumentError, match="an entry of a session's metadata"):
            misplaced()
    for wrong in ("{", "[1]", "ä", "[" * 5_000):
        with pytest.raises(InvalidArgumentError, match=ACCESS):
            states["ann"].initialize_session(session, {ACCESS: wrong})
    with pytest.raises(StateError):
        states["ann"].initialize_session(session, {ACCESS: "x" * 20_000})
    with pytest.raises(InvalidArgumentError, match=r"dspex\.owner"):
        states["ann"].initialize_session(session, {OWNER: "eve"})
    states["root"].initialize_session(session, everything)
    assert states["eve"].get_value(session, "secret") == 42
    states["ann"].initialize_session(session, access_control([]))
    with pytest.raises(SessionNotFoundError):
        states["bob"].get_value(session, "pub_a")
    states["ann"].initialize_session(session, {ACCESS: ""})
    states["eve"].set_variable(session, "secret", 1)
    with states["ann"].audit() as audit:
        commits = audit.iterate(CommitQuery(session=session, cause="InitializeSession", newest_first=False))
        actors = [each.actor for each in commits]
    assert actors == ["ann", "root", "ann", "ann"]


def test_nobody_takes_an_open_session_over(states: dict[str, BridgedState]) -> None:
    name = f"open-{next(NUMBERS):03}"
    states["ann"].initialize_session(name)
    states["bob"].register_variable(name, "x", "integer", 1)
    with pytest.raises(AccessDeniedError, match="other rules"):
        states["bob"].initialize_session(name, access_control([]))
    states["ann"].initialize_session(name, access_control([]))
    with pytest.raises(SessionNotFoundError):
        states["bob"].get_value(name, "x")


def test_rules_survive_a_restart_forks_exports_and_restoring(
    served: ServedDatabase, states: dict[str, BridgedState], session: str
) -> None:
    ann, cat = states["ann"], states["cat"]
    with ann.audit() as audit:
        point = str(audit.head())
    ann.set_variable(session, "secret", 43)
    with pytest.raises(AccessDeniedError, match="read of all variables"):
        states["bob"].fork_session(session, f"{session}-bob")
    with pytest.raises(AccessDeniedError):
        list(states["bob"].record(session)[1])
    with pytest.raises(AccessDeniedError):
        states["bob"].content_hash(session)
    with pytest.raises(AccessDeniedError, match="write of all variables"):
        cat.restore_session(session, point)
    cat.fork_session(session, f"{session}-fork")
    fork = states["cat"].run(GetSession(f"{session}-fork")).metadata
    assert (fork[OWNER], fork[ACCESS]) == ("cat", access_control(RULES)[ACCESS])
    with pytest.raises(SessionNotFoundError):
        ann.get_value(f"{session}-fork", "secret")
    ann.restore_session(session, point)
    header, commits = ann.record(session)
    states["root"].import_session(header, list(commits), session_id=f"{session}-copy")
    served.restart()
    for name in (session, f"{session}-copy"):
        assert states["bob"].get_value(name, "pub_a") == 1
        with pytest.raises(AccessDeniedError):
            states["bob"].get_value(name, "secret")
        with pytest.raises(SessionNotFoundError):
            states["eve"].get_value(name, "pub_a")
        assert ann.get_value(name, "secret") == 42


def test_without_tokens_rules_are_refused() -> None:
    with dspex_persist.connect("memory:") as state:
        with pytest.raises(InvalidArgumentError, match="needs a server that demands tokens"):
            state.initialize_session("s", access_control([]))
        state.initialize_session("s")
        with pytest.raises(InvalidArgumentError, match="needs a server that demands tokens"):
            state.initialize_session("s", access_control([]))


# The past


def test_audits_leave_out_what_may_not_be_read(states: dict[str, BridgedState], session: str) -> None:
    states["bob"].set_variable(session, "pub_own", 9)
    execute(states["bob"], session, 21)
    with states["bob"].audit() as audit:
        assert {each.name for each in audit.iterate(HistoryQuery(session=session))} == {"pub_a", "pub_own"}
        assert {each.name for each in audit.state(session)} == {"pub_a", "pub_own"}
        assert not list(audit.iterate(ExecutionQuery(session=session)))
        assert not list(audit.iterate(LmUsageQuery(session=session)))
        for commit in audit.iterate(CommitQuery(session=session)):
            assert {name for name, _ in commit.versions} <= {"pub_a", "pub_own"}
            assert commit.events == ()
    with states["ann"].audit() as audit:
        (execution,) = audit.iterate(ExecutionQuery(session=session))
        secret = next(audit.iterate(HistoryQuery(session=session, variable="secret")))
    with states["bob"].audit() as audit:
        for hidden in (execution.execution_id, execution.execution_id.rpartition("_")[0]):
            with pytest.raises(NotInHistoryError) as raised:
                audit.execution(hidden)
            assert execution.execution_id not in str(raised.value).replace(hidden, "")
        with pytest.raises(NotInHistoryError):
            audit.version(session, secret.variable_id, 0)
    with states["cat"].audit() as audit:
        assert audit.execution(execution.execution_id).summary.tool == "double"
        assert {each.name for each in audit.state(session)} == {"pub_a", "pub_own", "secret"}
    with states["eve"].audit() as audit:
        assert not [each for each in audit.iterate(SessionQuery()) if each.session_id == session]
        assert not [each for each in audit.iterate(HistoryQuery()) if each.session_id == session]
        with pytest.raises(NotInHistoryError):
            list(audit.iterate(CommitQuery(session=session)))
        with pytest.raises(NotInHistoryError) as missing:
            audit.state(session[:-1])
        assert session not in str(missing.value)
        with pytest.raises(NotInHistoryError):
            audit.resolve(execution.execution_id)


def test_asking_about_a_hidden_session_is_a_denial(states: dict[str, BridgedState], session: str) -> None:
    with states["eve"].audit() as audit:
        for ask in (audit.state, lambda hidden: list(audit.iterate(HistoryQuery(session=hidden)))):
            with pytest.raises(NotInHistoryError):
                ask(session)
    with pytest.raises(SessionNotFoundError):
        states["eve"].get_value(session, "pub_a")
    with states["root"].audit() as audit:
        denials = [each for each in audit.denials() if each.session_id == session]
    assert {(each.identity, each.rpc.rpartition(".")[2], each.missing) for each in denials} == {
        ("eve", "GetState", "rule"),
        ("eve", "ListHistory", "rule"),
        ("eve", "GetVariable", "rule"),
    }


def test_names_and_ids_of_what_is_hidden_are_as_if_unknown(states: dict[str, BridgedState], session: str) -> None:
    execute(states["ann"], session, 5)
    with states["ann"].audit() as audit:
        secret = next(audit.iterate(HistoryQuery(session=session, variable="secret")))
        (execution,) = audit.iterate(ExecutionQuery(session=session))
    with states["bob"].audit() as audit:
        for variable in ("secret", secret.variable_id, "nope"):
            for where in ((), ("> 1000",), ("> 0",)):
                with pytest.raises(NotInHistoryError) as unknown:
                    list(audit.iterate(HistoryQuery(session=session, variable=variable, where=where)))
                assert (unknown.value.what, unknown.value.hint) == ("variable", "")
        assert not list(audit.iterate(HistoryQuery(session=session, variable="pub_a", where=("> 1000",))))
    with states["eve"].audit() as audit:
        for execution_id in (execution.execution_id, "exec_1"):
            with pytest.raises(NotInHistoryError):
                list(audit.iterate(HistoryQuery(execution_id=execution_id)))
            with pytest.raises(NotInHistoryError):
                list(audit.iterate(CommitQuery(since=execution_id)))


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("rpc", ["RecordSession", "GetContentHash"])
def test_a_wrong_beginning_of_a_hidden_session_tells_nothing(
    served: ServedDatabase, states: dict[str, BridgedState], session: str, rpc: str, ended: bool
) -> None:
    if ended:
        states["ann"].cleanup_session(session)
    method = METHODS[f"dspex.persist.v1.AuditService.{rpc}"]
    channel = channel_to(served.target)
    open_method: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    request: Any = GetMessageClass(method.input_type)(session=session, started=1)
    options: Any = {"timeout": within(20), "metadata": (("authorization", "Bearer eve"),)}
    call_it = open_method(f"/dspex.persist.v1.AuditService/{rpc}")
    with pytest.raises(grpc.RpcError) as refused:
        list(call_it(request.SerializeToString(), **options))
    error: Any = refused.value
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, f"no session '{session}' in the history")


def test_metadata_of_hidden_sessions_cannot_be_searched(states: dict[str, BridgedState]) -> None:
    """A page that is full does not tell whether something hidden would follow."""
    numbers = [next(NUMBERS) for _ in range(3)]
    for who, number in zip(("ann", "eve", "ann"), numbers, strict=True):
        states[who].initialize_session(f"tagged-{number:03}", {**access_control([]), "tag": str(numbers[0])})
    with states["eve"].audit() as audit:
        page = audit.page(SessionQuery(metadata={"tag": str(numbers[0])}), None, 1)
        assert ([each.session_id for each in page.rows], page.after) == ([f"tagged-{numbers[1]:03}"], None)


def test_sums_of_calls_leave_out_sessions_of_which_something_is_hidden(
    states: dict[str, BridgedState], session: str
) -> None:
    recording = states["ann"].submit_recording(session).result()
    call_made = {"model": "m-ruled", "usage": {"prompt_tokens": 3}, "request": {}, "response": {}}
    recording.submit_record("lm", call_made).result()
    recording.submit_commit().result()
    query = LmUsageQuery(by=("model",), model="m-ruled")
    calls = {}
    for who, state in states.items():
        with state.audit() as audit:
            calls[who] = sum(each.calls for each in audit.iterate(query))
            assert all(each.session_id is None for each in audit.iterate(query))
    assert calls == {"root": 1, "ann": 1, "bob": 0, "cat": 1, "eve": 0}


def test_a_condition_on_hidden_values_tells_nothing(served: ServedDatabase, session: str) -> None:
    """Neither by a row, nor by the cursor of a page."""
    for operand in ("42", "43"):
        request: Any = GetMessageClass(METHODS["dspex.persist.v1.AuditService.ListHistory"].input_type)()
        request.session, request.range.limit = session, 1
        request.where.add(operator=5, operand=operand)
        options: Any = {"timeout": within(20), "metadata": (("authorization", "Bearer bob"),)}
        answer = GetMessageClass(METHODS["dspex.persist.v1.AuditService.ListHistory"].output_type).FromString
        method = channel_to(served.target).unary_stream("/dspex.persist.v1.AuditService/ListHistory", None, answer)
        answers = [plain(message) for message in method(request.SerializeToString(), **options)]
        assert answers == [{}]


def test_pages_of_a_guest_have_no_gaps(states: dict[str, BridgedState], session: str) -> None:
    ann = states["ann"]
    for number in range(30):
        ann.set_variable(session, "secret" if number % 3 else "pub_a", number)
    query = HistoryQuery(session=session, variable="*", newest_first=False)
    with ann.audit() as audit:
        everything = [each for each in audit.iterate(query) if each.name != "secret"]
    with states["bob"].audit() as audit:
        assert list(audit.iterate(query)) == everything
        for most in (1, 2, 7):
            rows: list[Any] = []
            after = None
            while True:
                page = audit.page(query, after, most)
                rows += page.rows
                assert len(page.rows) <= most
                if (after := page.after) is None:
                    break
            assert rows == everything


def test_the_rules_of_a_session_that_has_ended_still_hold(states: dict[str, BridgedState], session: str) -> None:
    states["ann"].cleanup_session(session)
    with states["eve"].audit() as audit:
        with pytest.raises(NotInHistoryError):
            list(audit.iterate(HistoryQuery(session=session)))
        with pytest.raises(NotInHistoryError):
            audit.state(session)
    states["eve"].initialize_session(session)
    states["eve"].register_variable(session, "mine", "integer", 1)
    with states["eve"].audit() as audit:
        assert [each.name for each in audit.iterate(HistoryQuery(session=session))] == ["mine"]
    with pytest.raises(NotInHistoryError):
        states["eve"].fork_session(session, f"{session}-fork", "1")


# Watches


def test_watches_follow_the_rules_while_they_are_open(states: dict[str, BridgedState], session: str) -> None:
    ann = states["ann"]
    with pytest.raises(AccessDeniedError, match="observe of 'secret'"):
        states["bob"].watch(session, ["secret"])
    with pytest.raises(SessionNotFoundError):
        states["eve"].watch(session)
    with states["bob"].watch(session) as watch:
        assert [each.name for each in watch.initial] == ["pub_a", "pub_own"]
        ann.set_variables(session, {"secret": 1, "pub_a": 2, "pub_own": 3}, atomic=True)
        seen = watch.next(within(20))
        assert [(each.variable.name, each.part) for each in seen] == [("pub_a", (1, 2)), ("pub_own", (2, 2))]
        ann.initialize_session(session, access_control([AccessRule("bob", "observe", "secret")]))
        ann.set_variables(session, {"secret": 4, "pub_a": 5}, atomic=True)
        seen = watch.next(within(20))
        assert [each.variable.name for each in seen] == ["secret"]
        ann.initialize_session(session, access_control([]))
        ann.set_variable(session, "secret", 6)
        with pytest.raises(SessionNotFoundError):
            watch.next(within(20))


def test_a_watch_of_an_open_session_follows_the_first_rules(states: dict[str, BridgedState]) -> None:
    name = f"open-{next(NUMBERS):03}"
    states["ann"].initialize_session(name)
    states["ann"].register_variable(name, "x", "integer", 1)
    with states["eve"].watch(name) as watch:
        states["ann"].initialize_session(name, access_control([]))
        states["ann"].set_variable(name, "x", 2)
        with pytest.raises(SessionNotFoundError):
            watch.next(within(20))


# Executions


def test_only_who_began_an_execution_speaks_for_it(
    served: ServedDatabase, states: dict[str, BridgedState], session: str
) -> None:
    """The id alone, which audits show, lets nobody else in: not on variables, tools, its journal or its end."""
    transaction = states["ann"].submit_transaction(session).result()
    own = transaction.execution_id
    for shown in (own, f"{own}.", f"{own}.{'0' * 32}", f"{own}.é"):
        for who in ("cat", "eve", "root"):
            with (
                BridgedState(served.target, token=who, execution_id=shown) as other,
                pytest.raises(ExecutionNotFoundError),
            ):
                other.get_value(session, "secret")
    for rpc in ("CommitTransaction", "AbortTransaction", "RecordInputs", "CheckBudget"):
        code, details, _ = call(
            served, f"dspex.persist.v1.AuditService.{rpc}", "root", {"execution_id": own, "kind": "lm"}
        )
        assert (code, "is running" in details) == ("FAILED_PRECONDITION", True)
    transaction.submit_commit().result()


def test_a_transaction_of_a_guest_is_limited_until_it_commits(states: dict[str, BridgedState], session: str) -> None:
    transaction = states["bob"].submit_transaction(session).result()
    with pytest.raises(AccessDeniedError):
        transaction.submit(GetVariable(session, "secret")).result()
    with pytest.raises(AccessDeniedError):
        transaction.submit(SetVariable(session, "secret", Value("1"))).result()
    transaction.submit(SetVariable(session, "pub_own", Value("5"))).result()
    states["ann"].initialize_session(session, access_control(RULES[:1]))
    with pytest.raises(AccessDeniedError):
        transaction.submit_commit().result()
    transaction.submit_abort().result()
    with pytest.raises(AccessDeniedError, match="write of any variable"):
        states["bob"].submit_transaction(session).result()


def test_a_registered_tool_speaks_by_what_it_was_told(
    served: ServedDatabase, states: dict[str, BridgedState], session: str
) -> None:
    """It may do everything in its execution, whoever's token it has; the id alone lets it do nothing."""

    async def scenario() -> None:
        worker = Worker()
        async with serving(worker) as address:
            tool = RegisteredTool(ToolSpec("hang"), "w", address)
            await asyncio.to_thread(states["root"].run, RegisterTools(session, "w", (tool,)))
            running = asyncio.create_task(asyncio.to_thread(states["ann"].execute_tool, session, "hang"))
            async with asyncio.timeout(within(20)):
                await worker.begun.wait()
            await asyncio.to_thread(speak, worker.headers[-1]["x-dspex-execution-id"])
        # The tool ends with its worker.
        assert not (await running).success

    def speak(shown: str) -> None:
        bare, _, secret = shown.partition(".")
        assert len(secret) == 32
        with BridgedState(served.target, token="eve", execution_id=shown) as inside:
            assert inside.get_value(session, "secret") == 42
            inside.set_variable(session, "secret", 43)
            assert inside.get_value(session, "secret") == 43
            with pytest.raises(StateError):
                inside.get_value(f"{session}-other", "secret")
        for wrong in (bare, f"{bare}.{secret[:-1]}", f"{bare}.{secret[::-1]}x"):
            with (
                BridgedState(served.target, token="eve", execution_id=wrong) as outside,
                pytest.raises(ExecutionNotFoundError) as refused,
            ):
                outside.get_value(session, "secret")
            assert secret not in str(refused.value)
        with states["ann"].audit() as audit:
            (execution,) = audit.iterate(ExecutionQuery(session=session))
        assert execution.execution_id == bare

    asyncio.run(scenario())


# Idempotency keys


def test_an_outcome_belongs_to_who_may_read_it(states: dict[str, BridgedState], session: str) -> None:
    assert execute(states["ann"], session, 1, idempotency_key="key") == 2
    states["ann"].set_variable(session, "pub_own", 1, idempotency_key="write")
    # Another identity neither gets these outcomes, nor learns that there are such keys.
    assert execute(states["bob"], session, 3, idempotency_key="key") == 6
    assert states["bob"].set_variable(session, "pub_own", 7, idempotency_key="write") == 2
    assert states["bob"].set_variable(session, "pub_own", 7, idempotency_key="write") == 2
    assert states["ann"].set_variable(session, "pub_own", 1, idempotency_key="write") == 1
    assert execute(states["bob"], session, 3, idempotency_key="key") == 6
    assert states["ann"].get_value(session, "secret") == 6


def test_the_outcome_of_an_end_belongs_to_who_may_end_the_session(
    states: dict[str, BridgedState], session: str
) -> None:
    """It is kept when all others of the session are deleted."""

    def end(who: str) -> int:
        return states[who].submit(CleanupSession(session), Origin(who, "test", idempotency_key="end")).result()

    assert end("ann") == 3
    assert [end("ann"), end("root")] == [3, 3]
    assert end("eve") == 0, "as for a session that never began"
    with pytest.raises(AccessDeniedError):
        end("bob")


def test_a_key_of_a_guest_may_be_as_long_as_one_of_the_owner(states: dict[str, BridgedState], session: str) -> None:
    long = "k" * 255
    for _ in range(2):
        assert states["ann"].set_variable(session, "pub_own", 1, idempotency_key=long) == 1
        assert states["bob"].set_variable(session, "pub_own", 2, idempotency_key=long) == 2
        assert states["bob"].set_variable(session, "pub_own", 3, idempotency_key=f"{long[1:]}x") == 3
        assert execute(states["bob"], session, 3, idempotency_key=long) == 6
    with pytest.raises(LimitExceededError):
        states["bob"].set_variable(session, "pub_own", 4, idempotency_key=f"{long}k")


def test_what_is_not_there_does_not_bring_up_what_is_hidden(
    served: ServedDatabase, states: dict[str, BridgedState], session: str
) -> None:
    rules = [*RULES, AccessRule("bob", "execute", tools="t?iple*"), AccessRule("cat", "execute", tools="x*")]
    states["ann"].initialize_session(session, access_control(rules))
    hidden = RegisteredTool(ToolSpec("xylem"), "w")
    states["root"].run(RegisterTools(session, "w", (hidden,)))
    for who, asked, said in (
        ("bob", "tripled", "unknown tool 'tripled'; did you mean triple?"),
        ("bob", "txiple", "unknown tool 'txiple'; did you mean triple?"),
        ("cat", "xylophone", "unknown tool 'xylophone'; there are: xylem"),
        ("cat", "xriple", "unknown tool 'xriple'; there are: xylem"),
        ("ann", "xriple", "unknown tool 'xriple'; did you mean triple?"),
    ):
        for rpc in ("ExecuteTool", "ExecuteElixirTool"):
            _, _, answer = call(served, f"{BRIDGE_SERVICE.full_name}.{rpc}", who, fields_for(session, tool_name=asked))
            assert answer["metadata"]["error_code"] == "UNKNOWN_TOOL"
            texts = json.dumps(answer)
            if who != "ann":
                seen = {spec.name for spec in states[who].list_tools(session)}
                assert not [name for name in {"double", "triple", "xylem"} - seen if name in texts]
            if rpc == "ExecuteTool":
                assert answer["error_message"] == said
                outcome = states[who].execute_tool(session, asked, {})
                assert str(outcome.error) == said
        fields = fields_for(session, tool_name=asked)
        code, details, _ = call(served, f"{BRIDGE_SERVICE.full_name}.ExecuteStreamingTool", who, fields)
        assert (code, said in details) == ("NOT_FOUND", True)
    counts = {who: states[who].get_session(session).tool_count for who in ("ann", "bob", "cat", "root")}
    assert counts == {"ann": 3, "bob": 2, "cat": 1, "root": 3}


def test_no_hash_of_a_commit_tells_what_the_one_before_says(states: dict[str, BridgedState], session: str) -> None:
    """Whoever knows the commits around one that is hidden could try what that one may say."""
    for who in ("root", "ann", "bob", "cat"):
        with states[who].audit() as audit:
            hashes = {entry.hash for entry in audit.iterate(CommitQuery(session=session))}
            assert all(hashes) if who == "root" else hashes <= {""}, who


def test_the_page_about_security_shows_rules_that_work(states: dict[str, BridgedState]) -> None:
    page = Path(__file__).parents[2].joinpath("docs", "security.md").read_text()
    section = page.partition("## Rules of a session")[2]
    program = section.partition("```py\n")[2].partition("```")[0]
    name = f"docs-{next(NUMBERS):03}"
    exec(program.replace("checkout-42", name), {"state": states["ann"]})
    shown = states["ann"].run(GetSession(name)).metadata
    assert json.loads(shown[ACCESS]) == json.loads(section.partition("```json\n")[2].partition("```")[0])
    assert states["ann"].get_value(name, "order_total") == 90


def test_a_command_shows_the_owner_and_the_rules(served: ServedDatabase, session: str) -> None:
    command = (sys.executable, "-m", "dspex_persist", "session", "show", session, "--target", served.target, "--json")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DSPEX_PERSIST_TOKEN": "bob"}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=within(60), check=True, env=environment)
    report = json.loads(shown.stdout)
    assert (report["owner"], report["rules"]) == ("ann", [rule.document() for rule in RULES[:3]])
    assert report["metadata"] == {}
