"""The contract of every provider that is `ExecutesTools`, as tests. A backend subclasses `ToolContract`:

    class TestMyTools(ToolContract):
        @pytest.fixture
        def provider(self) -> Iterator[ExecutesTools]:
            with MyState(tools=CONTRACT_TOOLS) as provider:
                yield provider

The provider has the tools of `CONTRACT_TOOLS` and no others. A server loads them with
`--tools dspex_persist.testing.contract_tools`, and must see the same files as the tests. The provider may be shared
with other tests, even concurrent ones: each test creates a new session.

No test depends on which backend it runs on. What only a journal or a wire shows is tested elsewhere.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import pytest

from dspex_persist.cognitive.context import Context
from dspex_persist.state import commands, errors, values
from dspex_persist.state.abilities import ExecutesTools
from dspex_persist.state.model import (
    REASON,
    ChangeKind,
    ExecutionStatus,
    RegisteredTool,
    Source,
    ToolOutcome,
    ToolParameter,
    ToolSpec,
    Value,
)
from dspex_persist.state.values import BinaryValue
from dspex_persist.testing import contract_tools
from dspex_persist.testing.checks import (
    DEADLINE_S,
    check_invalid,
    check_whole_commits,
    exact,
    let_pass,
    names_of,
    refused,
    shown,
    take,
)
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS, RAISED
from dspex_persist.testing.provider_contract.arguments import WRONG_METADATA, WRONG_TEXTS

UNTOUCHED: Final[dict[str, object]] = {"a": 0, "b": 0, "c": 0}
"""The initial values of a session in these tests."""
KINDS: Final = ("fail", "fail_later", "stumble", "stumble_later")
"""Tools that fail: a function, a coroutine, a generator, an async generator."""


class Gate:
    """A folder in which tools report their progress and wait; they get its path as their parameter `gate`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def wait(self, attempt: int = 1) -> None:
        """Wait until an attempt has reached the gate."""
        self.wait_for(f"at {attempt}")

    def wait_for(self, name: str) -> None:
        """Wait until the tool has reported `name`."""
        deadline = time.monotonic() + DEADLINE_S
        while not (self._folder / name).exists():
            assert time.monotonic() < deadline, f"the tool did not report {name!r} within {DEADLINE_S} s"
            let_pass(0.005)

    def open(self, *attempts: int) -> None:
        """Let these attempts continue; by default the first."""
        for attempt in attempts or (1,):
            (self._folder / f"go {attempt}").touch()


class Client:
    """A client with one session. `_key` is an idempotency key."""

    def __init__(self, provider: ExecutesTools, variables: Mapping[str, object] = UNTOUCHED) -> None:
        self.provider = provider
        self.session = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(self.session)
        for name, value in variables.items():
            provider.register_variable(self.session, name, "integer", value)

    def begin(self, tool: str, /, _key: str | None = None, **parameters: Any) -> Future[ToolOutcome]:
        """Start the execution of a tool; return the future of its outcome."""
        encoded = values.encode_arguments(_plain(parameters))
        command = commands.ExecuteTool(self.session, tool, encoded, timeout_s=2 * DEADLINE_S)
        return self.provider.submit(command, self.provider.default_origin(command.cause, _key))

    def execute(self, tool: str, /, _key: str | None = None, **parameters: Any) -> ToolOutcome:
        """Execute a tool; return its outcome."""
        return self.begin(tool, _key, **parameters).result(DEADLINE_S)

    def get(self, tool: str, /, _key: str | None = None, **parameters: Any) -> Any:
        """Execute a tool that must succeed; return its result."""
        return result_of(self.execute(tool, _key, **parameters))

    def set(self, name: str, value: object) -> None:
        """Write a variable outside any execution."""
        self.provider.set_variable(self.session, name, value)

    def values(self) -> dict[str, object]:
        """Return the values of all variables outside any execution."""
        variables = self.provider.list_variables(self.session)
        return {each.name: values.decode(each.type, each.value) for each in variables}

    def versions(self, name: str = "a") -> list[int]:
        """Return the versions in a variable's history, newest first."""
        return [version.version for version in self.provider.get_variable_history(self.session, name)]


def _plain(parameters: Mapping[str, object]) -> dict[str, object]:
    return {name: str(value) if isinstance(value, Gate) else value for name, value in parameters.items()}


def result_of(outcome: ToolOutcome) -> Any:
    """Return the result of an execution that must have committed."""
    assert outcome.success, f"{outcome.error_code}: {outcome.error}"
    assert outcome.result is not None
    return values.decode_loosely(outcome.result, outcome.result_type)


def check_not_begun(outcome: ToolOutcome, code: str) -> str:
    """Check that no execution was begun, with this error code; return the error's text."""
    _check_error(outcome, code)
    assert outcome == ToolOutcome(None, None, outcome.error, code)
    return str(outcome.error)


def check_ended(outcome: ToolOutcome, status: ExecutionStatus, code: str, *, attempts: int = 1) -> str:
    """Check that it ran and ended without success; return the error's text."""
    assert (outcome.status, outcome.error_code, outcome.attempts) == (status, code, attempts)
    assert (outcome.success, outcome.result, outcome.commit_sequence) == (False, None, None)
    assert not outcome.repeated
    assert outcome.execution_id
    error = _check_error(outcome, code)
    assert getattr(error, "execution_id", outcome.execution_id) == outcome.execution_id
    return str(error)


def _check_error(outcome: ToolOutcome, code: str) -> errors.StateError:
    """Check that the error has the class that belongs to its code, wherever the tool ran."""
    error = outcome.error
    assert isinstance(error, errors.StateError)
    assert (type(error), error.error_code) == (_KINDS[code], code)
    assert error.retryable == (code in ("CONFLICT", "SESSION_BUSY", "UNAVAILABLE"))
    return error


_KINDS: Final[Mapping[str, type[errors.StateError]]] = {
    "CONFLICT": errors.ExecutionConflictError,
    "IDEMPOTENCY_CONFLICT": errors.IdempotencyConflictError,
    "INTERRUPTED": errors.ToolInterruptedError,
    "INVALID_PARAMETERS": errors.ToolArgumentError,
    "SESSION_BUSY": errors.SessionBusyError,
    "MISSING_VARIABLES": errors.MissingVariablesError,
    "TIMED_OUT": errors.ToolTimedOutError,
    "TOOL_FAILED": errors.ToolFailedError,
    "UNAVAILABLE": errors.RemoteToolError,
    "UNKNOWN_TOOL": errors.ToolNotFoundError,
}


def check_failed(outcome: ToolOutcome) -> str:
    """Check that its code failed; return the error's text."""
    return check_ended(outcome, ExecutionStatus.FAILED, "TOOL_FAILED")


def check_conflict(outcome: ToolOutcome, *, attempts: int = 1) -> str:
    """Check that it ended with a conflict; return the error's text."""
    return check_ended(outcome, ExecutionStatus.CONFLICT, "CONFLICT", attempts=attempts)


