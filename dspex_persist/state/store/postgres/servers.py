"""The servers that share a database: their leases, and the executions that each of them runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import psycopg
from sqlalchemy import Connection, text

from dspex_persist.state.events import ExecutionBegan, ExecutionEnded
from dspex_persist.state.log_store import FencedError
from dspex_persist.state.store.log import began_sequence
from dspex_persist.state.store.postgres.connections import Database
from dspex_persist.state.store.postgres.inserts import NUMBERS, TEXTS, Many
from dspex_persist.state.store.postgres.staging import Staged
from dspex_persist.state.unit_of_work import UnitOfWork

_REGISTER: Final = """
    INSERT INTO servers (server_id, epoch, renewed_at, lease_s, address) VALUES (%s, 1, clock_timestamp(), %s, %s)
    ON CONFLICT (server_id) DO UPDATE
    SET epoch = servers.epoch + 1, renewed_at = clock_timestamp(), address = EXCLUDED.address RETURNING epoch
"""
_OTHERS: Final = "EXISTS (SELECT FROM servers AS other WHERE other.server_id <> {} AND other.renewed_at < 'infinity')"
_HAS_OTHERS: Final = f"SELECT {_OTHERS.format('%s')}"
_RENEW: Final = f"""
    UPDATE servers SET renewed_at = clock_timestamp(), address = %s WHERE server_id = %s AND epoch = %s
    RETURNING {_OTHERS.format("servers.server_id")}
"""
_FENCE: Final = """
    UPDATE servers SET epoch = epoch + 1, renewed_at = 'infinity'
    WHERE server_id <> %s AND renewed_at < clock_timestamp() - make_interval(secs => lease_s)
    RETURNING coalesce(nullif(address, ''), server_id)
"""
_MOVE_ON: Final = "UPDATE servers SET attempt = attempt + 1 WHERE server_id = %s RETURNING attempt"
_LEAVE: Final = "DELETE FROM servers WHERE server_id = %s"
_OWN: Final = Many(
    "INSERT INTO execution_servers (began_sequence, server_id, epoch) SELECT * FROM unnest({})",
    [NUMBERS, TEXTS, NUMBERS],
)
_DISOWN: Final = Many("DELETE FROM execution_servers WHERE began_sequence = ANY({})", [NUMBERS])
_ORPHANS: Final = text("""
    SELECT sessions.session_id, executions.execution_id
    FROM executions JOIN sessions ON sessions.session_key = executions.session_key
    LEFT JOIN execution_servers USING (began_sequence)
    LEFT JOIN servers ON servers.server_id = execution_servers.server_id AND servers.epoch = execution_servers.epoch
    WHERE executions.ended_sequence IS NULL AND sessions.ended_sequence IS NULL AND servers.server_id IS NULL
    ORDER BY executions.began_sequence
""")

_SERVER: Final = text("""
    SELECT servers.address FROM execution_servers
    JOIN executions USING (began_sequence) JOIN servers USING (server_id, epoch)
    WHERE began_sequence = :began AND execution_id = :execution_id AND server_id <> :server_id
""")


class Lease:
    """The lease of this server. All times are those of the database's clock.

    Args:
        database: The database.
        server_id: The server.
        lease_s: How long it is taken for alive after it has renewed the lease, in seconds.

    Attributes:
        epoch: How often it has begun one; its commits carry this number.
        attempt: How often it has given commits up; see `move_on`.
        address: Where clients reach this server; others know it from the next renewal on.
    """

    def __init__(self, database: Database, server_id: str, lease_s: float) -> None:
        self._database = database
        self.server_id = server_id
        self.lease_s = lease_s
        self.epoch = self.attempt = 0
        self.address = ""
        # Renewed on a connection of its own, which waits for no group.
        self._connection: psycopg.Connection[Any] | None = None

    def register(self, connection: "psycopg.Connection[Any]") -> None:
        """Begin a lease, the first or another one."""
        row = connection.execute(_REGISTER, (self.server_id, self.lease_s, self.address)).fetchone()
        assert row is not None, "it returns the row"
        self.epoch = row[0]

    def renew(self) -> bool:
        """See `SharedLog.renew`. Returns whether there are other servers."""
        try:
            if self._connection is None or self._connection.closed:
                self._connection = self._database.connect(is_brief=True)
            row = self._connection.execute(_RENEW, (self.address, self.server_id, self.epoch)).fetchone()
        except psycopg.Error as error:
            if self._connection is not None:
                self._connection.close()
            raise self._database.unavailable(error) from error
        if row is None:
            raise FencedError
        return bool(row[0])

    def has_others(self, connection: "psycopg.Connection[Any]") -> bool:
        """Return whether there are other servers, which have not been fenced."""
        row = connection.execute(_HAS_OTHERS, (self.server_id,)).fetchone()
        return row == (True,)

    def move_on(self, connection: "psycopg.Connection[Any]") -> None:
        """Have the database refuse what this server has sent it, and what has not arrived. In a transaction."""
        row = connection.execute(_MOVE_ON, (self.server_id,)).fetchone()
        # Without a row, it has been fenced, and nothing of it is accepted anyway.
        self.attempt = self.attempt if row is None else row[0]

    def fence(self, connection: "psycopg.Connection[Any]") -> list[str]:
        """Fence the other servers whose lease has run out; return who they are."""
        return [who for (who,) in connection.execute(_FENCE, (self.server_id,))]

    def leave(self, connection: "psycopg.Connection[Any]") -> None:
        """End the lease: this server runs nothing any more."""
        connection.execute(_LEAVE, (self.server_id,))

    def note_executions(self, staged: Staged, units: Iterable[UnitOfWork]) -> None:
        """Note, in the transaction of a group, which executions this server runs from now on, and no longer."""
        began: list[tuple[int, str, int]] = []
        ended: list[tuple[int]] = []
        for unit in units:
            for event in unit.events:
                if isinstance(event, ExecutionBegan):
                    began.append((unit.sequence, self.server_id, self.epoch))
                elif isinstance(event, ExecutionEnded):
                    ended.append((began_sequence(event.execution_id),))
        staged.run_all(_OWN, began)
        staged.run_all(_DISOWN, ended)

    def close(self) -> None:
        """Close its connection."""
        if self._connection is not None:
            self._connection.close()


def orphans(connection: Connection) -> Mapping[str, Sequence[str]]:
    """Return the running executions, by session, whose servers no longer live."""
    found: dict[str, tuple[str, ...]] = {}
    for session_id, execution_id in connection.execute(_ORPHANS):
        found[session_id] = (*found.get(session_id, ()), execution_id)
    return found


def server_of(connection: Connection, execution_id: str, server_id: str) -> str | None:
    """Return the address of the server that runs an execution; None if none does, or the one with this id."""
    try:
        began = began_sequence(execution_id)
    except (ValueError, IndexError):
        return None
    row = {"began": began, "execution_id": execution_id, "server_id": server_id}
    address: str | None = None if "\0" in execution_id else connection.execute(_SERVER, row).scalar()
    return address
