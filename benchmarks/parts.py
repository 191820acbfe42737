"""The parts of a write: how long each takes, for a caller alone and for many who share commits.

The functions that make up a write are wrapped in timers, which cost some 5 % of it. What a part spends in another one
is not counted for it. The times are those of the thread that writes the group, divided by the updates in it.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import dspex_persist
from benchmarks.files import NAMES, begin_session, carry_out, session_id
from benchmarks.load import run_threads
from benchmarks.plan import CALLERS, Plan
from benchmarks.table import Row
from dspex_persist.state.anchor import Anchor
from dspex_persist.state.groups import Groups
from dspex_persist.state.store.guard import FileGuard
from dspex_persist.state.store.inherited import Connection
from dspex_persist.state.store.session_store import SessionStore

PARTS: Final[dict[tuple[type, str], tuple[str, str]]] = {
    (Groups, "_apply"): ("stage", "an update: checking and staging it"),
    (SessionStore, "append"): ("rows", "an update: rows and hash chain"),
    (Connection, "execute"): ("begin", "an update: BEGIN, PRAGMA data_version"),
    (Connection, "executemany"): ("insert", "an update: INSERTs"),
    (Connection, "commit"): ("commit", "an update: COMMIT with its sync"),
    (FileGuard, "look"): ("look", "an update: looking at the files"),
    (Anchor, "write"): ("anchor", "an update: the anchor"),
    (Groups, "_publish"): ("publish", "an update: publishing it"),
    (Groups, "write_group"): ("rest", "an update: the rest of its group"),
}
"""The functions in timers, each with the key of its part and what that is."""


class _Timers:
    """Measures how long parts take, each without those that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = threading.local()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a timer."""

        def run(*arguments: Any, **options: Any) -> Any:
            outer = getattr(self._inner, "seconds", 0.0)
            self._inner.seconds = 0.0
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._inner.seconds
                self._inner.seconds = outer + took

        return run

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time all parts during the block."""
        wrapped = [
            patch.object(owner, name, self.timed(part, getattr(owner, name)))
            for (owner, name), (part, _) in PARTS.items()
        ]
        for each in wrapped:
            each.start()
        try:
            yield
        finally:
            for each in wrapped:
                each.stop()


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure the parts for one caller and for many."""
    return [row for callers in (1, CALLERS) for row in _measure(plan, folder / f"parts{callers}.db", callers)]


def _measure(plan: Plan, path: Path, callers: int) -> list[Row]:
    rounds: list[dict[str, float]] = []
    for number in range(plan.rounds):
        timers = _Timers()
        with timers.running(), dspex_persist.connect(path) as provider:
            if number == 0:
                for caller in range(callers):
                    carry_out(provider, begin_session(caller))
            timers.seconds.clear()
            done = run_threads(
                lambda caller: provider.set_variable(session_id(caller), NAMES[0], 0.25), callers, plan.slice_s
            )
            updates = len(done.latencies_s)
            rounds.append({part: timers.seconds[part] / updates * 1e6 for part, _ in PARTS.values()})
    who = "1 caller" if callers == 1 else f"{callers} threads"
    return [
        Row.of_rounds(f"parts.{part}.{callers}", f"{what}, {who}", "µs/update", [each[part] for each in rounds])
        for part, what in PARTS.values()
    ]
