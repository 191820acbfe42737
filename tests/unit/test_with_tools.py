"""WithTools over a provider in memory: what it adds, and that a tool may be of any kind."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from itertools import islice
from typing import Any

import pytest

from dspex_persist import ToolContext, tool
from dspex_persist.state import commands, values
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    RemoteToolError,
    ToolExistsError,
    UnsupportedError,
)
from dspex_persist.state.model import ExecutionStatus, Origin, RegisteredTool, ToolSpec, Value
from dspex_persist.state.tools.ports import RunnableTool
from dspex_persist.state.tools.session import ToolSession
from dspex_persist.state.tools.with_tools import WithTools
from tests.deadline import within
from tests.unit.replays import Memory, toolbox


@tool
def add(ctx: ToolContext, amount: int = 1) -> int:
    ctx["x"] += amount
    return int(ctx["x"])


@tool
def call_the_other(ctx: ToolContext) -> int:
    return int(ctx.call("other", n=1)) + int(ctx["x"])


@tool
def stream_for_ever(ctx: ToolContext) -> Iterator[int]:
    while True:
        yield 1


class Elsewhere(RunnableTool):
    """A third kind of tool, unknown to the runner: it writes with a command, without using a thread."""

    def __init__(self) -> None:
        super().__init__(ToolSpec("other"), worker_id="pool-1")

    @property
    def where(self) -> Mapping[str, str]:
        return {"dspex.where": "pool"}

    async def bind(self, parameters: Mapping[str, Value]) -> Mapping[str, object]:
        return {name: values.decode_loosely(value) for name, value in parameters.items()}

    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        session.run(commands.SetVariable(session.session_id, "x", Value("10")))
        return values.encode_loosely(arguments["n"])


@pytest.fixture
def state() -> Iterator[WithTools]:
    with WithTools(Memory(), toolbox(add, call_the_other, stream_for_ever)) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        yield state


def registered(name: str) -> commands.RegisterTools:
    return commands.RegisterTools("s", "w", (RegisteredTool(ToolSpec(name), "w", "127.0.0.1:1"),))


def test_a_tool_of_another_kind_runs_and_is_called_like_any_other(state: WithTools) -> None:
    state.runner.catalog.own["other"] = Elsewhere()
    outcome = state.execute_tool("s", "other", {"n": 7})
    assert (outcome.success, outcome.result) == (True, Value("7"))
    assert state.get_value("s", "x") == 10
    state.set_variable("s", "x", 0)
    assert state.execute_tool("s", "call_the_other").result == Value("11")


def test_own_tools_are_counted_and_reserve_their_names(state: WithTools) -> None:
    assert state.run(registered("theirs")) == {"theirs": "s:theirs"}
    assert state.get_session("s").tool_count == state.submit(commands.GetSession("s")).result().tool_count == 4
    with pytest.raises(ToolExistsError):
        state.run(registered("add"))
    available = state.runner.catalog.available(state.run(commands.ListTools("s")))
    assert list(available) == ["add", "call_the_other", "stream_for_ever", "theirs"]
    assert available["theirs"].where["dspex.where"] == "worker w"


def test_an_own_tool_hides_a_registered_one_with_its_name(state: WithTools) -> None:
    state.provider.run(registered("add"))
    tools = state.run(commands.ListTools("s"))
    assert state.runner.catalog.available(tools)["add"].worker_id == ""
    assert state.execute_tool("s", "add").result == Value("1")


def test_registered_tools_cannot_be_reached_without_a_port(state: WithTools) -> None:
    state.run(registered("theirs"))
    error = state.execute_tool("s", "theirs").error
    assert isinstance(error, RemoteToolError)
    assert "for servers" in str(error)


def test_both_commits_of_a_short_execution_are_small(state: WithTools, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop may write them by itself."""
    written: list[commands.Command[Any]] = []
    submit = state.provider.submit

    def note(command: commands.Command[Any], origin: Origin | None = None) -> "Future[Any]":
        written.append(command)
        return submit(command, origin)

    monkeypatch.setattr(state.provider, "submit", note)
    assert state.execute_tool("s", "add").success
    assert [(type(each), each.is_small) for each in written] == [
        (commands.BeginExecution, True),
        (commands.FinishExecution, True),
    ]


def test_without_tools_the_provider_lists_none() -> None:
    """No thread is started for tools that never run."""
    before = threading.enumerate()
    with WithTools(Memory()) as state:
        state.initialize_session("s")
        with pytest.raises(UnsupportedError):
            state.execute_tool("s", "add")
        with pytest.raises(UnsupportedError):
            list(state.stream_tool("s", "add"))
        assert not [each for each in threading.enumerate() if each not in before]


def test_closing_ends_streams_and_refuses_later_calls(state: WithTools) -> None:
    chunks = state.stream_tool("s", "stream_for_ever")
    assert next(chunks) == 1
    state.close()
    # A value that was yielded before may still arrive.
    with pytest.raises(EngineClosedError):
        list(islice(chunks, 3))
    with pytest.raises(EngineClosedError):
        state.execute_tool("s", "add")
    with pytest.raises(EngineClosedError):
        next(state.stream_tool("s", "add"))


def test_a_call_that_runs_when_it_is_closed_is_answered(state: WithTools) -> None:
    entered, release = threading.Event(), threading.Event()

    @tool
    def hold(ctx: ToolContext) -> None:
        entered.set()
        release.wait(within(20))

    with WithTools(Memory(), toolbox(hold)) as held:
        held.initialize_session("s")
        call = held.submit(commands.ExecuteTool("s", "hold"))
        assert entered.wait(within(20))
        held.close()
        with pytest.raises(EngineClosedError):
            call.result(within(20))
        release.set()


@pytest.mark.parametrize("threads", [0, True, "4"])
def test_an_invalid_number_of_threads(threads: int) -> None:
    with pytest.raises(InvalidArgumentError, match="tool_threads"):
        WithTools(Memory(), threads=threads)


def test_a_tool_that_fails_says_so_over_any_provider(state: WithTools) -> None:
    outcome = state.execute_tool("s", "add", {"amount": "many"})
    assert (outcome.status, outcome.error_code) == (None, "INVALID_PARAMETERS")
    assert state.execute_tool("s", "add").status is ExecutionStatus.COMMITTED
