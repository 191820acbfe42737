"""Misbehaving code in a tool fails alone: its execution ends, and the store keeps working."""

import asyncio
import gc
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, model_validator

from dspex_persist import Toolbox, ToolContext, clock, tool
from dspex_persist.state.commands import ExecuteTool, ReadState
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import EngineClosedError, InternalError, StateError
from dspex_persist.state.model import ExecutionStatus, LogEntry
from dspex_persist.state.tools import invoke
from dspex_persist.state.tools.requests import request_of
from tests.deadline import within
from tests.logs import capture_logs


class Textless(Exception):
    """An exception without a message."""

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
    """Continue even if the called tool fails."""
    try:
        context.call("function", name=name)
    except Exception as error:  # noqa: BLE001 -- what this is about
        return type(error).__name__
    return "nothing"


@tool
def log_and_change(context: ToolContext) -> None:
    """Change a logged field into something that is not JSON."""
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


def last_end_of(path: Path, name: str) -> dict[str, Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        query = (
            "SELECT ended.body FROM events ended, events began WHERE ended.kind = 'execution_ended' "
            "AND began.kind = 'execution_began' AND began.body ->> 'tool' = ? "
            "AND began.body ->> 'execution_id' = ended.body ->> 'execution_id' ORDER BY ended.sequence DESC"
        )
        body: dict[str, Any] = json.loads(connection.execute(query, (name,)).fetchone()[0])
        return body


def assert_all_have_ended(provider: EmbeddedState) -> None:
    """One that was left running would keep its session from expiring, and its key from being used again."""
    assert provider.run(ReadState("s")).executions == {}


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "async_generator"])
def test_a_tool_that_raises_anything_has_failed(provider: EmbeddedState, tmp_path: Path, kind: str, name: str) -> None:
    outcome = provider.execute_tool("s", kind, {"name": name}, idempotency_key="key")
    assert (outcome.status, outcome.error_code) == (ExecutionStatus.FAILED, "TOOL_FAILED")
    assert name in str(outcome.error) or name.startswith("Stop"), "Python itself makes a RuntimeError of those two"
    assert last_end(tmp_path / "sessions.db")["failure"]["traceback"]
    assert provider.get_value("s", "x") == 0
    assert_all_have_ended(provider)
    again = provider.execute_tool("s", kind, {"name": name}, idempotency_key="key")
    assert again.execution_id != outcome.execution_id


@pytest.mark.parametrize("name", RAISED)
def test_its_caller_continues(provider: EmbeddedState, name: str) -> None:
    outcome = provider.execute_tool("s", "caller", {"name": name})
    assert outcome.status is ExecutionStatus.COMMITTED, outcome.error
    assert outcome.result is not None
    assert "nothing" not in outcome.result.json
    assert provider.get_value("s", "x") == 0
    assert_all_have_ended(provider)


def test_log_entries_keep_the_values_of_their_time(provider: EmbeddedState, tmp_path: Path) -> None:
    outcome = provider.execute_tool("s", "log_and_change")
    assert outcome.status is ExecutionStatus.COMMITTED, outcome.error
    (line,) = last_end(tmp_path / "sessions.db")["log"]
    assert (line["message"], line["fields"]) == ("kept", {"circle": [1], "thing": {"a": 1}})
    provider.set_variable("s", "x", 1)


def test_log_fields_without_a_json_form_are_refused_at_once(provider: EmbeddedState) -> None:
    outcome = provider.execute_tool("s", "log_no_json")
    assert outcome.status is ExecutionStatus.FAILED
    assert "no JSON form" in str(outcome.error)
    provider.set_variable("s", "x", 1)


def test_a_caller_can_wait_for_a_tool_on_an_event_loop(tmp_path: Path) -> None:
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
    """Errors that pass between a tool and its caller, or a tool that it calls, reveal no internals."""
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
    assert lines[-1].endswith("VariableNotFoundError: variable not found: 'nothing of this name' in session 's'")


def _stumble(ctx: ToolContext) -> None:
    ctx["nothing of this name"]


def _lead(ctx: ToolContext) -> None:
    ctx.call("stumble")


# A tool that asks its own engine for something


class Engine:
    """How the tools below find the engine that runs them."""

    of_tools: ClassVar[EmbeddedState]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedState]:
    """An engine with one thread for tools, which its tools find as `Engine.of_tools`."""
    box = Toolbox.of([ask, ask_later, ask_without_waiting, ask_from_a_thread, answer, answer_later, ask_itself])
    with EmbeddedState(tmp_path / "engine.db", tools=box, tool_threads=1) as engine:
        engine.initialize_session("s")
        monkeypatch.setattr(Engine, "of_tools", engine, raising=False)
        yield engine


def result_of(name: str, /, **parameters: object) -> object:
    outcome = Engine.of_tools.execute_tool("s", name, parameters, timeout_s=within(10))
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return json.loads(outcome.result.json)


@tool
def answer() -> int:
    return 42


@tool
async def answer_later() -> int:
    await asyncio.sleep(0)
    return 42