class ToolsContract:
    """The base of all parts of the contract."""

    @pytest.fixture
    def provider(self) -> Iterator[ExecutesTools]:
        """The provider under test."""
        raise NotImplementedError(f"{type(self).__name__} has no fixture `provider`")

    @pytest.fixture
    def client(self, provider: ExecutesTools) -> Client:
        """A new session with the integers a, b and c."""
        return Client(provider)

    @pytest.fixture
    def gate(self, tmp_path: Path) -> Iterator[Gate]:
        """A gate. It opens at the end, so that no tool keeps waiting after a failed test."""
        gate = Gate(tmp_path / "gate")
        yield gate
        gate.open(1, 2, 3)


class ListingContract(ToolsContract):
    """The list of tools."""

    def test_tools_are_described_as_they_were_written(self, provider: ExecutesTools, client: Client) -> None:
        """The provider's own facts about them, such as where they run, are in the metadata under `dspex.`."""
        for session in ("", client.session):
            assert tuple(map(_as_written, provider.list_tools(session))) == CONTRACT_TOOLS.specs()
        assert provider.get_session(client.session).tool_count == len(CONTRACT_TOOLS)

    def test_an_unknown_session_has_none(self, provider: ExecutesTools) -> None:
        with pytest.raises(errors.SessionNotFoundError):
            provider.list_tools(uuid.uuid4().hex)

    def test_what_workers_register_is_listed_in_their_session_alone(
        self, provider: ExecutesTools, client: Client
    ) -> None:
        parameter = ToolParameter("rate", "float", "How fast.", required=False, default=Value("0.5"))
        far = RegisteredTool(ToolSpec("far", "Far away.", (parameter,), metadata={"team": "red"}), "worker-1")
        registered = provider.run(commands.RegisterTools(client.session, far.worker_id, (far,)))
        assert list(registered) == ["far"]
        assert tuple(map(_as_written, provider.list_tools(client.session))) == (*CONTRACT_TOOLS.specs(), far.spec)
        assert provider.get_session(client.session).tool_count == len(CONTRACT_TOOLS) + 1
        for session in ("", Client(provider).session):
            assert "far" not in [spec.name for spec in provider.list_tools(session)]

    def test_a_worker_takes_its_tools_away_and_no_others(self, provider: ExecutesTools, client: Client) -> None:
        for worker, names in (("worker-1", ["far", "near"]), ("worker-2", ["near", "other"])):
            tools = tuple(RegisteredTool(ToolSpec(name), worker) for name in names)
            provider.run(commands.RegisterTools(client.session, worker, tools))
        for _ in range(2):
            assert provider.run(commands.RegisterTools(client.session, "worker-1", ())) == {}
            left = {spec.name for spec in provider.list_tools(client.session)} - set(CONTRACT_TOOLS)
            # worker-2 has replaced the one of the same name.
            assert left == {"near", "other"}
        check_not_begun(client.execute("far"), "UNKNOWN_TOOL")

    def test_workers_cannot_register_a_name_that_the_provider_has(
        self, provider: ExecutesTools, client: Client
    ) -> None:
        mine = RegisteredTool(ToolSpec("add"), "worker-1")
        with pytest.raises(errors.ToolExistsError) as caught:
            provider.run(commands.RegisterTools(client.session, mine.worker_id, (mine,)))
        assert caught.value.name == "add"
        assert client.get("add") == 1

    def test_a_tool_that_cannot_be_reached_is_unavailable(self, provider: ExecutesTools, client: Client) -> None:
        far = RegisteredTool(ToolSpec("far"), "worker-1")
        provider.run(commands.RegisterTools(client.session, far.worker_id, (far,)))
        text = check_ended(client.execute("far"), ExecutionStatus.FAILED, "UNAVAILABLE")
        assert "'far'" in text
        assert client.values() == UNTOUCHED


def _as_written(spec: ToolSpec) -> ToolSpec:
    return replace(spec, metadata={key: text for key, text in spec.metadata.items() if not key.startswith("dspex.")})


RESULTS: Final[list[object]] = [
    *(None, True, False, 0, -1, 2**53 + 1, 2**70, -(10**400)),
    *(0.0, -0.0, 1.0, 0.1, 5e-324, 1.7976931348623157e308),
    *("", "plain", "naïve 🦜\0\n\u2028", '"quoted" \\ {}', "NaN", "x" * 100_000),
    *([], {}, [1, 1.0, True, None, "1", [[]]], {"": {"a b": [None]}, "ä": 1.5, "type": "tensor"}),
    [[1.5, 2.0], [3.0, 4.0]],
    {"shape": [2], "data": [1, 2]},
]


