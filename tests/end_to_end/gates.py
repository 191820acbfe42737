"""The tool's side of a gate (`old_style.Gate`), in whatever process the tool runs: a folder, in which a file of the
tool's says how far it has come, and one of the test's lets it go on."""

import time
from pathlib import Path
from typing import Protocol

from tests.deadline import within

DEADLINE_S = within(30)
PAUSE_S = 0.005


class Cancellable(Protocol):
    """What knows that nobody waits for the tool any more."""

    @property
    def cancelled(self) -> bool: ...


def announce(gate: str, name: str) -> None:
    """Tell the test how far it has come."""
    Path(gate, name).touch()


def wait_at(gate: str, ctx: Cancellable | None = None, *, name: str = "at", until: str = "go") -> None:
    """Announce, then wait for the test's word, or for the end of the execution where `ctx` is given."""
    announce(gate, name)
    deadline = time.monotonic() + DEADLINE_S
    while not Path(gate, until).exists() and not (ctx is not None and ctx.cancelled):
        if time.monotonic() > deadline:
            raise TimeoutError("the test never opened the gate")
        time.sleep(PAUSE_S)
