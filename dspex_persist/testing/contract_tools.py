"""CONTRACT_TOOLS: the tools of a provider that `tool_contract.ToolContract` tests.

Tools that tests must catch while they run take a folder, the gate: each attempt creates a file in it, and continues
when the test has created another one. So they must run where they see the test's files.
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
    """Report progress to the test."""
    Path(gate, name).touch()


def wait_at(gate: str, ctx: ToolContext) -> None:
    """Report the attempt, then wait until the test opens the gate or the execution ends."""
    announce(gate, f"at {ctx.attempt}")
    deadline = time.monotonic() + _DEADLINE_S
    while not Path(gate, f"go {ctx.attempt}").exists() and not ctx.cancelled:
        if time.monotonic() > deadline:
            raise TimeoutError("the test never opened the gate")
        time.sleep(_PAUSE_S)


async def wait_at_async(gate: str, ctx: ToolContext) -> None:
    """Do the same in a coroutine, which is cancelled when the execution ends."""
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
    description="Returns its arguments.",
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
    arguments = {"city": city, "days": days, "scale": scale, "ratio": ratio, "wet": wet, "tags": tags, "extra": extra}
    return {name: [type(argument).__name__, argument] for name, argument in arguments.items()}


@tool
def echo(value: Any) -> Any:
    """Return the argument."""
    return value


@tool
def total(numbers: list[float]) -> float:
    """Add up numbers, in whatever form they arrive."""
    return sum(numbers)


@tool
def not_a_number() -> float:
    """Return a number that JSON cannot represent."""
    return float("nan")


@tool
def facts(ctx: ToolContext) -> dict[str, Any]:
    """Return the facts in its context."""
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
    """An exception without a message."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Nameless(Exception):
    """An exception that hides even its type."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Extraordinary(BaseException):
    """An exception that `except Exception` does not catch."""


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
    """Write and fail, in a coroutine."""
    ctx["a"] = -1
    raise RAISED[name]()


@tool
def stumble(ctx: ToolContext, name: str) -> Iterator[int]:
    """Yield a chunk, then fail."""
    ctx["a"] = -1
    yield 1
    raise RAISED[name]()


@tool
async def stumble_later(ctx: ToolContext, name: str) -> AsyncIterator[int]:
    """Yield a chunk, then fail, in an async generator."""
    ctx["a"] = -1
    yield 1
    raise RAISED[name]()


@tool
def give_an_object(ctx: ToolContext) -> object:
    """Return an object that cannot be sent."""
    ctx["a"] = -1
    return object()


@tool
def give_bytes(ctx: ToolContext) -> BinaryValue:
    """Return bytes, which belong in a variable."""
    ctx["a"] = -1
    return BinaryValue({"shape": [1], "dtype": "float32", "binary_format": "float32", "type": "tensor"}, b"\0\0\0\0")


@tool(required_variables=("a", "missing_one", "missing_two"))
def demanding(ctx: ToolContext) -> int:
    """Require variables that the session does not have."""
    return len(ctx.variables)


# Transactions


@tool
def rebuild(ctx: ToolContext, gate: str) -> dict[str, Any]:
    """Write in every way, half of them before the gate, and return what it reads of that itself."""
    ctx["a"] = 8
    ctx.define("new", 1, constraints={"max": 10})
    ctx.set("new", 2, metadata={"why": "because"})
    ctx.define("brief", "x")
    wait_at(gate, ctx)
    ctx.update_many({"b": 9, "new": 3})
    del ctx["brief"], ctx["c"]
    refused = ""
    try:
        ctx["new"] = 11
    except InvalidValueError as error:
        refused = str(error)
    return {
        "values": ctx.get_many(),
        "versions": [version.version for version in ctx.history("new")],
        "brief": "brief" in ctx,
        "refused": refused,
    }


@tool
def roll_back(ctx: ToolContext) -> object:
    """Roll a back to its first version."""
    ctx["a"] = 5
    return ctx.rollback("a", 0)


@tool
def look(ctx: ToolContext, gate: str, what: Literal["value", "absent", "names"]) -> list[Any]:
    """Read before and after the gate: the value of a, whether `later` exists, or all names."""
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
    """Read a twice, even if other callers write it meanwhile, and copy it to b."""
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
    """Do the same with snapshot isolation, so that changes to the other variable are no conflict."""
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
    """Read, wait, write, and retry after a conflict."""
    value = ctx["a"]
    wait_at(gate, ctx)
    ctx["a"] = value + 1
    return [ctx.attempt, value + 1]


@tool(retries=1000)
def add_stubbornly(ctx: ToolContext, name: str = "a") -> int:
    """Add to a variable, however often that conflicts."""
    ctx[name] += 1
    return int(ctx[name])


# One after the other


@tool(concurrency="queue")
def add_in_turn(ctx: ToolContext, amount: int = 1) -> int:
    """Add to a, as all that queue do."""
    ctx["a"] += amount
    return int(ctx["a"])


@tool(concurrency="queue")
def hold_in_turn(ctx: ToolContext, gate: str, fails: bool = False) -> str:
    """Wait at the gate while others wait for their turn."""
    ctx["a"] += 1
    wait_at(gate, ctx)
    if fails:
        raise ValueError("it failed in its turn")
    return "held"


@tool(concurrency="queue", timeout_s=0.3)
def slow_in_turn(ctx: ToolContext, gate: str) -> str:
    """Take longer than its timeout, which begins with its turn."""
    ctx["a"] = -1
    wait_at(gate, ctx)
    return _write_late(ctx, gate)


@tool(concurrency="reject")
def hold_alone(ctx: ToolContext, gate: str) -> str:
    """Wait at the gate, and refuse others like it."""
    ctx["a"] += 1
    wait_at(gate, ctx)
    return "held"


# Ends that come from outside


@tool
def hold(ctx: ToolContext, gate: str) -> str:
    """Write, wait at the gate, and try to write once more."""
    ctx["a"] = -1
    wait_at(gate, ctx)
    return _write_late(ctx, gate)


@tool
async def hold_later(ctx: ToolContext, gate: str) -> str:
    """Write and wait at the gate, in a coroutine."""
    ctx["a"] = -1
    await wait_at_async(gate, ctx)
    return "held"


@tool(timeout_s=0.5)
def slow(ctx: ToolContext, gate: str) -> str:
    """Take longer than the tool's timeout."""
    ctx["a"] = -1
    wait_at(gate, ctx)
    return _write_late(ctx, gate)


