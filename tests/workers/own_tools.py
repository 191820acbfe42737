"""The tools of `stand_in`, for workers of ours."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspex_persist import ToolContext, tool
from dspex_persist.errors import ExecutionEndedError


@tool
def increase(ctx: ToolContext, amount: int) -> int:
    """Add to a."""
    ctx["a"] += amount
    return int(ctx["a"])


@tool
def fail(ctx: ToolContext) -> None:
    """Write and fail."""
    ctx["a"] = -1
    raise ValueError("it went wrong")


@tool
def hold(ctx: ToolContext, gate: str) -> int:
    """Read, wait, write."""
    before = int(ctx["a"])
    Path(f"{gate}.at").touch()
    while not Path(gate).exists():
        time.sleep(0.005)
    ctx["a"] = before + 1
    return before


@tool
def late(ctx: ToolContext, gate: str) -> None:
    """Go on after the caller's time is up."""
    Path(f"{gate}.at").touch()
    while not Path(gate).exists():
        time.sleep(0.005)
    try:
        ctx["a"] = -1
        done = "written"
    except ExecutionEndedError:
        done = "FAILED_PRECONDITION"
    Path(f"{gate}.late").write_text(done)


@tool
def below(ctx: ToolContext, amount: int) -> list[Any]:
    """Call another tool."""
    return [ctx.call("increase", amount=amount), ctx["a"]]


@tool
def crash(ctx: ToolContext) -> None:
    """End the process."""
    ctx["a"] = -1
    print("last words", file=sys.stderr, flush=True)
    os._exit(9)


@tool
def note(ctx: ToolContext) -> None:
    """Log something, under names that logs have themselves."""
    ctx.log("noted", event="e", tool="t", execution_id="x", level="l")


@tool
def count(ctx: ToolContext, to: int) -> Iterator[int]:
    """Write and yield."""
    for number in range(to):
        ctx["a"] = number
        yield number


@tool
def count_and_fail() -> Iterator[int]:
    """Yield and fail."""
    yield 1
    raise ValueError("half way")
