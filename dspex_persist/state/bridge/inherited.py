"""Protects gRPC channels and calls from use in a forked child.

A child inherits gRPC's locks and sockets, but not the threads that serve them: its calls would hang, or break those of
its parent. So a child makes no calls, and never frees what its parent has open.
"""

from collections.abc import Iterator
from typing import Any

from dspex_persist.infra import forks
from dspex_persist.state.errors import ForkedProcessError

_lost = False


def refuse_lost(target: str) -> None:
    """Raise `ForkedProcessError` if this process was forked from one that used gRPC."""
    if _lost:
        raise ForkedProcessError(f"gRPC, which is needed to reach {target},")


class OneProcess:
    """Restricts channels and calls to the process that opened them. Close it after them."""

    def __init__(self, target: str, *kept: object) -> None:
        self._target = target
        self._kept = kept
        self.refusal: ForkedProcessError | None = None
        """The error of all calls in a forked child; None in the process itself."""
        forks.register(self)

    def check(self) -> None:
        """Raise `ForkedProcessError` in a child."""
        if self.refusal is not None:
            raise self.refusal

    def next_of(self, messages: Iterator[Any]) -> Any:
        """Return the next message of a stream, or None at its end; raises as `check` does."""
        self.check()
        return next(messages, None)

    def close(self) -> None:
        """Note that the channels and calls are closed."""
        forks.unregister(self)

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`."""
        global _lost
        _lost = True
        self.refusal = ForkedProcessError(f"the connection to {self._target}")
        for each in self._kept:
            forks.keep_forever(each)
