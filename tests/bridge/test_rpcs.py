"""The table of rpcs: commands and results survive the translation to messages and back, for every rpc."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from dspex_persist.state import commands
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.headers import ACTOR, BINARY, RPC_ID, SOURCE, TIMEOUT_S
from dspex_persist.state.bridge.incoming import Call
from dspex_persist.state.bridge.rpcs import BY_COMMAND, RPCS
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.bridge.rpcs.tools import EXECUTE_ELIXIR_TOOL, GetExposedElixirTools
from dspex_persist.state.errors import (
    ExecutionConflictError,
    InvalidArgumentError,
    ToolInterruptedError,
    ToolNotFoundError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    BatchOutcome,
    ChangeKind,
    ExecutionStatus,
    Origin,
    RegisteredTool,
    Rule,
    SessionSummary,
    SessionView,
    Source,
    ToolOutcome,
    ToolParameter,
    ToolSpec,
    Value,
    Variable,
    VariablesFound,
    VariableVersion,
)

AT = datetime(2026, 3, 1, 12, 0, 0, 5, tzinfo=UTC)
VARIABLE = Variable("var_x", "x", "integer", Value("1"), 3, '{"min":0}', {"a": "1"}, Source.PYTHON, AT)
TENSOR = Value('{"shape":[1]}', b"\x00\x01")
VERSION = VariableVersion(
    "var_x", "integer", 3, ChangeKind.SET, Value("1"), {"why": "so"}, Source.ELIXIR, AT, "ann", "SetVariable", 9
)
TOOL = RegisteredTool(
    ToolSpec("t", "what it does", (ToolParameter("p", "integer", default=Value("1")),), metadata={"address": "h:1"}),
    "w",
    "h:1",
)

SAMPLES: list[tuple[commands.Command[Any], Any]] = [
    (commands.InitializeSession("s", {"m": "1"}, {}), SessionView(False, (VARIABLE,))),
    (commands.InitializeSession("s"), SessionView(True, ())),
    (commands.GetSession("s"), SessionSummary("s", {"m": "1"}, AT, 2, 3)),
    (commands.Heartbeat("s"), True),
    (commands.CleanupSession("s"), 4),
    (commands.RegisterVariable("s", "x", "integer", Value("1"), '{"min":0}', {"a": "1"}), "var_x"),
    (commands.RegisterVariable("s", "x", "tensor", TENSOR), "var_x"),
    (
        commands.RegisterVariables(
            "s",
            (
                commands.RegisterVariable("s", "x", "integer", Value("1"), '{"min":0}', {"a": "1"}),
                commands.RegisterVariable("s", "t", "tensor", TENSOR),
            ),
        ),
        ("var_x", "var_t"),
    ),
    (commands.GetVariable("s", "x", True), VARIABLE),
    (commands.GetVariables("s", ("x", "y")), VariablesFound({"x": VARIABLE}, ("y",))),
    (commands.SetVariable("s", "x", Value("2"), {"a": "1"}), 4),
    (commands.SetVariable("s", "x", TENSOR, {}, 0), 1),
    (commands.SetVariable("s", "x", Value("2"), {}, 7), 8),
    (
        commands.SetVariables("s", {"x": Value("1"), "t": TENSOR}, {"a": "1"}, True),
        BatchOutcome(False, {"x": 1}, {"t": "no"}),
    ),
    (commands.ListVariables("s", "x*"), (VARIABLE,)),
    (commands.DeleteVariable("s", "x"), None),
    (commands.GetVariableHistory("s", "x", 5, 8, Limits().history_size_bytes), [VERSION]),
    (commands.RollbackVariable("s", "x", 2), VARIABLE),
    (commands.AddDependency("s", "a", "b", "uses"), None),
    (commands.RemoveDependency("s", "a", "b", "uses"), True),
    (commands.GetDependencies("s", "a", True, True), ("b", "c")),
    (commands.StartOptimization("s", "x", "o", {"c": "1"}), "opt_1"),
    (commands.StopOptimization("s", "x", True), Value("1")),
    (
        commands.ExecuteTool("s", "t", {"p": Value("1"), "b": TENSOR}, {"m": "1"}, 2.5),
        ToolOutcome(ExecutionStatus.COMMITTED, Value("[1]"), None, "", "exec_1", 9, 2, True, True, "float"),
    ),
    (
        commands.ExecuteTool("s", "t"),
        ToolOutcome(
            ExecutionStatus.CONFLICT, None, ExecutionConflictError("exec_1", "x"), "CONFLICT", "exec_1", None, 3
        ),
    ),
    (commands.RegisterTools("s", "w", (TOOL,)), {"t": "s:t"}),
    (commands.ConstrainVariable("s", "x", '{"max":2}', Value("1"), {"a": "1"}, 0), 4),
    (commands.ConstrainVariable("s", "x", "", TENSOR), 4),
    (commands.ConstrainVariable("s", "x", ""), 0),
    (commands.AddRule("s", "fits", "a < b", "so", True), None),
    (commands.RemoveRule("s", "fits"), None),
    (commands.ListRules("s"), (Rule("fits", "a < b", "so"), Rule("none", "a > 1"))),
]


class Context:
    """The parts of gRPC's context that a call uses."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = [(name, text) for name, text in headers.items() if not name.endswith(BINARY)]

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._headers

    def time_remaining(self) -> None:
        return None


def call_of(rpc: Rpc[Any, Any], command: Any) -> Call:
    """The call with the headers of a command."""
    context: Any = Context(rpc.headers_of(command))
    call = Call(context, Limits(), 1_000_000)
    call.first = VARIABLE
    return call