@tool(timeout_s=0.5)
async def slow_later(ctx: ToolContext, gate: str) -> str:
    """Take longer than the tool's timeout, in a coroutine."""
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
    """Write, and optionally fail."""
    ctx[name] = value
    if fails:
        raise ValueError("the child failed")
    return value + 1


@tool
def parent(ctx: ToolContext, child_fails: bool = False, caught: bool = False, fails: bool = False) -> list[Any]:
    """Write a, call another tool that writes b, write c."""
    ctx["a"] = 1
    answer: Any = None
    try:
        answer = ctx.call(child, name="b", value=1, fails=child_fails)
    except ValueError as error:
        if not caught:
            raise
        answer = str(error)
    ctx["c"] = 1
    if fails:
        raise RuntimeError("the parent failed")
    return [answer, ctx["b"]]


@tool
async def parent_later(ctx: ToolContext) -> list[int]:
    """Call a tool by name, and await it."""
    mine = ctx["a"]
    return [await ctx.call("child", name="a", value=mine + 10), ctx["a"]]


@tool
def call(ctx: ToolContext, name: str, arguments: dict[str, Any]) -> str:
    """Call any tool, and continue even if it fails."""
    try:
        return f"it returned {ctx.call(name, **arguments)!r}"
    except StateError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 -- the called tool may raise anything
        return type(error).__name__


@tool
def descend(ctx: ToolContext, depth: int) -> int:
    """Call itself `depth` times."""
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
    """Publish values whose form depends on the variables' types: numbers that JSON does not have, and an array."""
    ctx.publish("loss", float("nan"))
    ctx.publish("point", [0.5, float("inf")])
    ctx.publish("point", Array([1.5, 2.5]))


