"""Notices between servers: that there may be news."""

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any, Final

import psycopg
from psycopg import sql

from dspex_persist.state.errors import StateError
from dspex_persist.state.shared.listener import POLL_S, Listener
from dspex_persist.state.store.postgres.connections import Database
from dspex_persist.state.store.postgres.servers import Lease

_MOST_NAME_BYTES: Final = 63


class Notices:
    """Sends the notices of one server and listens to those of the others, each on a thread and connection of its own.

    They are sent after the commit, because transactions that notify wait for each other, and several commits may be one
    notice. The channel is that of the schema: databases may have several.

    A server that listens sends one notice, by which the others know that they are not alone. One that is alone sends no
    more: a notice takes longer than a commit.

    Args:
        database: The database.
        lease: The lease of the server that sends; its own notices are no news.

    Attributes:
        has_others: Whether there may be other servers.
    """

    def __init__(self, database: Database, lease: Lease) -> None:
        self._database = database
        self._lease = lease
        self._server_id = lease.server_id
        self.has_others = True
        # In bytes, as the database counts: it cuts off the name to listen to, and refuses to notify a longer one.
        name = f"dspex_persist.{database.schema}".encode()[:_MOST_NAME_BYTES]
        self._channel = name.decode(errors="ignore")
        self._closed = threading.Event()
        self._to_tell = threading.Event()
        self._listener: Listener | None = None
        self._telling: threading.Thread | None = None

    def listen(self, on_news: Callable[[], None]) -> None:
        """Call `on_news`, on a thread of this object, when another server has told, and after each connection."""
        self._listener = Listener(self._hear, on_news, (psycopg.Error,), self._database.reason)
        self._telling = threading.Thread(target=self._tell, daemon=True, name="dspex-persist-tell")
        self._telling.start()

    def tell(self) -> None:
        """Tell the others soon, if there are any. It does not block."""
        if self.has_others:
            self._to_tell.set()

    def close(self) -> None:
        """End the threads."""
        if self._listener is not None:
            self._listener.end()
        self._closed.set()
        self._to_tell.set()
        if self._telling is not None and self._telling is not threading.current_thread():
            self._telling.join()
        if self._listener is not None:
            self._listener.close()

    def _hear(self) -> Generator[bool]:
        """See `Listener`."""
        with contextlib.closing(self._database.connect(is_brief=True)) as connection:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
            # Whoever comes from now on is heard.
            self._to_tell.set()
            self.has_others = self._lease.has_others(connection)
            yield True
            while True:
                senders = {notice.payload for notice in connection.notifies(timeout=POLL_S, stop_after=1)}
                is_news = bool(senders - {self._server_id})
                self.has_others = self.has_others or is_news
                yield is_news

    def _tell(self) -> None:
        connection: psycopg.Connection[Any] | None = None
        is_last = False
        while not is_last:
            self._to_tell.wait()
            self._to_tell.clear()
            # One more when this object closes: it ends the waiting of the listener.
            is_last = self._closed.is_set()
            try:
                if connection is None or connection.closed:
                    if is_last:
                        # Nobody waits for a database that is away: the listener looks every second, too.
                        break
                    connection = self._database.connect(is_brief=True)
                    # A hint need not be on the disk: waiting for that would delay the commits that follow.
                    connection.execute("SET synchronous_commit = off")
                connection.execute("SELECT pg_notify(%s, %s)", (self._channel, self._server_id))
            except (psycopg.Error, StateError):
                # The others poll.
                if connection is not None:
                    connection.close()
                connection = None
        if connection is not None:
            connection.close()