class ResultContract(ToolsContract):
    """Parameters and results."""

    @pytest.mark.parametrize("value", RESULTS, ids=shown)
    def test_values_come_back_exactly(self, client: Client, value: object) -> None:
        assert exact(client.get("echo", value=value)) == exact(value)
        assert exact(client.get("echo", value=[value])) == exact([value])

    def test_a_float_that_json_does_not_have_is_a_float_where_the_tool_says_so(self, client: Client) -> None:
        assert math.isnan(client.get("not_a_number"))
        assert client.get("infinity") == math.inf
        assert client.get("infinities") == [math.inf, 1.0, -math.inf]
        assert client.get("echo", value=float("-inf")) == "-Infinity"

    def test_it_is_one_in_a_repetition_and_for_a_tool_that_calls_it_too(self, client: Client) -> None:
        for tool, result in (("infinity", math.inf), ("infinities", [math.inf, 1.0, -math.inf])):
            for repeated in (False, True):
                outcome = client.execute(tool, tool)
                assert (outcome.repeated, result_of(outcome)) == (repeated, result)
        assert client.get("negate") == -math.inf
        assert client.get("negate_later") == -math.inf

    def test_it_is_one_in_a_context(self, provider: ExecutesTools, client: Client) -> None:
        context = Context(client.session, provider)
        assert context.call("infinity", sign=-1) == -math.inf
        assert context.call(contract_tools.infinity) == math.inf
        assert context.call("infinities") == [math.inf, 1.0, -math.inf]

    def test_the_keys_of_a_map_can_be_numbers(self, client: Client) -> None:
        assert client.get("by_number", points={"1": 2.5, "-3": 4}) == [["int", -3, 4.0], ["int", 1, 2.5]]
        for points in ({"one": 1}, {"1.5": 1}, {"01": 1}, {"": 1}, {"true": 1}):
            assert "key" in check_not_begun(client.execute("by_number", points=points), "INVALID_PARAMETERS")

    def test_numbers_may_come_as_bytes(self, client: Client) -> None:
        described = {"shape": [3], "dtype": "float32", "binary_format": "raw"}
        content = bytes.fromhex("0000803f0000004000006040")  # 1.0, 2.0, 3.5
        for type_name in ("tensor", "embedding"):
            assert client.get("total", numbers=BinaryValue({**described, "type": type_name}, content)) == 6.5
        assert client.get("total", numbers=[1, 2.0, 3.5]) == 6.5

    def test_arguments_are_coerced(self, client: Client) -> None:
        arguments = client.get("describe", city="Bern", days=2.0, ratio=1, wet="true", tags=["x"], extra={"k": [1]})
        assert arguments == {
            "city": ["str", "Bern"],
            "days": ["int", 2],
            "scale": ["str", "c"],
            "ratio": ["float", 1.0],
            "wet": ["bool", True],
            "tags": ["list", ["x"]],
            "extra": ["dict", {"k": [1]}],
        }

    def test_what_is_left_out_has_its_default(self, client: Client) -> None:
        arguments = client.get("describe", city="Bern", tags=None)
        left_out = {name: argument for name, (_, argument) in arguments.items() if name != "city"}
        assert left_out == {"days": 3, "scale": "c", "ratio": 0.5, "wet": False, "tags": None, "extra": None}

    def test_functions_and_coroutines(self, client: Client) -> None:
        assert client.get("add", name="a") == 1
        assert client.get("add_later", name="a", amount=2) == 3
        assert client.values()["a"] == 3

    def test_the_result_of_a_tool_that_streams_is_the_list_of_its_chunks(self, client: Client) -> None:
        counted, later, none = (
            client.execute(tool, to=to) for tool, to in (("count", 3), ("count_later", 2), ("count", 0))
        )
        assert [result_of(outcome) for outcome in (counted, later, none)] == [[1, 2, 3], [{"n": 1}, {"n": 2}], []]
        assert counted.streamed
        assert later.streamed
        assert none.streamed
        assert not client.execute("add").streamed
        assert client.versions() == [6, 5, 4, 3, 2, 1, 0]

    @pytest.mark.parametrize(
        ("tool", "words"), [("give_an_object", "object has no JSON form"), ("give_bytes", "write it to a variable")]
    )
    def test_a_result_that_cannot_travel_is_a_failure(self, client: Client, tool: str, words: str) -> None:
        assert words in check_failed(client.execute(tool))
        assert client.values() == UNTOUCHED

    def test_the_outcome_and_the_history_name_each_other(self, provider: ExecutesTools, client: Client) -> None:
        outcome = client.execute("add")
        (newest, first) = provider.get_variable_history(client.session, "a")
        assert (outcome.status, outcome.error, outcome.error_code) == (ExecutionStatus.COMMITTED, None, "")
        assert (outcome.attempts, outcome.repeated) == (1, False)
        assert (outcome.execution_id, outcome.commit_sequence) == (newest.cause, newest.sequence)
        assert (newest.kind, newest.source, newest.actor) == (ChangeKind.SET, Source.PYTHON, first.actor)

    def test_what_a_tool_writes_names_its_caller_and_the_reason(
        self, provider: ExecutesTools, client: Client, gate: Gate
    ) -> None:
        """Also for what the tools that it calls write, and for what it publishes."""
        gate.open()
        for tool, arguments in (("add", {}), ("parent", {}), ("progress", {"gate": str(gate)})):
            outcome = provider.execute_tool(client.session, tool, arguments, actor="ada", reason=f"to test {tool}")
            assert outcome.error is None
            written = [
                version
                for name in client.values()
                for version in provider.get_variable_history(client.session, name)
                if version.cause == outcome.execution_id
            ]
            assert written
            assert {(each.actor, each.reason) for each in written} == {("ada", f"to test {tool}")}
            assert all(REASON not in variable.metadata for variable in provider.list_variables(client.session))

    def test_a_tool_that_writes_nothing_has_a_commit_of_its_own(self, client: Client) -> None:
        first, second = (client.execute("echo", value=1).commit_sequence for _ in range(2))
        assert first is not None
        assert second is not None
        assert first < second

    def test_a_tool_knows_its_execution(self, provider: ExecutesTools, client: Client) -> None:
        outcomes = [
            provider.execute_tool(client.session, "facts", metadata={"user": "ada", "mood": "naïve 🦜"})
            for _ in range(2)
        ]
        first, second = (result_of(outcome) for outcome in outcomes)
        assert first["metadata"] == {"user": "ada", "mood": "naïve 🦜"}
        assert (first["session_id"], first["execution_id"]) == (client.session, outcomes[0].execution_id)
        assert (first["attempt"], first["cancelled"]) == (1, False)
        drawn = {*first["random"], *first["uuids"], *second["random"], *second["uuids"]}
        assert len(drawn) == 8
        moments = [datetime.fromisoformat(text) for text in (*first["now"], *second["now"])]
        assert moments == sorted(moments)
        assert moments[0].utcoffset() is not None


class RefusalContract(ToolsContract):
    """Requests that are refused before an execution begins."""

    @pytest.mark.parametrize(
        ("parameters", "name", "words"),
        [
            ({}, "city", "required"),
            ({"city": 3}, "city", "string"),
            ({"city": None}, "city", "string"),
            ({"city": "Bern", "days": True}, "days", "true"),
            ({"city": "Bern", "days": "2"}, "days", "integer"),
            ({"city": "Bern", "days": 1.5}, "days", "1.5"),
            ({"city": "Bern", "scale": "k"}, "scale", "'c'"),
            ({"city": "Bern", "tags": [1]}, "tags", "string"),
            ({"city": "Bern", "dais": 1}, "dais", "days"),
            ({"city": "Bern", "days": BinaryValue({"type": "tensor"}, b"1")}, "days", ""),
        ],
        ids=shown,
    )
    def test_a_wrong_argument_is_named(self, client: Client, parameters: dict[str, Any], name: str, words: str) -> None:
        text = check_not_begun(client.execute("describe", **parameters), "INVALID_PARAMETERS")
        assert f"invalid parameter '{name}' of tool 'describe'" in text
        assert words in text

    @pytest.mark.parametrize("name", ["ad", "", "add ", "Add", "naïve 🦜"], ids=shown)
    def test_an_unknown_tool(self, client: Client, name: str) -> None:
        text = check_not_begun(client.execute(name), "UNKNOWN_TOOL")
        assert f"unknown tool {name!r}" in text
        assert "add" in text

    def test_missing_variables_are_all_named(self, client: Client) -> None:
        text = check_not_begun(client.execute("demanding"), "MISSING_VARIABLES")
        assert "missing_one, missing_two" in text
        for name in ("missing_one", "missing_two"):
            client.provider.register_variable(client.session, name, "integer", 0)
        assert client.get("demanding") == 5

    @pytest.mark.parametrize(
        ("tool", "parameters"),
        [("add", {}), ("nowhere", {}), ("describe", {}), ("demanding", {}), ("count", {"to": 1})],
        ids=shown,
    )
    def test_of_an_unknown_session_that_is_what_is_said(
        self, client: Client, tool: str, parameters: dict[str, Any]
    ) -> None:
        client.session = uuid.uuid4().hex
        with pytest.raises(errors.SessionNotFoundError) as caught:
            client.execute(tool, **parameters)
        assert caught.value.session_id == client.session

    def test_a_session_that_has_ended_executes_nothing(self, provider: ExecutesTools, client: Client) -> None:
        assert client.get("add") == 1
        provider.cleanup_session(client.session)
        with pytest.raises(errors.SessionNotFoundError):
            client.execute("add")
        with pytest.raises(errors.SessionNotFoundError):
            provider.list_tools(client.session)

    @pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf, 1e10], ids=shown)
    def test_an_invalid_timeout_is_refused(self, provider: ExecutesTools, client: Client, timeout_s: float) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="timeout_s"):
            provider.execute_tool(client.session, "add", timeout_s=timeout_s)
        assert client.values() == UNTOUCHED

    def test_an_invalid_key_is_refused(self, provider: ExecutesTools, client: Client) -> None:
        for key in ("", "k" * 1000, "a\nb", "\ud83e"):
            with pytest.raises((errors.InvalidArgumentError, errors.LimitExceededError)):
                provider.execute_tool(client.session, "add", idempotency_key=key)
        assert client.values() == UNTOUCHED

    def test_invalid_metadata_is_refused(self, provider: ExecutesTools, client: Client) -> None:
        many = {str(number): "" for number in range(100_000)}
        command = commands.ExecuteTool(client.session, "add", metadata=many)
        assert isinstance(refused(provider.submit(command)), errors.LimitExceededError | errors.InvalidArgumentError)
        assert client.values() == UNTOUCHED


