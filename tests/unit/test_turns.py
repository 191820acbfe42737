"""Executions that wait for their turn: order, limits, cancelling, closing. The contract of tools has the rest."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

from dspex_persist import LocalState, ToolContext, tool
from dspex_persist.cognitive.errors import ToolDefinitionError
from dspex_persist.state import commands, errors
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Concurrency, ToolOutcome, Value
from dspex_persist.state.options import SessionOptions
from tests.deadline import within

entered, gate = threading.Event(), threading.Event()
order: list[int] = []


@tool(concurrency="queue")
def hold(ctx: ToolContext) -> None:
    """Keep the turn until the test opens the gate."""
    entered.set()
    gate.wait(within(20))


@tool(concurrency="queue")
def note(ctx: ToolContext, number: int) -> None:
    """Note that it was its turn."""
    order.append(number)


@pytest.fixture
def state() -> Iterator[LocalState]:
    entered.clear()
    gate.clear()
    order.clear()
    tools = {each.spec.name: each for each in (hold, note)}
    with LocalState(SessionOptions(limits=Limits(queued_executions=5)), tools=tools) as state:
        state.initialize_session("s")
        yield state
        gate.set()


def begin(state: LocalState, name: str, **parameters: int) -> Future[ToolOutcome]:
    values = {name: Value(str(value)) for name, value in parameters.items()}
    return state.submit(commands.ExecuteTool("s", name, values))


def held(state: LocalState) -> Future[ToolOutcome]:
    """Begin an execution that keeps the turn."""
    future = begin(state, "hold")
    assert entered.wait(within(20))
    return future


def test_they_run_in_the_order_of_the_calls(state: LocalState) -> None:
    first = held(state)
    waiting = [begin(state, "note", number=number) for number in range(5)]
    gate.set()
    assert all(each.result(within(20)).success for each in (first, *waiting))
    assert order == [0, 1, 2, 3, 4]


def test_one_that_is_cancelled_leaves_the_line(state: LocalState) -> None:
    first = held(state)
    waiting = [begin(state, "note", number=number) for number in range(4)]
    assert waiting[0].cancel()
    assert waiting[2].cancel()
    waiting.append(begin(state, "note", number=4))
    gate.set()
    assert first.result(within(20)).success
    assert all(waiting[number].result(within(20)).success for number in (1, 3, 4))
    assert order == [1, 3, 4]


def test_a_line_has_a_limit(state: LocalState) -> None:
    first = held(state)
    waiting = [begin(state, "note", number=number) for number in range(5)]
    refused = begin(state, "note", number=5).result(within(20))
    assert isinstance(refused.error, errors.SessionBusyError)
    assert (refused.status, refused.error.retryable) == (None, True)
    assert "5 executions wait for 'hold' (execution exec_" in str(refused.error)
    assert str(refused.error).endswith("already (setting queued_executions); repeat later")
    gate.set()
    assert all(each.result(within(20)).success for each in (first, *waiting))
    assert order == [0, 1, 2, 3, 4]


def test_closing_ends_the_ones_that_wait(state: LocalState) -> None:
    first = held(state)
    waiting = [begin(state, "note", number=number) for number in range(3)]
    opening = state.submit_transaction("s")
    state.close()
    gate.set()
    wait((first, opening, *waiting), within(20))
    assert all(isinstance(each.exception(), errors.EngineClosedError) for each in waiting)
    assert order == []


def test_an_ended_session_is_gone_when_their_turn_comes(state: LocalState) -> None:
    first = held(state)
    waiting = [begin(state, "note", number=number) for number in range(3)]
    state.cleanup_session("s")
    gate.set()
    assert first.result(within(20)).error_code == "INTERRUPTED"
    assert all(isinstance(each.exception(within(20)), errors.SessionNotFoundError) for each in waiting)
    assert order == []


def test_an_execution_does_not_wait_for_its_own_caller() -> None:
    asked: list[Any] = []

    @tool(concurrency="queue")
    def ask(ctx: ToolContext, session: str) -> None:
        asked.append(state.execute_tool(session, "inner").error)

    @tool(concurrency="queue")
    def inner(ctx: ToolContext) -> None:
        """Do nothing."""

    @tool
    def join(ctx: ToolContext) -> None:
        ctx.call(ask, session="s")

    with LocalState(tools={each.spec.name: each for each in (ask, inner, join)}) as state:
        for session in ("s", "other"):
            state.initialize_session(session)
        assert state.execute_tool("s", "ask", {"session": "s"}).success
        assert state.execute_tool("s", "ask", {"session": "other"}).success
        assert state.execute_tool("s", "join").success
        state.initialize_session("s", {"dspex.concurrency": "reject"})
        assert state.execute_tool("s", "join").success
    refusal, none, inside, inside_again = asked
    assert none is inside is None
    for error in (refusal, inside_again):
        assert isinstance(error, errors.SessionBusyError)
        assert "has called this and waits for it" in str(error)


@pytest.mark.parametrize("wrong", ["chaos", 3, True])
def test_what_a_tool_cannot_say(wrong: Any) -> None:
    decorate: Callable[..., Any] = tool
    with pytest.raises(ToolDefinitionError, match="its concurrency must be one of optimistic, queue, reject, not"):
        decorate(name="wrong", concurrency=wrong)(lambda: None)


def test_the_strictest_applies() -> None:
    lax, queue, strict = Concurrency
    assert Concurrency.strictest() is lax
    assert Concurrency.strictest(None, queue) is queue
    assert Concurrency.strictest(queue, lax) is queue
    assert Concurrency.strictest(queue, strict) is strict