@tool
def ask(name: str, also: str = "") -> Any:
    return result_of(name, name=also) if also else result_of(name)


@tool
async def ask_later(name: str, also: str = "") -> Any:
    """It blocks the event loop that it runs on."""
    return result_of(name, name=also) if also else result_of(name)


@tool
async def ask_without_waiting(name: str, also: str = "") -> Any:
    """Wait in a thread, as a coroutine should."""
    return await asyncio.to_thread(result_of, name, **{"name": also} if also else {})


@tool
def ask_from_a_thread(name: str) -> Any:
    """Call from another thread, which does not belong to the execution."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(result_of, name).result()


@tool
def ask_itself() -> Any:
    return result_of("ask_itself")


@pytest.mark.parametrize("last", ["answer", "answer_later"])
@pytest.mark.parametrize("asking", ["ask", "ask_later", "ask_without_waiting"])
def test_a_tool_can_ask_its_own_engine_for_any_tool(engine: EmbeddedState, asking: str, last: str) -> None:
    assert result_of(asking, name=last) == 42


@pytest.mark.parametrize("second", ["ask", "ask_later", "ask_without_waiting"])
@pytest.mark.parametrize("first", ["ask", "ask_later", "ask_without_waiting"])
def test_a_tool_called_that_way_can_do_the_same(engine: EmbeddedState, first: str, second: str) -> None:
    assert result_of(first, name=second, also="answer_later") == 42


def test_tools_that_ask_for_tools_without_end_are_ended(engine: EmbeddedState) -> None:
    with pytest.raises(StateError, match="depth of calls from tool to tool"):
        result_of("ask_itself")


def test_one_that_waits_for_the_thread_that_it_holds_is_ended(engine: EmbeddedState) -> None:
    outcome = engine.execute_tool("s", "ask_from_a_thread", {"name": "answer"}, timeout_s=0.5)
    assert outcome.status is ExecutionStatus.TIMED_OUT
    assert result_of("answer_later") == 42


# Slow user code in unexpected places


HELD, ENTERED = threading.Event(), threading.Semaphore(0)


@pytest.fixture
def held() -> Iterator[None]:
    """Code of tools waits while a test lasts."""
    HELD.clear()
    while ENTERED.acquire(blocking=False):
        pass
    yield
    HELD.set()


class Slow(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def wait(cls, document: Any) -> Any:
        HELD.wait()
        return document


class Leaving(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def leave(cls, document: Any) -> Any:
        raise SystemExit(document)


class SlowError(Exception):
    def __str__(self) -> str:
        HELD.wait()
        return "slow"


class LeavingError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


@tool
def take_slow(slow: Slow) -> int:
    return 1


@tool
async def take_slow_later(slow: Slow) -> int:
    return 1


@tool
def take_leaving(leaving: Leaving) -> int:
    return 1


@tool
def raise_slow() -> None:
    raise SlowError


@tool
async def raise_leaving() -> None:
    raise LeavingError


@tool
def raise_long() -> None:
    raise ValueError("x" * 10_000_000)


@tool
async def block() -> None:
    ENTERED.release()
    HELD.wait()


@tool
def hold() -> None:
    ENTERED.release()
    HELD.wait()


@tool(retries=1_000_000)
def lose(ctx: ToolContext) -> None:
    """Lose every conflict: write the variable that this execution has read, through the engine."""
    ctx["x"] += 1
    Engine.of_tools.set_variable("s", "x", 0)


@pytest.fixture
def patient(tmp_path: Path, held: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedState]:
    """An engine with tools whose code blocks the thread or the event loop that runs it."""
    box = Toolbox.of([*(take_slow, take_slow_later, take_leaving, raise_slow, raise_leaving, raise_long), block])
    box = Toolbox.of([box, hold, lose, answer, answer_later])
    with EmbeddedState(tmp_path / "patient.db", tools=box, tool_threads=2) as engine:
        engine.initialize_session("s")
        engine.register_variable("s", "x", "integer", 0)
        monkeypatch.setattr(Engine, "of_tools", engine, raising=False)
        yield engine


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("take_slow", {"slow": {}}),
        ("take_slow_later", {"slow": {}}),
        ("raise_slow", {}),
        ("block", {}),
        ("hold", {}),
        ("lose", {}),
    ],
)
def test_no_caller_waits_longer_than_its_timeout(
    patient: EmbeddedState, name: str, parameters: dict[str, object]
) -> None:
    outcome = patient.execute_tool("s", name, parameters, timeout_s=0.4)
    assert (outcome.status, outcome.error_code) == (ExecutionStatus.TIMED_OUT, "TIMED_OUT")
    assert "longer than 0.4 s" in str(outcome.error)
    assert result_of("answer") == 42
    assert_all_have_ended(patient)


def test_a_caller_that_joined_an_execution_waits_no_longer_than_its_timeout(patient: EmbeddedState) -> None:
    first = patient.submit(ExecuteTool("s", "hold"), patient.default_origin("ExecuteTool", "key"))
    assert ENTERED.acquire(timeout=within(20))
    second = patient.execute_tool("s", "hold", idempotency_key="key", timeout_s=0.3)
    assert second.status is ExecutionStatus.TIMED_OUT
    assert "it runs already under this key" in str(second.error)
    assert not first.done()
    HELD.set()
    assert first.result(within(20)).success


def test_a_caller_within_an_execution_may_go_when_that_has_ended(
    patient: EmbeddedState, caplog: pytest.LogCaptureFixture
) -> None:
    """Then nobody is left to hear that the execution has ended, and asyncio must not complain about that."""
    outer = patient.submit(ExecuteTool("s", "hold"))
    assert ENTERED.acquire(timeout=within(20))
    runner = patient.runner
    (execution_id,) = runner.running.sessions
    within_it = request_of(ExecuteTool("s", "hold"), patient.default_origin("ExecuteTool"))
    inner = runner.start(runner.execute_within(execution_id, within_it))
    assert ENTERED.acquire(timeout=within(20))
    # In the store only: the runner would end them.
    assert patient.provider.cleanup_session("s")
    assert inner.cancel()
    HELD.set()
    assert outer.result(within(20)).status is ExecutionStatus.INTERRUPTED
    deadline = time.monotonic() + within(20)
    while any("_conduct_joined" in repr(task) for task in asyncio.all_tasks(runner._home.loop)):
        assert time.monotonic() < deadline
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_an_asynchronous_tool_that_blocks_holds_up_its_own_kind_only(patient: EmbeddedState) -> None:
    blocking = patient.submit(ExecuteTool("s", "block"))
    assert ENTERED.acquire(timeout=within(20))
    assert result_of("answer") == 42
    assert patient.execute_tool("s", "answer_later", timeout_s=0.3).status is ExecutionStatus.TIMED_OUT
    HELD.set()
    assert blocking.result(within(20)).success
    assert result_of("answer_later") == 42


def test_arguments_and_errors_whose_code_leaves_the_process(patient: EmbeddedState) -> None:
    outcome = patient.execute_tool("s", "take_leaving", {"leaving": {}})
    assert (outcome.error_code, "SystemExit" in str(outcome.error)) == ("INVALID_PARAMETERS", True)
    outcome = patient.execute_tool("s", "raise_leaving")
    assert str(outcome.error) == "LeavingError: it has no text: its __str__ raised SystemExit"
    assert result_of("answer") == result_of("answer_later") == 42


def test_long_error_messages_are_shortened(patient: EmbeddedState) -> None:
    outcome = patient.execute_tool("s", "raise_long")
    assert "(10,000,000 characters)" in str(outcome.error)
    assert len(str(outcome.error)) < 20_000


@pytest.mark.parametrize(
    ("holding", "held_by", "waiting", "what"),
    [("hold", 2, "answer", "tool_threads"), ("block", 1, "answer_later", "event loop")],
)
def test_the_log_says_that_tools_wait_for_those_that_have_ended(
    patient: EmbeddedState, monkeypatch: pytest.MonkeyPatch, holding: str, held_by: int, waiting: str, what: str
) -> None:
    monkeypatch.setattr(invoke, "_LONG_WAIT_S", 0.2)
    calls = [patient.submit(ExecuteTool("s", holding)) for _ in range(held_by)]
    for call in calls:
        assert ENTERED.acquire(timeout=within(20))
        call.cancel()
    with capture_logs() as logs:
        outcome = patient.execute_tool("s", waiting, timeout_s=1)
    assert outcome.status is ExecutionStatus.TIMED_OUT
    warnings = [line for line in logs if line["event"] == "tools wait for their turn"]
    assert warnings[-1]["tool"] == waiting
    assert what in warnings[-1]["waits_for"]
    assert warnings[-1]["running_though_ended"] == warnings[-1]["running"] == held_by


class Shy:
    """Has no form in JSON, nor any text."""

    def __repr__(self) -> str:
        raise ValueError("not for you")


@tool
def keep_poison(ctx: ToolContext) -> int:
    """Add an entry to the log that the journal cannot store, behind the checks of `ctx.log`."""
    ctx["x"] = 1
    ctx.call("answer")
    ctx._session._log.append(LogEntry(clock.now(), "poison", {"it": Shy()}))
    return 1


def test_an_end_that_cannot_be_written_fails_that_execution_alone(tmp_path: Path) -> None:
    """Only its end is recorded, and its caller gets the error."""
    with EmbeddedState(tmp_path / "poison.db", tools=Toolbox.of([keep_poison, answer])) as engine:
        engine.initialize_session("s")
        engine.register_variable("s", "x", "integer", 0)
        with pytest.raises(InternalError):
            engine.execute_tool("s", "keep_poison")
        assert engine.get_value("s", "x") == 0
        deadline = time.monotonic() + within(20)
        while engine.run(ReadState("s")).executions:
            assert time.monotonic() < deadline, "it has not ended"
        assert engine.execute_tool("s", "answer").success
    body = last_end_of(tmp_path / "poison.db", "keep_poison")
    assert (body["status"], body["failure"]["type"], body["log"]) == ("failed", "InternalError", [])