class TransactionContract(ToolsContract):
    """An execution commits all its writes at once, or none."""

    def test_writes_appear_all_at_once_and_are_seen_by_the_tool_before(
        self, provider: ExecutesTools, client: Client, gate: Gate
    ) -> None:
        with provider.watch(client.session) as watch:
            call = client.begin("rebuild", gate=gate)
            gate.wait()
            assert client.values() == UNTOUCHED
            gate.open()
            outcome = call.result(DEADLINE_S)
            updates = take(watch, 8)
        result = result_of(outcome)
        assert result["values"] == client.values() == {"a": 8, "b": 9, "new": 3}
        assert (result["versions"], result["brief"]) == ([2, 1, 0], False)
        assert "above maximum 10" in result["refused"]
        check_whole_commits(updates)
        assert {update.sequence for update in updates} == {outcome.commit_sequence}
        assert {update.execution_id for update in updates} == {outcome.execution_id}
        assert sorted(names_of(updates)) == ["a", "b", "brief", "brief", "c", "new", "new", "new"]
        history = provider.get_variable_history(client.session, "new")
        assert [dict(version.metadata) for version in history] == [{}, {"why": "because"}, {}]
        assert {version.cause for version in history} == {outcome.execution_id}

    def test_what_it_wrote_itself_it_can_roll_back(self, client: Client) -> None:
        assert client.get("roll_back") == 0
        assert client.versions() == [2, 1, 0]
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize("tool", KINDS)
    @pytest.mark.parametrize("name", RAISED)
    def test_a_tool_fails_alone_whatever_it_raises(self, client: Client, tool: str, name: str) -> None:
        text = check_failed(client.execute(tool, name=name))
        if name == "Nameless":
            assert "hides what it is" in text
        else:
            assert name in text or name.startswith("Stop"), "Python itself makes a RuntimeError of those two"
        assert "Traceback" not in text
        assert client.values() == UNTOUCHED
        assert client.get("add") == 1

    def test_the_message_of_an_error_is_reported(self, client: Client) -> None:
        assert check_failed(client.execute("fail", name="ValueError")) == "ValueError: it went wrong: 🦜"

    def test_sessions_are_apart(self, provider: ExecutesTools, client: Client, gate: Gate) -> None:
        other = Client(provider)
        call = client.begin("add_at_gate", gate=gate)
        gate.wait()
        assert [other.get("add") for _ in range(3)] == [1, 2, 3]
        gate.open()
        assert result_of(call.result(DEADLINE_S)) == 1
        assert (client.values()["a"], other.values()["a"]) == (1, 3)


class ConflictContract(ToolsContract):
    """Changes by other callers while a tool runs."""

    def test_a_read_that_has_changed_is_a_conflict_with_name_and_versions(self, client: Client, gate: Gate) -> None:
        text = check_conflict(_meanwhile(client, gate, lambda: client.set("a", 9), "look", what="value"))
        assert "a (was at version 0, is at version 1)" in text

    def test_a_name_that_was_not_there_and_is_now_is_a_conflict(self, client: Client, gate: Gate) -> None:
        def register() -> None:
            client.provider.register_variable(client.session, "later", "integer", 1)

        text = check_conflict(_meanwhile(client, gate, register, "look", what="absent"))
        assert "later (was not there, is at version 0)" in text

    def test_a_name_that_is_gone_is_a_conflict(self, client: Client, gate: Gate) -> None:
        def delete() -> None:
            client.provider.delete_variable(client.session, "a")

        text = check_conflict(_meanwhile(client, gate, delete, "look", what="value"))
        assert "a (was at version 0, is not there)" in text

    def test_a_list_that_others_have_lengthened_is_a_conflict(self, client: Client, gate: Gate) -> None:
        def register() -> None:
            client.provider.register_variable(client.session, "d", "integer", 1)

        text = check_conflict(_meanwhile(client, gate, register, "look", what="names"))
        assert "d (was not there, is at version 0)" in text

    @pytest.mark.parametrize("what", ["value", "absent"])
    def test_what_others_do_elsewhere_is_none(self, client: Client, gate: Gate, what: str) -> None:
        call = client.begin("look", gate=gate, what=what)
        gate.wait()
        client.set("b", 9)
        gate.open()
        first, second = result_of(call.result(DEADLINE_S))
        assert first == second

    def test_rules_are_checked_at_the_end(self, client: Client) -> None:
        client.provider.add_rule(client.session, "equal", "b <= c", "b follows c")
        # The tool it calls writes b, and it writes c later.
        assert result_of(client.execute("parent")) == [2, 1]
        text = check_failed(client.execute("add", name="b"))
        assert "RuleViolatedError" in text
        assert "it is false: b <= c with b = 2, c = 1; b follows c" in text
        assert client.values() == {"a": 1, "b": 1, "c": 1}
        assert result_of(client.execute("add", name="c")) == 2

    def test_a_conflict_writes_nothing_and_does_not_block_the_next(self, client: Client, gate: Gate) -> None:
        check_conflict(_meanwhile(client, gate, lambda: client.set("a", 5), "add_at_gate"))
        assert client.versions() == [1, 0]
        assert client.get("add_at_gate", gate=gate) == 6

    def test_snapshot_isolation_bears_with_what_was_only_read(self, client: Client, gate: Gate) -> None:
        outcome = _meanwhile(client, gate, lambda: client.set("a", 9), "look_loosely")
        assert result_of(outcome) == [0, 0]
        assert client.values() == {"a": 9, "b": 0, "c": 0}

    def test_snapshot_isolation_still_loses_no_write(self, client: Client, gate: Gate) -> None:
        text = check_conflict(_meanwhile(client, gate, lambda: client.set("b", 9), "look_loosely"))
        assert "b (was at version 0, is at version 1)" in text
        assert client.values()["b"] == 9

    @pytest.mark.parametrize(("tool", "both"), [("take", False), ("take_loosely", True)])
    def test_two_that_read_what_the_other_writes(
        self, provider: ExecutesTools, tmp_path: Path, tool: str, both: bool
    ) -> None:
        """Serializable isolation lets only one of them commit; snapshot isolation lets both."""
        client = Client(provider, {"a": 1, "b": 0})
        gates = [Gate(tmp_path / name) for name in "ab"]
        calls = [client.begin(tool, gate=gate, name=name) for gate, name in zip(gates, "ab", strict=True)]
        for gate in gates:
            gate.wait()
        for gate in gates:
            gate.open()
        outcomes = [call.result(DEADLINE_S) for call in calls]
        assert sorted(outcome.success for outcome in outcomes) == [both, True]
        assert sum(cast("dict[str, int]", client.values()).values()) == (-1 if both else 0)

    def test_retries_run_again_on_what_is_there_then(self, client: Client, gate: Gate) -> None:
        call = client.begin("add_with_retries", gate=gate)
        gate.wait()
        client.set("a", 5)
        gate.open(1, 2)
        outcome = call.result(DEADLINE_S)
        assert result_of(outcome) == [2, 6]
        assert outcome.attempts == 2
        newest = client.provider.get_variable_history(client.session, "a")[0]
        assert (newest.version, newest.cause) == (2, outcome.execution_id)

    def test_retries_come_to_an_end(self, client: Client, gate: Gate) -> None:
        call = client.begin("add_with_retries", gate=gate)
        for attempt in (1, 2, 3):
            gate.wait(attempt)
            client.set("a", 10 * attempt)
            gate.open(attempt)
        text = check_conflict(call.result(DEADLINE_S), attempts=3)
        assert "a (was at version 2, is at version 3)" in text
        assert client.values()["a"] == 30

    def test_the_total_of_many_threads_is_exact(self, provider: ExecutesTools, client: Client) -> None:
        other, threads, each = Client(provider), 8, 6

        def work(number: int) -> list[int]:
            mine = (client, other)[number % 2]
            return [cast(int, mine.get("add_stubbornly")) for _ in range(each)]

        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(work, range(threads)))
        total = threads * each // 2
        for mine, of_mine in ((client, results[::2]), (other, results[1::2])):
            assert mine.values()["a"] == total
            assert sorted(number for numbers in of_mine for number in numbers) == list(range(1, total + 1))
            assert mine.versions() == list(range(total, -1, -1))


