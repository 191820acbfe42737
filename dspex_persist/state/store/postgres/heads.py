"""The head of the log: the one row that says where it ends, compared with what this server knows of it."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg

from dspex_persist.clock import from_micros, to_micros
from dspex_persist.state.anchor import Head
from dspex_persist.state.errors import FileChangedError, Hint, NotADatabaseError
from dspex_persist.state.log_store import News
from dspex_persist.state.shared import lost
from dspex_persist.state.shared_log import SharedHold
from dspex_persist.state.store.log import Keys
from dspex_persist.state.store.postgres.connections import run
from dspex_persist.state.store.postgres.schema import LOCKS
from dspex_persist.state.store.schema import REVISION

SELECT_HEAD: Final = """
    SELECT database_id, sequence, hash, last_at, next_session_key, next_variable_key,
        (SELECT epoch FROM servers WHERE server_id = '{server}'),
        (SELECT version_num FROM alembic_version), has_holds
    FROM head
"""
# The lock is taken by a statement of its own: one with both would read the head as it was before the wait.
BEGIN: Final = "BEGIN; EXECUTE dspex_lock; EXECUTE dspex_head"
TRY_TO_BEGIN: Final = "BEGIN; EXECUTE dspex_try_lock; EXECUTE dspex_head"
# One state of the log, without its lock.
BEGIN_TO_READ: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; EXECUTE dspex_head"
MOVED: Final = "DX001"
"""The SQLSTATE of a group that begins at another head than it has seen."""
LOCKED: Final = "DX002"
"""The SQLSTATE of a group that would have to wait for the lock."""
# Those of servers that have not been fenced.
_HOLDS: Final = """
    SELECT session_id, hold_id, server_id = %s, is_full, since FROM holds JOIN servers USING (server_id, epoch)
"""
_HASH: Final = "SELECT hash FROM commits WHERE sequence = %s"
_CHANGED: Final = """
    SELECT DISTINCT sessions.started_sequence, sessions.session_id, sessions.ended_sequence IS NOT NULL
    FROM commits JOIN sessions ON sessions.session_key = commits.session_key
    WHERE commits.sequence > $1 AND commits.sequence <= $2
"""

# Planning these takes the database as long as running them, so each connection that writes prepares them.
PREPARE: Final = f"""
    PREPARE dspex_lock AS SELECT pg_advisory_xact_lock({LOCKS}, 'head'::regclass::oid::int);
    PREPARE dspex_try_lock AS SELECT pg_try_advisory_xact_lock({LOCKS}, 'head'::regclass::oid::int);
    PREPARE dspex_lock_at_once AS SELECT dspex_give_up('{LOCKED}')
        WHERE NOT pg_try_advisory_xact_lock({LOCKS}, 'head'::regclass::oid::int);
    PREPARE dspex_head AS {SELECT_HEAD};
    PREPARE dspex_unmoved (text, bigint, bytea, bigint, bigint) AS SELECT dspex_give_up('{MOVED}') WHERE NOT EXISTS (
        SELECT FROM head WHERE database_id = $1 AND sequence = $2 AND hash = $3 AND NOT has_holds
            AND EXISTS (SELECT FROM servers WHERE server_id = '{{server}}' AND epoch = $4 AND attempt = $5)
            AND '{REVISION}' = (SELECT version_num FROM alembic_version)
    );
    PREPARE dspex_hash (bigint) AS SELECT hash FROM commits WHERE sequence = $1;
    PREPARE dspex_changed (bigint, bigint) AS {_CHANGED};
    PREPARE dspex_end (bigint, bytea, bigint, bigint, bigint) AS UPDATE head SET sequence = $1, hash = $2,
        last_at = greatest(last_at, $3), next_session_key = $4, next_variable_key = $5
