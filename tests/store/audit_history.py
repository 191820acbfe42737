"""A history with everything that audits report, made through a provider with tools."""

import threading
from collections.abc import Iterator
from pathlib import Path

from dspex_persist import Toolbox, ToolContext, tool
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import Origin, Source, Value
from tests.asked import entry
from tests.deadline import within

SECRET = "tell-nobody-0451"


@tool(description="Count up.", retries=3)
def count(ctx: ToolContext, by: int = 1) -> int:
    """Reads one variable and writes two."""
    ctx.log("counting", by=by)
    ctx._session.record("lm", entry(question=f"by {by}? {SECRET}", answer=f"{SECRET}, yes", model=f"m/{by}"))
    ctx["total"] += by
    ctx.set("last", by, metadata={"step": str(by), "café": "ja"})
    return int(ctx["total"])


@tool(description="Fail after writing.")
def fail(ctx: ToolContext) -> None:
    """Writes, publishes, and raises."""
    ctx["total"] = -1
    ctx.publish("progress", 0.5)
    raise ValueError("no such luck")


@tool(description="Call others.")
def parent(ctx: ToolContext) -> list[int]:
    """Two children, one of which fails."""
    ctx["last"] = ctx["temperature"] * 10
    results = [ctx.call("count", by=5)]
    try:
        ctx.call("fail")
    except ValueError:
        results.append(0)
    return results


@tool(description="Depend on a value that others change.", retries=1)
def collide(ctx: ToolContext) -> int:
    """Its first attempt always conflicts with another caller's write."""
    before = int(ctx["shared"])
    if ctx.attempt == 1:
        MEET.set()
        MET.wait(within(10))
    ctx["shared"] = before + 1
    return before


@tool(description="Yield.")
def chunks(ctx: ToolContext) -> Iterator[int]:
    """A stream that defines a variable on its way."""
    ctx.define("made", [1, 2, 3], metadata={"by": "chunks"})
    yield from range(3)


MEET, MET = threading.Event(), threading.Event()
TOOLS = (count, fail, parent, collide, chunks)


def make(path: Path) -> None:
    """Fill a fresh file."""
    MEET.clear()
    MET.clear()
    toolbox = Toolbox()
    for each in TOOLS:
        toolbox.add(each)
    with EmbeddedState(path, tools=toolbox) as state:
        state.initialize_session("gone", {"kind": "old"})
        state.register_variable("gone", "temperature", "float", 0.1)
        state.cleanup_session("gone")
        state.initialize_session("main", {"kind": "new"})
        state.register_variable(
            "main", "temperature", "float", 0.7, constraints={"min": 0, "max": 2}, metadata={"unit": "K"}
        )
        for name, kind, value in (("total", "integer", 0), ("last", "float", 0), ("progress", "float", 0.0)):
            state.register_variable("main", name, kind, value)
        state.register_variable("main", "shared", "integer", 0)
        state.register_variable("main", "secret", "string", SECRET, metadata={"sensitive": "true"})
        state.register_variable("main", "[odd] name", "string", "x" * 3_000)
        state.register_variable("main", "weights", "embedding", [0.5, 0.25])
        elixir = Origin("erl", "SetVariable", Source.ELIXIR)
        for step in range(8):
            command = SetVariable("main", "temperature", Value(str(0.1 * step)), {"step": str(step), "café": "ja"})
            state.submit(command, elixir if step % 2 else None).result()
        state.rollback_variable("main", "temperature", 2)
        state.execute_tool("main", "count", {"by": 2}, metadata={"user": "ann", "trace": "t1"}, idempotency_key="k1")
        state.execute_tool("main", "fail", metadata={"user": "bob"})
        state.execute_tool("main", "parent")
        state.execute_tool("main", "chunks")
        colliding = threading.Thread(target=state.execute_tool, args=("main", "collide"))
        colliding.start()
        MEET.wait(within(10))
        state.set_variable("main", "shared", 10)
        MET.set()
        colliding.join()
        state.set_variable("main", "secret", SECRET + "!")
        state.delete_variable("main", "made")
        state.register_variable("main", "made", "string", "anew")
        state.start_optimization("main", "temperature", "mipro")
        state.set_variable("main", "temperature", 1.5, metadata={"optimizer_id": "mipro"})
        state.stop_optimization("main", "temperature")
        state.initialize_session("gone")
        state.register_variable("gone", "temperature", "float", 0.2)
        state.set_variable("gone", "temperature", 0.3, metadata={"step": "1"})
