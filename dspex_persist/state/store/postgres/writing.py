"""The connection that writes: one group of commits is one transaction, which holds the lock of the log."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any, Final, NoReturn

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection as Checked
from sqlalchemy.exc import DBAPIError

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.anchor import Head
from dspex_persist.state.errors import StateError, StorageError, UnavailableError
from dspex_persist.state.log_store import FencedError, MovedError, News, UnwritableError, WouldWaitError
from dspex_persist.state.shared.settling import settled
from dspex_persist.state.store.log import Keys
from dspex_persist.state.store.postgres import heads, later
from dspex_persist.state.store.postgres.connections import DRIVER_ERRORS, Database, run
from dspex_persist.state.store.postgres.cursors import Connection, NoAnswerError
from dspex_persist.state.store.postgres.heads import HeadRow, KnownHead
from dspex_persist.state.store.postgres.servers import Lease
from dspex_persist.state.store.postgres.staging import Staged

# Errors of the rows of one unit: its data, a constraint, a limit of the database.
_OF_ONE_UNIT: Final = ("22", "23", "54")
# How an optimistic group has ended.
_GIVEN_UP: Final = {heads.MOVED: MovedError, heads.LOCKED: WouldWaitError}
_COMMIT_S: Final = 20.0
_COMMIT_WARNING: Final = "01000"
_logger: Final = get_logger(__name__)


class Written:
    """What a group has written so far: where the log ends if it is committed."""

    def __init__(self, head: Head, keys: Keys, at: datetime) -> None:
        self.head, self.keys, self.at = head, keys, at


class Writing:
    """The writing half of the log. One thread at a time uses it.

    Args:
        database: The database.
        lease: The lease of this server, which each group is part of.
        known: What this server knows of the head.
        settle_s: How long to look whether a group was stored whose COMMIT was not answered, in seconds.
    """

    def __init__(self, database: Database, lease: Lease, known: KnownHead, settle_s: float) -> None:
        self._database = database
        self._lease = lease
        self._known = known
        self._settle_s = settle_s
        self._engine = database.engine()
        self._checked: Checked | None = None
        # The names of the statements that the connection has prepared.
        self._prepared: set[str] = set()
        self._staged: Staged | None = None
        self.written: Written | None = None
        self.observe: Callable[[float], object] | None = None
        # Whether the group is optimistic, and its transaction has not begun; and whether it may wait for the lock.
        self._is_pending = self._waits = False

    @property
    def is_open(self) -> bool:
        """Whether there is a connection. It may have broken since it was used."""
        return self._checked is not None

    @property
    def connection(self) -> Checked:
        """The connection, while it is open."""
        assert self._checked is not None, "it is connected"
        return self._checked

    @property
    def after_all(self) -> Checked:
        """The connection, in the transaction of the group, once it has run all statements that are staged."""
        self.begin()
        if self._staged is not None:
            self._staged.send()
        return self.connection

    @property
    def staged(self) -> Staged:
        """Where the statements of a group go that return nothing. They are sent with its COMMIT, or before a read."""
        if self._staged is None:
            self._staged = Staged(self.driver, self._prepared, self.begin)
        return self._staged

    @property
    def driver(self) -> Connection:
        """The driver's connection, while it is open."""
        driver = self.connection.connection.dbapi_connection
        assert isinstance(driver, Connection), "it is of `Database`"
        return driver

    def connect(self) -> Connection:
        """Return the driver's connection, a new one after an error.

        Raises:
            UnavailableError: The database cannot be reached.
        """
        if self._checked is None:
            try:
                self._checked = self._engine.connect()
                self.driver.add_notice_handler(self._note)
                self._prepare()
            except DRIVER_ERRORS as error:
                self.drop()
                raise self._database.unavailable(error) from error
        return self.driver

    def _prepare(self) -> None:
        """Prepare the statements that each group needs, and note what else is prepared."""
        # Asked for, because psycopg forgets all prepared statements with a transaction that is rolled back.
        self._prepared = {name for (name,) in run(self.driver, "SELECT name FROM pg_prepared_statements").fetchall()}
        if "dspex_head" not in self._prepared:
            run(self.driver, f"{heads.PREPARE.format(server=self._lease.server_id)}; {later.PREPARE}")

    def drop(self) -> None:
        """Give the connection up: what an error leaves behind in one is not worth knowing."""
        if self._checked is not None:
            checked, self._checked = self._checked, None
            with contextlib.suppress(Exception):
                checked.invalidate()
            with contextlib.suppress(Exception):
                checked.close()

    @staticmethod
    def _note(diagnostic: "psycopg.errors.Diagnostic") -> None:
        if diagnostic.sqlstate == _COMMIT_WARNING:
            # "canceling wait for synchronous replication": committed here, and perhaps not there.
            _logger.error("the database warns", reason=diagnostic.message_primary)

    @contextlib.contextmanager
    def using(self) -> Iterator["psycopg.Connection[Any]"]:
        """Have the connection outside of a group, for something that may be repeated."""
        try:
            yield self.connect()
        except DRIVER_ERRORS as error:
            self.drop()
            raise self._database.unavailable(error) from error

    @contextlib.contextmanager
    def beside(self) -> Iterator[Checked]:
        """Write something that is not a part of the log, in a transaction of its own.

        Raises:
            StorageError: Nothing was written.
        """
        try:
            with self.connect().transaction():
                yield self.connection
        except DRIVER_ERRORS as error:
            self.drop()
            raise StorageError(self._database.reason(error)) from error

    def read_head(self, connection: "psycopg.Connection[Any]") -> HeadRow:
        """Return the head, outside of a group."""
        return self._known.row_of(run(connection, "EXECUTE dspex_head").fetchone())

    @contextlib.contextmanager
    def group(self, *, wait: bool, looks_first: bool = True) -> Iterator[News | None]:
        """See `LogStore.group`; unless it looks at the head first, `SharedLog.optimistic_group`."""
        self.written = self._staged = None
        self._is_pending, self._waits = not looks_first, wait
        is_sent = False
        try:
            if looks_first:
                row = self._begin_connected(wait)
                yield self._known.learn(self.driver, row)
            else:
                self.connect()
                yield None
            if self.written is None:
                self.begin()
                self._leave()
                return
            end = heads.end_of_group(self.written.head, self.written.keys, self.written.at)
            parts = [self._begin_with(), self.staged.take(), end]
            is_sent = True
            began = time.perf_counter()
            self._commit(";".join(filter(None, parts)))
            if self.observe is not None:
                self.observe(time.perf_counter() - began)
        except DRIVER_ERRORS as error:
            self._end_failed(error, is_sent)
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._is_pending = False
        self._note_written()

    @contextlib.contextmanager
    def reading(self) -> Iterator[News | None]:
        """See `SharedLog.reading`."""
        self.written = self._staged = None
        try:
            self.connect()
            cursor = run(self.driver, heads.BEGIN_TO_READ)
            cursor.nextset()
            yield self._known.learn(self.driver, self._known.row_of(cursor.fetchone()))
            self._leave()
        except DRIVER_ERRORS as error:
            self._end_failed(error, is_sent=False)
        except BaseException:
            self._roll_back()
            raise

    def begin(self) -> Connection:
        """Begin the transaction of an optimistic group, which has to read something, and return its connection.

        Raises:
            MovedError: The head is another one.
            FencedError: See `LogStore`.
            WouldWaitError: See `LogStore.group`.
        """
        if self._is_pending:
            try:
                row = self._begin(self._waits)
            except psycopg.OperationalError as error:
                if not self._is_broken():
                    raise
                self.drop()
                raise MovedError from error
            self._is_pending = False
            if not self._known.is_at(row):
                self._leave()
                raise MovedError
        return self.driver

    def _begin_with(self) -> str:
        """Return the statements to begin an optimistic group with, just before it is stored; none for others."""
        if not self._is_pending:
            return ""
        if self.driver.has_heard():
            # It may be that the database has closed the connection. What is sent then has an unknown outcome.
            self.begin()
            return ""
        return self._known.begin_here(self._lease.epoch, self._lease.attempt, wait=self._waits)

    def _note_written(self) -> None:
        assert self.written is not None, "there was something to commit"
        self._known.advance(self.written.head, self.written.keys, self.written.at)

    def _begin_connected(self, wait: bool) -> HeadRow:
        """Begin a transaction; on another connection if the one that was there has broken meanwhile."""
        is_new = self._checked is None
        self.connect()
        try:
            return self._begin(wait)
        except psycopg.OperationalError:
            if is_new or not self._is_broken():
                raise
        self.drop()
        self.connect()
        return self._begin(wait)

    def _is_broken(self) -> bool:
        # SQLAlchemy invalidates the connection if it is the first to notice, and has no driver's connection any more.
        return self._checked is None or self._checked.invalidated or self.driver.broken or self.driver.closed

    def _begin(self, wait: bool) -> HeadRow:
        cursor = run(self.driver, heads.BEGIN if wait else heads.TRY_TO_BEGIN)
        cursor.nextset()
        has_lock = cursor.fetchone() != (False,)
        cursor.nextset()
        row = self._known.row_of(cursor.fetchone())
        if not has_lock:
            self._leave()
            raise WouldWaitError
        if row.epoch != self._lease.epoch:
            self._leave()
            self._lease.register(self.driver)
            raise FencedError
        return row

    def _leave(self) -> None:
        """End a transaction that has written nothing. With ROLLBACK, psycopg would deallocate what is prepared."""
        if run(self.driver, "END").statusmessage != "COMMIT":
            # An error had ended it before.
            self._prepare()

    def _commit(self, end: str) -> None:
        # It may wait for a standby that is away, for as long as that is.
        driver = self.driver
        driver.most_s = _COMMIT_S
        try:
            cursor = run(driver, end)
            while cursor.nextset():
                pass
        finally:
            driver.most_s = math.inf
        if cursor.statusmessage != "COMMIT":
            # What the database answers, without an error, if an error has ended the transaction before.
            raise StorageError("the database has rolled the transaction back")

    def _roll_back(self) -> None:
        try:
            if self._checked is not None:
                self._end_transaction()
                if self._checked.in_transaction():
                    self._checked.rollback()
        except Exception:  # noqa: BLE001 - whatever it is, another connection is the answer
            self.drop()

    def _end_transaction(self) -> None:
        if self.driver.info.transaction_status != TransactionStatus.IDLE:
            self.driver.execute("ROLLBACK")
            self._prepare()

    def _end_failed(self, error: Exception, is_sent: bool) -> None:
        """Raise the error for a group that was not stored. Return if it was, although its COMMIT failed."""
        reason = self._database.reason(error)
        if self._is_broken():
            self.drop()
            if is_sent and self._is_stored(reason):
                return
            if isinstance(_original(error), NoAnswerError):
                raise UnavailableError(reason) from error
            raise StorageError(f"the connection to the database was lost: {reason}") from error
        self._roll_back()
        original = _original(error)
        if isinstance(original, psycopg.Error) and original.diag.sqlstate in _GIVEN_UP:
            raise _GIVEN_UP[original.diag.sqlstate]
        self._raise_for(error, reason)

    def _raise_for(self, error: Exception, reason: str) -> NoReturn:
        original = _original(error)
        state = getattr(original, "sqlstate", None) or ""
        _logger.warning("group failed", reason=reason)
        if state[:2] in _OF_ONE_UNIT or isinstance(original, psycopg.DataError | psycopg.ProgrammingError):
            raise UnwritableError(StorageError(reason)) from error
        raise StorageError(reason) from error

    def _is_stored(self, reason: str) -> bool:
        """Find out whether a group was stored whose COMMIT was not answered.

        Raises:
            OutcomeUnknownError: The database does not answer.
        """
        assert self.written is not None, "there was something to commit"
        unknown = f"{self._database.name} did not answer whether it has stored the commit"
        stored = settled(
            partial(self._look_up_anew, self.written.head),
            (*DRIVER_ERRORS, StateError),
            lambda _: unknown,
            settle_s=self._settle_s,
        )
        _logger.warning("commit settled", reason=reason, stored=stored)
        return stored

    def _look_up_anew(self, head: Head) -> bool:
        try:
            return self._look_up(head)
        except (*DRIVER_ERRORS, StateError):
            self.drop()
            raise

    def _look_up(self, head: Head) -> bool:
        connection = self.connect()
        # The session of the lost connection holds the lock until its transaction has ended, one way or the other.
        run(connection, heads.BEGIN)
        try:
            is_there = heads.has_commit(connection, head)
            if not is_there:
                # All of it may still be on its way.
                self._lease.move_on(connection)
        finally:
            is_done = run(connection, "END").statusmessage == "COMMIT"
        if not is_done:
            raise psycopg.OperationalError("the database has rolled the transaction back")
        return is_there

    def close(self) -> None:
        """End the lease, and close the connection."""
        if self._checked is not None:
            # Without a connection, the database is away, and the lease ends by itself.
            with contextlib.suppress(*DRIVER_ERRORS, StateError):
                self._lease.leave(self.driver)
        self.drop()
        self._engine.dispose()


def _original(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error
