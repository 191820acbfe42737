"""Creates database files for the benchmarks through the engine, with many commands in flight."""

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
    """Return the session id of caller `number`."""
    return f"session-{number:06d}"


def value_of(number: int) -> Value:
    """Return a small float that depends on `number`."""
    return Value(json.dumps(number / 4))


def begin_session(number: int, names: Sequence[str] = NAMES) -> Iterator[Command[Any]]:
    """Yield the commands that begin a session and register its variables."""
    yield InitializeSession(session_id(number))
    for name in names:
        yield RegisterVariable(session_id(number), name, "float", value_of(0))


def set_times(number: int, name: str, times: int) -> Iterator[Command[Any]]:
    """Return the commands that add `times` versions to a variable."""
    return (SetVariable(session_id(number), name, value_of(count)) for count in range(times))


def carry_out(provider: StateProvider, commands: Iterable[Command[Any]]) -> int:
    """Submit all commands, a thousand in flight, and return their number. Raises the first error."""
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
    """Create a database file with these commands, close it, and return the number of commands."""
    with dspex_persist.connect(path) as provider:
        return carry_out(provider, commands)
