"""PostgresLog: the log of sessions in a PostgreSQL database. Any number of servers may append to it."""

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psycopg
from sqlalchemy import Connection, text

from dspex_persist.addresses import canonical
from dspex_persist.clock import from_micros, to_micros
from dspex_persist.state.decoding import in_database
from dspex_persist.state.denials import Denial
from dspex_persist.state.errors import StateError, UnavailableError
from dspex_persist.state.log_store import FencedError, News
from dspex_persist.state.meter import FileFigures
from dspex_persist.state.model import VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.shared.database_state import LEASE_S, DatabaseLog
from dspex_persist.state.shared.lost import without_head
from dspex_persist.state.shared.server_anchor import ServerAnchor
from dspex_persist.state.shared.settling import SETTLE_S
from dspex_persist.state.shared_log import SharedHold
from dspex_persist.state.store import denials as stored_denials
from dspex_persist.state.store import log, outcomes
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store.engine import Durability, snapshot
from dspex_persist.state.store.postgres import contents, holds, later, objects, schema, servers
from dspex_persist.state.store.postgres.clocks import compare_clocks
from dspex_persist.state.store.postgres.connections import DRIVER_ERRORS, Database
from dspex_persist.state.store.postgres.heads import KnownHead, has_commit
from dspex_persist.state.store.postgres.inserts import NUMBERS, Many
from dspex_persist.state.store.postgres.notices import Notices
from dspex_persist.state.store.postgres.refused import check_metadata_keys
from dspex_persist.state.store.postgres.servers import Lease
from dspex_persist.state.store.postgres.writing import Writing, Written
from dspex_persist.state.store.stored import StoredLog, StoredSessions
from dspex_persist.state.unit_of_work import RecordedOutcome, UnitOfWork, VersionQuery

# Of the session that asks, until it ends: whoever holds it prunes by the settings of all servers.
_TRY_TO_PRUNE: Final = f"SELECT pg_try_advisory_lock({schema.LOCKS}, 'pruned'::regclass::oid::int)"
_EXPIRES: Final = Many(
    """
    UPDATE sessions SET expires_at = greatest(sessions.expires_at, touched.expires_at)
    FROM unnest({}) AS touched (session_key, expires_at) WHERE sessions.session_key = touched.session_key
    """,
    [NUMBERS, NUMBERS],
)
_EXPIRY: Final = text("SELECT expires_at FROM sessions WHERE session_key = :key AND ended_sequence IS NULL")


class _Stored(StoredSessions):
    """The `Backing` of units of work, read from a connection. No text of PostgreSQL contains NUL."""

    @contextlib.contextmanager
    def _reading(self, session_id: str) -> Iterator[None]:
        with in_database(), super()._reading(session_id):
            yield

    def load(self, session_id: str) -> SessionState | None:
        return None if "\0" in session_id else super().load(session_id)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        return None if "\0" in session_id + key else super().find_outcome(session_id, key)

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        return None if "\0" in query.identifier else super().history(state, query)


