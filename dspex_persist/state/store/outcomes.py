"""The outcomes recorded under idempotency keys."""

from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, insert, select

from dspex_persist.clock import to_micros
from dspex_persist.state.store.schema import is_unicode, outcomes
from dspex_persist.state.unit_of_work import RecordedOutcome

# Built once: SQLAlchemy needs longer to build a statement than SQLite to run it.
_FORGET_SESSION = delete(outcomes).where(outcomes.c.session_id == bindparam("session_id"))


def find(connection: Connection, session_id: str, key: str) -> RecordedOutcome | None:
    """Return the outcome recorded under this key, or None."""
    if not is_unicode(session_id):
        return None
    query = select(outcomes).where(outcomes.c.session_id == session_id, outcomes.c.idempotency_key == key)
    row = connection.execute(query).first()
    if row is None:
        return None
    return RecordedOutcome(row.session_id, row.idempotency_key, row.cause, row.fingerprint, row.result)


def keep(connection: Connection, outcome: RecordedOutcome, created_at: datetime) -> None:
    """Store an outcome."""
    connection.execute(
        insert(outcomes),
        {
            "session_id": outcome.session_id,
            "idempotency_key": outcome.key,
            "cause": outcome.cause,
            "fingerprint": outcome.fingerprint,
            "result": outcome.result,
            "created_at": to_micros(created_at),
        },
    )


def forget_session(connection: Connection, session_id: str) -> None:
    """Delete the outcomes of a session that has ended."""
    connection.execute(_FORGET_SESSION, {"session_id": session_id})


def forget(connection: Connection, before: datetime) -> int:
    """Delete the outcomes recorded before a time; return how many."""
    return connection.execute(delete(outcomes).where(outcomes.c.created_at < to_micros(before))).rowcount
