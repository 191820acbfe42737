"""The verbs of contexts, on sessions in memory: the same here and now, and from asyncio."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspex_persist import Context, ToolContext
from dspex_persist.cognitive.variables import Definition
from dspex_persist.state.errors import (
    DependencyCycleError,
    InvalidArgumentError,
    InvalidValueError,
    NotOptimizingError,
    VariableLockedError,
    VersionConflictError,
)
from dspex_persist.state.model import ChangeKind
from tests.deadline import within


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context("s", actor="user:ann") as context:
        yield context


class TestDefining:
    def test_several_at_once_all_or_none(self, ctx: Context) -> None:
        ids = ctx.define_many(
            {"a": 1, "b": Definition(0.5, constraints={"max": 1}, description="how hot", metadata={"unit": "K"})},
            reason="the beginning",
        )
        assert [ctx.info(name).id for name in "ab"] == list(ids.values())
        b = ctx.info("b")
        assert (b.type, b.constraints, b.description, b.metadata["unit"]) == ("float", {"max": 1}, "how hot", "K")
        assert len({ctx.history(name)[0].commit for name in "ab"}) == 1
        assert ctx.history("a")[0].reason == "the beginning"
        with pytest.raises(InvalidValueError, match="above maximum"):
            ctx.define_many({"c": 1, "d": Definition(2.0, constraints={"max": 1})})
        assert list(ctx) == ["a", "b"]
        assert ctx.define_many({}) == {}
        with pytest.raises(InvalidArgumentError, match="definitions"):
            ctx.define_many(5)  # type: ignore[arg-type]

    def test_an_update_of_the_mapping_defines_what_is_new(self, ctx: Context) -> None:
        ctx["a"] = 1
        ctx.variables.update({"a": 2, "b": "x"}, c=[1])
        assert ctx.variables == {"a": 2, "b": "x", "c": [1]}
        with pytest.raises(InvalidValueError, match="whole number"):
            ctx.variables.update({"a": "no", "d": 1})
        assert "d" not in ctx
        ctx.strict = True
        with pytest.raises(KeyError, match="not found: 'e'"):
            ctx.variables.update(a=3, e=1)
        assert ctx["a"] == 2


class TestWho:
    def test_actor_and_reason_are_in_the_history(self, ctx: Context) -> None:
        ctx.define("x", 1)
        ctx.set("x", 2, reason="too low", actor="user:bob")
        ctx.update("x", lambda x: x + 1, reason="again")
        ctx.rollback("x", 0, reason="back")
        ctx.delete("x", reason="done")
        seen = [(entry.actor, entry.reason, entry.kind) for entry in ctx.history("x")]
        assert seen == [
            ("user:ann", "done", ChangeKind.DELETED),
            ("user:ann", "back", ChangeKind.ROLLED_BACK),
            ("user:ann", "again", ChangeKind.SET),
            ("user:bob", "too low", ChangeKind.SET),
            ("user:ann", None, ChangeKind.REGISTERED),
        ]
        newest, *_ = ctx.history("x", 1)
        assert newest.execution_id is None
        assert newest.metadata == {}
        assert newest.commit > 1
        assert [entry.version for entry in ctx.history("x", 2, before=3)] == [2, 1]

    def test_the_same_key_writes_once(self, ctx: Context) -> None:
        ctx.define("x", 1)
        assert [ctx.set("x", 5, idempotency_key="k") for _ in range(2)] == [1, 1]


class TestUpdating:
    def test_retries_end(self, ctx: Context) -> None:
        ctx.define("x", 0)

        def disturb(x: int) -> int:
            ctx.set("x", x + 100)
            return x + 1

        with pytest.raises(VersionConflictError):
            ctx.update("x", disturb, retries=2)
        assert ctx["x"] == 300

    def test_an_error_of_the_function_is_the_callers(self, ctx: Context) -> None:
        ctx.define("x", 0)
        with pytest.raises(ZeroDivisionError):
            ctx.update("x", lambda x: 1 // x)
        assert ctx["x"] == 0


class TestDependencies:
    def test_they_are_listed_in_order(self, ctx: Context) -> None:
        ctx.define_many(dict.fromkeys("abcd", 0))
        ctx.depends_on("d", "c", "b", kind="uses", reason="so")
        ctx.depends_on("c", "b")
        ctx.depends_on("b", "a")
        assert ctx.dependencies("d") == ("b", "c")
        assert ctx.dependencies("d", transitive=True) == ("a", "b", "c")
        assert ctx.dependents("a", transitive=True) == ("b", "c", "d")
        assert ctx.dependents("a") == ("b",)
        assert not ctx.remove_dependency("d", "b")
        assert ctx.remove_dependency("d", "b", kind="uses")
        assert ctx.dependencies("d") == ("c",)
        with pytest.raises(DependencyCycleError):
            ctx.depends_on("a", "d")


class TestOptimizing:
    def test_reports_are_the_history_of_the_run(self, ctx: Context) -> None:
        ctx.define("t", 0.1)
        ctx.set("t", 0.2)
        with ctx.optimize("t", {"target": "accuracy", "rounds": 3}, optimizer_id="mipro") as run:
            status = ctx.optimization("t")
            assert status is not None
            assert (status.optimizer_id, status.id) == ("mipro", run.id)
            assert dict(status.config) == {"target": "accuracy", "rounds": "3"}
            with pytest.raises(VariableLockedError, match="mipro"):
                ctx.set("t", 0.9)
            assert run.report(0, 0.5, {"accuracy": 0.7}) == 2
            run.report(None, 0.6, {"accuracy": 0.8})
            assert run.value() == ctx["t"] == 0.6
        assert run.status() is None
        assert ctx.optimization("t") is None
        ctx.set("t", 0.9)
        trials = run.history()
        assert [(trial.iteration, trial.value, dict(trial.metrics)) for trial in trials] == [
            (0, 0.5, {"accuracy": 0.7}),
            (1, 0.6, {"accuracy": 0.8}),
        ]
        assert [trial.version for trial in trials] == [2, 3]
        with pytest.raises(NotOptimizingError):
            run.report(2, 0.1)

    def test_waiting_for_another_and_breaking_its_lock_are_explicit(self, ctx: Context) -> None:
        ctx.define("t", 0.1)
        with ctx.optimize("t", optimizer_id="first") as first:
            with pytest.raises(VariableLockedError), ctx.optimize("t", optimizer_id="second"):
                pass
            waited = threading.Event()

            def wait() -> None:
                with ctx.optimize("t", optimizer_id="second", wait_s=within(30)):
                    waited.set()

            thread = threading.Thread(target=wait)
            thread.start()
        assert waited.wait(within(30))
        thread.join(within(30))
        with ctx.optimize("t", optimizer_id="first") as first, ctx.optimize("t", force=True) as other:
            other.report(0, 0.5)
            with pytest.raises(VariableLockedError):
                first.report(0, 0.6)
        assert [entry.kind for entry in ctx.history("t")][1] is ChangeKind.LOCK_BROKEN

    def test_from_asyncio(self, ctx: Context) -> None:
        async def optimize() -> list[Any]:
            await ctx.define.aio("t", 0)
            async with ctx.optimize("t") as run:
                await asyncio.gather(*(run.report.aio(n, n) for n in range(1)))
                with pytest.raises(VariableLockedError):
                    async with ctx.optimize("t", wait_s=0.001):
                        pass
            return [trial.value for trial in await run.history.aio()]

        assert asyncio.run(optimize()) == [0]


def test_tools_have_the_same_verbs() -> None:
    def work(ctx: ToolContext) -> list[Any]:
        ctx.define_many({"a": 1, "b": 2})
        ctx.depends_on("b", "a")
        with ctx.optimize("a") as run:
            run.report(0, 5)
        ctx.update("b", lambda b: b + 1, reason="more")
        assert ctx.remove_dependency("b", "a")
        return [ctx.dependencies("b"), ctx.get_many(), ctx.history("b")[0].reason]

    with Context(tools=[work]) as context:
        assert context.call("work") == [[], {"a": 5, "b": 3}, "more"]
        newest = context.history("b")[0]
        assert newest.execution_id is not None


def test_a_verb_shows_what_it_is(ctx: Context) -> None:
    assert repr(ctx.set) == f"<verb set of {ctx!r}>"
    assert (ctx.set.__doc__ or "").startswith("Write a value.")
    assert isinstance(Context.set.__doc__, str)


async def _later(_: Any) -> int:
    return 1


def test_what_is_to_be_called_is_a_function(ctx: Context) -> None:
    ctx["n"] = 0
    wrong: Any = 5
    refusals: list[tuple[str, Any, Callable[[Any], object]]] = [
        ("function", wrong, lambda function: ctx.update("n", function)),
        ("fn", wrong, lambda function: ctx.derive("double", from_=["n"], fn=function)),
        ("on_change", wrong, lambda function: ctx.watch("n", on_change=function)),
        ("on_change", _later, lambda function: ctx.watch("n", on_change=function)),
        ("filter", wrong, lambda function: ctx.watch("n", filter=function)),
        ("filter", _later, lambda function: ctx.watch("n", filter=function)),
        ("predicate", wrong, lambda function: ctx.wait_for("n", function)),
        ("predicate", _later, lambda function: ctx.wait_for("n", function)),
    ]
    for argument, function, call in refusals:
        with pytest.raises(InvalidArgumentError, match=f"invalid {argument}: .*must be a function, not "):
            call(function)
    assert ctx["n"] == 0
    assert asyncio.run(ctx.update.aio("n", _later)) == 1


def test_a_block_is_attempted_at_least_once(ctx: Context) -> None:
    with pytest.raises(InvalidArgumentError, match="-1 is below 0: 0 means one attempt"):
        next(ctx.transactions(retries=-1))
    assert len(list(ctx.transactions(retries=0))) == 1
