"""A command's values are parsed before its turn: the writer parses none of them."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import pytest

from dspex_persist import Context, ToolContext, tool
from dspex_persist.state import commands as c
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    IdempotencyConflictError,
    InvalidValueError,
    LimitExceededError,
    StateError,
    VariableReplacedError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.state.values import json_text
from tests.deadline import within

WRITER: Final = "dspex-persist-writer"
KEYED: Final = Origin("ann", "test", idempotency_key="k")
LONG = Value("[" + ",".join(["1"] * 40_000) + "]")
FLOATS = Value("[" + ",".join(["1.0"] * 40_000) + "]")
DEADLINE_S = within(30)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[EmbeddedState]:
    with EmbeddedState(tmp_path / "s.db", tools={tool.spec.name: tool for tool in (fill, show)}) as state:
        state.initialize_session("s")
        for name, type_name in {"numbers": "list", "vector": "embedding", "text": "string", "count": "integer"}.items():
            state.register_variable("s", name, type_name, {"string": "", "integer": 0}.get(type_name, []))
        yield state


@pytest.fixture
def readers(state: EmbeddedState, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that have parsed a large text, in order."""
    read, threads = json_text.read, list[str]()

    def noting(text: str) -> object:
        if len(text) > 10_000:
            threads.append(threading.current_thread().name)
        return read(text)

    monkeypatch.setattr(json_text, "read", noting)
    return threads


@tool
def fill(ctx: ToolContext) -> None:
    """Writes a large value twice."""
    ctx.variables["numbers"] = [1] * 40_000
    ctx.variables["vector"] = [1] * 40_000


@tool
def show(ctx: ToolContext) -> None:
    """Publishes a large value."""
    ctx.publish("numbers", [1] * 40_000)


class TestWhoReads:
    @pytest.mark.parametrize(
        "command",
        [
            c.RegisterVariable("s", "new", "embedding", LONG),
            c.SetVariable("s", "numbers", LONG),
            c.SetVariables("s", {"numbers": LONG}, atomic=True),
            c.SetVariables("s", {"numbers": LONG}),
        ],
    )
    @pytest.mark.parametrize("origin", [None, KEYED])
    def test_the_submitting_thread(
        self, state: EmbeddedState, readers: list[str], command: c.Command[Any], origin: Origin | None
    ) -> None:
        state.submit(command, origin).result()
        assert readers == ["MainThread"]

    def test_also_for_a_session_that_is_not_in_memory(
        self, state: EmbeddedState, readers: list[str], tmp_path: Path
    ) -> None:
        state.close()
        with EmbeddedState(tmp_path / "s.db") as again:
            again.run(c.SetVariable("s", "vector", LONG))
            assert readers == ["MainThread"]
            assert again.get_variable("s", "vector").value == FLOATS

    @pytest.mark.parametrize(("name", "times"), [("fill", 2), ("show", 1)])
    def test_a_tool_s_thread_once_even_if_it_is_carried_out_again(
        self, state: EmbeddedState, readers: list[str], name: str, times: int
    ) -> None:
        assert Context("s", state).call(name) is None
        assert len(readers) == times
        assert WRITER not in readers
        assert state.get_variable("s", "numbers").value == LONG

    def test_the_submitter_fingerprints_executions_with_a_key(self, state: EmbeddedState, readers: list[str]) -> None:
        begin = c.BeginExecution("s", "tool", {"numbers": LONG}, idempotency_key="k")
        spaced = c.BeginExecution("s", "tool", {"numbers": Value(f" {LONG.json}")}, idempotency_key="k")
        other = c.BeginExecution("s", "tool", {"numbers": FLOATS}, idempotency_key="k")
        begun = state.run(begin)
        again = state.run(spaced)
        assert again.running is not None
        assert again.running.id == begun.execution_id
        with pytest.raises(IdempotencyConflictError):
            state.run(other)
        assert readers == ["MainThread"] * 3

    def test_the_writer_reads_small_values(self, state: EmbeddedState) -> None:
        command = c.SetVariable("s", "count", Value("1"))
        assert state.run(command) == 1
        assert command.ahead is None