def _meanwhile(client: Client, gate: Gate, change: Callable[[], None], tool: str, /, **parameters: Any) -> ToolOutcome:
    """Execute a tool, and make a change while it waits at the gate; return its outcome."""
    call = client.begin(tool, gate=gate, **parameters)
    gate.wait()
    change()
    gate.open()
    return call.result(DEADLINE_S)


class ConcurrencyContract(ToolsContract):
    """Executions that do not run at the same time."""

    def test_a_queue_loses_none(self, client: Client) -> None:
        outcomes = [future.result(DEADLINE_S) for future in [client.begin("add_in_turn") for _ in range(30)]]
        assert sorted(map(result_of, outcomes)) == list(range(1, 31))
        assert {outcome.attempts for outcome in outcomes} == {1}
        sequences = {result_of(outcome): outcome.commit_sequence or 0 for outcome in outcomes}
        assert [sequences[number] for number in range(1, 31)] == sorted(sequences.values())

    def test_a_session_lets_all_its_tools_queue(self, client: Client) -> None:
        client.provider.initialize_session(client.session, {"dspex.concurrency": "queue"})
        futures = [client.begin(tool) for tool in ("add", "add_later", "add_in_turn") for _ in range(10)]
        assert all(future.result(DEADLINE_S).success for future in futures)
        assert client.values()["a"] == 30

    def test_one_waits_for_the_one_before(self, client: Client, gate: Gate) -> None:
        first = client.begin("hold_in_turn", gate=gate)
        gate.wait()
        second = client.begin("add_in_turn")
        assert client.get("add", name="b") == 1, "optimistic ones neither wait nor are waited for"
        assert not second.done()
        gate.open()
        assert (result_of(first.result(DEADLINE_S)), result_of(second.result(DEADLINE_S))) == ("held", 2)

    def test_sessions_do_not_wait_for_each_other(self, client: Client, gate: Gate) -> None:
        first = client.begin("hold_in_turn", gate=gate)
        gate.wait()
        assert Client(client.provider).get("add_in_turn") == 1
        gate.open()
        assert result_of(first.result(DEADLINE_S)) == "held"

    @pytest.mark.parametrize("ends", ["fails", "times out"])
    def test_however_one_ends_it_passes_the_turn_on(self, client: Client, gate: Gate, ends: str) -> None:
        fails = ends == "fails"
        first = (
            client.begin("hold_in_turn", gate=gate, fails=True) if fails else client.begin("slow_in_turn", gate=gate)
        )
        gate.wait()
        waiting = [client.begin("add_in_turn") for _ in range(3)]
        if fails:
            gate.open()
        assert first.result(DEADLINE_S).error_code == ("TOOL_FAILED" if fails else "TIMED_OUT")
        assert sorted(result_of(each.result(DEADLINE_S)) for each in waiting) == [1, 2, 3]
        gate.open()
        assert client.values()["a"] == 3

    def test_a_caller_waits_no_longer_than_it_asked_to(self, client: Client, gate: Gate) -> None:
        first = client.begin("hold_in_turn", gate=gate)
        gate.wait()
        outcome = client.provider.execute_tool(client.session, "add_in_turn", timeout_s=0.1)
        assert (outcome.status, outcome.error_code, outcome.execution_id) == (
            ExecutionStatus.TIMED_OUT,
            "TIMED_OUT",
            "",
        )
        assert "has not had its turn" in str(outcome.error)
        later = client.begin("add_in_turn")
        gate.open()
        assert (result_of(first.result(DEADLINE_S)), result_of(later.result(DEADLINE_S))) == ("held", 2)

    def test_a_tools_own_time_begins_with_its_turn(self, client: Client, gate: Gate, tmp_path: Path) -> None:
        first = client.begin("hold_in_turn", gate=gate)
        gate.wait()
        inner = Gate(tmp_path / "inner")
        second = client.begin("slow_in_turn", gate=inner)
        let_pass(0.4)
        gate.open()
        assert result_of(first.result(DEADLINE_S)) == "held"
        inner.wait()
        assert second.result(DEADLINE_S).error_code == "TIMED_OUT"
        inner.open()

    def test_one_that_rejects_is_refused_while_another_runs(self, client: Client, gate: Gate) -> None:
        first = client.begin("hold_alone", gate=gate)
        gate.wait()
        text = check_not_begun(client.execute("hold_alone", gate=gate), "SESSION_BUSY")
        assert text.startswith(f"session '{client.session}' is busy: 'hold_alone' (execution exec_")
        waits = client.begin("add_in_turn")
        gate.open()
        assert (result_of(first.result(DEADLINE_S)), result_of(waits.result(DEADLINE_S))) == ("held", 2)
        assert client.get("hold_alone", gate=gate) == "held"

    def test_the_stricter_of_tool_and_session_applies(self, client: Client, gate: Gate) -> None:
        first = client.begin("hold_in_turn", gate=gate)
        gate.wait()
        for setting, tool, code in (
            ("optimistic", "hold_alone", "SESSION_BUSY"),
            ("queue", "hold_alone", "SESSION_BUSY"),
            ("reject", "add_in_turn", "SESSION_BUSY"),
            ("reject", "add", "SESSION_BUSY"),
            ("optimistic", "add", ""),
        ):
            client.provider.initialize_session(client.session, {"dspex.concurrency": setting})
            parameters = {"gate": gate} if tool == "hold_alone" else {"name": "b"} if tool == "add" else {}
            assert client.execute(tool, **parameters).error_code == code, (setting, tool)
        gate.open()
        assert result_of(first.result(DEADLINE_S)) == "held"

    @pytest.mark.parametrize("tool", ["hold_alone", "hold_in_turn"])
    def test_a_repeated_request_waits_for_the_outcome(self, client: Client, gate: Gate, tool: str) -> None:
        first = client.begin(tool, "key", gate=gate)
        gate.wait()
        again = client.begin(tool, "key", gate=gate)
        gate.open()
        one, other = first.result(DEADLINE_S), again.result(DEADLINE_S)
        assert (result_of(one), one.execution_id) == (result_of(other), other.execution_id)
        assert client.values()["a"] == 1

    def test_what_runs_before_its_turn_is_checked_at_once(self, client: Client, gate: Gate) -> None:
        first = client.begin("hold_in_turn", gate=gate)
        gate.wait()
        check_not_begun(client.execute("add_in_turn", amount="two"), "INVALID_PARAMETERS")
        gate.open()
        assert result_of(first.result(DEADLINE_S)) == "held"

    def test_what_a_session_cannot_say(self, client: Client) -> None:
        for metadata in ({"dspex.concurrency": "chaos"}, {"dspex.concurrency": ""}, {"dspex.other": "queue"}):
            with pytest.raises(errors.InvalidArgumentError, match="metadata"):
                client.provider.initialize_session(client.session, metadata)
        client.provider.initialize_session(client.session, {"dspex.concurrency": "reject"})
        assert client.provider.get_session(client.session).metadata == {"dspex.concurrency": "reject"}


