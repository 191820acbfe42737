"""The outcomes recorded under idempotency keys."""

from datetime import datetime
from typing import Final

from sqlalchemy import Connection, delete, select

from dspex_persist.clock import to_micros
from dspex_persist.state.store.schema import is_unicode, outcomes
from dspex_persist.state.unit_of_work import RecordedOutcome

# Run by the driver, as they are needed for each group.
INSERT: Final = "INSERT INTO outcomes ({}) VALUES ({})".format(
    ", ".join(column.name for column in outcomes.columns), ", ".join("?" for _ in outcomes.columns)
)
FORGET_SESSION: Final = "DELETE FROM outcomes WHERE session_id = ?"


def find(connection: Connection, session_id: str, key: str) -> RecordedOutcome | None:
    """Return the outcome recorded under this key, or None."""
    if not is_unicode(session_id):
        return None
    query = select(outcomes).where(outcomes.c.session_id == session_id, outcomes.c.idempotency_key == key)
    row = connection.execute(query).first()
    if row is None:
        return None
    return RecordedOutcome(row.session_id, row.idempotency_key, row.cause, row.fingerprint, row.result)


def row_of(outcome: RecordedOutcome, created_at: int) -> tuple[str | int, ...]:
    """Return the row of an outcome; `created_at` in microseconds."""
    return (outcome.session_id, outcome.key, outcome.cause, outcome.fingerprint, outcome.result, created_at)


def forget(connection: Connection, before: datetime) -> int:
    """Delete the outcomes recorded before a time; return how many."""
    return connection.execute(delete(outcomes).where(outcomes.c.created_at < to_micros(before))).rowcount
