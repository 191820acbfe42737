"""The tool's side of a gate (`old_style.Gate`), for any process that runs tools.

A gate is a folder: the tool creates a file to say how far it has come, the test creates one to let it continue.
"""

import time
from pathlib import Path
from typing import Protocol

from tests.deadline import within

DEADLINE_S = within(30)
PAUSE_S = 0.005


class Cancellable(Protocol):
    """A context that knows whether a caller still waits for the tool."""

    @property
    def cancelled(self) -> bool: ...


def announce(gate: str, name: str) -> None:
    """Tell the test that the tool has come this far."""
    Path(gate, name).touch()


def wait_at(gate: str, ctx: Cancellable | None = None, *, name: str = "at", until: str = "go") -> None:
    """Announce, then wait until the test opens the gate or, with `ctx`, until the execution is cancelled."""
    announce(gate, name)
    deadline = time.monotonic() + DEADLINE_S
    while not Path(gate, until).exists() and not (ctx is not None and ctx.cancelled):
        if time.monotonic() > deadline:
            raise TimeoutError("the test never opened the gate")
        time.sleep(PAUSE_S)
