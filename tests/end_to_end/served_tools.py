"""The tools of these tests' servers: loaded by `serve --tools tests.end_to_end.served_tools`.

Tools that a test must catch while they run take a gate, which is a folder: they create a file in it, and continue when
the test has created another one.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextvars import ContextVar
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NoReturn

import dspex_persist
from dspex_persist import ToolContext, tool
from tests.end_to_end.gates import DEADLINE_S, PAUSE_S, announce, wait_at

mood: ContextVar[str] = ContextVar("mood", default="none")


async def wait_at_async(gate: str) -> None:
    """What `wait_at` does, in a coroutine, which is cancelled from outside."""
    announce(gate, "at")
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not Path(gate, "go").exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
                await asyncio.sleep(PAUSE_S)
    except asyncio.CancelledError:
        announce(gate, "cancelled")
        raise


@tool
async def leave_running(gate: str, where: str) -> str:
    """End, and leave something behind that does not."""
    if where == "thread":
        _left.append(asyncio.create_task(asyncio.to_thread(_linger, gate)))
    elif where == "pool":
        _left.append(ThreadPoolExecutor(1).submit(_linger, gate))
    else:
        _left.append(ProcessPoolExecutor(1, mp_context=get_context("fork")).submit(_linger_alone, gate))
    return where


_left: list[object] = []


def _linger_alone(gate: str) -> NoReturn:
    """Linger in a process that must end itself, because its pool may be gone by then."""
    _linger(gate)
    os._exit(0)


def _linger(gate: str) -> None:
    """Stay for much longer than any test waits, unless the test opens the gate."""
    announce(gate, "at")
    for _ in range(int(20 * DEADLINE_S / PAUSE_S)):
        if Path(gate, "go").exists():
            return
        time.sleep(PAUSE_S)


# Parameters


@tool(description="Says what it was given.", timeout_s=20, retries=2, isolation="snapshot", metadata={"team": "red"})
def describe(
    city: str,
    days: int = 3,
    scale: Literal["c", "f"] = "c",
    ratio: float = 0.5,
    wet: bool = False,
    tags: list[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, object]:
    """Not its description.

    Args:
        city: Which city.
        days: How many days.
    """
    arguments = {"city": city, "days": days, "scale": scale, "ratio": ratio, "wet": wet, "tags": tags, "extra": extra}
    return {name: [type(argument).__name__, argument] for name, argument in arguments.items()}


@tool
def echo(value: Any) -> Any:
    """Give back what came."""
    return value


@tool
def total(numbers: Any) -> float:
    """Add up numbers, however they came."""
    return float(sum(numbers if isinstance(numbers, list) else numbers["data"]))


# The kinds of code


@tool
def add(ctx: ToolContext, name: str, amount: int = 1) -> int:
    """Add to a variable."""
    ctx[name] += amount
    return int(ctx[name])


@tool
def count(ctx: ToolContext, to: int, name: str = "") -> Iterator[int]:
    """Count, in a generator."""
    for number in range(1, to + 1):
        if name:
            ctx[name] = number
        yield number


@tool
async def count_later(ctx: ToolContext, to: int, name: str = "") -> AsyncIterator[dict[str, int]]:
    """Count, in an async generator."""
    for number in range(1, to + 1):
        await asyncio.sleep(0)
        if name:
            ctx[name] = number
        yield {"n": number}


class Shop:
    """Tools that share something."""

    def __init__(self) -> None:
        self.sold = 0

    @tool
    def sell(self, ctx: ToolContext, name: str) -> int:
        """Sell one of the stock."""
        ctx[name] -= 1
        self.sold += 1
        return self.sold

    @tool
    async def restock(self, ctx: ToolContext, name: str, amount: int) -> int:
        """Fill the stock up."""
        ctx[name] += amount
        return self.sold

    @tool
    def receipts(self) -> Iterator[str]:
        """One for each sale."""
        yield from (f"receipt {number}" for number in range(self.sold))


shop = Shop()
sell, restock, receipts = shop.sell, shop.restock, shop.receipts


# Transactions


@tool
def write_three(ctx: ToolContext, gate: str, value: int) -> list[Any]:
    """Write a, wait, write b and c; what it saw of a itself."""
    ctx["a"] = value
    wait_at(gate, ctx)
    ctx.update_many({"b": value, "c": value})
    return [ctx["a"], ctx["b"], ctx.info("a").version]


@tool
def look_twice(ctx: ToolContext, gate: str) -> list[Any]:
    """Read a before and after the gate."""
    first = ctx["a"]
    wait_at(gate, ctx)
    return [first, ctx["a"], sorted(ctx)]


@tool
def add_at_gate(ctx: ToolContext, gate: str, name: str = "a") -> int:
    """Read, wait, write."""
    value = ctx[name]
    wait_at(gate, ctx)
    ctx[name] = value + 1
    return int(ctx[name])


@tool(retries=3)
def add_with_retries(ctx: ToolContext, gate: str) -> list[int]:
    """The same, again after a conflict."""
    value = ctx["a"]
    wait_at(gate, ctx)
    ctx["a"] = value + 1
    return [ctx.attempt, value + 1]


@tool(retries=1000)
def add_stubbornly(ctx: ToolContext, name: str) -> int:
    """Add to a variable however many others do."""
    ctx[name] += 1
    return int(ctx[name])


@tool
def all_variables(ctx: ToolContext) -> dict[str, Any]:
    """Every way of working with variables."""
    ctx.define("new", 1, constraints={"max": 10})
    ctx.set("new", 2, metadata={"why": "because"})
    ctx.define("brief", "x")
    del ctx["brief"]
    refused = ""
    try:
        ctx["new"] = 11
    except dspex_persist.StateError as error:
        refused = str(error)
    return {
        "get": ctx.variables.get("absent", "default"),
        "batch": ctx.get_many("a", "new"),
        "list": [variable.name for variable in ctx.list("*")],
        "history": [version.version for version in ctx.history("new")],
        "refused": refused,
    }


@tool(required_variables=("a", "missing_one", "missing_two"))
def demanding(ctx: ToolContext) -> None:
    """Never runs in a session that has only a."""
    ctx["a"] = -1


# Endings


@tool
def fail(ctx: ToolContext) -> None:
    """Write, log, and fail."""
    ctx["a"] = -1
    ctx.log("about to fail", why="test")
    raise ValueError("it went wrong")


@tool
def leave(ctx: ToolContext) -> None:
    """Try to end the server."""
    ctx["a"] = -1
    sys.exit(3)


@tool
def no_json(ctx: ToolContext) -> object:
    """A result that cannot travel."""
    ctx["a"] = -1
    return object()


@tool(timeout_s=0.2)
def slow(ctx: ToolContext, gate: str) -> None:
    """Takes longer than it may."""
    ctx["a"] = -1
    wait_at(gate, ctx)
    announce(gate, "cancelled" if ctx.cancelled else "not cancelled")
    ctx["a"] = -2


@tool(timeout_s=0.2)
async def slow_later(ctx: ToolContext, gate: str) -> None:
    """The same in a coroutine."""
    ctx["a"] = -1
    await wait_at_async(gate)


@tool
def hold(ctx: ToolContext, gate: str) -> str:
    """Write, and take as long as it is let."""
    ctx["a"] = -1
    wait_at(gate, ctx)
    announce(gate, "cancelled" if ctx.cancelled else "not cancelled")
    return "held"


@tool
async def hold_later(ctx: ToolContext, gate: str) -> str:
    """The same in a coroutine."""
    ctx["a"] = -1
    await wait_at_async(gate)
    return "held"


# Streams


@tool
def stream_at_gate(ctx: ToolContext, gate: str) -> Iterator[int]:
    """Two chunks; what it wrote comes with the end."""
    ctx["a"] = 7
    yield 1
    yield 2
    wait_at(gate, ctx)


@tool
def flood(ctx: ToolContext, gate: str, chunks: int = 1_000_000) -> Iterator[str]:
    """Many large chunks; how many have been taken is the size of a file."""
    ctx["a"] = -1
    try:
        with Path(gate, "taken").open("ab", buffering=0) as taken:
            for _ in range(chunks):
                taken.write(b".")
                yield "x" * 65_536
    finally:
        announce(gate, "closed")


@tool
def stumble(ctx: ToolContext) -> Iterator[int]:
    """A chunk, then nothing but an error."""
    ctx["a"] = -1
    yield 1
    raise ValueError("it stumbled")


# From tool to tool


@tool
def child(ctx: ToolContext, name: str, value: int, fails: bool = False) -> int:
    """Write, and fail if so wished."""
    ctx[name] = value
    if fails:
        raise ValueError("the child failed")
    return value + 1


@tool
def parent(ctx: ToolContext, child_fails: bool, caught: bool, fails: bool = False) -> list[Any]:
    """Write a, have b written by another tool."""
    ctx["a"] = 1
    result: Any = None
    try:
        result = ctx.call(child, name="b", value=1, fails=child_fails)
    except ValueError as error:
        if not caught:
            raise
        result = str(error)
    ctx["c"] = 1
    if fails:
        raise RuntimeError("the parent failed")
    return [result, ctx["b"]]


@tool
def tell_mood() -> list[str]:
    """Return the mood that the caller has set."""
    return [mood.get()]


@tool
def in_a_mood(ctx: ToolContext) -> list[str]:
    """Set a context variable, and have a tool on another thread read it."""
    mood.set("cheerful")
    return [*ctx.call(tell_mood), mood.get()]


@tool
async def in_a_mood_later(ctx: ToolContext) -> list[str]:
    """The same from a coroutine, and in a thread."""
    mood.set("thoughtful")
    return [*(await ctx.call(tell_mood)), await asyncio.to_thread(mood.get)]


# What is recorded


@tool
def recorder(ctx: ToolContext) -> dict[str, Any]:
    """Time, chance and ids."""
    ctx.log("first line", step=1)
    ctx.log("second line")
    return {
        "now": [ctx.now().timestamp(), ctx.now().timestamp()],
        "random": [ctx.random.random(), ctx.random.random()],
        "uuid": [str(ctx.uuid()), str(ctx.uuid())],
        "ids": [ctx.session_id, ctx.execution_id],
        "metadata": dict(ctx.metadata),
    }


@tool
def progress(ctx: ToolContext, gate: str) -> int:
    """Publish a, write b, wait."""
    ctx["b"] = 5
    version = ctx.publish("a", 50, {"step": "half"})
    wait_at(gate, ctx)
    return version


# For workers


@tool
def hold_for_worker(gate: str) -> str:
    """Run until the test opens the gate, even if the caller has left."""
    wait_at(gate)
    return "held"


@tool(exposed=True)
def helper(ctx: ToolContext, amount: int) -> int:
    """Workers may call it."""
    ctx["a"] += amount
    return int(ctx["a"])


@tool
def ask_server(target: str, session: str, tool: str, depth: int = 0) -> Any:
    """Have another tool executed by the server that runs it, in an execution apart."""
    with dspex_persist.connect(f"grpc://{target}") as state:
        parameters = {"target": target, "session": session, "tool": tool, "depth": depth - 1} if depth else {}
        outcome = state.execute_tool(session, "ask_server" if depth else tool, parameters, timeout_s=DEADLINE_S)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return json.loads(outcome.result.json)


@tool
async def ask_server_later(target: str, session: str, tool: str) -> Any:
    """The same, and it blocks the event loop."""
    return ask_server(target, session, tool)


@tool
async def tell_mood_later() -> int:
    """Another asynchronous one."""
    await asyncio.sleep(0)
    return 1


@tool
def one() -> int:
    """Return 1, at once."""
    return 1
