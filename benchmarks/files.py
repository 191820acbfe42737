"""Database files for the benchmarks, made through the engine itself, many commands in flight."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import dspex_persist
from benchmarks.plan import BATCH
from dspex_persist.state.commands import Command, InitializeSession, RegisterVariable, SetVariable
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider

NAMES = tuple(f"v{index:02d}" for index in range(BATCH))
"""The variables of each session: small floats."""
_IN_FLIGHT = 1_000


def session_id(number: int) -> str:
    """The id of the session of caller `number`."""
    return f"session-{number:06d}"


def value_of(number: int) -> Value:
    """A small float that differs with `number`."""
    return Value(json.dumps(number / 4))


def begin_session(number: int, names: Sequence[str] = NAMES) -> Iterator[Command[Any]]:
    """The commands that begin a session and register its variables."""
    yield InitializeSession(session_id(number))
    for name in names:
        yield RegisterVariable(session_id(number), name, "float", value_of(0))


def set_times(number: int, name: str, times: int) -> Iterator[Command[Any]]:
    """The commands that give a variable `times` more versions."""
    return (SetVariable(session_id(number), name, value_of(count)) for count in range(times))


def carry_out(provider: StateProvider, commands: Iterable[Command[Any]]) -> int:
    """Have all commands carried out, a thousand in flight; how many. Raises what one of them failed with."""
    waiting: deque[Future[Any]] = deque()
    count = 0
    for command in commands:
        waiting.append(provider.submit(command))
        count += 1
        if len(waiting) >= _IN_FLIGHT:
            waiting.popleft().result()
    for future in waiting:
        future.result()
    return count


def make_file(path: Path, commands: Iterable[Command[Any]]) -> int:
    """Make a database file by these commands, and close it; how many there were."""
    with dspex_persist.connect(path) as provider:
        return carry_out(provider, commands)
