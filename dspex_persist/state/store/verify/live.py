"""Check that the engine can load the live sessions."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import nullcontext

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from dspex_persist.state.errors import quote
from dspex_persist.state.store import sessions
from dspex_persist.state.store.engine import raw_rows
from dspex_persist.state.store.verify.walk import UNREADABLE, Problem, Walk, end_of_page, find_row, of_file


class LiveWalk(Walk):
    """Every live session can be loaded the way the engine loads it on first use."""

    def __init__(self) -> None:
        self._last = 0

    def __str__(self) -> str:
        return f"the live sessions after number {self._last}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        statement = "SELECT session_key, session_id FROM sessions WHERE session_key > ? AND ended_sequence IS NULL"
        for key, session_id in list(raw_rows(connection, f"{statement} ORDER BY session_key LIMIT 1000", self._last)):
            try:
                # After an error, another database ends the transaction, or what of it is nested.
                with nullcontext() if of_file(connection) else connection.begin_nested():
                    sessions.load(connection, session_id)
            except (*UNREADABLE, DBAPIError, sqlite3.Error, AttributeError, AssertionError) as error:
                reason = f"{type(error).__name__} {getattr(error, 'orig', error)}"
                yield Problem(f"session {quote(session_id)}", f"it cannot be loaded: {reason}")
            self._last = key
            if time.monotonic() > end:
                return
        self.more = self._last != _last_live(connection)


def _last_live(connection: Connection) -> int:
    (last,) = find_row(connection, "SELECT coalesce(max(session_key), 0) FROM sessions WHERE ended_sequence IS NULL")
    return int(last)
