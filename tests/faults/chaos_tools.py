"""Tools that misbehave, for the chaos test's server: `--tools tests.faults.chaos_tools`.

As in `tools`, each one writes `token` into the metadata of every version that it makes. Those that end well return
these versions.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

from dspex_persist import ToolContext, tool
from tests.faults.monkey import address_space_of

TOOLS = __name__
_CHILD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
_MOST_BYTES = 200 * 1024 * 1024
_children: list[Any] = []


def _write(ctx: ToolContext, targets: list[str], value: str, token: str) -> dict[str, int]:
    return {target: ctx.set(target, value, metadata={"token": token}) for target in targets}


# Without a limit of its own, which would hide that somebody waits for the dead.
@tool
def die(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float) -> None:
    """Write, and end the process in one of several ways."""
    _write(ctx, targets, value, token)
    time.sleep(pause_s)
    match len(token) % 3:
        case 0:
            os.kill(os.getpid(), signal.SIGKILL)
        case 1:
            os.abort()
        case _:
            print("no more", file=sys.stderr, flush=True)
            os._exit(3)


@tool(timeout_s=0.4)
def hang(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float) -> None:
    """Write, and go on without looking at the time, nor at the cancellation."""
    _write(ctx, targets, value, token)
    # Longer than code may go on that was given up.
    time.sleep(30 if pause_s > 0.05 else 0.8)


@tool(timeout_s=20)
def grow(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float) -> None:
    """Write, and take memory: until there is none, or more than the pool allows."""
    _write(ctx, targets, value, token)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if pause_s > 0.05:
        kept = bytearray(_MOST_BYTES)
        # Written to, so that it is in use.
        kept[::4096] = b"x" * (len(kept) // 4096)
        time.sleep(5)
        raise RuntimeError("it was not killed")
    used = address_space_of(os.getpid())
    resource.setrlimit(resource.RLIMIT_AS, (used + _MOST_BYTES // 10, limits[1]))
    try:
        bytearray(_MOST_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@tool(timeout_s=20)
def use_up_files(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0) -> dict[str, int]:
    """Write half, open files until there are no more descriptors, and write the rest."""
    half = len(targets) // 2
    versions = _write(ctx, targets[:half], value, token)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, limits[1]))  # noqa: PTH208
    opened: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        return versions | _write(ctx, targets[half:], value, token)
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@tool(timeout_s=20)
def chatter(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0) -> dict[str, int]:
    """Write, and print what is no text, and what looks as if another worker were ready."""
    os.write(1, os.urandom(20_000))
    versions = _write(ctx, targets, value, token)
    os.write(2, b"GRPC_READY:1\nGRPC_READY:99999\n\0\xff{" + b"\n" * 1_000)
    return versions


@tool(timeout_s=20)
def leave_child(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0) -> dict[str, int]:
    """Write, and leave a process that is in no group of the worker's, and ignores SIGTERM."""
    argv = [sys.executable, "-I", "-S", "-c", _CHILD]
    # All descriptors are the worker's: the pipes of its output stay open.
    _children.append(subprocess.Popen(argv, start_new_session=True))
    return _write(ctx, targets, value, token)


@tool(timeout_s=20)
def call_others(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0) -> dict[str, int]:
    """Write half by a tool of the other pool, and half by one of this pool."""
    half = len(targets) // 2
    versions: dict[str, int] = ctx.call("spread_there", targets=targets[:half], value=value, token=token)
    time.sleep(pause_s)
    return versions | ctx.call("spread", targets=targets[half:], value=value, token=token)
