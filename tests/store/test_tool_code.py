"""What users' code may do wrong inside a tool: it fails alone, its execution ends, and the store goes on."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Toolbox, ToolContext, tool
from dspex_persist.state.commands import ReadState
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import EngineClosedError
from dspex_persist.state.model import ExecutionStatus


class Textless(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Extraordinary(BaseException):
    """Nothing that `except Exception` sees."""


RAISED: dict[str, Callable[[], BaseException]] = {
    each.__name__: each
    for each in (
        ValueError,
        Textless,
        Extraordinary,
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        StopIteration,
        StopAsyncIteration,
        TimeoutError,
        asyncio.CancelledError,
    )
}


@tool
def function(context: ToolContext, name: str) -> None:
    context["x"] = 1
    raise RAISED[name]()


@tool
async def coroutine(context: ToolContext, name: str) -> None:
    context["x"] = 1
    raise RAISED[name]()


@tool
def generator(context: ToolContext, name: str) -> Iterator[int]:
    context["x"] = 1
    yield 1
    raise RAISED[name]()


@tool
async def async_generator(context: ToolContext, name: str) -> AsyncIterator[int]:
    context["x"] = 1
    yield 1
    raise RAISED[name]()


@tool
def caller(context: ToolContext, name: str) -> str:
    """Goes on whatever the tool that it calls does."""
    try:
        context.call("function", name=name)
    except Exception as error:  # noqa: BLE001 -- what this is about
        return type(error).__name__
    return "nothing"


@tool
def log_and_change(context: ToolContext) -> None:
    """Changes what it has logged into what is no JSON."""
    circle: list[Any] = [1]
    thing: dict[str, Any] = {"a": 1}
    context.log("kept", circle=circle, thing=thing)
    circle.append(circle)
    thing["b"] = object()


@tool
def log_no_json(context: ToolContext) -> None:
    context.log("refused", thing=object())


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[EmbeddedState]:
    """An engine with these tools, and a session `s` with the integer x (0)."""
    toolbox = Toolbox()
    for each in (function, coroutine, generator, async_generator, caller, log_and_change, log_no_json):
        toolbox.add(each)
    with EmbeddedState(tmp_path / "sessions.db", tools=toolbox) as provider:
        provider.initialize_session("s")
        provider.register_variable("s", "x", "integer", 0)
        yield provider


def last_end(path: Path) -> dict[str, Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        query = "SELECT body FROM events WHERE kind = 'execution_ended' ORDER BY sequence DESC, ordinal DESC"
        body: dict[str, Any] = json.loads(connection.execute(query).fetchone()[0])
        return body


def assert_all_have_ended(provider: EmbeddedState) -> None:
    """One that was left running would keep its session from expiring, and its key from being used again."""
    assert provider.run(ReadState("s")).executions == {}


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "async_generator"])
def test_whatever_a_tool_raises_it_has_failed(provider: EmbeddedState, tmp_path: Path, kind: str, name: str) -> None:
    outcome = provider.execute_tool("s", kind, {"name": name}, idempotency_key="key")
    assert (outcome.status, outcome.error_code) == (ExecutionStatus.FAILED, "TOOL_FAILED")
    assert name in str(outcome.error) or name.startswith("Stop"), "Python itself makes a RuntimeError of those two"
    assert last_end(tmp_path / "sessions.db")["failure"]["traceback"]
    assert provider.get_value("s", "x") == 0
    assert_all_have_ended(provider)
    again = provider.execute_tool("s", kind, {"name": name}, idempotency_key="key")
    assert again.execution_id != outcome.execution_id


@pytest.mark.parametrize("name", RAISED)
def test_whoever_called_it_goes_on(provider: EmbeddedState, name: str) -> None:
    outcome = provider.execute_tool("s", "caller", {"name": name})
    assert outcome.status is ExecutionStatus.COMMITTED, outcome.error
    assert outcome.result is not None
    assert "nothing" not in outcome.result.json
    assert provider.get_value("s", "x") == 0
    assert_all_have_ended(provider)


def test_what_was_logged_is_kept_as_it_was(provider: EmbeddedState, tmp_path: Path) -> None:
    outcome = provider.execute_tool("s", "log_and_change")
    assert outcome.status is ExecutionStatus.COMMITTED, outcome.error
    (line,) = last_end(tmp_path / "sessions.db")["log"]
    assert (line["message"], line["fields"]) == ("kept", {"circle": [1], "thing": {"a": 1}})
    provider.set_variable("s", "x", 1)


def test_what_cannot_be_logged_is_refused_at_once(provider: EmbeddedState) -> None:
    outcome = provider.execute_tool("s", "log_no_json")
    assert outcome.status is ExecutionStatus.FAILED
    assert "no JSON form" in str(outcome.error)
    provider.set_variable("s", "x", 1)


def test_whoever_waits_for_a_tool_may_be_on_an_event_loop(tmp_path: Path) -> None:
    """As in a notebook: the tool runs on another one."""

    async def main() -> tuple[object, str]:
        toolbox = Toolbox()
        toolbox.add(tool(_double, name="double"))
        with EmbeddedState(tmp_path / "loop.db", tools=toolbox) as provider:
            provider.initialize_session("s")
            outcome = provider.execute_tool("s", "double", {"number": 21})
        with pytest.raises(EngineClosedError):
            provider.execute_tool("s", "double", {"number": 21})
        assert outcome.result is not None
        return outcome.status, outcome.result.json

    assert asyncio.run(main()) == (ExecutionStatus.COMMITTED, "42")


async def _double(number: int) -> int:
    return 2 * number


def test_the_journal_has_the_traceback_of_the_tools_own_code(tmp_path: Path) -> None:
    """What stands between a tool and whoever asked, or between it and one that it calls, tells nobody anything."""
    toolbox = Toolbox()
    toolbox.add(tool(_stumble, name="stumble"))
    toolbox.add(tool(_lead, name="lead"))
    with EmbeddedState(tmp_path / "trace.db", tools=toolbox) as provider:
        provider.initialize_session("s")
        outcome = provider.execute_tool("s", "lead")
        with provider.audit() as audit:
            failure = audit.execution(outcome.execution_id).failure
    assert failure is not None
    lines = failure.traceback.splitlines()
    assert [line.strip() for line in lines if line.startswith("  File")][-2:] == [
        f'File "{__file__}", line {_lead.__code__.co_firstlineno + 1}, in _lead',
        f'File "{__file__}", line {_stumble.__code__.co_firstlineno + 1}, in _stumble',
    ]
    assert lines[-1] == "KeyError: 'nothing of this name'"


def _stumble(ctx: ToolContext) -> None:
    ctx["nothing of this name"]


def _lead(ctx: ToolContext) -> None:
    ctx.call("stumble")