class CallContract(ToolsContract):
    """A tool and the tools that it calls are one transaction."""

    def test_a_called_tool_is_part_of_the_transaction(self, provider: ExecutesTools, client: Client) -> None:
        outcome = client.execute("parent")
        assert result_of(outcome) == [2, 1]
        assert client.values() == {"a": 1, "b": 1, "c": 1}
        newest = [provider.get_variable_history(client.session, name)[0] for name in "abc"]
        assert {version.sequence for version in newest} == {outcome.commit_sequence}

    def test_a_coroutine_awaits_what_it_calls(self, client: Client) -> None:
        assert client.get("parent_later") == [11, 10]
        assert client.values()["a"] == 10

    def test_a_called_tool_that_fails_is_undone_alone_if_its_caller_bears_it(self, client: Client) -> None:
        assert client.get("parent", child_fails=True, caught=True) == ["the child failed", 0]
        assert client.values() == {"a": 1, "b": 0, "c": 1}

    def test_a_called_tool_that_fails_fails_its_caller(self, client: Client) -> None:
        assert check_failed(client.execute("parent", child_fails=True)) == "ValueError: the child failed"
        assert client.values() == UNTOUCHED

    def test_a_caller_that_fails_takes_what_it_called_with_it(self, client: Client) -> None:
        assert check_failed(client.execute("parent", fails=True)) == "RuntimeError: the parent failed"
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize("name", RAISED)
    def test_a_caller_can_continue_whatever_a_called_tool_raises(self, client: Client, name: str) -> None:
        assert client.get("call", name="fail", arguments={"name": name})
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize(
        ("name", "arguments", "answer"),
        [
            ("nowhere", {}, "ToolNotFoundError: unknown tool 'nowhere'"),
            ("describe", {"city": 1}, "ToolArgumentError: invalid parameter 'city' of tool 'describe'"),
            ("demanding", {}, "MissingVariablesError: tool 'demanding' needs variables"),
            ("count", {"to": 2}, "it returned [1, 2]"),
            ("count_later", {"to": 1}, "it returned [{'n': 1}]"),
            ("add_later", {}, "it returned 1"),
        ],
    )
    def test_any_tool_can_be_called(self, client: Client, name: str, arguments: dict[str, Any], answer: str) -> None:
        assert client.get("call", name=name, arguments=arguments).startswith(answer)

    def test_a_called_tool_sees_what_its_caller_has_written(self, client: Client) -> None:
        assert client.get("descend", depth=3) == 3
        assert client.values()["a"] == 4
        assert client.versions() == [4, 3, 2, 1, 0]

    def test_calls_that_never_end_are_ended(self, client: Client) -> None:
        assert "depth of calls" in check_failed(client.execute("descend", depth=10_000))
        assert client.values() == UNTOUCHED


class PublishContract(ToolsContract):
    """Values that a tool publishes while it runs."""

    def test_what_is_published_is_seen_at_once_and_is_no_conflict(
        self, provider: ExecutesTools, client: Client, gate: Gate
    ) -> None:
        with provider.watch(client.session) as watch:
            call = client.begin("progress", gate=gate)
            (update,) = take(watch, 1)
            assert (update.variable.name, update.variable.value.json) == ("a", "50")
            gate.wait()
            assert client.values() == {"a": 50, "b": 0, "c": 0}
            gate.open()
            outcome = call.result(DEADLINE_S)
        assert result_of(outcome) == [1, 50]
        assert client.values() == {"a": 50, "b": 5, "c": 0}
        newest = provider.get_variable_history(client.session, "a")[0]
        assert (newest.kind, newest.cause) == (ChangeKind.PUBLISHED, outcome.execution_id)
        assert dict(newest.metadata) == {"step": "half"}
        assert outcome.commit_sequence is not None
        assert newest.sequence < outcome.commit_sequence

    def test_what_is_published_stays_after_a_failure(self, client: Client, gate: Gate) -> None:
        gate.open()
        check_failed(client.execute("progress", gate=gate, fails=True))
        assert client.values() == {"a": 50, "b": 0, "c": 0}

    def test_what_others_write_over_it_is_a_conflict(self, client: Client, gate: Gate) -> None:
        text = check_conflict(_meanwhile(client, gate, lambda: client.set("a", 60), "progress"))
        assert "a (was at version 1, is at version 2)" in text
        assert client.values() == {"a": 60, "b": 0, "c": 0}

    def test_it_is_written_as_the_variable_s_type_has_it(self, provider: ExecutesTools, client: Client) -> None:
        provider.register_variable(client.session, "loss", "float", 0.0)
        provider.register_variable(client.session, "point", "embedding", [0.0, 0.0])
        assert client.execute("publish_numbers").success
        history = [
            values.decode(each.type, each.value)
            for name in ("loss", "point")
            for each in provider.get_variable_history(client.session, name)
            if each.value is not None
        ]
        assert repr(history) == "[nan, 0.0, [1.5, 2.5], [0.5, inf], [0.0, 0.0]]"

    def test_what_it_has_written_it_cannot_publish(self, client: Client) -> None:
        assert "do one or the other" in check_failed(client.execute("publish_and_write"))
        assert client.values() == UNTOUCHED


