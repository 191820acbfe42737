"""Copying, and sending to other processes: it works, or a TypeError says what to do instead."""

import copy
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from dspex_persist import Context, Definition, ToolContext, tool


def sent(thing: object) -> Any:
    return ForkingPickler.loads(ForkingPickler.dumps(thing))


WAYS: tuple[Callable[[Any], Any], ...] = (copy.copy, copy.deepcopy, sent)


@tool
def double(ctx: ToolContext, number: int) -> int:
    return 2 * number


class Till:
    @tool
    def total(self, ctx: ToolContext) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Till)

    __hash__ = None  # type: ignore[assignment]


@tool
def refusals(ctx: ToolContext) -> list[str]:
    found = []
    for way in WAYS:
        with pytest.raises(TypeError) as refused:
            way(ctx)
        found.append(str(refused.value))
    return found


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context("s", tools=[refusals]) as context:
        context.define_many({"x": Definition(1, description="y", constraints={"max": 9}), "list": [1, [2]]})
        yield context


@pytest.mark.parametrize("way", WAYS)
def test_what_belongs_to_a_context_says_what_to_do_instead(ctx: Context, way: Callable[[Any], Any]) -> None:
    with ctx.transaction() as tx:
        for thing, advice in (
            (ctx, r"Context\('s', backend\); ctx.fork\(\) copies the session, dict\(ctx\) its values"),
            (tx, r"dict\(tx\) copies the values"),
            (ctx.v, r"ctx.variables.copy\(\) returns a dict"),
            (ctx.watch(), r"ctx.watch\(..., after=changes.position\)"),
            (ctx.watch(on_change=print), r"ctx.watch\(..., on_change=...\)"),
            (ctx.optimize("x"), "report from the one with the lock"),
        ):
            with pytest.raises(TypeError, match=advice):
                way(thing)


def test_a_tools_context_says_so_too(ctx: Context) -> None:
    (advice,) = {*ctx.call(refusals)}
    assert "pass values to other processes" in advice


@pytest.mark.parametrize("way", WAYS)
def test_the_variables_become_a_dict(ctx: Context, way: Callable[[Any], Any]) -> None:
    copied = way(ctx.variables)
    assert type(copied) is dict
    assert copied == {"x": 1, "list": [1, [2]]}
    copied["x"] = 2
    assert ctx["x"] == 1


def test_a_handle_stands_for_its_variable_and_stays_with_its_context(ctx: Context) -> None:
    handle = ctx.handle("x", int)
    for way in (copy.copy, copy.deepcopy):
        way({"of": handle})["of"].set(3)
        assert ctx["x"] == 3
    with pytest.raises(TypeError, match=r"send its name, 'x', and make another one there with ctx.handle"):
        sent(handle)


def test_a_verb_goes_where_its_object_goes(ctx: Context) -> None:
    copy.copy(ctx.set)("x", 5)
    copy.deepcopy(ctx.handle("x", int).update)(lambda x: x + 1)
    assert ctx["x"] == 6
    for way in (copy.deepcopy, sent):
        with pytest.raises(TypeError, match=r"a context cannot be copied"):
            way(ctx.set)


@pytest.mark.parametrize("way", WAYS)
def test_tools_go_by_their_names_as_functions_do(way: Callable[[Any], Any]) -> None:
    assert way(double) is double
    bound = way(Till().total)
    assert (bound.spec.name, bound(None)) == ("total", 1)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_read_is_a_value(ctx: Context, way: Callable[[Any], Any]) -> None:
    ctx.rule("small", "x < 10")
    with ctx.watch("x") as changes:
        ctx["x"] = 2
        change = changes.next()
    assert change is not None
    with ctx.optimize("x") as run:
        run.report(0, 1, {"score": 1})
        status = ctx.optimization("x")
        trials = run.history()
    values = [ctx.info("x"), ctx.history("x"), ctx.list(), ctx.describe(), ctx.rules(), change, status, trials]
    assert [repr(way(value)) for value in values] == [repr(value) for value in values]
    assert way(ctx.history("x"))[0].value == 1
