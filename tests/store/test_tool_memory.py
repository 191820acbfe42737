"""The objects of an execution are freed when it ends, however it ends, without waiting for garbage collection."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from dspex_persist import Toolbox, ToolContext, tool
from dspex_persist.state.commands import ExecuteTool
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import ToolOutcome
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
