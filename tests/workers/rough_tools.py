"""Tools of our own that misbehave, for `test_misbehaving.py`."""

import os
import threading
import time
from collections.abc import Iterator

from dspex_persist import ToolContext, tool

_kept: list[bytearray] = []


def _take(mib: int) -> bytearray:
    # All ones, so that it is in use.
    return bytearray(b"\1") * (mib * 1024 * 1024)


@tool
def pid(ctx: ToolContext) -> int:
    """Return the process."""
    return os.getpid()


@tool
def leak(ctx: ToolContext, mib: int) -> int:
    """Keep memory, and return the process."""
    ctx["a"] = mib
    _kept.append(_take(mib))
    return os.getpid()


@tool
def grow(ctx: ToolContext, mib: int) -> None:
    """Take memory, and never return."""
    ctx["a"] = -1
    ctx.log("before it grows")
    # Taking it leaves no time for the line to be sent.
    time.sleep(0.1)
    kept = _take(mib)
    threading.Event().wait()
    kept.clear()


@tool
def chatter(ctx: ToolContext) -> int:
    """Print what is no text, and what looks as if another worker were ready."""
    os.write(1, b"\xff\xfe\0" * 100_000 + b"\nGRPC_READY:1\n")
    os.write(2, b'{"event": \nGRPC_READY:99999\n')
    ctx["a"] = 5
    return os.getpid()


@tool
def never_return(ctx: ToolContext) -> None:
    """Write, and never return, whatever happens."""
    ctx["a"] = -1
    ctx.log("before it hangs")
    threading.Event().wait()


@tool
def endless(ctx: ToolContext) -> Iterator[int]:
    """Yield as long as somebody reads, without a look at anything else."""
    ctx["a"] = -1
    number = 0
    while True:
        yield number
        number += 1
        time.sleep(0.01)
