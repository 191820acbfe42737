"""The refused calls in a file."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Connection

from dspex_persist.clock import to_micros
from dspex_persist.state.denials import Denial
from dspex_persist.state.store.engine import driver_of, raw_rows

_COUNT: Final = """
    INSERT INTO denials (at, last_at, identity, peer, rpc, session_id, missing, count) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT ((at / 60000000), identity, peer, rpc, session_id, missing)
    DO UPDATE SET count = denials.count + excluded.count,
        last_at = CASE WHEN excluded.last_at > denials.last_at THEN excluded.last_at ELSE denials.last_at END
"""
_DROP_OLDEST: Final = """
    DELETE FROM denials WHERE denial_key <= (SELECT denial_key FROM denials ORDER BY denial_key DESC LIMIT 1 OFFSET ?)
"""
# The oldest first, and never the newest: a row may be older than those before it if the clock was set back.
_OLD: Final = """
    FROM denials WHERE denial_key < (
        SELECT min(denial_key) FROM denials
        WHERE last_at >= ? OR denial_key = (SELECT max(denial_key) FROM denials)
    )
"""


def keep(connection: Connection, denials: Sequence[Denial], most: int) -> None:
    """Count refusals, in the transaction of the caller, and keep the newest `most` rows."""
    driver = driver_of(connection)
    driver.executemany(_COUNT, map(_row_of, denials))
    driver.execute(_DROP_OLDEST, (most,))


def _row_of(denial: Denial) -> tuple[object, ...]:
    texts = (text.encode(errors="replace").decode() for text in denial.refused)
    return (to_micros(denial.at), to_micros(denial.last_at), *texts, denial.count)


def count_old(connection: Connection, before: datetime) -> int:
    """Return how many rows `forget` would delete."""
    ((count,),) = raw_rows(connection, f"SELECT count(*) {_OLD}", to_micros(before))
    return int(count)


def forget(connection: Connection, before: datetime) -> int:
    """Delete the rows whose refusals were all before a time, except for the newest row; returns how many."""
    return int(driver_of(connection).execute(f"DELETE {_OLD}", (to_micros(before),)).rowcount)
