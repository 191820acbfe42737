"""The growth of the database file per small update, including history, indexes and chain."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.files import NAMES, begin_session, make_file, session_id, value_of
from benchmarks.plan import CALLERS, Plan
from benchmarks.table import Row, Target
from dspex_persist.state.commands import Command, SetVariable


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure the sizes of closed files, after a checkpoint. They do not depend on how fast the file was written."""
    return [_row(plan, folder, sessions) for sessions in (1, CALLERS)]


def _row(plan: Plan, folder: Path, sessions: int) -> Row:
    path = folder / f"growth-{sessions}.db"
    make_file(path, chain.from_iterable(map(begin_session, range(sessions))))
    before_bytes = _size_bytes(path)
    updates = make_file(path, _updates(plan, sessions))
    return Row(
        key=f"growth.{sessions}",
        what=f"growth of the file, {sessions} caller{'s' if sessions > 1 else ''}",
        value=(_size_bytes(path) - before_bytes) / updates,
        unit="bytes/update",
        target=Target("value", "at most", 300),
    )


def _updates(plan: Plan, sessions: int) -> Iterator[Command[Any]]:
    return (
        SetVariable(session_id(number % sessions), NAMES[number // sessions % len(NAMES)], value_of(number))
        for number in range(plan.growth_updates)
    )


def _size_bytes(path: Path) -> int:
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        raise RuntimeError(f"{wal} is not empty, so the size of the file is too small")
    return path.stat().st_size
