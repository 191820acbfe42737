"""How many calls each event loop is serving. Code that may block a loop for a moment asks whether others would wait."""

import asyncio
from typing import Final
from weakref import WeakKeyDictionary


class Traffic:
    """The calls in progress on one event loop, to be counted by the code that serves them, on that loop."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


_traffic: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Traffic]] = WeakKeyDictionary()


def traffic_of(loop: asyncio.AbstractEventLoop) -> Traffic:
    """Return the traffic of a loop."""
    return _traffic.setdefault(loop, Traffic())
