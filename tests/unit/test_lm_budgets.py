"""Budgets of LM calls: the next call is refused before it is made."""

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import BudgetExceededError, Context, ToolContext, ToolFailedError, connect, tool
from dspex_persist.cognitive.errors import ToolDefinitionError
from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Importable, Recordable
from dspex_persist.state.budgets import Budget, Spent
from dspex_persist.state.lm_calls import spent_on
from dspex_persist.state.local import LocalState
from dspex_persist.state.tools.spending import Spending
from dspex_persist.state.tools.with_tools import WithTools
from tests.deadline import within
from tests.lms import Engine, dspy, lm_calls, lm_on, recorded
from tests.unit.test_lm_accounts import response

CALL = 5
"""The tokens of a call of an `Engine`."""


class Models:
    """The models of the tools below, which a test sets."""

    engine: Engine
    lm: Any


@pytest.fixture(autouse=True)
def models() -> None:
    Models.engine = Engine()
    Models.lm = lm_on(Models.engine)


@tool(record_lm=True)
def ask_once(ctx: ToolContext, question: str = "hello") -> str:
    """Ask."""
    return str(Models.lm(question)[0])


@tool(record_lm=True, max_tokens=3 * CALL)
def ask_little(ctx: ToolContext, times: int) -> int:
    """Ask several times, with a budget of its own."""
    for each in range(times):
        Models.lm(f"{each}")
    return times


@tool(record_lm=True)
def ask_by_another(ctx: ToolContext) -> str:
    """Have another tool ask."""
    return str(ctx.call(ask_once))


@tool(record_lm=True)
async def ask_later(ctx: ToolContext) -> str:
    """Ask asynchronously."""
    return str((await Models.lm.acall("later"))[0])


@tool(record_lm=True)
def ask_and_fail(ctx: ToolContext) -> None:
    """Ask, and fail."""
    Models.lm("hello")
    raise ValueError("no")


@tool(record_lm=True, retries=5)
def ask_and_conflict(ctx: ToolContext) -> None:
    """Ask, and conflict with the test, which changes the variable in each attempt."""
    ctx["x"] = ctx["x"] + 1
    Models.lm("hello")


TOOLS = [ask_once, ask_little, ask_by_another, ask_later, ask_and_fail, ask_and_conflict]


def calls_in(ctx: Context) -> list[Mapping[str, Any]]:
    _, commits = Recordable.of(ctx.backend.provider).record(ctx.session_id)
    ends = [event.body for commit in commits for event in commit.events if "recorded" in event.body]
    return [call for end in ends for call in end["recorded"].get("lm", [])]


def test_the_budget_of_a_session_counts_all_its_executions() -> None:
    with Context("s", tools=TOOLS, max_tokens=6 * CALL) as ctx:
        for _ in range(2):
            ctx.call(ask_once)
        ctx.call(ask_by_another)
        ctx.call(ask_later)
        with pytest.raises(ToolFailedError):
            ctx.call(ask_and_fail)
        with ctx.recording():
            Models.lm("recorded")
            with pytest.raises(BudgetExceededError) as caught:
                Models.lm("refused")
        with pytest.raises(ToolFailedError) as failed:
            ctx.call(ask_once)
    assert Models.engine.calls == 6
    error = caught.value
    assert (error.owner, error.unit, error.budget, error.used) == ("session 's'", "tokens", 30, 30)
    assert str(error) == (
        "the LM calls of session 's' have used 30 tokens of a budget of 30; no more are made; raise it with "
        "Context(session_id, max_tokens=...), or lift it with the metadata dspex.max_tokens: 'none'"
    )
    assert failed.value.kind == "BudgetExceededError"


def test_a_refused_call_is_recorded_and_refused_again_in_a_replay() -> None:
    with Context("s", tools=TOOLS, max_tokens=CALL) as ctx:
        with ctx.recording():
            Models.lm("one")
            with pytest.raises(BudgetExceededError):
                Models.lm("two")
        calls = calls_in(ctx)
    assert [call.get("error", {}).get("type") for call in calls] == [
        None,
        "dspex_persist.state.errors.tools.BudgetExceededError",
    ]
    assert (calls[1]["cost"], "cached" in calls[1]) == (0.0, False)
    with lm_calls.playing(calls) as playback:
        assert Models.lm("one") == ["ONE"]
        with pytest.raises(BudgetExceededError, match="have used 5 tokens"):
            Models.lm("two")
    assert (playback.divergences, Models.engine.calls) == ([], 1)


def test_the_budget_of_a_tool_counts_its_executions_in_a_session() -> None:
    with Context("s", tools=TOOLS) as ctx:
        ctx.call(ask_little, times=2)
        ctx.call(ask_once)
        with pytest.raises(
            ToolFailedError, match="tool 'ask_little' in this session have used 15 tokens of a budget of 15"
        ):
            ctx.call(ask_little, times=2)
        with pytest.raises(ToolFailedError, match=r"@tool\(max_tokens=..., max_cost=...\)"):
            ctx.call(ask_little, times=1)
        ctx.call(ask_once)
        other = Context("t", ctx.backend.provider)
        other.call("ask_little", times=3)
    assert Models.engine.calls == 2 + 1 + 1 + 1 + 3


