"""Notices between servers: that there may be news. They are hints, of which any may be lost: servers also poll."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Final

import psycopg
from psycopg import sql

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import StateError
from dspex_persist.state.store.postgres.connections import Database

_POLL_S: Final = 1.0
_MOST_NAME_BYTES: Final = 63
_logger: Final = get_logger(__name__)


class Notices:
    """Sends the notices of one server and listens to those of the others, each on a thread and connection of its own.

    They are sent after the commit, because transactions that notify wait for each other, and several commits may be one
    notice. The channel is that of the schema: databases may have several.

    Args:
        database: The database.
        server_id: Who sends; its own notices are no news.
    """

    def __init__(self, database: Database, server_id: str) -> None:
        self._database = database
        self._server_id = server_id
        # In bytes, as the database counts: it cuts off the name to listen to, and refuses to notify a longer one.
        name = f"dspex_persist.{database.schema}".encode()[:_MOST_NAME_BYTES]
        self._channel = name.decode(errors="ignore")
        self._closed = threading.Event()
        self._to_tell = threading.Event()
        self._threads: list[threading.Thread] = []

    def listen(self, on_news: Callable[[], None]) -> None:
        """Call `on_news`, on a thread of this object, when another server has told, and after each connection."""
        listening = threading.Thread(target=self._listen, args=(on_news,), daemon=True, name="dspex-persist-listen")
        telling = threading.Thread(target=self._tell, daemon=True, name="dspex-persist-tell")
        self._threads = [listening, telling]
        for thread in self._threads:
            thread.start()

    def tell(self) -> None:
        """Tell the others soon. It does not block."""
        self._to_tell.set()

    def close(self) -> None:
        """End the threads."""
        self._closed.set()
        self._to_tell.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _listen(self, on_news: Callable[[], None]) -> None:
        is_away = False
        while not self._closed.is_set():
            try:
                with contextlib.closing(self._database.connect()) as connection:
                    connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
                    is_away = False
                    on_news()
                    self._wait(connection, on_news)
            except (psycopg.Error, StateError) as error:
                if not is_away:
                    _logger.warning("not listening to other servers", reason=self._database.reason(error))
                is_away = True
                self._closed.wait(_POLL_S)

    def _wait(self, connection: "psycopg.Connection[Any]", on_news: Callable[[], None]) -> None:
        while not self._closed.is_set():
            for notice in connection.notifies(timeout=_POLL_S, stop_after=1):
                if notice.payload != self._server_id:
                    on_news()

    def _tell(self) -> None:
        connection: psycopg.Connection[Any] | None = None
        is_last = False
        while not is_last:
            self._to_tell.wait()
            self._to_tell.clear()
            # One more when this object closes: it ends the waiting of `_listen`.
            is_last = self._closed.is_set()
            try:
                if connection is None or connection.closed:
                    connection = self._database.connect()
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
