"""The objects of an execution are freed when it ends, however it ends, without waiting for garbage collection."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Toolbox, ToolContext, tool
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state.commands import Command, ExecuteTool, FinishExecution, GetVariable, ReadState, SetVariable
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import StorageError, VariableNotFoundError
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.model import ToolOutcome, Value
from dspex_persist.state.tools import endings
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.requests import ToolRequest
from tests.deadline import within

_held: "list[weakref.ref[ToolContext]]" = []
"""The classes of which an execution has one object that refers to all others."""


def hold(context: ToolContext) -> None:
    _held.append(weakref.ref(context))


@tool
def fine(context: ToolContext) -> int:
    hold(context)
    context["x"] = 1
    return 1


@tool
async def fine_async(context: ToolContext) -> int:
    hold(context)
    return 1


@tool
def failing(context: ToolContext) -> int:
    hold(context)
    raise ValueError("no")


@tool
async def failing_async(context: ToolContext) -> int:
    hold(context)
    raise ValueError("no")


@tool
def failing_stream(context: ToolContext) -> Iterator[int]:
    hold(context)
    yield 1
    raise ValueError("no")


@tool
async def failing_async_stream(context: ToolContext) -> AsyncIterator[int]:
    hold(context)
    yield 1
    raise ValueError("no")


@tool
def exiting(context: ToolContext) -> int:
    hold(context)
    raise SystemExit(1)


@tool
def refused(context: ToolContext) -> int:
    hold(context)
    return int(context["nosuch"])


@tool(timeout_s=0.05)
def late(context: ToolContext) -> int:
    hold(context)
    while not context.cancelled:
        time.sleep(0.001)
    return 1


@tool(timeout_s=0.05)
async def late_async(context: ToolContext) -> int:
    hold(context)
    await asyncio.sleep(60)
    return 1


@tool
def calling(context: ToolContext, name: str) -> int:
    hold(context)
    return int(context.call(name))


@tool
async def calling_async(context: ToolContext, name: str) -> int:
    hold(context)
    return int(await context.call(name))


@tool
def catching(context: ToolContext) -> int:
    hold(context)
    with pytest.raises(ValueError, match="no"):
        context.call("failing_async")
    return 1


@tool
async def waiting(context: ToolContext) -> int:
    hold(context)
    _began.set()
    await asyncio.sleep(60)
    return 1


_began = threading.Event()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[EmbeddedState]:
    tools = Toolbox.of(
        [
            *(fine, fine_async, failing, failing_async, failing_stream, failing_async_stream, exiting, refused),
            *(late, late_async, calling, calling_async, catching, waiting),
        ]
    )
    with EmbeddedState(tmp_path / "s.db", tools=tools) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        state.execute_tool("s", "fine")  # what is made once is there
        gc.collect()
        gc.disable()
        try:
            _held.clear()
            yield state
        finally:
            gc.enable()


def assert_gone() -> None:
    """Wait until no object of the executions is left: threads may still be leaving the frames that they ended in."""
    assert _held
    until = time.monotonic() + within(5)
    while any(each() is not None for each in _held):
        assert time.monotonic() < until, [gc.get_referrers(each()) for each in _held]
        time.sleep(0.001)
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        assert [each for each in gc.garbage if type(each) in (ToolRequest, Execution, Verdict)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((each, {}) for each in ("fine", "fine_async", "failing", "failing_async", "failing_stream")),
        *((each, {}) for each in ("failing_async_stream", "exiting", "refused", "late", "late_async", "catching")),
        *((caller, {"name": each}) for caller in ("calling", "calling_async") for each in ("fine_async", "failing")),
    ],
)
def test_an_execution_that_has_ended_is_not_kept(state: EmbeddedState, name: str, parameters: dict[str, str]) -> None:
    assert state.execute_tool("s", name, parameters).execution_id
    assert_gone()


def test_nor_an_execution_whose_caller_is_gone(state: EmbeddedState) -> None:
    _began.clear()
    future: Future[ToolOutcome] = state.submit(ExecuteTool("s", "waiting"))
    assert _began.wait(within(5))
    future.cancel()
    del future
    assert_gone()


def refuse(state: EmbeddedState, monkeypatch: pytest.MonkeyPatch, refused: type[Command[Any]]) -> threading.Event:
    """Have the store refuse the next command of a type once the returned event is set."""
    writer, go = state.provider._writer, threading.Event()  # type: ignore[attr-defined]
    write_group, left = writer._write_group, [StorageError("disk full")]

    def write(jobs: Sequence[Job], *, wait: bool = True) -> list[Outcome]:
        if left and isinstance(jobs[0].command, refused):
            _began.set()
            assert go.wait(within(5))
            return [Outcome(error=left.pop())]
        return write_group(jobs, wait=wait)  # type: ignore[no-any-return]

    monkeypatch.setattr(writer, "_write_group", write)
    # The writer's thread writes, so that the loop may cancel meanwhile.
    monkeypatch.setattr(type(writer), "is_fast", False)
    _began.clear()
    return go


def test_nor_one_whose_end_the_store_refuses(state: EmbeddedState, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(state, monkeypatch, FinishExecution).set()
    with pytest.raises(StorageError):
        state.execute_tool("s", "fine")
    assert_gone()


def test_one_whose_caller_leaves_while_the_store_refuses_its_end_ends_later(
    state: EmbeddedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "_RETRY_S", 0.01)
    go = refuse(state, monkeypatch, FinishExecution)
    future = state.submit(ExecuteTool("s", "fine"))
    assert _began.wait(within(5))
    future.cancel()
    # Its task has the cancellation once the loop has run another coroutine.
    state.runner.start(asyncio.sleep(0)).result(within(5))
    go.set()
    until = time.monotonic() + within(5)
    while state.run(ReadState("s")).executions:
        assert time.monotonic() < until, "it runs for ever"
        time.sleep(0.001)


def test_errors_of_commands_on_a_loop_are_not_kept(state: EmbeddedState) -> None:
    held: list[weakref.ref[BaseException]] = []

    async def fail() -> None:
        submit = state.on_loop(LoopMailbox(asyncio.get_running_loop()))
        for command in (GetVariable("s", "nosuch"), SetVariable("s", "nosuch", Value("1"))):
            try:
                await submit(command)
            except VariableNotFoundError as error:
                held.append(weakref.ref(error))

    asyncio.run(fail())
    until = time.monotonic() + within(5)
    while any(each() is not None for each in held):
        # The writer's thread may still be leaving the frames in which it answered.
        assert time.monotonic() < until, [gc.get_referrers(each()) for each in held]
        time.sleep(0.001)