def test_a_budget_applies_as_soon_as_it_is_set_and_can_be_raised_and_lifted() -> None:
    with Context("s", tools=TOOLS) as ctx, ctx.recording():
        Models.lm("one")
        for facts in ({"max_tokens": 1}, {"metadata": {"dspex.max_tokens": "5"}}):
            Context("s", ctx.backend.provider, **facts)
            with pytest.raises(BudgetExceededError):
                Models.lm("two")
        Context("s", ctx.backend.provider, max_tokens=6)
        Models.lm("three")
        with pytest.raises(BudgetExceededError):
            Models.lm("four")
        Context("s", ctx.backend.provider, metadata={"dspex.max_tokens": "none"})
        Models.lm("five")


def test_no_call_at_all_is_a_budget_too() -> None:
    with Context("s", tools=TOOLS, max_tokens=0) as ctx, ctx.recording(), pytest.raises(BudgetExceededError):
        Models.lm("one")
    assert Models.engine.calls == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_budget_of_money_counts_what_is_known() -> None:
    class Own(dspy.BaseLM):  # type: ignore[misc]
        cost: float | None = 0.25

        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return response(self.cost)

    lm = Own("own")
    with Context("s", max_cost=0.5) as ctx, ctx.recording():
        lm("one")
        lm.cost = None
        for _ in range(3):
            lm("free, as far as anybody knows")
        lm.cost = 0.25
        lm("two")
        with pytest.raises(BudgetExceededError) as caught:
            lm("three")
    assert (caught.value.unit, caught.value.used, caught.value.setting) == ("USD", 0.5, "max_cost")
    assert "have used 0.5 USD of a budget of 0.5" in str(caught.value)


def test_answers_of_the_cache_and_of_a_playback_use_nothing() -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    cached = lm_on(Models.engine, cache=True)
    with Context("s", max_tokens=2 * CALL) as ctx, ctx.recording():
        for _ in range(5):
            cached("one")
        played = [{**call, "cached": False} for call in recorded(lambda: Models.lm("two"))[1]]
        with lm_calls.playing(played):
            Models.lm("two")
        Models.lm("three")
        # Nobody can know before whether the cache would answer.
        with pytest.raises(BudgetExceededError):
            cached("one")
    assert spent_on({"cached": True, "cost": 1.0, "response": {"usage": {"m": {"total_tokens": 5}}}}) == Spent()
    assert spent_on({"usage": {"m": {"prompt_tokens": 2, "completion_tokens": 1}}, "cost": 0.5}) == Spent(3, 0.5)
    assert spent_on({}) == Spent()


def test_the_sum_survives_a_restart(tmp_path: Path) -> None:
    for round_ in range(3):
        with Context("s", tmp_path / "s.db", tools=TOOLS, max_tokens=4 * CALL) as ctx:
            ctx.call(ask_once)
            if round_ == 1:
                with ctx.recording():
                    Models.lm("recorded")
    again = Context("s", tmp_path / "s.db", tools=TOOLS)
    with again as ctx, pytest.raises(ToolFailedError, match="have used 20 tokens"):
        ctx.call(ask_once)
    assert Models.engine.calls == 4


def test_the_sum_goes_along_when_a_session_moves_or_is_imported(tmp_path: Path) -> None:
    with Context("s", tools=TOOLS, max_tokens=2 * CALL) as ctx:
        ctx.call(ask_once)
        ctx.ensure_persistent(tmp_path / "s.db")
        ctx.call(ask_once)
        with pytest.raises(ToolFailedError, match="have used 10 tokens"):
            ctx.call(ask_once)
        header, commits = Recordable.of(ctx.backend.provider).record("s")
        kept = tuple(commits)
    with connect("memory:", tools=TOOLS) as state:
        Importable.of(state).import_session(header, kept)
        with Context("s", state) as ctx, pytest.raises(ToolFailedError, match="have used 10 tokens"):
            ctx.call("ask_once")


def test_a_budget_that_comes_late_counts_what_was_before() -> None:
    with Context("s", tools=TOOLS) as ctx:
        ctx.call(ask_once)
        with ctx.recording():
            Models.lm("in a running execution")
            with Context("s", ctx.backend.provider, max_tokens=2 * CALL), pytest.raises(ToolFailedError):
                ctx.call(ask_once)
        with pytest.raises(ToolFailedError, match="have used 10 tokens"):
            ctx.call(ask_once)
        # Another session gets the id.
        ctx.end()
        Context("s", ctx.backend.provider, max_tokens=CALL).call("ask_once")


def test_runners_over_one_provider_count_together() -> None:
    with LocalState() as state, WithTools(state, {}) as one, WithTools(state, {"ask_once": ask_once}) as other:
        Context("s", one, max_tokens=2 * CALL)
        with Context("s", one) as ctx, ctx.recording():
            Models.lm("one")
            Context("s", other).call("ask_once")
            with pytest.raises(BudgetExceededError):
                Models.lm("two")


