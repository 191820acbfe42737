"""Tools that show what runs in a worker, for `serve --tools tests.end_to_end.pool_tools --workers 1`."""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dspex_persist import ToolContext, tool


@tool
def pid() -> int:
    """Return the process that runs it."""
    return os.getpid()


@tool
def loaded(package: str) -> list[str]:
    """Return which modules of a package the process has imported."""
    return [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]


@tool
def pid_below(ctx: ToolContext) -> list[int]:
    """Return the process that runs it, and the one that runs what it calls."""
    return [os.getpid(), ctx.call(pid)]


@tool
def everything(ctx: ToolContext) -> dict[str, Any]:
    """Use all that a journal keeps, and other tools, one of which fails."""
    ctx.log("begins", attempt=ctx.attempt)
    ctx["a"] += 1
    ctx.publish("b", 7, {"step": "half"})
    ctx._session.record("other", {"answer": 42})
    refused = ""
    try:
        ctx.call("broken", word="of the child")
    except LookupError as error:
        refused = str(error)
    child = ctx.call("child", amount=3)
    ctx.log("ends")
    return {
        "now": ctx.now().isoformat(),
        "id": str(ctx.uuid()),
        "random": ctx.random.random(),
        "user": ctx.metadata.get("user"),
        "refused": refused,
        "child": child,
    }


@tool
def child(ctx: ToolContext, amount: int) -> list[Any]:
    """Add to a, and use what is recorded."""
    ctx["a"] += amount
    ctx.log("in the child")
    return [ctx["a"], ctx.random.random(), ctx.now().isoformat()]


@tool
def broken(ctx: ToolContext, word: str) -> None:
    """Write, log, and raise."""
    ctx["a"] = -1
    ctx.log("before it breaks")
    raise LookupError(word)


@tool
def quote(ctx: ToolContext, word: str) -> None:
    """Raise an error that quotes what it was given and what it has read."""
    before = ctx.history("token")[-1].value
    raise LookupError(f"no {word} with {ctx['token']} or {before} at {ctx['place']}, and the answer is 42")


@tool
async def everything_later(ctx: ToolContext) -> list[Any]:
    """Do some of this in a coroutine."""
    ctx.log("begins")
    made = await ctx.call("child", amount=1)
    await asyncio.sleep(0)
    return [*made, str(ctx.uuid())]


@tool
def end_process(ctx: ToolContext, how: str) -> None:
    """Log, write, and end the process that runs it."""
    ctx["a"] = -1
    ctx.log("before the end")
    time.sleep(0.05)
    if how == "exit":
        print("last words", flush=True)
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


@tool
def end_below(ctx: ToolContext) -> None:
    """Call a tool that ends the process of both."""
    ctx["a"] = -1
    ctx.call("end_process", how="kill")


@tool(timeout_s=2)
def hang(ctx: ToolContext, gate: str) -> None:
    """Never return, whatever happens."""
    ctx["a"] = -1
    ctx.log("before it hangs")
    Path(gate).write_text(str(os.getpid()))
    threading.Event().wait()


@tool
def hold(ctx: ToolContext, gate: str) -> str:
    """Wait until a file is there."""
    Path(f"{gate}.at").touch()
    while not Path(gate).exists() and not ctx.cancelled:
        time.sleep(0.005)
    return "held"


@tool
def write_later(ctx: ToolContext, gate: str) -> int:
    """Return, and leave a thread that writes when the next execution runs."""

    def write() -> None:
        while not Path(f"{gate}.at").exists():
            time.sleep(0.005)
        try:
            ctx["a"] = -1
            done = "written"
        except Exception as error:  # noqa: BLE001 -- the test sees which
            done = type(error).__name__
        Path(f"{gate}.late").write_text(done)
        Path(gate).touch()

    threading.Thread(target=write, daemon=True).start()
    return 1


@tool
def go_down(ctx: ToolContext, depth: int) -> int:
    """Call itself."""
    return 1 + int(ctx.call("go_down", depth=depth - 1)) if depth else 0