def sent(rpc: Rpc[Any, Any], command: Any) -> tuple[Any, Call]:
    """The command as the server decodes it, and its call."""
    request, call = rpc.request_of(command), call_of(rpc, command)
    if rpc.size_of is not None:
        assert rpc.size_of(request, call.limits) >= 0
    return rpc.command_of(type(request).FromString(request.SerializeToString()), call), call


def same(one: Any, other: Any) -> bool:
    """Equality that also compares errors by their fields."""
    return (type(one), vars(one)) == (type(other), vars(other)) if isinstance(one, Exception) else bool(one == other)


@pytest.mark.parametrize(("command", "result"), SAMPLES, ids=lambda each: type(each).__name__)
def test_both_directions(command: commands.Command[Any], result: Any) -> None:
    rpc = BY_COMMAND[type(command)]
    arrived, call = sent(rpc, command)
    assert arrived == command
    response = rpc.response_of(result, call)
    trailers = dict(call.trailers)
    received = rpc.result_of(command, type(response).FromString(response.SerializeToString()), trailers.get)
    if isinstance(result, ToolOutcome):
        assert all(same(getattr(received, name), getattr(result, name)) for name in ToolOutcome.__slots__)
    else:
        assert received == result


class Metadata:
    """A context that counts how often its metadata is read."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self.readings = 0
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        self.readings += 1
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:40312"

    def time_remaining(self) -> None:
        return None


def test_a_call_reads_its_metadata_once() -> None:
    context: Any = Metadata(("user-agent", "test"), (ACTOR, "ann"), (SOURCE + BINARY, b"python"), (TIMEOUT_S, "2"))
    call = Call(context, Limits(), 1_000_000)
    assert call.origin("GetVariable") == Origin("ann", "GetVariable", Source.PYTHON)
    assert (call.header(SOURCE), call.header(RPC_ID), call.seconds_left()) == ("python", None, 2.0)
    assert context.readings == 1


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        (((RPC_ID, "1"), (RPC_ID + BINARY, b"2")), f"{RPC_ID}: it has two values, '1' and '2': send it once"),
        (((RPC_ID + BINARY, b"\xff"),), f"{RPC_ID + BINARY}: it is not UTF-8"),
    ],
)
def test_an_invalid_header_fails_what_uses_it(metadata: tuple[tuple[str, str | bytes], ...], error: str) -> None:
    """A write uses all of them, because its origin is recorded."""
    context: Any = Metadata(*metadata)
    call = Call(context, Limits(), 1_000_000)
    assert call.header(ACTOR) is None
    for use in (lambda: call.header(RPC_ID), lambda: call.origin("SetVariable")):
        with pytest.raises(InvalidArgumentError, match=re.escape(error)):
            use()


def test_there_is_a_sample_of_every_command() -> None:
    assert {type(command) for command, _ in SAMPLES} | {GetExposedElixirTools} == set(BY_COMMAND)


def test_the_table_has_every_rpc_of_the_bridge_once() -> None:
    others = ["Ping", "WatchVariables", "ExecuteStreamingTool"]
    names = [rpc.name for rpc in RPCS]
    assert sorted(names + others) == sorted(method.name for method in codec.BRIDGE_SERVICE.methods)


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.name)
def test_the_messages_have_the_types_of_the_protocol(rpc: Rpc[Any, Any]) -> None:
    method = codec.BRIDGE_SERVICE.methods_by_name[rpc.name]
    samples = [(command, result) for command, result in SAMPLES if type(command) is rpc.command]
    for command, result in samples or [(GetExposedElixirTools("s"), [])]:
        assert rpc.request_of(command).DESCRIPTOR is method.input_type
        assert rpc.response_of(result, call_of(rpc, command)).DESCRIPTOR is method.output_type


@pytest.mark.parametrize("every", [True, False])
def test_a_list_of_tools_can_include_unexposed_ones(every: bool) -> None:
    rpc = BY_COMMAND[GetExposedElixirTools]
    question, call = sent(rpc, GetExposedElixirTools("s", every))
    assert question == GetExposedElixirTools("s", every)
    response = rpc.response_of([codec.tool_message(TOOL.spec, {})], call)
    assert [tool.name for tool in rpc.result_of(question, response, {}.get)] == ["t"]


def test_the_rest_of_an_incomplete_list_is_requested() -> None:
    rpc = BY_COMMAND[commands.GetVariableHistory]
    assert rpc.rest_of is not None
    command = commands.GetVariableHistory("s", "x", 3)
    rest = rpc.rest_of(command, [VERSION], {"x-dspex-before-version": "3"}.get)
    assert (rest.limit, rest.before) == (2, 3)
    assert rpc.rest_of(command, [VERSION], {}.get) is None
    assert rpc.rest_of(command, [VERSION] * 3, {"x-dspex-before-version": "3"}.get) is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ToolNotFoundError("t", "there are none"), None),
        (ToolInterruptedError("exec_1", "the server ended"), ExecutionStatus.INTERRUPTED),
    ],
)
@pytest.mark.parametrize("rpc", [BY_COMMAND[commands.ExecuteTool], EXECUTE_ELIXIR_TOOL], ids=lambda rpc: rpc.name)
def test_a_tools_response_carries_its_error(rpc: Rpc[Any, Any], error: Any, status: ExecutionStatus | None) -> None:
    command = commands.ExecuteTool("s", "t", {"p": Value("1")})
    arrived, call = sent(rpc, command)
    assert arrived == command
    response = rpc.response_of(ToolOutcome(status, None, error, error.error_code), call)
    received = rpc.result_of(command, response, {}.get)
    assert received.status is status
    assert same(received.error, error)