def test_calls_at_the_same_time_overshoot_by_those_in_progress_at_most() -> None:
    barrier = threading.Barrier(4)

    class Together(Engine):
        def complete(self, request: Any) -> Any:
            barrier.wait(within(20))
            return super().complete(request)

    lm = lm_on(Together())
    with Context("s", max_tokens=1) as ctx, ctx.recording(), ThreadPoolExecutor(4) as pool:
        # All four begin before one of them ends.
        assert [future.result() for future in [pool.submit(lm, f"{each}") for each in range(4)]]
        refused = [pool.submit(lm, f"{each}").exception() for each in range(4)]
    assert all(isinstance(each, BudgetExceededError) for each in refused)
    assert {each.used for each in refused if isinstance(each, BudgetExceededError)} == {4 * CALL}


def test_attempts_that_conflict_count() -> None:
    with Context("s", tools=TOOLS, max_tokens=3 * CALL) as ctx:
        ctx["x"] = 0

        class Changing(Engine):
            def complete(self, request: Any) -> Any:
                ctx["x"] = 100 + self.calls
                return super().complete(request)

        Models.lm = lm_on(Changing())
        with pytest.raises(ToolFailedError, match="have used 15 tokens"):
            ctx.call(ask_and_conflict)


def test_transactions_and_asyncio() -> None:
    with Context("s", tools=TOOLS, max_tokens=2 * CALL) as ctx:
        with ctx.recording(), ctx.transaction():
            Models.lm("one")

        async def program() -> None:
            async with ctx.recording():
                await Models.lm.acall("two")
                with pytest.raises(BudgetExceededError):
                    await Models.lm.acall("three")

        asyncio.run(program())
        with pytest.raises(ToolFailedError, match="BudgetExceededError"):
            asyncio.run(ctx.call.aio(ask_later))


def test_what_is_not_recorded_is_neither_counted_nor_refused() -> None:
    with Context("s", max_tokens=0):
        Models.lm("one")
    with pytest.raises(ToolDefinitionError, match="a budget needs record_lm=True"):
        tool(max_tokens=5)(lambda_)


def lambda_(ctx: ToolContext) -> None:
    """A function."""


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "5", float("inf")])
def test_wrong_budgets(wrong: Any) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="max_tokens"):
        Context("s", max_tokens=wrong)
    with pytest.raises(ToolDefinitionError, match="its max_tokens"):
        tool(max_tokens=wrong, record_lm=True)(lambda_)
    if wrong != 1.5:
        with pytest.raises(errors.InvalidArgumentError, match="max_cost"):
            Context("s", max_cost=wrong)
    for text in ("", "-1", "much", "nan", "inf", "1e400"):
        for key in ("dspex.max_tokens", "dspex.max_cost"):
            with pytest.raises(errors.InvalidArgumentError, match=key):
                Context("s", metadata={key: text})


def test_budgets_as_metadata() -> None:
    assert Budget.of(5, 0.1).metadata() == {"dspex.max_tokens": "5", "dspex.max_cost": "0.1"}
    assert Budget.of_metadata(Budget.of(5, 1e-7).metadata()) == Budget(5, 1e-7)
    assert Budget.of_metadata({"dspex.max_tokens": "none", "dspex.max_cost": "2"}) == Budget(None, 2.0)


def test_sums_of_many_sessions_take_no_memory_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspex_persist.state.tools.spending._MOST_SESSIONS", 3)
    spending, call = Spending(), {"usage": {"m": {"total_tokens": 1}}}
    for key in range(10):
        spending.add(key, f"{key}", "t", call)
        spending.end(key, f"{key}", None)
    assert len(spending._ledgers) <= 3
    for key in range(10, 20):
        spending.add(key, f"{key}", "t", call)
    # What is still running cannot be read from the journal.
    assert set(spending._ledgers) >= set(range(10, 20))


def test_the_journal_and_the_running_sum_count_each_execution_once() -> None:
    """Whichever of its end and the reading of the journal comes first."""
    spending, call = Spending(), {"usage": {"m": {"total_tokens": 1}}}
    with LocalState() as state:
        state.initialize_session("s", {"dspex.max_tokens": "1000"})

        def used() -> int:
            origin = state.default_origin("x")
            spending.check(state, "s", origin, "t")
            return spending._ledgers[1].total(None).tokens

        spending.add(1, "early", "t", call)
        spending.end(1, "early", 2)  # only the journal knows it, if it has it
        assert spending._ledgers == {}
        spending.add(1, "lost", "t", call)
        spending.end(1, "lost", None)
        spending.add(1, "running", "t", call)
        assert used() == 2
        spending.end(1, "running", 1)  # the journal had it when it was read
        assert used() == 1
        spending.add(1, "late", "t", call)
        assert used() == 2
        spending.end(1, "late", 99)
        spending.end(1, "unknown", 99)
        assert used() == 2
        assert state.submit(commands.SumLmCalls("s")).result() == (1, {})