"""


class HeadRow(NamedTuple):
    """What `SELECT_HEAD` selects.

    Attributes:
        epoch: That of the lease of this server; None if it has none.
        revision: That of the schema; None if a copy is being put back.
        has_holds: Whether sessions may be held.
    """

    database_id: str
    sequence: int
    hash: bytes
    last_at: int
    next_session_key: int
    next_variable_key: int
    epoch: int | None
    revision: str | None
    has_holds: bool


class KnownHead:
    """The head as this server knows it.

    Args:
        name: How errors name the database.
        server_id: This server.

    Attributes:
        head: The last commit.
        keys: The next free keys.
        last_at: The time of that commit.
        on_change: Called with the last commit when another one is known.
        has_holds: Whether there may be some.
        holds: The sessions that are held, as this server has seen last; see `SharedLog.holds`.
    """

    def __init__(self, name: str, server_id: str) -> None:
        self._name = name
        self._server_id = server_id
        self._database_id = ""
        self.head = Head(0, bytes(32))
        self.keys = Keys(1, 1)
        self.last_at = from_micros(0)
        self.on_change: Callable[[Head], None] = _nothing
        self.has_holds = False
        self.holds: Mapping[str, SharedHold] = {}

    def row_of(self, found: tuple[Any, ...] | None) -> HeadRow:
        """Return the head as `SELECT_HEAD` has found it.

        Raises:
            LostCommitsError: There is none, in a database that had one.
            NotADatabaseError: There is none.
        """
        if found is not None:
            return HeadRow(*found)
        if self._database_id:
            raise lost.without_head(self._name)
        raise NotADatabaseError(self._name, f"{lost.NO_HEAD}; see whether a copy was put back completely")

    def take(self, row: HeadRow) -> None:
        """Know the head of the database from now on."""
        self._database_id = row.database_id
        keys = Keys(row.next_session_key, row.next_variable_key)
        self.advance(Head(row.sequence, bytes(row.hash)), keys, from_micros(row.last_at))
        self.has_holds = row.has_holds

    def advance(self, head: Head, keys: Keys, at: datetime) -> None:
        """Know what this server has committed."""
        is_new = head.sequence != self.head.sequence
        self.head, self.keys, self.last_at = head, keys, at
        if is_new:
            self.on_change(head)

    def learn(self, connection: "psycopg.Connection[Any]", row: HeadRow) -> News | None:
        """Take the head of the database over; return what others have committed, or None if nothing.

        Raises:
            LostCommitsError: Commits that this server knows are not in the database.
            FileChangedError: A newer release has upgraded the database.
        """
        before = self.head
        if row.revision is None:
            raise FileChangedError(self._name, "its table alembic_version is empty").advising(Hint.PUT_BACK_DATABASE)
        if row.revision != REVISION:
            reason = f"a server of another release has upgraded it to schema {row.revision}"
            raise FileChangedError(self._name, reason).advising(Hint.UPGRADE_PACKAGE)
        self._compare(row)
        self.holds = self._read_holds(connection) if row.has_holds else {}
        if row.sequence == before.sequence:
            self.take(row)
            return None
        numbers = f"{before.sequence}, {row.sequence}"
        cursor = run(connection, f"EXECUTE dspex_hash ({before.sequence}); EXECUTE dspex_changed ({numbers})")
        found = cursor.fetchone()
        if before.sequence and (found is None or found[0] != before.hash):
            raise lost.other_commit(self._name, before.sequence)
        cursor.nextset()
        rows = cursor.fetchall()
        self.take(row)
        ended = frozenset(first for first, _, has_ended in rows if has_ended)
        changed = {first: session_id for first, session_id, _ in rows}
        return News(before.sequence, row.sequence, from_micros(row.last_at), changed, ended)

    def is_at(self, row: HeadRow) -> bool:
        """Whether a row is the head that is known, so that `learn` would find nothing."""
        known = (self._database_id, self.head.sequence, self.head.hash, REVISION, False)
        return (row.database_id, row.sequence, bytes(row.hash), row.revision, row.has_holds) == known

    def begin_here(self, epoch: int, attempt: int, *, wait: bool) -> str:
        """Return the statements that begin a group, of which one fails unless the head is the known one."""
        lock = "dspex_lock" if wait else "dspex_lock_at_once"
        facts = f"'{self._database_id}', {self.head.sequence}, '\\x{self.head.hash.hex()}', {epoch}, {attempt}"
        return f"BEGIN; EXECUTE {lock}; EXECUTE dspex_unmoved ({facts})"

    def _read_holds(self, connection: "psycopg.Connection[Any]") -> Mapping[str, SharedHold]:
        rows = connection.execute(_HOLDS, (self._server_id,)).fetchall()
        return {session_id: SharedHold(*hold) for session_id, *hold in rows}

    def _compare(self, row: HeadRow) -> None:
        known = self.head
        if self._database_id not in ("", row.database_id):
            raise lost.other_database(self._name)
        if row.sequence < known.sequence:
            raise lost.gone(self._name, row.sequence, known.sequence)
        if row.sequence == known.sequence and known.sequence and bytes(row.hash) != known.hash:
            raise lost.other_commit(self._name, row.sequence)


def _nothing(_: Head) -> None:
    pass


def end_of_group(head: Head, keys: Keys, at: datetime) -> str:
    """Return the statements that move the head and commit, in one round trip. If the first fails, nothing is stored."""
    numbers = f"{to_micros(at)}, {keys.next_session}, {keys.next_variable}"
    return f"EXECUTE dspex_end ({head.sequence}, '\\x{head.hash.hex()}', {numbers}); COMMIT"


def has_commit(connection: "psycopg.Connection[Any]", head: Head) -> bool:
    """Whether the database has this commit."""
    found = connection.execute(_HASH, (head.sequence,)).fetchone()
    return found is not None and bytes(found[0]) == head.hash
