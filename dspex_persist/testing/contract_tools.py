"""CONTRACT_TOOLS: what a provider under `tool_contract.ToolContract` serves.

Those that must be caught in the act take a folder, their gate: each attempt announces itself by a file in it, and goes
on when the test has put another one there. So they have to run where they see the test's files.
"""

import _thread
import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final, Literal, cast

from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.cognitive.tools import Tool, tool
from dspex_persist.state.errors import ExecutionEndedError, InvalidArgumentError, InvalidValueError, StateError
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


class Nameless(Exception):
    """An error that does not say what it is."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Extraordinary(BaseException):
    """Nothing that `except Exception` sees."""


RAISED: Final[dict[str, Callable[[], BaseException]]] = {
    "ValueError": lambda: ValueError("it went wrong: 🦜"),
    "UnicodeError": lambda: UnicodeError("half a character: \ud83e"),
    "TimeoutError": TimeoutError,
    "Textless": Textless,
    "Nameless": Nameless,
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
def publish_numbers(ctx: ToolContext) -> None:
    """What only the variables' types say how to write: numbers that JSON does not have, and an array."""
    ctx.publish("loss", float("nan"))
    ctx.publish("point", [0.5, float("inf")])
    ctx.publish("point", Array([1.5, 2.5]))


class Array:
    """Numbers in the way of NumPy."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = numbers
        self.shape = (len(numbers),)

    def tolist(self) -> list[float]:
        """Its numbers."""
        return self._numbers


@tool
def publish_and_write(ctx: ToolContext) -> None:
    """Both to one variable, which cannot be."""
    ctx["a"] = 1
    ctx.publish("a", 2)


# What no tool should do


@tool
def log_wrongly(ctx: ToolContext, what: str) -> None:
    """Log what is no text, or what the journal has no form for."""
    ctx["a"] = -1
    deep: list[Any] = []
    for _ in range(150):
        deep = [deep]
    lines: dict[str, Callable[[], None]] = {
        "bytes": lambda: ctx.log(b"an answer"),  # type: ignore[arg-type]
        "None": lambda: ctx.log(None),  # type: ignore[arg-type]
        "half a character": lambda: ctx.log("\ud83e"),
        "an object": lambda: ctx.log("fine", it=object()),
        "not a number": lambda: ctx.log("fine", it=[float("nan")]),
        "half a character in a field": lambda: ctx.log("fine", it="\ud83e"),
        "itself": lambda: ctx.log("fine", it=_itself()),
        "deep": lambda: ctx.log("fine", it=deep),
    }
    lines[what]()


def _itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@tool
def look_up_wrongly(ctx: ToolContext) -> list[Any]:
    """Ask for variables by what is no name: it is a mapping, and says what mappings say."""
    names: list[Any] = [None, 3, 1.5, b"a", ("a",), object()]
    found: list[Any] = [name in ctx for name in names] + [ctx.variables.get(name, "none") for name in names]
    operations: list[Callable[[Any], Any]] = [ctx.__getitem__, ctx.__delitem__, lambda name: ctx.__setitem__(name, 1)]
    for operation in operations:
        for name in names:
            try:
                operation(name)
            except InvalidArgumentError as error:
                found.append("must be a str" in str(error))
    return found


@tool
def pass_wrongly(ctx: ToolContext, what: str) -> None:
    """Pass what cannot be to a method of the context, which is used as from a program without types."""
    ctx["a"] = -1
    half, untyped, variables = "half \ud83e", cast(Any, ctx), cast(Any, ctx.variables)
    ways: dict[str, Callable[[], object]] = {
        "a name": lambda: untyped[half],
        "a name to look for": lambda: half in untyped,
        "a name to write": lambda: variables.set(half, 1),
        "a pattern": lambda: variables.list(half),
        "no pattern": lambda: variables.list(3),
        "a name among others": lambda: variables.get_all("a", half),
        "no name among others": lambda: variables.get_all("a", 3),
        "a version": lambda: variables.set("a", 1, expected_version="0"),
        "a version to go back to": lambda: variables.rollback("a", "0"),
        "no limit": lambda: variables.history("a", "all"),
        "metadata": lambda: variables.set("a", 1, metadata={"n": 1}),
        "metadata's key": lambda: variables.set("a", 1, metadata={1: "n"}),
        "half metadata": lambda: variables.set("a", 1, metadata={"n": half}),
        "metadata of what is defined": lambda: variables.define("d", 1, metadata={"n": b"1"}),
        "a type": lambda: variables.define("d", 1, type_name=3),
        "constraints": lambda: variables.define("d", 1, constraints={"min": object()}),
        "what is published": lambda: untyped.publish(3, 1),
        "published metadata": lambda: untyped.publish("b", 1, {"n": 1}),
        "what is called": lambda: untyped.call(3),
        "what is called by half a name": lambda: untyped.call(half),
        "itself to another process": lambda: ForkingPickler.dumps(ctx),
        "an argument": lambda: untyped.call("echo", value=object()),
        "half an argument": lambda: untyped.call("echo", value=half),
        "an argument's name": lambda: untyped.call("echo", **{half: 1}),
    }
    ways[what]()


@tool(timeout_s=20)
async def end_the_loop(ctx: ToolContext, how: str) -> str:
    """Do what ends an event loop, or would."""
    ctx["a"] += 1
    loop = asyncio.get_running_loop()

    async def leave() -> None:
        raise SystemExit(3)

    async def interrupt() -> None:
        raise KeyboardInterrupt

    if how == "gather":
        await asyncio.gather(leave(), asyncio.sleep(0))
    elif how == "group":
        async with asyncio.TaskGroup() as group:
            group.create_task(interrupt())
    elif how == "task":
        await asyncio.wait((asyncio.create_task(leave()),))
    elif how == "callback":
        loop.call_soon(sys.exit)
    elif how == "stop":
        loop.stop()
    elif how == "close":
        loop.close()
    elif how == "stop and close":
        loop.stop()
        threading.Thread(target=_close, args=(loop,)).start()
    await asyncio.sleep(0.01)
    return how


@tool
async def change_the_loop(ctx: ToolContext, how: str) -> str:
    """Change what all have that run on the event loop."""
    ctx["a"] += 1
    loop = asyncio.get_running_loop()
    if how == "tasks":
        loop.set_task_factory(lambda *_, **__: 1 / 0)  # type: ignore[arg-type]
    elif how == "executor":
        with ThreadPoolExecutor() as executor:
            loop.set_default_executor(executor)
    elif how == "no executor":
        await loop.shutdown_default_executor()
    return await asyncio.to_thread(str, how)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Try until it has been closed in between, or the loop goes on for good."""
    for _ in range(200):
        with contextlib.suppress(RuntimeError):
            loop.close()
        time.sleep(0.0001)