class PostgresLog(_Stored, StoredLog, DatabaseLog):
    """One server's connections to the database.

    Args:
        url: The database, postgresql://...
        durability: "normal": commits are acknowledged before they are on the disk of the database.
        anchor_dir: Where this server remembers the last commit that it knows; None: only in memory.
        lease_s: See `SharedLog.lease_s`.
        settle_s: How long to look whether a group was stored whose COMMIT was not answered, in seconds.

    Raises:
        InvalidArgumentError: The URL is malformed.
        UnavailableError: The database cannot be reached.
        OpenError: It is no database for us, was written by a newer release, or has lost commits.
    """

    driver_errors = DRIVER_ERRORS
    sessions = _Stored
    takes_pages = True

    def __init__(
        self,
        url: str,
        *,
        durability: Durability = "full",
        anchor_dir: Path | None = None,
        lease_s: float = LEASE_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        server_id = uuid.uuid4().hex
        self._database = Database(url, durability=durability, server_id=server_id)
        self._address = canonical(url)
        self.name = self._database.name
        self._known = KnownHead(self._database.name, server_id)
        self._lease = Lease(self._database, server_id, lease_s)
        self._notices = Notices(self._database, self._lease)
        self._writing = Writing(self._database, self._lease, self._known, settle_s)
        # For reads that wait until memory has all that was committed before them.
        self._barrier: psycopg.Connection[Any] | None = None
        self._barrier_lock = threading.Lock()
        self._anchor: ServerAnchor | None = None
        self.readers = self._database.readers()
        try:
            self._database.refuse_poolers()
            with self._database.reported():
                schema.upgrade(self._database)
            with self._writing.using() as connection:
                compare_clocks(connection, self._database.name)
                self._begin(connection, anchor_dir)
        except BaseException:
            self.close()
            raise

    def _begin(self, connection: "psycopg.Connection[Any]", anchor_dir: Path | None) -> None:
        self._lease.register(connection)
        row = self._writing.read_head(connection)
        if anchor_dir is not None:
            self._anchor = ServerAnchor(
                anchor_dir,
                row.database_id,
                self._database.name,
                address=self._address,
                last=row.sequence,
                has_commit=lambda head: has_commit(connection, head),
            )
            self._known.on_change = self._anchor.write
        self._known.take(row)

    @property
    def sequence(self) -> int:
        """See `LogStore`."""
        return self._known.head.sequence

    @property
    def last_at(self) -> datetime:
        """See `LogStore`."""
        return self._known.last_at

    # Groups

    @property
    def _connection(self) -> Connection:  # type: ignore[override]  # another one after each error
        """What units of work read from, inside a group."""
        return self._writing.after_all

    @contextlib.contextmanager
    def group(self, *, wait: bool = True) -> Iterator[News | None]:
        """One transaction, which holds the lock of the log."""
        with self._writing.group(wait=wait) as news:
            yield news

    @contextlib.contextmanager
    def optimistic_group(self, *, wait: bool = True) -> Iterator[News | None]:
        """A transaction that begins with the first read, or else when it is stored: then a commit is one round trip."""
        with self._writing.group(wait=wait, looks_first=self._known.has_holds) as news:
            yield news

    @contextlib.contextmanager
    def reading(self) -> Iterator[News | None]:
        """A transaction that sees one state of the log, without its lock."""
        with self._writing.reading() as news:
            yield news

    def advance(self, states: Sequence[SessionState], until: int) -> list[SessionState | None]:
        """See `SharedLog`."""
        return later.advance(self._writing.driver, states, until)

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """See `LogStore`."""
        check_metadata_keys(units)
        known, before = self._known, self._writing.written
        written = before or Written(known.head, known.keys.copy(), known.last_at)
        staged, kept = self._writing.staged, contents.keep(self._writing.begin, units)
        writer = log.LogWriter(self._writing.connection, written.head, written.keys, staged, kept)
        for unit in units:
            writer.add(unit)
            written.at = max(written.at, unit.now)
        writer.flush()
        self._lease.note_executions(staged, units)
        expiries = {state.key: to_micros(state.lease.expires_at) for state in touched if state.lease is not None}
        staged.run_all(_EXPIRES, list(expiries.items()))
        written.head = writer.head
        self._writing.written = written

    def note_import(self, first: int, last: int) -> None:
        """See `LogStore`."""
        log.note_import(self._connection, first, last)

    def actor_of(self, sequence: int) -> str:
        """See `LogStore.actor_of`."""
        return stored_sessions.actor_of(self._connection, sequence)

    def stored_by(self, identity: str) -> Mapping[int, int]:
        """See `LogStore.stored_by`."""
        return {} if "\0" in identity else stored_sessions.stored_by(self._connection, identity)

    # Reading

    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """See `SharedLog`."""
        with snapshot(self.readers) as connection:
            return servers.orphans(connection)

    def expired(self, now: datetime, limit: int) -> list[str]:
        """See `LogStore`."""
        with snapshot(self.readers) as connection:
            return stored_sessions.expired(connection, now, limit)

    def expiry_of(self, state: SessionState) -> datetime | None:
        """See `SharedLog`."""
        with snapshot(self.readers) as connection:
            micros = connection.execute(_EXPIRY, {"key": state.key}).scalar()
        return None if micros is None else from_micros(micros)

    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """See `LogStore`."""
        with self._writing.beside() as connection:
            outcomes.forget(connection, before)

    def keep_denials(self, denials: Sequence[Denial], most: int) -> None:
        """See `LogStore`."""
        with self._denials() as connection:
            stored_denials.keep(connection, [_without_nul(denial) for denial in denials], most)

    def forget_denials(self, before: datetime) -> int:
        """See `LogStore`."""
        with self._denials() as connection:
            return stored_denials.forget(connection, before)

    @contextlib.contextmanager
    def _denials(self) -> Iterator[Connection]:
        with self._writing.beside() as connection:
            # One server at a time: two might wait for each other's rows.
            connection.exec_driver_sql("LOCK TABLE denials IN SHARE ROW EXCLUSIVE MODE")
            yield connection

    @contextlib.contextmanager
    def turn_to_prune(self) -> Iterator[bool]:
        """Tell whether no other server prunes by its settings now. If so, none does until the end of the block."""
        with self._database.reported(), contextlib.closing(self._database.connect()) as connection:
            yield connection.execute(_TRY_TO_PRUNE).fetchone() == (True,)

    def size_bytes(self) -> int:
        """Return the size of the tables and indexes."""
        with snapshot(self.readers) as connection:
            return objects.size_bytes(connection)

    def observe_commits(self, observe: Callable[[float], object]) -> None:
        """See `DatabaseLog`. It is the time of one message, with which the rows of the group are sent, too."""
        self._writing.observe = observe

    def figures(self) -> FileFigures:
        """Return that size, and how many live sessions there are."""
        with snapshot(self.readers) as connection:
            live = stored_sessions.count_live(connection)
        return FileFigures(self.size_bytes(), None, None, live)

    def count_with_access(self) -> int:
        """Return how many live sessions have rules of access."""
        with snapshot(self.readers) as connection:
            return stored_sessions.count_with_access(connection)

    # Other servers

    def head(self) -> int:
        """See `SharedLog`. A connection that has broken is replaced once: reading the head again does no harm."""
        with self._barrier_lock:
            while True:
                is_new = self._barrier is None or self._barrier.closed
                try:
                    if self._barrier is None or is_new:
                        self._barrier = self._database.connect(is_brief=True)
                    row = self._barrier.execute("SELECT sequence FROM head").fetchone()
                except psycopg.Error as error:
                    if self._barrier is not None:
                        self._barrier.close()
                    if is_new:
                        raise self._database.unavailable(error) from error
                else:
                    if row is None:
                        raise without_head(self._database.name)
                    return int(row[0])

    def news(self) -> News | None:
        """See `SharedLog`. A connection that has broken is replaced once, as for `head`."""
        is_new = not self._writing.is_open
        try:
            return self._read_news()
        except UnavailableError:
            if is_new:
                raise
            return self._read_news()

    def _read_news(self) -> News | None:
        with self._writing.using() as connection:
            row = self._writing.read_head(connection)
            if row.epoch != self._lease.epoch:
                self._lease.register(connection)
                raise FencedError
            return self._known.learn(connection, row)

    def listen(self, on_news: Callable[[], None]) -> None:
        """See `SharedLog`."""
        self._notices.listen(on_news)

    def tell(self) -> None:
        """See `SharedLog`."""
        self._notices.tell()

    def announce(self, address: str) -> None:
        """See `SharedLog`."""
        self._lease.address = address.replace("\0", "")

    def server_of(self, execution_id: str) -> str | None:
        """See `SharedLog`."""
        with snapshot(self.readers) as connection:
            return servers.server_of(connection, execution_id, self._lease.server_id)

    @property
    def lease_s(self) -> float:
        """See `SharedLog`."""
        return self._lease.lease_s

    def renew(self) -> None:
        """See `SharedLog`."""
        self._notices.has_others = self._lease.renew()

    def fence(self) -> Sequence[str]:
        """See `SharedLog`."""
        with self._writing.using() as connection:
            fenced = self._lease.fence(connection)
        if self._known.has_holds:
            with self._writing.beside() as checked:
                holds.forget(checked)
        return fenced

    @property
    def holds(self) -> Mapping[str, SharedHold]:
        """See `SharedLog`."""
        return self._known.holds

    def hold(self, session_id: str, hold_id: str) -> None:
        """See `SharedLog`."""
        with self._writing.beside() as connection:
            holds.begin(connection, session_id, hold_id, self._lease)

    def fill_hold(self, hold_id: str) -> bool:
        """See `SharedLog`."""
        with self._writing.beside() as connection:
            return holds.fill(connection, hold_id)

    def end_hold(self, hold_id: str) -> None:
        """See `SharedLog`."""
        with self._writing.beside() as connection:
            holds.end(connection, hold_id)

    def moved_to(self, session_id: str, since: int) -> str | None:
        """See `SharedLog`."""
        with snapshot(self.readers) as connection:
            return holds.moved_to(connection, session_id, since)

    def close(self) -> None:
        """See `LogStore`."""
        self._notices.close()
        with contextlib.suppress(*DRIVER_ERRORS, StateError):
            self._writing.close()
        if self._barrier is not None:
            self._barrier.close()
        if self._anchor is not None:
            self._known.on_change = lambda _: None
            self._anchor.close()
        self._lease.close()
        self.readers.dispose()


def _without_nul(denial: Denial) -> Denial:
    refused = {name: text.replace("\0", "\N{REPLACEMENT CHARACTER}") for name, text in denial.refused._asdict().items()}
    return replace(denial, **refused)
