"""The tools of the fault tests' servers: `--tools tests.faults.tools`.

Each one writes `token` into the metadata of every version that it makes, and returns these versions.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from dspex_persist import ToolContext, tool
from dspex_persist.state.errors import VariableNotFoundError

TOOLS = __name__
RETRIES = 50


@tool(retries=3)
def spread(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0) -> dict[str, int]:
    """Write one value to several variables, with a pause before each of them and at the end."""
    versions = {}
    for target in targets:
        time.sleep(pause_s)
        versions[target] = ctx.set(target, value, metadata={"token": token})
    time.sleep(pause_s)
    return versions


@tool(retries=3)
async def spread_async(
    ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0
) -> dict[str, int]:
    """Like `spread`, but on the event loop, with the second half in a called tool."""
    versions = {}
    half = len(targets) // 2
    for target in targets[:half]:
        await asyncio.sleep(pause_s)
        versions[target] = ctx.set(target, value, metadata={"token": token})
    versions |= await ctx.call("spread", targets=targets[half:], value=value, token=token, pause_s=pause_s)
    return versions


@tool(retries=RETRIES)
def increment(ctx: ToolContext, target: str, token: str = "", pause_s: float = 0.0) -> dict[str, int]:
    """Read a number, and write the next one."""
    value = ctx[target]
    time.sleep(pause_s)
    return {target: ctx.set(target, value + 1, metadata={"token": token} if token else {})}


@tool
def break_off(ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0) -> None:
    """Write everything, and then fail."""
    spread(ctx, targets, value, token, pause_s)
    raise RuntimeError("planned")


@tool
def stream(
    ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0
) -> Iterator[dict[str, int]]:
    """Write to one variable after the other, and yield each version."""
    for target in targets:
        version = ctx.set(target, value, metadata={"token": token})
        time.sleep(pause_s)
        yield {target: version}


@tool
async def stream_async(
    ctx: ToolContext, targets: list[str], value: str, token: str, pause_s: float = 0.0
) -> AsyncIterator[dict[str, int]]:
    """Like `stream`, but on the event loop, and with its progress published, where all clients see it at once."""
    for index, target in enumerate(targets):
        version = ctx.set(target, value, metadata={"token": token})
        await asyncio.to_thread(ctx.publish, "progress", index + 1)
        await asyncio.sleep(pause_s)
        yield {target: version}


# Tools for the histories of executions (tests/concurrency/serializability.py)


def _append(ctx: ToolContext, operations: list[str], pause_s: float) -> list[str]:
    seen: list[str] = []
    for operation in operations:
        name, _, element = operation.partition("+")
        elements = str(ctx[name])
        seen.append(elements)
        time.sleep(pause_s)
        if element:
            ctx[name] = f"{elements},{element}" if elements else element
    return seen


@tool
def append(ctx: ToolContext, operations: list[str], pause_s: float = 0.0) -> list[str]:
    """Run `name` (read a list) and `name+element` (append to it); returns the list before each of them."""
    return _append(ctx, operations, pause_s)


@tool(isolation="snapshot")
def append_on_snapshot(ctx: ToolContext, operations: list[str], pause_s: float = 0.0) -> list[str]:
    """Like `append`, with snapshot isolation: only its writes are checked."""
    return _append(ctx, operations, pause_s)


# Tools for single observations (tests/concurrency/observations.py)


def _observe(ctx: ToolContext, actions: list[list[str]], pause_s: float) -> list[Any]:
    results: list[Any] = []
    for action, name, text in actions:
        results.append(_ACTIONS[action](ctx, name, text))
        time.sleep(pause_s)
    return results


def _get(ctx: ToolContext, name: str, text: str) -> Any:
    try:
        variable = ctx.info(name)
    except VariableNotFoundError:
        return None
    return [variable.version, variable.record.value.json]


def _list(ctx: ToolContext, name: str, text: str) -> Any:
    return sorted([each.name, each.version, each.record.value.json] for each in ctx.list())


def _history(ctx: ToolContext, name: str, text: str) -> Any:
    try:
        versions = ctx.history(name, 4)
    except VariableNotFoundError:
        return None
    return [[each.version, value.json if (value := each.record.value) is not None else None] for each in versions]


def _set(ctx: ToolContext, name: str, text: str) -> Any:
    try:
        return ctx.set(name, text)
    except KeyError:
        return None


def _define(ctx: ToolContext, name: str, text: str) -> Any:
    ctx.define(name, text)
    return _get(ctx, name, text)


def _delete(ctx: ToolContext, name: str, text: str) -> Any:
    try:
        ctx.delete(name)
    except KeyError:
        return None
    return True


_ACTIONS = {"get": _get, "list": _list, "history": _history, "set": _set, "define": _define, "delete": _delete}


@tool(retries=2)
def observe(ctx: ToolContext, actions: list[list[str]], pause_s: float = 0.0) -> list[Any]:
    """Run actions, each a word, a name and a text; returns what each of them saw."""
    return _observe(ctx, actions, pause_s)


@tool(retries=2, isolation="snapshot")
def observe_on_snapshot(ctx: ToolContext, actions: list[list[str]], pause_s: float = 0.0) -> list[Any]:
    """Like `observe`, with snapshot isolation: only its writes are checked."""
    return _observe(ctx, actions, pause_s)
