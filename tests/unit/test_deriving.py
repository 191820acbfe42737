"""Derived variables are computed in the commit of the change, whoever makes it, and follow the session."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, ToolContext, connect
from dspex_persist.state.errors import (
    DependencyCycleError,
    DerivationError,
    ToolFailedError,
    UnavailableError,
    UnsupportedError,
    VariableNotFoundError,
)


def times(price: float, count: int) -> float:
    return price * count


@pytest.fixture(params=["local", "file"])
def ctx(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def sell(ctx: ToolContext, count: int) -> float:
        ctx["count"] -= count
        return float(ctx["sum"])

    where: Any = "local" if request.param == "local" else tmp_path / "x.db"
    with Context("s", where, tools=[sell], actor="user:ann") as context:
        context.define_many({"price": 2.0, "count": 3})
        assert context.derive("sum", ["price", "count"], times, description="all of it") == 6.0
        yield context


def test_it_is_computed_in_the_same_commit(ctx: Context) -> None:
    ctx.set("count", 4, reason="one more")
    assert ctx["sum"] == 8.0
    computed, given = ctx.history("sum")[0], ctx.history("count")[0]
    assert (computed.commit, computed.actor, computed.reason) == (given.commit, "user:ann", "one more")
    assert ctx.info("sum").description == "all of it"
    assert ctx.dependencies("sum") == ("count", "price")
    ctx.update_many({"count": 1, "price": 0.5})
    assert [entry.value for entry in ctx.history("sum")] == [0.5, 8.0, 6.0]
    with Context("s", ctx.backend.provider) as other:
        other["price"] = 3.0
    assert ctx["sum"] == 3.0
    ctx.rollback("count", 0)
    assert ctx["sum"] == 9.0
    ctx["unrelated"] = 1
    assert ctx.info("sum").version == 4


def test_a_tool_and_a_transaction_compute_it_when_they_commit(ctx: Context) -> None:
    assert ctx.call("sell", count=1) == 6.0, "before the commit it is as it was"
    assert ctx["sum"] == 4.0
    with ctx.transaction() as tx:
        tx["price"] = 10.0
    assert ctx["sum"] == 20.0


def test_it_can_be_derived_from_a_derived_one(ctx: Context) -> None:
    ctx.derive("tax", ["sum"], lambda total: total * 0.5)
    ctx["count"] = 10
    assert (ctx["sum"], ctx["tax"]) == (20.0, 10.0)
    assert ctx.history("tax")[0].commit == ctx.history("count")[0].commit
    with pytest.raises(Exception, match=r"cycle|itself"):
        ctx.derive("price", ["tax"], lambda tax: tax)
    ctx["count"] = 1
    assert ctx["tax"] == 1.0


def test_a_function_that_fails_refuses_the_change(ctx: Context) -> None:
    ctx.derive("ratio", ["price", "count"], lambda price, count: price / count)
    with pytest.raises(DerivationError, match="'ratio' is derived from price, count: ZeroDivisionError"):
        ctx["count"] = 0
    assert (ctx["count"], ctx["sum"]) == (3, 6.0)
    with pytest.raises(ToolFailedError, match="ZeroDivisionError"):
        ctx.call("sell", count=3)
    assert ctx["count"] == 3
    with pytest.raises(DerivationError, match="it is computed from them: write those"):
        ctx["sum"] = 1.0
    with pytest.raises(VariableNotFoundError, match="missing"):
        ctx.derive("other", ["missing"], lambda missing: missing)
    with pytest.raises(ZeroDivisionError):
        ctx.derive("other", ["count"], lambda count: 1 // (count - 3))
    assert "other" not in ctx
    ctx["count"] = 4


def test_a_variable_is_not_derived_from_itself(ctx: Context) -> None:
    for name in ("price", "new"):
        with pytest.raises(DependencyCycleError, match=f"{name} -> {name}"):
            ctx.derive(name, from_=["price", name], fn=max)
    assert "new" not in ctx


def test_without_a_part_it_rests(ctx: Context) -> None:
    ctx.delete("price")
    ctx["count"] = 9
    assert ctx["sum"] == 6.0
    ctx.define("price", 1.0)
    assert ctx["sum"] == 9.0
    ctx.delete("sum")
    ctx["count"] = 10
    assert "sum" not in ctx


def test_a_session_with_one_does_not_move_to_a_server() -> None:
    with Context("s") as ctx:
        ctx.define_many({"price": 2.0, "count": 3})
        ctx.derive("sum", ["price", "count"], times)
        with pytest.raises(UnsupportedError, match=r"with derived variables \(sum\)"):
            ctx.ensure_bridged("grpc://127.0.0.1:1")
        ctx["count"] = 5
        assert ctx["sum"] == 10.0
        ctx.delete("sum")
        with pytest.raises(UnavailableError):
            ctx.ensure_bridged("grpc://127.0.0.1:1", timeout_s=1)


def test_it_moves_with_the_session_and_ends_with_the_context(tmp_path: Path) -> None:
    with Context("s") as ctx:
        ctx.define_many({"price": 2.0, "count": 3})
        ctx.derive("sum", ["price", "count"], times)
        ctx.ensure_persistent(tmp_path / "moved.db")
        ctx["count"] = 5
        assert ctx["sum"] == 10.0
    with connect(tmp_path / "moved.db") as state:
        with Context("s", state) as first:
            assert first.derive("sum", ["price", "count"], lambda price, count: price + count) == 7.0
            first["count"] = 6
            assert first["sum"] == 8.0
        with Context("s", state) as second:
            second["count"] = 7
            assert second["sum"] == 8.0, "nobody computes it any more"
            second["sum"] = 1.0


def test_a_session_elsewhere_cannot_have_one() -> None:
    with connect("grpc://127.0.0.1:1") as state, pytest.raises(UnsupportedError, match="derived variables"):
        Context.derive.__get__(_Elsewhere(state))("sum", ["x"], lambda x: x)


class _Elsewhere(Context):
    """A context that has begun no session."""

    def __init__(self, state: Any) -> None:
        from dspex_persist.cognitive.backends import Backend

        self._prepare("s", None, False)
        self._backend = Backend(state, is_owned=False)


def test_from_asyncio() -> None:
    async def use() -> list[Any]:
        async with Context.aopen("s") as ctx:
            await ctx.define_many.aio({"a": 1, "b": 2})
            await ctx.derive.aio("c", from_=["a", "b"], fn=lambda a, b: a + b)
            await ctx.set.aio("a", 10)
            return [await ctx.get.aio("c")]

    assert asyncio.run(use()) == [12]
