"""Connections and cursors of psycopg that take the statements of the store as those of sqlite3 do."""

from collections.abc import Iterable, Sequence
from typing import Any

import psycopg

from dspex_persist.state.store.dialect import translated


class Cursor(psycopg.Cursor[Any]):
    """A cursor that takes the statements of the store, with question marks, and those with psycopg's placeholders."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> "Cursor":
        """Run a statement."""
        if isinstance(query, str) and (not params or isinstance(params, tuple | list)) and "%s" not in query:
            query, order = translated(query)
            if order is not None:
                params = [params[place] for place in order]
            if not params:
                # With parameters, psycopg reads %% as %.
                params = () if "%%" in query else None
        super().execute(query, params, **options)
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        """Run a statement once for each row."""
        if isinstance(query, str) and "%s" not in query and "%(" not in query:
            query, order = translated(query)
            if order is not None:
                params_seq = [[row[place] for place in order] for row in params_seq]
        super().executemany(query, params_seq, **options)


class Connection(psycopg.Connection[Any]):
    """A connection that is a `Driver`, as those of sqlite3 are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cursor_factory = Cursor

    def executemany(self, statement: str, rows: Iterable[Sequence[object]]) -> Cursor:
        """Run a statement once for each row."""
        cursor = Cursor(self)
        cursor.executemany(statement, rows)
        return cursor