class TestResults:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("count", LONG),
            ("text", Value('"' + "x" * 3_000_000 + '"')),
            ("numbers", Value("[" * 2000)),
            ("numbers", Value("[" * 2000 + "]" * 2000)),
            ("numbers", Value('"' + "x" * 3000 + '"')),
            ("vector", Value(f"[{LONG.json[1:-1]},null]")),
        ],
    )
    def test_errors_are_the_same(self, state: EmbeddedState, name: str, value: Value) -> None:
        def refusal(run: Any) -> str:
            with pytest.raises((InvalidValueError, LimitExceededError)) as refused:
                run()
            return str(refused.value)

        command = c.SetVariable("s", name, value)
        error = refusal(lambda: state.run(command))
        assert command.ahead is not None
        one = c.SetVariables("s", {name: value, "missing": Value("1")})
        assert state.run(one).errors[name] == error

        state.initialize_session("other")
        kept = state.get_variable("s", name)
        type_name, constraints = kept.type, kept.constraints
        assert refusal(lambda: state.run(c.RegisterVariable("other", name, type_name, value, constraints))) == error

    def test_one_value_for_many_names_is_read_once(self, state: EmbeddedState, readers: list[str]) -> None:
        for name in ("a", "b"):
            state.register_variable("s", name, "list", [])
        outcome = state.run(c.SetVariables("s", dict.fromkeys(("a", "b", "numbers"), LONG)))
        assert dict(outcome.versions) == {"a": 1, "b": 1, "numbers": 1}
        assert len(readers) == 1

    def test_an_error_names_each(self, state: EmbeddedState) -> None:
        state.register_variable("s", "another", "integer", 0)
        errors = state.run(c.SetVariables("s", dict.fromkeys(("count", "another"), LONG))).errors
        assert [name in errors[name] for name in ("count", "another")] == [True, True]

    def test_the_order_of_submission_is_kept_without_waiting(self, state: EmbeddedState) -> None:
        """The type of the variable was not known when the command was submitted: then the writer parses the value."""
        submitted: list[Future[Any]] = [
            state.submit(each)
            for each in (
                c.RegisterVariable("s", "x", "list", Value("[]")),
                c.SetVariable("s", "x", LONG),
                c.SetVariable("s", "x", Value("[2]")),
                c.DeleteVariable("s", "x"),
                c.RegisterVariable("s", "x", "embedding", Value("[]")),
                c.SetVariable("s", "x", LONG),
            )
        ]
        results = [each.result(DEADLINE_S) for each in submitted]
        assert results[1:3] == [1, 2]
        assert results[5] == 1
        assert state.get_variable("s", "x").value == FLOATS

    def test_a_command_submitted_again_uses_the_current_state(self, state: EmbeddedState) -> None:
        command = c.SetVariable("s", "numbers", LONG)
        state.run(command)
        state.delete_variable("s", "numbers")
        state.register_variable("s", "numbers", "embedding", [])
        state.run(command)
        assert state.get_variable("s", "numbers").value == FLOATS

    def test_a_command_for_a_store_with_other_limits(self, state: EmbeddedState, tmp_path: Path) -> None:
        command = c.SetVariable("s", "numbers", LONG)
        state.run(command)
        with EmbeddedState(tmp_path / "other.db", StoreOptions(limits=Limits(value_size_bytes=20_000))) as other:
            other.initialize_session("s")
            other.register_variable("s", "numbers", "list", [])
            with pytest.raises(LimitExceededError):
                other.run(command)


class TestWhoReadsItFirst:
    """Call `read_ahead` explicitly, like a server."""

    def test_a_value_replaced_since_is_not_read_by_the_writer(self, state: EmbeddedState, readers: list[str]) -> None:
        command = c.SetVariables("s", {"count": Value("1"), "numbers": LONG})
        assert state.read_ahead(command)
        state.delete_variable("s", "numbers")
        state.register_variable("s", "numbers", "embedding", [])
        with pytest.raises(VariableReplacedError) as refused:
            state.run(command)
        assert refused.value.name == "numbers"
        assert refused.value.retryable
        assert state.get_value("s", "count") == 0
        assert state.read_ahead(command)
        assert dict(state.run(command).versions) == {"count": 1, "numbers": 1}
        assert readers == ["MainThread"] * 2

    def test_of_another_session_of_the_same_id(self, state: EmbeddedState) -> None:
        command = c.SetVariable("s", "numbers", LONG)
        state.read_ahead(command)
        state.cleanup_session("s")
        with pytest.raises(StateError, match="session not found"):
            state.run(command)

    @pytest.mark.parametrize("command", [c.SetVariable("s", "count", Value("1")), c.GetVariable("s", "count")])
    def test_there_is_nothing_to_read_of(self, state: EmbeddedState, command: c.Command[Any]) -> None:
        assert not state.read_ahead(command)
        assert command.ahead is None

    def test_nor_after_the_end(self, state: EmbeddedState) -> None:
        state.close()
        command = c.SetVariable("s", "numbers", LONG)
        state.read_ahead(command)
        with pytest.raises(StateError, match="closed"):
            state.run(command)
