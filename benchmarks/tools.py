"""The tools of the benchmarks: `dspex-persist serve --tools benchmarks.tools`."""

import threading
import time
from collections.abc import Iterator

from dspex_persist import ToolContext, tool


class _Slow:
    """Counts the slow tools that are running, and the fewest that were running since the last `look`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._fewest = 0
        self._ended = False

    def wait(self, seconds: float) -> None:
        """Run as a slow tool for this long."""
        with self._changed:
            self._count += 1
            self._changed.wait_for(lambda: self._ended, seconds)
            self._count -= 1
            self._fewest = min(self._fewest, self._count)

    def look(self) -> list[int]:
        """Return the number of running tools, and the fewest since the last call."""
        with self._changed:
            counts = [self._count, self._fewest]
            self._fewest = self._count
            return counts

    def end(self, ended: bool) -> None:
        """Set whether all slow tools return at once from now on."""
        with self._changed:
            self._ended = ended
            self._changed.notify_all()


_slow = _Slow()


@tool
def noop() -> None:
    """Do nothing."""


@tool
def compute() -> int:
    """Compute for 5 ms of this thread's time."""
    until, count = time.thread_time() + 0.005, 0
    while time.thread_time() < until:
        count += 1
    return count


@tool
def pause() -> None:
    """Wait for 5 ms."""
    time.sleep(0.005)


@tool
def read_3_write_2(ctx: ToolContext, number: int) -> float:
    """Add up three variables and a number, and write the sum and its half to two others."""
    total: float = ctx["v00"] + ctx["v01"] + ctx["v02"] + number
    ctx["v03"] = total
    ctx["v04"] = total / 2
    return total


@tool
def set_variable(ctx: ToolContext, name: str, value: float) -> float:
    """Set one variable."""
    ctx[name] = value
    return value


@tool
def count(most: int) -> Iterator[int]:
    """Yield the numbers below `most`."""
    yield from range(most)


@tool
def slow(ctx: ToolContext, seconds: float) -> float:
    """Read a variable, block for this many seconds, and write it."""
    before: float = ctx["v00"]
    _slow.wait(seconds)
    ctx["v00"] = before + 1
    return before


@tool
async def look_at_slow() -> list[int]:
    """Return the number of running executions of `slow`, and the fewest since the last call."""
    return _slow.look()


@tool
async def end_slow(ended: bool) -> None:
    """Set whether all executions of `slow` return at once from now on."""
    _slow.end(ended)
