"""What type checkers know of contexts: checked by tests/unit/test_typing.py with mypy and basedpyright."""

from collections.abc import Mapping
from typing import Any, assert_type

from pydantic import BaseModel

from dspex_persist import Context, ToolContext, Variable, tool
from dspex_persist.cognitive.describing import Description, History
from dspex_persist.cognitive.records import HistoryEntry, VariableInfo


class Profile(BaseModel):
    name: str
    age: int = 0


def here_and_now(ctx: Context) -> None:
    assert_type(ctx.set("x", 1, reason="why"), int)
    assert_type(ctx.define("x", 1, constraints={"min": 0}), str)
    assert_type(ctx.get("x", 0), Any)
    assert_type(ctx.get_many("x", "y"), dict[str, Any])
    assert_type(ctx.history("x", 5), History)
    assert_type(ctx.list("a*"), tuple[VariableInfo, ...])
    assert_type(ctx.dependents("x", transitive=True), tuple[str, ...])
    assert_type(ctx.define_many({"x": 1}), Mapping[str, str])
    assert_type(ctx.history("x")[0], HistoryEntry)
    assert_type(ctx.describe(), Description)
    assert_type(ctx["x"], Any)
    ctx.update("x", lambda x: x + 1)


async def from_asyncio(ctx: Context) -> None:
    assert_type(await ctx.set.aio("x", 1, reason="why"), int)
    assert_type(await ctx.history.aio("x", limit=5), History)
    assert_type(await ctx.info.aio("x"), VariableInfo)
    async with Context.aopen("s") as other:
        assert_type(other, Context)
    assert_type(await Context.aopen("s"), Context)
    async with ctx.optimize("x") as run:
        assert_type(await run.report.aio(0, 0.5), int)


def handles(ctx: Context) -> None:
    temperature = ctx.handle("temperature", float)
    assert_type(temperature, Variable[float])
    assert_type(temperature.value, float)
    temperature.value = 0.5
    assert_type(temperature.set(0.5, reason="why"), int)
    assert_type(temperature.update(lambda t: t / 2), float)
    assert_type(temperature.get(), float)
    names = ctx.handle("names", list[str])
    assert_type(names.value, list[str])
    profile = ctx.handle("profile", Profile)
    assert_type(profile.value.age, int)


async def awaited_handles(ctx: Context) -> None:
    temperature = ctx.handle("temperature", float)
    assert_type(await temperature.get.aio(), float)
    assert_type(await temperature.set.aio(0.7), int)


@tool
def in_tools(ctx: ToolContext) -> float:
    assert_type(ctx.set("x", 1), int)
    return ctx.handle("temperature", float).value
