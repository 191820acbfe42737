"""The sessions that servers hold while these are moved. Both steps of a hold take turns with groups."""

import json
from typing import Final

from sqlalchemy import Connection, text

from dspex_persist.state.commands.sessions import MOVED
from dspex_persist.state.errors import SessionHeldError
from dspex_persist.state.store.postgres.schema import LOCKS
from dspex_persist.state.store.postgres.servers import Lease

# A group that has begun before does not know of the hold.
_LOCK: Final = text(f"SELECT pg_advisory_xact_lock({LOCKS}, 'head'::regclass::oid::int)")
_FORGET: Final = text("""
    DELETE FROM holds
    WHERE NOT EXISTS (SELECT 1 FROM servers WHERE servers.server_id = holds.server_id AND servers.epoch = holds.epoch)
""")
_HOLD: Final = text("""
    INSERT INTO holds (session_id, hold_id, server_id, epoch, since)
    SELECT :session_id, :hold_id, server_id, epoch, head.sequence FROM servers, head
    WHERE server_id = :server_id AND epoch = :epoch
    ON CONFLICT (session_id) DO NOTHING RETURNING 1
""")
_FILL: Final = text("""
    UPDATE holds SET is_full = true FROM servers
    WHERE hold_id = :hold_id AND servers.server_id = holds.server_id AND servers.epoch = holds.epoch RETURNING 1
""")
# Groups look for holds only if the head says so.
_BEGIN_TO_SAY: Final = text("UPDATE head SET has_holds = true WHERE NOT has_holds")
_END_TO_SAY: Final = text("UPDATE head SET has_holds = false WHERE NOT EXISTS (SELECT 1 FROM holds)")
_END: Final = text("DELETE FROM holds WHERE hold_id = :hold_id")
_ENDED: Final = text("""
    SELECT events.body FROM sessions JOIN events ON events.sequence = sessions.ended_sequence
    WHERE sessions.session_id = :session_id AND sessions.ended_sequence > :since AND events.kind = 'session_ended'
    ORDER BY sessions.ended_sequence DESC LIMIT 1
""")


def begin(connection: Connection, session_id: str, hold_id: str, lease: Lease) -> None:
    """Begin a hold, in a transaction.

    Raises:
        SessionHeldError: There is one, or this server has lost its lease.
    """
    connection.execute(_LOCK)
    connection.execute(_FORGET)
    row = {"session_id": session_id, "hold_id": hold_id, "server_id": lease.server_id, "epoch": lease.epoch}
    if connection.execute(_HOLD, row).scalar() is None:
        raise SessionHeldError(session_id)
    connection.execute(_BEGIN_TO_SAY)


def fill(connection: Connection, hold_id: str) -> bool:
    """Make a hold full, in a transaction; return whether it still existed."""
    connection.execute(_LOCK)
    return connection.execute(_FILL, {"hold_id": hold_id}).scalar() is not None


def end(connection: Connection, hold_id: str) -> None:
    """End a hold, in a transaction."""
    connection.execute(_LOCK)
    connection.execute(_END, {"hold_id": hold_id})
    connection.execute(_END_TO_SAY)


def forget(connection: Connection) -> None:
    """Forget the holds of servers that have been fenced, in a transaction."""
    connection.execute(_LOCK)
    connection.execute(_FORGET)
    connection.execute(_END_TO_SAY)


def moved_to(connection: Connection, session_id: str, since: int) -> str | None:
    """Return where the session with this id has moved after a commit; None if it has not."""
    body = connection.execute(_ENDED, {"session_id": session_id, "since": since}).scalar()
    reason = "" if body is None else str(json.loads(body)["reason"])
    return reason.removeprefix(MOVED) if reason.startswith(MOVED) else None