class Array:
    """An array with NumPy's interface."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = numbers
        self.shape = (len(numbers),)

    def tolist(self) -> list[float]:
        """Return the numbers."""
        return self._numbers


@tool
def publish_and_write(ctx: ToolContext) -> None:
    """Write and publish the same variable, which is refused."""
    ctx["a"] = 1
    ctx.publish("a", 2)


# What no tool should do


@tool
def log_wrongly(ctx: ToolContext, what: str) -> None:
    """Log a message that is not text, or a field that the journal cannot store."""
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
    endless: list[Any] = []
    endless.append(endless)
    return endless


@tool
def look_up_wrongly(ctx: ToolContext) -> list[Any]:
    """Look up variables by objects that are not names: a mapping does not contain them."""
    names: list[Any] = [None, 3, 1.5, b"a", ("a",), object()]
    answers: list[Any] = [name in ctx for name in names] + [ctx.variables.get(name, "none") for name in names]
    operations: list[Callable[[Any], Any]] = [ctx.__getitem__, ctx.__delitem__, lambda name: ctx.__setitem__(name, 1)]
    for operation in operations:
        for name in names:
            try:
                operation(name)
            except InvalidArgumentError as error:
                answers.append("must be a str" in str(error))
    return answers


@tool
def pass_wrongly(ctx: ToolContext, what: str) -> None:
    """Pass an invalid argument to a method of the context, as a program without type checks can."""
    ctx["a"] = -1
    half, untyped, variables = "half \ud83e", cast(Any, ctx), cast(Any, ctx)
    ways: dict[str, Callable[[], object]] = {
        "a name": lambda: untyped[half],
        "a name to look for": lambda: half in untyped,
        "a name to write": lambda: variables.set(half, 1),
        "a pattern": lambda: variables.list(half),
        "no pattern": lambda: variables.list(3),
        "a name among others": lambda: variables.get_many("a", half),
        "no name among others": lambda: variables.get_many("a", 3),
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
    """Do something that ends an event loop, or would."""
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
    """Change a setting of the event loop that all coroutines on it share."""
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
    """Try repeatedly to close the loop in the moment in which it is stopped."""
    for _ in range(200):
        with contextlib.suppress(RuntimeError):
            loop.close()
        time.sleep(0.0001)


@tool
def end_the_thread(ctx: ToolContext, how: str) -> str:
    """Do something that ends a thread."""
    ctx["a"] += 1
    ways: dict[str, Callable[[], object]] = {"sys": sys.exit, "_thread": _thread.exit, "quit": lambda: sys.exit("bye")}
    ways[how]()
    return how


@tool(timeout_s=0.5)
async def ignore_the_end(ctx: ToolContext, gate: str) -> str:
    """Ignore being cancelled, until the test opens the gate."""
    ctx["a"] = -1
    while not Path(gate, "go 1").exists():  # noqa: ASYNC240 -- it is short
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(_PAUSE_S)
    return "held"


@tool
def stream_for_ever(ctx: ToolContext, text: str) -> Iterator[str]:
    """Yield endlessly."""
    ctx["a"] = -1
    while True:
        yield text


@tool
async def stream_for_ever_later(ctx: ToolContext, text: str) -> AsyncIterator[str]:
    """Yield endlessly in an async generator that never gives up the event loop."""
    ctx["a"] = -1
    while True:
        yield text


@tool
def write_for_ever(ctx: ToolContext, text: str) -> None:
    """Write endlessly."""
    ctx["a"] = -1
    ctx.define("words", "")
    while True:
        ctx["words"] = text


@tool
def call_for_ever(ctx: ToolContext, text: str) -> None:
    """Call another tool endlessly."""
    ctx["a"] = -1
    while True:
        ctx.call("log_it", text=text)


@tool
def log_it(ctx: ToolContext, text: str) -> str:
    """Log a text in the journal."""
    ctx.log(text)
    return text


@tool
def log_for_ever(ctx: ToolContext, message: str) -> None:
    """Log endlessly."""
    ctx["a"] = -1
    while True:
        ctx.log(message)


@tool
def ask_for_the_time_for_ever(ctx: ToolContext) -> None:
    """Read the time endlessly; each one is recorded."""
    ctx["a"] = -1
    while True:
        ctx.now()


@tool
def nest(depth: int) -> Any:
    """Return a list nested this deeply."""
    nested: Any = 1
    for _ in range(depth):
        nested = [nested]
    return nested


@tool
def nest_in_a_stream(depth: int) -> Iterator[Any]:
    """Yield it as the only chunk."""
    yield nest(depth - 1)


# What is an execution's own


@tool(retries=2)
def use_up(ctx: ToolContext, gate: str, numbers: list[int], notes: dict[str, list[int]] = {}) -> int:  # noqa: B006
    """Consume its arguments, its defaults and its metadata, while it adds to a."""
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
    """Append to a default argument, which only this call may see."""
    seen.append(name)
    return seen


@tool
def change_and_call(ctx: ToolContext) -> list[Any]:
    """Pass a list to another tool, which changes its copy."""
    mine = ["mine"]
    returned = ctx.call("append_to", items=mine)
    returned.append("changed here")
    return [mine, returned, ctx.call("append_to", items=mine)]


@tool
def append_to(items: list[str]) -> list[str]:
    """Change its argument."""
    items.append("changed there")
    return items


@tool
def by_number(points: dict[int, float]) -> list[Any]:
    """Return the entries of a map whose keys are numbers."""
    return [[type(key).__name__, key, value] for key, value in points.items()]


# Floats that JSON does not have


@tool
def infinity(sign: int = 1) -> float:
    """Return an infinity."""
    return sign * float("inf")


@tool
def infinities() -> Iterator[float]:
    """Yield infinities and a number."""
    yield from (float("inf"), 1.0, float("-inf"))


@tool
def negate(ctx: ToolContext) -> float:
    """Call tools that return infinities, and compute with the results."""
    return float(min(ctx.call("infinities")) - ctx.call(infinity))


@tool
async def negate_later(ctx: ToolContext) -> float:
    """Do the same in a coroutine."""
    return -float(await ctx.call(infinity))


def _toolbox() -> Toolbox:
    toolbox = Toolbox()
    for item in [item for item in globals().values() if isinstance(item, Tool)]:
        toolbox.add(item)
    return toolbox


CONTRACT_TOOLS: Final = _toolbox()
"""Open the provider under test with it, or have its server load this module's tools."""
