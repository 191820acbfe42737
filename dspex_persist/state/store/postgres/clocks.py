"""The clock of this machine, compared with that of the database: TTLs need all servers to agree on the time."""

import time
from typing import Any, Final

import psycopg

from dspex_persist import clock
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import NotADatabaseError

MOST_S: Final = 5.0
"""How far the clocks may differ, in seconds."""
WARN_S: Final = 0.5
"""How far they may differ without a warning."""
_logger: Final = get_logger(__name__)


def compare_clocks(connection: "psycopg.Connection[Any]", name: str) -> None:
    """Raise `NotADatabaseError` if this machine's clock differs too much from that of the database `name`."""
    asked = time.monotonic()
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    took_s = time.monotonic() - asked
    assert row is not None, "it has one row"
    # The answer may be as old as the question.
    ahead_s = abs((clock.now() - row[0]).total_seconds()) - took_s
    if ahead_s > MOST_S:
        reason = f"its clock and that of this machine differ by {ahead_s:.1f} s: have both set by NTP"
        raise NotADatabaseError(name, reason)
    if ahead_s > WARN_S:
        _logger.warning("the clocks of this machine and of the database differ", db=name, seconds=round(ahead_s, 1))
