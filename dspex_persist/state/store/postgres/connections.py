"""Connections to a PostgreSQL database: opened in one place, with the settings that our promises depend on."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Final, cast
from urllib.parse import unquote

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import Connection as Checked
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError

from dspex_persist.addresses import in_small_letters, shown
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.decoding import in_database
from dspex_persist.state.errors import InvalidArgumentError, NotADatabaseError, ReadFailedError, UnavailableError
from dspex_persist.state.errors.hints import Hint
from dspex_persist.state.store import damage, engine
from dspex_persist.state.store.engine import Durability
from dspex_persist.state.store.postgres.cursors import Connection
from dspex_persist.state.store.postgres.parameters import fault_of
from dspex_persist.state.store.postgres.poolers import refuse_shared

DRIVER_ERRORS: Final = (DBAPIError, psycopg.Error)
"""What the driver raises, itself or through SQLAlchemy."""
damage.DRIVER_ERRORS.append(psycopg.Error)

_OLDEST: Final = 140_000
# Of the client's side: a server that has vanished is given up within this time, in seconds or milliseconds.
_NETWORK: Final = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
}
# A group waits so long for the lock of the log, which the sessions before it hold for milliseconds. A session that was
# stopped while it held the lock loses it before those that wait for it give up.
_SETTINGS: Final = {
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "5s",
    "tcp_user_timeout": "10s",
    "timezone": "UTC",
    "statement_timeout": "0",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "standard_conforming_strings": "on",
    "datestyle": "ISO",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
    # A connection that waits is no idle one.
    "idle_session_timeout": "0",
}
# Those of newer releases.
_NEWER: Final = sql.SQL("SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout'")
# The statements of the store are written for indexes and nested loops: SQLite has no other joins, and gets hints. These
# settings are the hints here. Without them, a page of the history may read all executions, as statistics change.
_PLANS: Final = {
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_seqscan": "off",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
}
_SET: Final = sql.SQL("SELECT set_config({name}, {value}, false)")
_FACTS: Final = sql.SQL("""
    SELECT current_setting('server_version_num')::int, current_setting('server_version'),
        current_setting('server_encoding'), pg_is_in_recovery(), current_setting('fsync'),
        current_setting('full_page_writes'), current_setting('synchronous_commit')
""")
_NOT_ALLOWED: Final = "42501"
# Classes of errors because of what is in a row, or of what should be in the schema.
_OF_ROWS: Final = ("22", "42", "XX")
_HOST: Final = r"(?:\[[0-9A-Fa-f:.%]+\]|[^\[\]/?#:@,]*)(?::[0-9]{1,5})?"
_URL: Final = re.compile(rf"postgres(?:ql)?://(?:[^/?#@:]*(?::[^/?#@]*)?@)?{_HOST}(?:,{_HOST})*(?:/[^/?#]*)?")
_MOST_NAME_BYTES: Final = 63
"""PostgreSQL cuts longer names off, and so would take another schema for this one."""
_logger: Final = get_logger(__name__)


class Database:
    """A database, and how this process connects to it.

    Args:
        url: Its URL, postgresql://... as for libpq, with the parameter `schema` besides.
        durability: "normal": the database may acknowledge commits before they are on its disk.
        server_id: Who connects: a part of the name that the database shows for it.
        writes: Whether anything is written: if not, it does not matter how safe that would be.
    """

    def __init__(self, url: str, *, durability: Durability = "full", server_id: str = "", writes: bool = True) -> None:
        self._durability = durability
        self._writes = writes
        self.name = shown(url)
        given, self.schema = _read(url)
        ours = _NETWORK | {"application_name": f"dspex-persist:{server_id[:12]}"}
        self._conninfo = make_conninfo("", **(ours | given | {"client_encoding": "UTF8"}))

    def connect(self, *, autocommit: bool = True, is_brief: bool = False) -> Connection:
        """Open a connection.

        Args:
            autocommit: Whether each statement is a transaction.
            is_brief: Whether all statements on it are answered at once, unless the database is away. Others may take
                long, as long as the database takes new connections meanwhile.

        Raises:
            psycopg.Error: It cannot be reached, or refuses.
            NotADatabaseError: Its settings, or its version, would break our promises.
        """
        connection = self._open()
        try:
            self._prepare(connection)
            if not is_brief:
                connection.is_there = self._is_there
            if not autocommit:
                connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self) -> Connection:
        return Connection.connect(self._conninfo, autocommit=True)

    def refuse_poolers(self) -> None:
        """Raise `NotADatabaseError` if a pooler gives connections to others: they would get what is set for ours.

        Nothing of that is set before.
        """
        with self.reported(), contextlib.closing(self._open()) as first:
            refuse_shared(first, self._open, self.name)

    def _prepare(self, connection: Connection) -> None:
        """Set what is a matter of the session, and look at what is not."""
        schema = sql.Identifier(self.schema).as_string(connection)
        settings = _SETTINGS | _PLANS | {"search_path": schema}
        if self._durability == "normal":
            settings["synchronous_commit"] = "off"
        given = [_SET.format(name=sql.Literal(name), value=sql.Literal(value)) for name, value in settings.items()]
        with psycopg.Cursor(connection) as cursor:
            cursor.execute(sql.SQL("; ").join([*given, _NEWER, _FACTS]))
            while cursor.nextset():
                pass
            (facts,) = cursor.fetchall()
        self._check(*facts)

    def _is_there(self) -> bool:
        try:
            psycopg.Connection.connect(self._conninfo).close()
        except psycopg.Error:
            return False
        return True

    def _check(
        self, number: int, version: str, encoding: str, is_standby: bool, fsync: str, full_pages: str, commit: str
    ) -> None:
        faults = {
            f"it is PostgreSQL {version}; 14 or newer is needed": number < _OLDEST,
            f"its encoding is {encoding}, not UTF8: create it with ENCODING 'UTF8'": encoding != "UTF8",
        }
        of_writers = {
            "it is a standby, which takes no writes: name the primary": is_standby,
            "fsync is off, so that a power cut may destroy the database": fsync == "off",
            "full_page_writes is off, so that a power cut may destroy the database": full_pages == "off",
            "synchronous_commit is off, so that a crash of the database loses acknowledged commits: set it on for this "
            "user, or choose the durability normal": commit == "off" and self._durability == "full",
        }
        for reason, is_so in (faults | (of_writers if self._writes else {})).items():
            if is_so:
                raise NotADatabaseError(self.name, reason)

    def engine(self, *, size: int = 1, overflow: int = 0, reads: bool = False) -> Engine:
        """Return a pool of connections for SQLAlchemy.

        Args:
            size: How many idle connections it keeps.
            overflow: How many more it opens if none is idle.
            reads: Whether its transactions only read, each from one snapshot.
        """
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
        if reads:
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True, engine.NAME: self.name}
        return create_engine(
            "postgresql+psycopg://",
            creator=lambda: self.connect(autocommit=False),
            pool_size=size,
            max_overflow=overflow,
            pool_pre_ping=reads,
            use_native_hstore=False,
            execution_options=options,
        )

    def readers(self) -> Engine:
        """Return a pool for reading, whose transactions are snapshots; callers of `engine.snapshot` may have it."""
        readers = self.engine(size=4, overflow=16, reads=True)

        engine.snapshots_by(readers, self._snapshot)
        return readers

    @contextlib.contextmanager
    def _snapshot(self, readers: Engine) -> Iterator[Checked]:
        with self.reported(), in_database(), readers.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Convert what the driver raises while reading."""
        try:
            yield
        except DRIVER_ERRORS as error:
            state = _state_of(error)
            if lacks_right(error):
                raise ReadFailedError(self.name, self.reason(error)).advising(Hint.GRANT_ACCESS) from error
            if state[:2] in _OF_ROWS:
                raise ReadFailedError(self.name, self.reason(error)) from error
            raise self.unavailable(error) from error

    def unavailable(self, error: BaseException) -> UnavailableError:
        """Return what a server is told that cannot do without what it asked for, with advice if a right is missing."""
        unavailable = UnavailableError(self.reason(error))
        return unavailable.advising(Hint.GRANT_ACCESS) if lacks_right(error) else unavailable

    def reason(self, error: BaseException) -> str:
        """Return what the database says."""
        original = getattr(error, "orig", None) or error
        lines = str(original).strip().splitlines()
        return lines[0] if lines else type(original).__name__


