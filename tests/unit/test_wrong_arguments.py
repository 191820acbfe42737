"""What strangers pass: an error names the argument as the verb calls it, and says what to do."""

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, ContextClosedError
from dspex_persist.state.errors import ForkedProcessError, InvalidArgumentError, InvalidValueError
from tests.infra.test_forks import in_child

WRONG = object()

# By the argument: verbs that have it, with something that it cannot be.
ARGUMENTS: dict[str, list[Callable[[Any], object]]] = {
    "name": [
        lambda ctx: ctx[WRONG],
        lambda ctx: ctx.define(WRONG, 1),
        lambda ctx: ctx.set(WRONG, 1),
        lambda ctx: ctx.get("a\0b"),
        lambda ctx: "\ud800" in ctx,
        lambda ctx: ctx.info(WRONG),
        lambda ctx: ctx.update(WRONG, lambda x: x),
        lambda ctx: ctx.delete(WRONG),
        lambda ctx: ctx.history(WRONG),
        lambda ctx: ctx.rollback(WRONG, 0),
        lambda ctx: ctx.depends_on(WRONG, "x"),
        lambda ctx: ctx.dependencies(WRONG),
        lambda ctx: ctx.dependents(WRONG),
        lambda ctx: ctx.handle(WRONG, int),
        lambda ctx: ctx.optimize(WRONG),
        lambda ctx: ctx.optimization(WRONG),
        lambda ctx: ctx.wait_for(WRONG, bool),
        lambda ctx: ctx.rule(WRONG, "x > 0"),
    ],
    "names": [lambda ctx: ctx.get_many("x", WRONG), lambda ctx: ctx.watch(WRONG)],
    "others": [lambda ctx: ctx.depends_on("x", WRONG)],
    "other": [lambda ctx: ctx.remove_dependency("x", WRONG)],
    "from_": [lambda ctx: ctx.derive("y", "x", max)],
    "changes": [lambda ctx: ctx.update_many(WRONG), lambda ctx: ctx.variables.update(None)],
    "definitions": [lambda ctx: ctx.define_many(WRONG)],
    "description": [
        lambda ctx: ctx.define("y", 1, description=WRONG),
        lambda ctx: ctx.define("y", model=_model(), description=WRONG),
    ],
    "version": [lambda ctx: ctx.rollback("x", "0")],
    "expected_version": [lambda ctx: ctx.set("x", 1, expected_version="0")],
    "before": [lambda ctx: ctx.history("x", before=WRONG)],
    "after": [lambda ctx: ctx.watch(after="0"), lambda ctx: ctx.watch(after=-1)],
    "create": [lambda ctx: ctx.set("y", 1, create="no"), lambda _: Context(create=None)],  # type: ignore[arg-type]
    "strict": [lambda _: Context(strict="no")],  # type: ignore[arg-type]
    "atomic": [lambda ctx: ctx.update_many({"x": 1}, atomic=1)],
    "include_initial": [lambda ctx: ctx.watch(include_initial=1), lambda ctx: _handle(ctx).watch(include_initial=1)],
    "retries": [lambda ctx: ctx.update("x", lambda x: x, retries=-1), lambda ctx: next(ctx.transactions(retries=-1))],
    "config": [lambda ctx: ctx.optimize("x", 5), lambda ctx: ctx.optimize("x", "")],
    "optimizer_id": [lambda ctx: ctx.optimize("x", optimizer_id=5)],
    "kind": [
        *(lambda ctx, kind=kind: ctx.handle("x", kind) for kind in (5, "int", [], {}, (int,), True)),
        lambda ctx: ctx.handle("x", object()).value,
    ],
    "session_id": [lambda ctx: ctx.fork(5), lambda _: Context(5)],  # type: ignore[arg-type]
    "durable_at": [lambda _: Context(durable_at=5)],  # type: ignore[arg-type]
    "remote_at": [lambda _: Context(remote_at=Path("x"))],  # type: ignore[arg-type]
    "path": [lambda ctx: ctx.ensure_persistent(5)],
    "url": [lambda ctx: ctx.ensure_bridged(5)],
}