class KeyContract(ToolsContract):
    """An execution runs once for each idempotency key."""

    def test_the_same_request_runs_once_and_is_answered_again(self, client: Client) -> None:
        first, second, third = (client.execute("add", "k", name="a", amount=2) for _ in range(3))
        assert not first.repeated
        assert second == third == replace(first, repeated=True)
        assert client.versions() == [1, 0]

    def test_what_streamed_is_answered_again_as_such(self, client: Client) -> None:
        first, second = (client.execute("count", "k", to=3) for _ in range(2))
        assert second == replace(first, repeated=True)
        assert result_of(second) == [1, 2, 3]
        assert client.versions() == [3, 2, 1, 0]

    def test_the_order_of_parameters_makes_no_other_request(self, client: Client) -> None:
        assert client.get("add", "k", name="a", amount=2) == 2
        assert client.execute("add", "k", amount=2, name="a").repeated

    def test_a_key_may_come_in_the_metadata(self, provider: ExecutesTools, client: Client) -> None:
        """It is the same key there, and takes precedence over the argument."""
        first = provider.execute_tool(client.session, "add", metadata={"idempotency_key": "k"})
        second = provider.execute_tool(
            client.session, "add", metadata={"idempotency_key": "k", "user": "ada"}, idempotency_key="other"
        )
        third = client.execute("add", "k")
        assert [outcome.repeated for outcome in (first, second, third)] == [False, True, True]
        assert client.get("add", "other") == 2

    def test_another_request_of_its_key_is_refused(self, client: Client) -> None:
        client.get("add", "k", name="a")
        for tool, parameters in (("add", {"name": "b"}), ("add", {}), ("add_later", {"name": "a"})):
            assert "'k'" in check_not_begun(client.execute(tool, "k", **parameters), "IDEMPOTENCY_CONFLICT")
        assert client.values() == {"a": 1, "b": 0, "c": 0}

    def test_keys_belong_to_their_session(self, provider: ExecutesTools, client: Client) -> None:
        client.get("add", "k", name="a")
        other = Client(provider)
        assert other.get("add", "k", name="b") == 1
        provider.cleanup_session(client.session)
        provider.initialize_session(client.session)
        provider.register_variable(client.session, "a", "integer", 5)
        assert client.get("add", "k", name="a") == 6

    def test_a_repeated_request_waits_for_the_running_execution(self, client: Client, gate: Gate) -> None:
        calls = [client.begin("add_at_gate", "k", gate=gate)]
        gate.wait()
        calls += [client.begin("add_at_gate", "k", gate=gate) for _ in range(3)]
        other = client.execute("add_at_gate", "k", gate=gate, name="b")
        assert "'k'" in check_not_begun(other, "IDEMPOTENCY_CONFLICT")
        assert not any(call.done() for call in calls)
        gate.open()
        first, *others = (call.result(DEADLINE_S) for call in calls)
        assert result_of(first) == 1
        # It may have ended just before one of the requests was handled.
        assert [replace(outcome, repeated=False) for outcome in others] == [first] * 3
        assert client.versions() == [1, 0]

    def test_of_many_at_once_one_runs(self, client: Client) -> None:
        threads = 8
        with ThreadPoolExecutor(threads) as pool:
            outcomes = list(pool.map(lambda _: client.execute("add_stubbornly", "k"), range(threads)))
        assert {outcome.execution_id for outcome in outcomes if result_of(outcome) == 1} == {outcomes[0].execution_id}
        assert client.versions() == [1, 0]

    def test_a_failed_execution_can_run_again(self, client: Client) -> None:
        first, second = (client.execute("fail", "k", name="ValueError") for _ in range(2))
        assert check_failed(first) == check_failed(second)
        assert first.execution_id != second.execution_id

    def test_an_execution_in_conflict_can_run_again(self, client: Client, gate: Gate) -> None:
        call = client.begin("add_at_gate", "k", gate=gate)
        gate.wait()
        client.set("a", 5)
        gate.open()
        check_conflict(call.result(DEADLINE_S))
        assert client.get("add_at_gate", "k", gate=gate) == 6
        assert client.execute("add_at_gate", "k", gate=gate).repeated

    def test_what_was_refused_leaves_its_key_free(self, client: Client) -> None:
        check_not_begun(client.execute("nowhere", "k"), "UNKNOWN_TOOL")
        check_not_begun(client.execute("describe", "k"), "INVALID_PARAMETERS")
        assert client.get("add", "k") == 1


class EndingContract(ToolsContract):
    """Executions that are ended while they run."""

    @pytest.mark.parametrize("tool", ["slow", "slow_later"])
    def test_a_tool_that_takes_longer_than_it_may_leaves_nothing(self, client: Client, gate: Gate, tool: str) -> None:
        outcome = client.execute(tool, "k", gate=gate)
        assert "longer than 0.5 s" in check_ended(outcome, ExecutionStatus.TIMED_OUT, "TIMED_OUT")
        # A thread cannot be stopped, but what it still writes is refused; a coroutine is cancelled.
        gate.wait_for("cancelled")
        assert client.values() == UNTOUCHED
        gate.open()
        assert client.get(tool, "k", gate=gate) == "held"

    @pytest.mark.parametrize("tool", ["hold", "hold_later"])
    def test_a_tool_that_takes_longer_than_its_caller_waits_leaves_nothing(
        self, provider: ExecutesTools, client: Client, gate: Gate, tool: str
    ) -> None:
        parameters = {"gate": str(gate)}
        try:
            outcome = provider.execute_tool(client.session, tool, parameters, timeout_s=0.6)
        except errors.OutcomeUnknownError:
            pass  # So late that the answer did not arrive in time.
        else:
            text = check_ended(outcome, ExecutionStatus.TIMED_OUT, "TIMED_OUT")
            assert "longer than 0.6 s, which is how long its caller waits" in text
        gate.wait_for("cancelled")
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize("tool", ["hold", "hold_later"])
    def test_a_tool_whose_session_ends_leaves_nothing(
        self, provider: ExecutesTools, client: Client, gate: Gate, tool: str
    ) -> None:
        call = client.begin(tool, gate=gate)
        gate.wait()
        provider.cleanup_session(client.session)
        provider.initialize_session(client.session)
        provider.register_variable(client.session, "a", "integer", 3)
        gate.open()
        text = check_ended(call.result(DEADLINE_S), ExecutionStatus.INTERRUPTED, "INTERRUPTED")
        assert "the session ended while the tool ran" in text
        assert client.values() == {"a": 3}

    @pytest.mark.parametrize("tool", ["hold", "hold_later"])
    def test_a_tool_whose_session_ends_is_not_waited_for(
        self, provider: ExecutesTools, client: Client, gate: Gate, tool: str
    ) -> None:
        """The gate stays closed until its caller has the outcome."""
        call = client.begin(tool, gate=gate)
        gate.wait()
        provider.cleanup_session(client.session)
        provider.initialize_session(client.session)
        text = check_ended(call.result(DEADLINE_S), ExecutionStatus.INTERRUPTED, "INTERRUPTED")
        assert "the session ended while the tool ran" in text
        assert client.values() == {}


class OwnContract(ToolsContract):
    """Objects that each attempt and each call has for itself."""

    def test_an_attempt_has_arguments_defaults_and_metadata_of_its_own(
        self, provider: ExecutesTools, client: Client, gate: Gate
    ) -> None:
        encoded = values.encode_arguments({"gate": str(gate), "numbers": [1, 2, 3]})
        command = commands.ExecuteTool(client.session, "use_up", encoded, {"user": "ada"}, 2 * DEADLINE_S)
        call = provider.submit(command)
        for attempt in (1, 2):
            gate.wait(attempt)
            client.set("a", 10 * attempt)
            gate.open(attempt)
        gate.open(3)
        outcome = call.result(DEADLINE_S)
        assert result_of(outcome) == 26
        assert outcome.attempts == 3
        assert client.values()["a"] == 26

    def test_a_default_is_nothing_that_calls_share(self, provider: ExecutesTools, client: Client) -> None:
        for mine in (client, client, Client(provider)):
            assert mine.get("remember", name=f"secret of {mine.session}") == [f"secret of {mine.session}"]

    def test_tools_that_call_each_other_share_nothing(self, client: Client) -> None:
        there = ["mine", "changed there"]
        assert client.get("change_and_call") == [["mine"], [*there, "changed here"], there]