def lacks_right(error: BaseException) -> bool:
    """Whether the database has refused something because the user may not do it."""
    return _state_of(error) == _NOT_ALLOWED


def _state_of(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None) or ""


def _read(url: str) -> tuple[dict[str, str], str]:
    """Return the parameters for libpq, and the schema.

    Raises:
        InvalidArgumentError: It is not a URL of a database.
    """
    url = in_small_letters(url)
    head, mark, query = url.partition("?")
    parameters = [part for part in query.split("&") if part] if mark else []
    schemas = [unquote(part.partition("=")[2]) for part in parameters if part.startswith("schema=")]
    rest = [part for part in parameters if not part.startswith("schema=")]
    if _URL.fullmatch(head) is None or len(schemas) > 1 or not all(schemas):
        reason = f"{shown(url)} is not postgresql://USER@HOST:PORT/DATABASE?schema=NAME"
        raise InvalidArgumentError("url", f"{reason}; characters such as @ and / in a password are written %40 and %2F")
    schema = (schemas or ["public"])[0]
    if "\0" in schema or len(schema.encode("utf-8", "replace")) > _MOST_NAME_BYTES:
        raise InvalidArgumentError(
            "url", f"{shown(url)}: the name of a schema has at most {_MOST_NAME_BYTES} bytes, and no NUL"
        )
    try:
        known = conninfo_to_dict("?".join([head, "&".join(rest)]) if rest else head)
        parameters_of = {name: str(value) for name, value in known.items() if value is not None}
    except psycopg.Error as error:
        # The message quotes what is wrong, which may be of a password.
        is_name = str(error).startswith("invalid URI query parameter") and "@" not in query
        reason = str(error).strip() if is_name else "something in it is not written as in a URL"
        raise InvalidArgumentError("url", f"{shown(url)}: {reason}") from None
    if (fault := fault_of(parameters_of)) is not None:
        raise InvalidArgumentError("url", f"{shown(url)}: {fault}")
    if "," in parameters_of.get("host", ""):
        # Of several, the one that takes writes.
        parameters_of.setdefault("target_session_attrs", "read-write")
    return parameters_of, schema


def run(connection: psycopg.Connection[Any], statements: str) -> psycopg.Cursor[Any]:
    """Run several statements in one round trip; return the cursor with the first result.

    They are those of PostgreSQL, with their parameters in them: what looks like a placeholder belongs to a value.
    """
    cursor, as_it_is = psycopg.Cursor(connection), cast(Any, statements)
    cursor.execute(as_it_is, prepare=False)
    return cursor
