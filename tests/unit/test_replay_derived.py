"""Replays of executions in whose commits functions computed variables from others."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspex_persist import Context, ToolContext, tool
from dspex_persist.errors import ExecutionConflictError, ToolFailedError
from dspex_persist.replay import ReplayOutcome, ReplayReport, load, replay, replay_state
from dspex_persist.state.abilities import Recordable


@tool
def buy(ctx: ToolContext, count: int) -> float:
    """Write what `total` is computed from, and return the `total` from before."""
    ctx["count"] = count
    return ctx["total"]


@tool
def order(ctx: ToolContext, count: int) -> float:
    """Have another tool write it."""
    ctx.call("buy", count=count)
    ctx["price"] = 3.0
    return ctx["total"]


@tool
def announce(ctx: ToolContext) -> list[float]:
    """Publish what `total` is computed from, and read that after each time."""
    seen = [ctx["total"]]
    for count in ctx["announced"]:
        ctx.publish("count", count)
        seen.append(ctx["total"])
    return seen


@tool
def past(ctx: ToolContext) -> list[Any]:
    """Read the history of what was computed, the last version by publishing."""
    ctx.publish("count", 8)
    return [entry.value for entry in ctx.history("total")]


TOOLS = [buy, order, announce, past]


def total(count: int, price: float) -> float:
    if count < 0:
        raise ValueError("less than nothing")
    return count * price


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context("s", tools=TOOLS) as ctx:
        ctx.define_many({"count": 1, "price": 2.0, "announced": [5, 6]})
        ctx.derive("total", ["count", "price"], total)
        ctx.derive("taxed", ["total"], lambda total: total * 1.5)
        yield ctx


def replayed(ctx: Context, tools: list[Callable[..., Any]] | None = None) -> ReplayReport:
    recording = load(Recordable.of(ctx.backend.provider).record("s"))
    assert replay_state(recording, ctx.audit().state("s")).divergences == ()
    return replay(recording, TOOLS if tools is None else tools)


def test_what_was_computed_is_no_divergence(ctx: Context) -> None:
    assert (ctx.call(buy, count=4), ctx["total"], ctx["taxed"]) == (2.0, 8.0, 12.0)
    assert (ctx.call(order, count=5), ctx["total"], ctx["taxed"]) == (8.0, 15.0, 22.5)
    report = replayed(ctx)
    assert [each.outcome for each in report.executions] == [ReplayOutcome.SAME] * 3, report.describe()


def test_a_tool_that_publishes_sees_what_is_computed_from_that(ctx: Context) -> None:
    assert ctx.call(announce) == [2.0, 10.0, 12.0]
    assert ctx["taxed"] == 18.0
    assert ctx.call(past) == [16.0, 12.0, 10.0, 2.0]
    report = replayed(ctx)
    assert [each.outcome for each in report.executions] == [ReplayOutcome.SAME] * 2, report.describe()


def test_others_who_change_what_was_published_still_conflict(ctx: Context) -> None:
    other = Context("s", ctx.backend.provider)

    @tool
    def disturbed(ctx: ToolContext) -> float:
        before: float = ctx["total"]
        ctx.publish("count", 5)
        other["count"] = 6
        return before

    with (
        Context("s", ctx.backend.provider, tools=[disturbed]) as beside,
        pytest.raises(ExecutionConflictError, match=r"others changed total \(was at version 1, is at version 2\)"),
    ):
        beside.call("disturbed")


def test_rules_hold_for_what_was_computed_in_a_replay_too(ctx: Context) -> None:
    ctx.rule("even", "total == double(count) * price")
    assert ctx.call(buy, count=9) == 2.0
    report = replayed(ctx)
    assert report.ok, report.describe()


def test_a_function_that_refused_is_no_divergence(ctx: Context) -> None:
    with pytest.raises(ToolFailedError, match="less than nothing"):
        ctx.call(buy, count=-1)
    (skipped,) = replayed(ctx).executions
    assert (skipped.outcome, skipped.reason) == (
        ReplayOutcome.SKIPPED,
        "a derived variable refused what it wrote, and its function is not in the recording",
    )


def test_code_that_writes_something_else_still_diverges(ctx: Context) -> None:
    @tool(name="buy")
    def buys_more(ctx: ToolContext, count: int) -> float:
        ctx["count"] = count + 1
        return ctx["total"]

    ctx.call(buy, count=4)
    (diverged,) = replayed(ctx, [buys_more]).divergences
    assert diverged.diff == ("-count v1 = 4", "+count v1 = 5")


def test_a_tool_without_its_code_is_repeated(ctx: Context) -> None:
    ctx.call(order, count=5)
    outcomes = [each.outcome for each in replayed(ctx, [order]).executions]
    assert outcomes == [ReplayOutcome.SAME, ReplayOutcome.SKIPPED]