class DoorContract(ToolsContract):
    """What a tool passes to its context is checked: a wrong tool fails alone, and other callers are not affected."""

    @pytest.fixture(autouse=True)
    def others_go_on(self, provider: ExecutesTools) -> Iterator[None]:
        """After each test, another session is served as before."""
        yield
        other = Client(provider)
        other.set("a", 1)
        assert other.get("add") == 2
        assert other.get("add_later") == 3

    @pytest.mark.parametrize(
        ("what", "words"),
        [
            ("bytes", "must be a str, not bytes"),
            ("None", "must be a str, not NoneType"),
            ("half a character", "U+D83E"),
            ("an object", "object has no JSON form"),
            ("not a number", "JSON has no NaN"),
            ("half a character in a field", "surrogate"),
            ("itself", "contains itself"),
            ("deep", "nesting"),
        ],
    )
    def test_what_cannot_be_logged(self, client: Client, what: str, words: str) -> None:
        assert words in check_failed(client.execute("log_wrongly", what=what))
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize(
        "what",
        [
            *("a name", "a name to look for", "a name to write", "a pattern", "no pattern", "a name among others"),
            *("no name among others", "a version", "a version to go back to", "no limit", "metadata"),
            *("metadata's key", "half metadata", "metadata of what is defined", "a type", "constraints"),
            *("what is published", "published metadata", "what is called", "what is called by half a name"),
            *("an argument", "half an argument", "an argument's name", "itself to another process"),
        ],
    )
    def test_what_cannot_be_passed(self, client: Client, what: str) -> None:
        text = check_failed(client.execute("pass_wrongly", what=what))
        assert "internal error" not in text
        assert "has no attribute" not in text
        assert client.values() == UNTOUCHED

    def test_what_is_no_name_names_nothing(self, client: Client) -> None:
        assert client.get("look_up_wrongly") == [False] * 6 + ["none"] * 6 + [True] * 18
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize("how", ["gather", "group", "task", "callback", "stop", "close", "stop and close"])
    def test_a_loop_goes_on_whatever_ends_it(self, client: Client, how: str) -> None:
        """Or it is replaced; in any case the caller gets an answer."""
        outcome = client.execute("end_the_loop", how=how)
        if how in ("callback", "stop"):
            assert result_of(outcome) == how
        elif not outcome.success:
            assert check_failed(outcome)
        assert client.values()["a"] == (1 if outcome.success else 0)

    @pytest.mark.parametrize("how", ["tasks", "executor", "no executor"])
    def test_a_loop_stays_as_it_is_for_the_others(self, client: Client, how: str) -> None:
        assert "the event loop is shared" in check_failed(client.execute("change_the_loop", how=how))
        assert client.values() == UNTOUCHED
        assert client.get("change_the_loop", how="not at all") == "not at all"

    @pytest.mark.parametrize("how", ["sys", "_thread", "quit"])
    def test_a_thread_goes_on_whatever_ends_it(self, client: Client, how: str) -> None:
        assert "tried to end the process" in check_failed(client.execute("end_the_thread", how=how))
        assert client.values() == UNTOUCHED

    def test_no_caller_waits_for_a_tool_that_ignores_its_end(self, client: Client, gate: Gate) -> None:
        outcome = client.execute("ignore_the_end", gate=gate)
        check_ended(outcome, ExecutionStatus.TIMED_OUT, "TIMED_OUT")
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize("tool", ["stream_for_ever", "stream_for_ever_later"])
    def test_a_stream_without_an_end_is_ended_when_it_is_too_large(self, client: Client, tool: str) -> None:
        for text in ("x" * 1_000_000, "x" * 5_000):
            assert "stream_size_bytes" in check_failed(client.execute(tool, text=text))
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize(
        ("tool", "parameters"),
        [
            ("log_for_ever", {"message": ""}),
            ("log_for_ever", {"message": "naïve " * 100}),
            ("ask_for_the_time_for_ever", {}),
        ],
    )
    def test_what_is_kept_of_a_tool_has_an_end(self, client: Client, tool: str, parameters: dict[str, str]) -> None:
        assert "journal_size_bytes" in check_failed(client.execute(tool, **parameters))
        assert client.values() == UNTOUCHED

    @pytest.mark.parametrize(
        ("tool", "text", "setting"),
        [
            ("write_for_ever", "", "execution_writes"),
            ("write_for_ever", "x" * 1_000_000, "execution_size_bytes"),
            ("call_for_ever", "x" * 1_000_000, "execution_size_bytes"),
        ],
    )
    def test_what_waits_for_the_end_of_an_execution_has_an_end(
        self, client: Client, tool: str, text: str, setting: str
    ) -> None:
        """It becomes one commit, during which all other writers wait."""
        assert setting in check_failed(client.execute(tool, text=text))
        assert client.values() == UNTOUCHED

    def test_parameters_have_a_limit_together(self, client: Client) -> None:
        parameters = {f"p{number}": "x" * 2_000_000 for number in range(34)}
        with pytest.raises(errors.LimitExceededError, match="execution_size_bytes"):
            client.execute("log_it", **parameters)

    @pytest.mark.parametrize("tool", ["nest", "nest_in_a_stream"])
    def test_a_result_is_no_deeper_than_a_value(self, client: Client, tool: str) -> None:
        assert client.execute(tool, depth=100).success
        assert "json_depth" in check_failed(client.execute(tool, depth=101))


class ToolArgumentContract(ToolsContract):
    """Arguments of a wrong type are refused before anything is done, with the same message by every backend."""

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_TEXTS, ids=shown)
    def test_ids_and_names(self, client: Client, wrong: Any, reason: str) -> None:
        provider = client.provider
        check_invalid(lambda: provider.execute_tool(wrong, "tool"), "session_id", reason)
        check_invalid(lambda: provider.execute_tool(client.session, wrong), "tool", reason)
        check_invalid(lambda: provider.list_tools(wrong), "session_id", reason)

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_METADATA, ids=shown)
    def test_metadata(self, client: Client, wrong: Any, reason: str) -> None:
        ask = partial(client.provider.execute_tool, client.session, "tool", metadata=wrong)
        check_invalid(ask, "metadata", reason)

    @pytest.mark.parametrize("wrong", ["5", True, None, [5]], ids=shown)
    def test_timeouts(self, client: Client, wrong: Any) -> None:
        advice = ": use float(...)" if isinstance(wrong, str) else ""
        kind = "None" if wrong is None else type(wrong).__name__
        reason = f"it must be a number of seconds, not {kind}{advice}"
        check_invalid(
            lambda: client.provider.execute_tool(client.session, "tool", timeout_s=wrong), "timeout_s", reason
        )

    def test_a_timeout_that_no_float_can_hold(self, client: Client) -> None:
        ask = partial(client.provider.execute_tool, client.session, "tool", timeout_s=10**400)
        check_invalid(ask, "timeout_s", "it is too large for a number of seconds")


class ToolContract(
    ToolArgumentContract,
    OwnContract,
    DoorContract,
    ListingContract,
    ResultContract,
    RefusalContract,
    TransactionContract,
    ConflictContract,
    ConcurrencyContract,
    CallContract,
    PublishContract,
    KeyContract,
    EndingContract,
):
    """The whole contract."""