def _model() -> type:
    from pydantic import BaseModel

    class Model(BaseModel):
        x: int = 1

    return Model


def _handle(ctx: Context) -> Any:
    return ctx.handle("x", int)


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context("s") as context:
        context["x"] = 1
        yield context


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_the_error_names_the_argument(ctx: Context, argument: str) -> None:
    for call in ARGUMENTS[argument]:
        with pytest.raises(InvalidArgumentError) as refused:
            call(ctx)
        assert refused.value.field == argument
    assert dict(ctx) == {"x": 1}


def test_it_names_it_from_asyncio_and_in_a_transaction_too(ctx: Context) -> None:
    async def use() -> None:
        await ctx.rollback.aio("x", "0")  # type: ignore[arg-type]

    with pytest.raises(InvalidArgumentError, match=r"^invalid version: "):
        asyncio.run(use())
    with ctx.transaction() as tx, pytest.raises(InvalidArgumentError, match=r"^invalid name: "):
        tx[5]  # type: ignore[index]


@dataclass
class Point:
    x: int = 1


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (Point(), "use dataclasses.asdict(...), or a pydantic model"),
        (Colour.RED, "use its value"),
        (Path("x"), "convert it with str(...)"),
        (Decimal("1.5"), "convert it with float(...)"),
        (timedelta(1), "use its total_seconds()"),
        (datetime(2026, 1, 1, tzinfo=UTC), "use its isoformat()"),
        (b"x", "decode them to a str"),
        ({1, 2}, "make it a list"),
        ({"a": [Point()]}, 'at "a": at 0: Point has no JSON form'),
        pytest.param(10**5000, "an integer of more than 4300 digits has no JSON form", id="a huge number"),
        pytest.param([10**5000], "an integer of more than 4300 digits has no JSON form", id="one in a list"),
    ],
)
def test_what_is_no_value_gets_advice(ctx: Context, value: object, advice: str) -> None:
    with pytest.raises(InvalidValueError) as refused:
        ctx["y"] = value
    assert advice in str(refused.value)


def test_names_that_no_variable_can_have(ctx: Context) -> None:
    for name in ("", "a\nb", "x" * 1000, 5, None, ("x",)):
        assert name not in ctx
        assert name not in ctx.variables
        assert ctx.variables.get(name, 7) == ctx.variables.pop(name, 7) == 7
    for name in ("a.b", "a/b", "a b", "ünï", "😀", "*", "__x", "class", "with'quote"):
        ctx[name] = 1
        assert (name in ctx, ctx[name], ctx.variables.pop(name)) == (True, 1, 1)


def test_a_debugger_can_look_at_a_closed_context(ctx: Context) -> None:
    variables, attributes = ctx.variables, ctx.v
    ctx.close()
    assert repr(variables) == repr(attributes) == "<variables of <Context of session 's', closed>>"
    assert dir(attributes) == []
    with pytest.raises(ContextClosedError):
        ctx.derive("y", ["x"], max)


def test_an_optimization_ends_with_what_the_block_raises(ctx: Context) -> None:
    with pytest.raises(ZeroDivisionError), ctx.optimize("x"):  # noqa: PT012
        ctx.close()
        raise ZeroDivisionError
    with Context("t") as other:
        other["x"] = 1
        # There is nothing left to unlock.
        with other.optimize("x"):
            other.end()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it needs fork")
def test_a_transaction_is_of_no_use_in_a_forked_child() -> None:
    def use(tx: Any) -> str:
        try:
            tx["x"]
        except ForkedProcessError as error:
            return str(error)
        return "it worked"

    def end(tx: Any) -> str:
        try:
            tx.__exit__(None, None, None)
        except ForkedProcessError as error:
            return str(error)
        return "it worked"

    with Context("s") as ctx:
        ctx["x"] = 1
        with ctx.transaction() as tx:
            tx["x"] = 2
            for act in (use, end):
                assert in_child(lambda act=act: act(tx)).startswith(  # type: ignore[misc]
                    "the transaction belongs to the process that this one was forked from"
                )
        assert ctx["x"] == 2
