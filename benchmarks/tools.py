"""The tools that the benchmarks have executed: `dspex-persist serve --tools benchmarks.tools`."""

import threading
from collections.abc import Iterator

from dspex_persist import ToolContext, tool


class _Slow:
    """The slow tools that are in their code at the moment, and the fewest that there were since somebody looked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._fewest = 0
        self._ended = False

    def wait(self, seconds: float) -> None:
        """Be one of them for so long."""
        with self._changed:
            self._count += 1
            self._changed.wait_for(lambda: self._ended, seconds)
            self._count -= 1
            self._fewest = min(self._fewest, self._count)

    def look(self) -> list[int]:
        """How many there are, and the fewest that there were since the last look."""
        with self._changed:
            seen = [self._count, self._fewest]
            self._fewest = self._count
            return seen

    def end(self, ended: bool) -> None:
        """Have all of them return at once, from now on or not any more."""
        with self._changed:
            self._ended = ended
            self._changed.notify_all()


_slow = _Slow()


@tool
def noop() -> None:
    """Do nothing."""


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
    """Read a variable, block for so many seconds, and write it."""
    before: float = ctx["v00"]
    _slow.wait(seconds)
    ctx["v00"] = before + 1
    return before


@tool
async def look_at_slow() -> list[int]:
    """How many executions of `slow` are running, and the fewest that were since the last look."""
    return _slow.look()


@tool
async def end_slow(ended: bool) -> None:
    """Have all executions of `slow` return at once, from now on or not any more."""
    _slow.end(ended)
