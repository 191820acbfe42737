"""How much memory the engine keeps while sessions come and go, and while they come and stay."""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import dspex_persist
from benchmarks.files import NAMES, begin_session, carry_out, session_id, value_of
from benchmarks.plan import Plan
from benchmarks.table import Row, Target
from dspex_persist.state.commands import CleanupSession, Command, SetVariable

_MIB = 1024 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Resident memory of this process after a tenth of the sessions and after all of them."""
    few, many = plan.come_and_go
    with dspex_persist.connect(folder / "memory.db") as provider:
        carry_out(provider, chain.from_iterable(map(_come_and_go, range(few))))
        after_few = _resident_bytes()
        carry_out(provider, chain.from_iterable(map(_come_and_go, range(few, many))))
        after_many = _resident_bytes()
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
    """A session's whole life; every fourth has a variable, which is set."""
    names = NAMES[: number % 4 == 0]
    yield from begin_session(number, names)
    yield from (SetVariable(session_id(number), name, value_of(number)) for name in names)
    yield CleanupSession(session_id(number))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
