"""CONTRACT_TOOLS: what a provider under `tool_contract.ToolContract` serves.

Those that must be caught in the act take a folder, their gate: each attempt announces itself by a file in it, and goes
on when the test has put another one there. So they have to run where they see the test's files.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.cognitive.tools import Tool, tool
from dspex_persist.state.errors import ExecutionEndedError, InvalidValueError, StateError
from dspex_persist.state.values import BinaryValue

_DEADLINE_S: Final = 30.0
_PAUSE_S: Final = 0.005


def announce(gate: str, name: str) -> None:
    """Tell the test how far it has come."""
    Path(gate, name).touch()


def wait_at(gate: str, ctx: ToolContext) -> None:
    """Announce the attempt, then wait for the test's word, or for the end of the execution."""
    announce(gate, f"at {ctx.attempt}")
    deadline = time.monotonic() + _DEADLINE_S
    while not Path(gate, f"go {ctx.attempt}").exists() and not ctx.cancelled:
        if time.monotonic() > deadline:
            raise TimeoutError("the test never opened the gate")
        time.sleep(_PAUSE_S)


async def wait_at_async(gate: str, ctx: ToolContext) -> None:
    """The same in a coroutine, which is cancelled from outside."""
    announce(gate, f"at {ctx.attempt}")
    try:
        async with asyncio.timeout(_DEADLINE_S):
            while not Path(gate, f"go {ctx.attempt}").exists():  # noqa: ASYNC110, ASYNC240 -- another process makes it
                await asyncio.sleep(_PAUSE_S)
    except asyncio.CancelledError:
        announce(gate, "cancelled")
        raise


# Parameters and results


@tool(
    description="Says what it was given.",
    isolation="snapshot",
    retries=2,
    timeout_s=20.1234567,
    exposed=True,
    metadata={"team": "red"},
)
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
    found = {"city": city, "days": days, "scale": scale, "ratio": ratio, "wet": wet, "tags": tags, "extra": extra}
    return {name: [type(argument).__name__, argument] for name, argument in found.items()}


@tool
def echo(value: Any) -> Any:
    """Give back what came."""
    return value


@tool
def total(numbers: list[float]) -> float:
    """Add up numbers, however they came."""
    return sum(numbers)


@tool
def not_a_number() -> float:
    """A result that JSON has no number for."""
    return float("nan")


@tool
def facts(ctx: ToolContext) -> dict[str, Any]:
    """What its context tells it."""
    return {
        "session_id": ctx.session_id,
        "execution_id": ctx.execution_id,
        "attempt": ctx.attempt,
        "metadata": dict(ctx.metadata),
        "cancelled": ctx.cancelled,
        "random": [ctx.random.random(), ctx.random.random()],
        "uuids": [str(ctx.uuid()), str(ctx.uuid())],
        "now": [ctx.now().isoformat(), ctx.now().isoformat()],
    }


# The kinds of code


@tool
def add(ctx: ToolContext, name: str = "a", amount: int = 1) -> int:
    """Add to a variable."""
    ctx[name] += amount
    return int(ctx[name])


@tool
async def add_later(ctx: ToolContext, name: str = "a", amount: int = 1) -> int:
    """Add to a variable, in a coroutine."""
    await asyncio.sleep(0)
    ctx[name] += amount
    return int(ctx[name])


@tool
def count(ctx: ToolContext, to: int) -> Iterator[int]:
    """Count in the variable a, in a generator."""
    for number in range(1, to + 1):
        ctx["a"] = number
        yield number


@tool
async def count_later(ctx: ToolContext, to: int) -> AsyncIterator[dict[str, int]]:
    """Count in the variable a, in an async generator."""
    for number in range(1, to + 1):
        await asyncio.sleep(0)
        ctx["a"] = number
        yield {"n": number}


# Failures


