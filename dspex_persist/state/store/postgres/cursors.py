"""Connections and cursors of psycopg that take the statements of the store as those of sqlite3 do."""

import math
import re
import select
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final, NoReturn, TypeVar

import psycopg
from psycopg.rows import namedtuple_row, tuple_row

from dspex_persist.state.store.dialect import translated
from dspex_persist.state.store.postgres.inserts import insert_of

# What `stream` fetches in one round trip; a row may have some MiB.
_STREAMED_ROWS: Final = 50
R = TypeVar("R")
QUIET_S: Final = 10.0
"""How long a database may be silent while it owes an answer, before anybody asks whether it is still there."""
_QUERY: Final = re.compile(r"\s*(?:SELECT|WITH)\b", re.IGNORECASE)


class Cursor(psycopg.Cursor[Any]):
    """A cursor that takes the statements of the store, with question marks, and those with psycopg's placeholders."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> "Cursor":
        """Run a statement."""
        if isinstance(query, str) and (not params or isinstance(params, tuple | list)) and "%s" not in query:
            query, params = _translated(query, params)
        super().execute(query, params, **options)
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        """Run a statement once for each row."""
        if isinstance(query, str) and "%s" not in query and "%(" not in query:
            query, order = translated(query)
            if order is not None:
                params_seq = [[row[place] for place in order] for row in params_seq]
        super().executemany(query, params_seq, **options)


def _translated(query: str, params: Any) -> tuple[str, Any]:
    query, order = translated(query)
    if order is not None:
        params = [params[place] for place in order]
    if not params:
        # With parameters, psycopg reads %% as %.
        return query, () if "%%" in query else None
    if _QUERY.match(query) and any(isinstance(each, str) and "\0" in each for each in params):
        # No text there has a NUL, and none is equal to NULL.
        params = [None if isinstance(each, str) and "\0" in each else each for each in params]
    return query, params


def merged(connection: psycopg.Connection[Any], statement: str, parameters: Sequence[object]) -> str:
    """Return a statement of the store with its parameters in it."""
    query: Any
    query, params = _translated(statement, parameters)
    return psycopg.ClientCursor(connection).mogrify(query, params)


class NoAnswerError(psycopg.OperationalError):
    """The database has owed an answer for too long, so that the connection was given up."""


class Connection(psycopg.Connection[Any]):
    """A connection that is a `Driver`, as those of sqlite3 are.

    A database that is stopped, or behind a network that drops what it sends, may owe an answer for ever. Nothing on
    the way tells: what acknowledges our packets is its machine, or a proxy.

    Attributes:
        is_there: Asked after a silence of `QUIET_S`: whether the database answers others, and so may only take its
            time. The connection is given up if not.
        most_s: How long the database may be silent at most, even if it is there, in seconds.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cursor_factory = Cursor
        self._numbers = count()
        self.is_there: Callable[[], bool] = _nobody_asks
        self.most_s = math.inf

    def wait(self, gen: Generator[Any, Any, R], *arguments: Any, **options: Any) -> R:
        """Wait for what the database owes, as long as it may be silent."""
        return super().wait(self._watched(gen), *arguments, **options)

    def _watched(self, gen: Generator[Any, Any, R]) -> Generator[Any, Any, R]:
        heard_at = asked_at = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                # Several times a second, nothing is ready.
                now = time.monotonic()
                if ready:
                    heard_at = asked_at = now
                elif now - asked_at > QUIET_S:
                    if now - heard_at > self.most_s or not self.is_there():
                        self._give_up(now - heard_at)
                    asked_at = now
                wanted = gen.send(ready)
        except StopIteration as end:
            result: R = end.value
            return result

    def _give_up(self, silent_s: float) -> NoReturn:
        self.pgconn.finish()
        raise NoAnswerError(f"the database has not answered for {silent_s:.0f} s")

    def has_heard(self) -> bool:
        """Whether the database has said something that nobody has asked for: mostly, that it closes the connection."""
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        return bool(poll.poll(0))

    def stream(self, statement: str, parameters: Sequence[object], named: bool = False) -> Iterator[Any]:
        """Yield the rows of a statement with only some of them in memory. The transaction has to last as long.

        Args:
            statement: A statement of the store.
            parameters: Its parameters.
            named: Whether the rows have the names of the columns.
        """
        query, params = _translated(statement, parameters)
        name = f"stream_{next(self._numbers)}"
        with psycopg.Cursor(self, row_factory=namedtuple_row if named else tuple_row) as cursor:
            cursor.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {query}".encode(), params, prepare=False)
            # Where the rest is not asked for, the end of the transaction closes it. Whoever closed it later might do so
            # in another transaction.
            while rows := cursor.execute(f"FETCH {_STREAMED_ROWS} FROM {name}".encode(), prepare=False).fetchall():
                yield from rows

    def executemany(self, statement: str, rows: Iterable[Sequence[object]]) -> Cursor:
        """Run a statement once for each row; an INSERT of several rows is one statement."""
        cursor, rows = Cursor(self), list(rows)
        if len(rows) == 1:
            return cursor.execute(statement, rows[0])
        insert = insert_of(statement)
        arrays = insert.parameters(rows) if insert is not None and rows else None
        if insert is None or arrays is None:
            cursor.executemany(statement, rows)
            return cursor
        return cursor.execute(insert.text, arrays)


def _nobody_asks() -> bool:
    return False
