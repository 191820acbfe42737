"""The memory that the engine keeps while sessions come and go, and that a server keeps for idle clients."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import dspex_persist
from benchmarks.crowd import Crowd, allow_connections
from benchmarks.files import NAMES, begin_session, carry_out, make_file, session_id, value_of
from benchmarks.plan import BATCH, Plan
from benchmarks.proc import resident_bytes
from benchmarks.rpc import start_server
from benchmarks.table import Row, Target
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.commands import CleanupSession, Command, SetVariable

_MIB = 1024 * 1024
_KB = 1000


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure the resident memory of this process after a tenth of the sessions and after all of them."""
    few, many = plan.come_and_go
    with dspex_persist.connect(folder / "memory.db") as provider:
        carry_out(provider, chain.from_iterable(map(_come_and_go, range(few))))
        after_few = resident_bytes()
        carry_out(provider, chain.from_iterable(map(_come_and_go, range(few, many))))
        after_many = resident_bytes()
    return [
        Row(f"memory.{few}", f"memory after {few:,} sessions came and went", after_few / _MIB, "MiB"),
        Row(f"memory.{many}", f"memory after {many:,} sessions came and went", after_many / _MIB, "MiB"),
        Row(
            "memory.growth",
            "memory that the sessions in between added",
            (after_many - after_few) / _MIB,
            "MiB",
            target=Target("value", "at most", 64),
        ),
    ]


def _come_and_go(number: int) -> Iterator[Command[Any]]:
    """Yield the commands of a session from beginning to end; every fourth session has a variable, which it sets."""
    names = NAMES[: number % 4 == 0]
    yield from begin_session(number, names)
    yield from (SetVariable(session_id(number), name, value_of(number)) for name in names)
    yield CleanupSession(session_id(number))


# What is idle, in servers


def measure_idle(plan: Plan, folder: Path) -> list[Row]:
    """By how much resident memory of a server grows with each of them."""
    allow_connections(max(plan.idle_connections, plan.watchers))
    return [
        _sessions(plan, folder / "idle-sessions.db"),
        _connections(plan, folder / "idle-connections.db"),
        _watchers(plan, folder / "idle-watchers.db"),
    ]


def _sessions(plan: Plan, path: Path) -> Row:
    with start_server(path) as server, dspex_persist.connect(f"grpc://127.0.0.1:{server.port}") as provider:

        def begin(first: int, count: int) -> None:
            commands = [list(begin_session(number)) for number in range(first, first + count)]
            # Over gRPC nothing keeps those of a session in order.
            carry_out(provider, (initialize for initialize, *_ in commands))
            carry_out(provider, (register for _, *registers in commands for register in registers))

        return _row("session", f"a session of {BATCH} variables", plan.idle_sessions, plan, server, begin)


def _connections(plan: Plan, path: Path) -> Row:
    with start_server(path) as server, Crowd(server.port) as crowd:

        def connect(_first: int, count: int) -> None:
            crowd.connect(count)

        return _row("connection", "an idle connection", plan.idle_connections, plan, server, connect)


def _watchers(plan: Plan, path: Path) -> Row:
    make_file(path, begin_session(0))
    with start_server(path) as server, Crowd(server.port) as crowd:

        def watch(_first: int, count: int) -> None:
            crowd.watch(count, session_id(0), NAMES[0])

        return _row("watcher", "a watcher", plan.watchers, plan, server, watch)


def _row(key: str, what: str, count: int, plan: Plan, server: ServerProcess, add: Callable[[int, int], None]) -> Row:
    """Have so many added, a part of them each round. What the very first ones take does not count: they have the server
    make what all share."""
    each = count // (plan.rounds + 1)
    add(0, each)
    grown: list[float] = []
    for number in range(1, plan.rounds + 1):
        before = resident_bytes(server.pid)
        add(number * each, each)
        grown.append((resident_bytes(server.pid) - before) / each / _KB)
    return Row.of_rounds(f"memory.{key}", f"memory of the server for {what}", "kB", grown)