@tool
def end_the_thread(ctx: ToolContext, how: str) -> str:
    """Do what ends a thread."""
    ctx["a"] += 1
    ways: dict[str, Callable[[], object]] = {"sys": sys.exit, "_thread": _thread.exit, "quit": lambda: sys.exit("bye")}
    ways[how]()
    return how


@tool(timeout_s=0.5)
async def ignore_the_end(ctx: ToolContext, gate: str) -> str:
    """Go on whenever it is cancelled, until the test lets it go."""
    ctx["a"] = -1
    while not Path(gate, "go 1").exists():  # noqa: ASYNC240 -- it is short
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(_PAUSE_S)
    return "held"


@tool
def stream_for_ever(ctx: ToolContext, text: str) -> Iterator[str]:
    """Yield without an end."""
    ctx["a"] = -1
    while True:
        yield text


@tool
async def stream_for_ever_later(ctx: ToolContext, text: str) -> AsyncIterator[str]:
    """The same in an async generator, which lets nobody else run."""
    ctx["a"] = -1
    while True:
        yield text


@tool
def write_for_ever(ctx: ToolContext, text: str) -> None:
    """Writes without an end."""
    ctx["a"] = -1
    ctx.variables.define("words", "")
    while True:
        ctx["words"] = text


@tool
def call_for_ever(ctx: ToolContext, text: str) -> None:
    """Calls another tool without an end."""
    ctx["a"] = -1
    while True:
        ctx.call("log_it", text=text)


@tool
def log_it(ctx: ToolContext, text: str) -> str:
    """Leaves something in the journal."""
    ctx.log(text)
    return text


@tool
def log_for_ever(ctx: ToolContext, message: str) -> None:
    """Log without an end."""
    ctx["a"] = -1
    while True:
        ctx.log(message)


@tool
def ask_for_the_time_for_ever(ctx: ToolContext) -> None:
    """Have the time recorded without an end."""
    ctx["a"] = -1
    while True:
        ctx.now()


@tool
def nest(depth: int) -> Any:
    """A result of this depth."""
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


@tool
def nest_in_a_stream(depth: int) -> Iterator[Any]:
    """The same as the only chunk."""
    yield nest(depth - 1)


# What is an execution's own


@tool(retries=2)
def use_up(ctx: ToolContext, gate: str, numbers: list[int], notes: dict[str, list[int]] = {}) -> int:  # noqa: B006
    """Use its arguments, its defaults and its metadata up, while it adds to a."""
    value = ctx["a"]
    wait_at(gate, ctx)
    assert not notes
    assert ctx.metadata.pop("user") == "ada"  # type: ignore[attr-defined]
    while numbers:
        value += numbers.pop()
        notes.setdefault("taken", []).append(value)
    ctx["a"] = value
    return int(value)


@tool
def remember(name: str, seen: list[str] = []) -> list[str]:  # noqa: B006
    """Keep what it was told, where only this call sees it."""
    seen.append(name)
    return seen


@tool
def change_and_call(ctx: ToolContext) -> list[Any]:
    """Hand a list to another tool, which changes its own."""
    mine = ["mine"]
    given = ctx.call("append_to", items=mine)
    given.append("changed here")
    return [mine, given, ctx.call("append_to", items=mine)]


@tool
def append_to(items: list[str]) -> list[str]:
    """Change what it was given."""
    items.append("changed there")
    return items


@tool
def by_number(points: dict[int, float]) -> list[Any]:
    """The entries of a map whose keys are numbers."""
    return [[type(key).__name__, key, value] for key, value in points.items()]


# Floats that JSON does not have


@tool
def infinity(sign: int = 1) -> float:
    """An infinity."""
    return sign * float("inf")


@tool
def infinities() -> Iterator[float]:
    """One after the other."""
    yield from (float("inf"), 1.0, float("-inf"))


@tool
def negate(ctx: ToolContext) -> float:
    """Call for one, and reckon with it."""
    return float(min(ctx.call("infinities")) - ctx.call(infinity))


@tool
async def negate_later(ctx: ToolContext) -> float:
    """The same in a coroutine."""
    return -float(await ctx.call(infinity))


def _toolbox() -> Toolbox:
    toolbox = Toolbox()
    for item in [item for item in globals().values() if isinstance(item, Tool)]:
        toolbox.add(item)
    return toolbox


CONTRACT_TOOLS: Final = _toolbox()
"""Open the provider under test with it, or have its server load this module's tools."""