class Textless(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Extraordinary(BaseException):
    """Nothing that `except Exception` sees."""


RAISED: Final[dict[str, Callable[[], BaseException]]] = {
    "ValueError": lambda: ValueError("it went wrong: 🦜"),
    "UnicodeError": lambda: UnicodeError("half a character: \ud83e"),
    "TimeoutError": TimeoutError,
    "Textless": Textless,
    "StopIteration": StopIteration,
    "StopAsyncIteration": StopAsyncIteration,
    "CancelledError": asyncio.CancelledError,
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "Extraordinary": Extraordinary,
}
"""What the tools below can raise, by name."""


@tool
def fail(ctx: ToolContext, name: str) -> None:
    """Write, log, and fail."""
    ctx["a"] = -1
    ctx.log("about to fail", why=name)
    raise RAISED[name]()


@tool
async def fail_later(ctx: ToolContext, name: str) -> None:
    """The same in a coroutine."""
    ctx["a"] = -1
    raise RAISED[name]()


@tool
def stumble(ctx: ToolContext, name: str) -> Iterator[int]:
    """A chunk, then nothing but an error."""
    ctx["a"] = -1
    yield 1
    raise RAISED[name]()


@tool
async def stumble_later(ctx: ToolContext, name: str) -> AsyncIterator[int]:
    """The same in an async generator."""
    ctx["a"] = -1
    yield 1
    raise RAISED[name]()


@tool
def give_an_object(ctx: ToolContext) -> object:
    """A result that cannot travel."""
    ctx["a"] = -1
    return object()


@tool
def give_bytes(ctx: ToolContext) -> BinaryValue:
    """A result that belongs into a variable."""
    ctx["a"] = -1
    return BinaryValue({"shape": [1], "dtype": "float32", "binary_format": "float32", "type": "tensor"}, b"\0\0\0\0")


@tool(required_variables=("a", "missing_one", "missing_two"))
def demanding(ctx: ToolContext) -> int:
    """Never runs in a session that has only a."""
    return len(ctx.variables)


# Transactions


@tool
def rebuild(ctx: ToolContext, gate: str) -> dict[str, Any]:
    """Every way of writing, half of them before the gate; what it sees of that itself."""
    ctx["a"] = 8
    ctx.variables.define("new", 1, constraints={"max": 10})
    ctx.variables.set("new", 2, metadata={"why": "because"})
    ctx.variables.define("brief", "x")
    wait_at(gate, ctx)
    ctx.variables.set_all({"b": 9, "new": 3})
    del ctx["brief"], ctx["c"]
    refused = ""
    try:
        ctx["new"] = 11
    except InvalidValueError as error:
        refused = str(error)
    return {
        "values": ctx.variables.get_all(),
        "versions": [version.version for version in ctx.variables.history("new")],
        "brief": "brief" in ctx,
        "refused": refused,
    }


@tool
def roll_back(ctx: ToolContext) -> object:
    """Have a as it was registered."""
    ctx["a"] = 5
    return ctx.variables.rollback("a", 0)


@tool
def look(ctx: ToolContext, gate: str, what: Literal["value", "absent", "names"]) -> list[Any]:
    """Look before and after the gate, at the value of a, at whether there is a `later`, or at all names."""
    looks: dict[str, Callable[[], Any]] = {
        "value": lambda: ctx["a"],
        "absent": lambda: "later" in ctx,
        "names": lambda: list(ctx),
    }
    first = looks[what]()
    wait_at(gate, ctx)
    return [first, looks[what]()]


@tool(isolation="snapshot")
def look_loosely(ctx: ToolContext, gate: str) -> list[Any]:
    """Look at a twice, whatever others write meanwhile, and copy it to b."""
    first = ctx["a"]
    wait_at(gate, ctx)
    ctx["b"] = first
    return [first, ctx["a"]]


@tool
def take(ctx: ToolContext, gate: str, name: str) -> int:
    """Take 1 from `name` if a and b together allow it."""
    together = ctx["a"] + ctx["b"]
    wait_at(gate, ctx)
    if together > 0:
        ctx[name] -= 1
    return int(together)


@tool(isolation="snapshot")
def take_loosely(ctx: ToolContext, gate: str, name: str) -> int:
    """The same, without minding what others do to the other one."""
    together = ctx["a"] + ctx["b"]
    wait_at(gate, ctx)
    if together > 0:
        ctx[name] -= 1
    return int(together)


@tool
def add_at_gate(ctx: ToolContext, gate: str, name: str = "a") -> int:
    """Read, wait, write."""
    value = ctx[name]
    wait_at(gate, ctx)
    ctx[name] = value + 1
    return int(value) + 1


@tool(retries=2)
def add_with_retries(ctx: ToolContext, gate: str) -> list[int]:
    """The same, again after a conflict."""
    value = ctx["a"]
    wait_at(gate, ctx)
    ctx["a"] = value + 1
    return [ctx.attempt, value + 1]


@tool(retries=1000)
def add_stubbornly(ctx: ToolContext, name: str = "a") -> int:
    """Add to a variable however many others do."""
    ctx[name] += 1
    return int(ctx[name])


# Ends that come from outside


@tool
def hold(ctx: ToolContext, gate: str) -> str:
    """Write, take as long as it is let, and try to write once more."""
    ctx["a"] = -1
    wait_at(gate, ctx)
    return _write_late(ctx, gate)


@tool
async def hold_later(ctx: ToolContext, gate: str) -> str:
    """The same in a coroutine."""
    ctx["a"] = -1
    await wait_at_async(gate, ctx)
    return "held"


@tool(timeout_s=0.5)
def slow(ctx: ToolContext, gate: str) -> str:
    """Takes longer than it may."""
    ctx["a"] = -1
    wait_at(gate, ctx)
    return _write_late(ctx, gate)


@tool(timeout_s=0.5)
async def slow_later(ctx: ToolContext, gate: str) -> str:
    """The same in a coroutine."""
    ctx["a"] = -1
    await wait_at_async(gate, ctx)
    return "held"


def _write_late(ctx: ToolContext, gate: str) -> str:
    try:
        ctx["a"] = -2
    except ExecutionEndedError:
        announce(gate, "cancelled")
    return "held"


# From tool to tool


@tool
def child(ctx: ToolContext, name: str, value: int, fails: bool = False) -> int:
    """Write, and fail if so wished."""
    ctx[name] = value
    if fails:
        raise ValueError("the child failed")
    return value + 1


@tool
def parent(ctx: ToolContext, child_fails: bool = False, caught: bool = False, fails: bool = False) -> list[Any]:
    """Write a, have b written by another tool, write c."""
    ctx["a"] = 1
    said: Any = None
    try:
        said = ctx.call(child, name="b", value=1, fails=child_fails)
    except ValueError as error:
        if not caught:
            raise
        said = str(error)
    ctx["c"] = 1
    if fails:
        raise RuntimeError("the parent failed")
    return [said, ctx["b"]]


@tool
async def parent_later(ctx: ToolContext) -> list[int]:
    """A coroutine that awaits what it calls, by name."""
    mine = ctx["a"]
    return [await ctx.call("child", name="a", value=mine + 10), ctx["a"]]


@tool
def call(ctx: ToolContext, name: str, arguments: dict[str, Any]) -> str:
    """Call any tool, and go on whatever comes of it."""
    try:
        return f"it said {ctx.call(name, **arguments)!r}"
    except StateError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 -- what this is about
        return type(error).__name__


@tool
def descend(ctx: ToolContext, depth: int) -> int:
    """Call itself as often as it is told."""
    ctx["a"] += 1
    return int(ctx.call("descend", depth=depth - 1)) + 1 if depth else 0


# What is seen at once


@tool
def progress(ctx: ToolContext, gate: str, fails: bool = False) -> list[Any]:
    """Publish a, write b, wait."""
    ctx["b"] = 5
    version = ctx.publish("a", 50, {"step": "half"})
    wait_at(gate, ctx)
    if fails:
        raise ValueError("it went wrong")
    return [version, ctx["a"]]


@tool
def publish_and_write(ctx: ToolContext) -> None:
    """Both to one variable, which cannot be."""
    ctx["a"] = 1
    ctx.publish("a", 2)


def _toolbox() -> Toolbox:
    toolbox = Toolbox()
    for item in [item for item in globals().values() if isinstance(item, Tool)]:
        toolbox.add(item)
    return toolbox


CONTRACT_TOOLS: Final = _toolbox()
"""Open the provider under test with it, or have its server load this module's tools."""
