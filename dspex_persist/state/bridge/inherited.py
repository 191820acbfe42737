"""gRPC's channels and calls in a process that was forked from the one that made them.

A child has gRPC's locks and sockets, and none of the threads that serve them: its calls hang, or break those of its
parent. So it makes none, and never frees what its parent has open.
"""

from collections.abc import Iterator
from typing import Any

from dspex_persist.infra import forks
from dspex_persist.state.errors import ForkedProcessError

_lost = False


def refuse_lost(target: str) -> None:
    """Raise `ForkedProcessError` where the process was forked while gRPC was in use."""
    if _lost:
        raise ForkedProcessError(f"gRPC, which is to reach {target},")


class OneProcess:
    """Keeps channels and calls to the process that made them. `close` when they are closed."""

    def __init__(self, target: str, *kept: object) -> None:
        self._target = target
        self._kept = kept
        self.refusal: ForkedProcessError | None = None
        """In a child, what its calls end with."""
        forks.register(self)

    def check(self) -> None:
        """Raise `ForkedProcessError` in a child."""
        if self.refusal is not None:
            raise self.refusal

    def next_of(self, messages: Iterator[Any]) -> Any:
        """The next message of a stream, None at its end; raises as `check` does."""
        self.check()
        return next(messages, None)

    def close(self) -> None:
        """They are closed: there is nothing left to be kept."""
        forks.unregister(self)

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`."""
        global _lost
        _lost = True
        self.refusal = ForkedProcessError(f"the connection to {self._target}")
        for each in self._kept:
            forks.keep_forever(each)
