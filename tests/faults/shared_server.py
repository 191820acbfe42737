"""One of several servers on a shared log, with a planted bug: `python -m tests.faults.shared_server BUG serve ...`.

Everything else is the real product, but for short leases: what is waited for is shorter by then. "none" is no bug.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dspex_persist.cli import main
from dspex_persist.state import shared
from dspex_persist.state.shared import barrier
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from dspex_persist.state.valkey.valkey_log import ValkeyLog
from tests.faults.planted_server import _patch

LEASE_S = 2.0
SETTLE_S = 3.0


def no_barrier() -> None:
    """Read what is in memory, without asking whether others have committed."""

    def ask(self: barrier.Barrier) -> Future[None]:
        passed: Future[None] = Future()
        passed.set_result(None)
        return passed

    _patch(barrier.Barrier, "pass_through", lambda _: None)
    _patch(barrier.Barrier, "ask", ask)


def no_news() -> None:
    """Take over the number of the last commit of others, and not what they have changed."""
    _patch(shared.SharedGroups, "learn", lambda self, news: self._advance(news.sequence))


def _shorten(constructor: Any, **values: float) -> None:
    assert values.keys() <= constructor.__kwdefaults__.keys(), f"{constructor} has other arguments by now"
    constructor.__kwdefaults__.update(values)


BUGS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "no-barrier": no_barrier,
    "no-news": no_news,
}

if __name__ == "__main__":
    _shorten(PostgresLog.__init__, lease_s=LEASE_S, settle_s=SETTLE_S)
    for each in (shared.DatabaseState, ValkeyLog):
        _shorten(each.__init__, lease_s=LEASE_S)
    BUGS[sys.argv.pop(1)]()
    main()
