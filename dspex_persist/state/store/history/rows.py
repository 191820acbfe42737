"""What all queries on the log share: conditions, pages, JSON that may be damaged."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from dspex_persist.state.audit import Cursor, Page, Query, T, is_glob
from dspex_persist.state.decoding import damaged
from dspex_persist.state.journal import check_name
from dspex_persist.state.store import damage
from dspex_persist.state.store.engine import named_rows
from dspex_persist.state.store.schema import is_unicode
from dspex_persist.state.values.json_text import stored

PAGE_BYTES: Final = 4 * 1024 * 1024
"""The most bytes of a history in one page, unless a single version is larger."""
WINDOW: Final = 50_000
"""The most commits that one snapshot scans for a query without a selective condition."""


def sound_document(column: str) -> str:
    """Return an SQL expression for the column's JSON in a form that SQLite can parse.

    Old releases wrote bare NaN, and a file may be damaged.
    """
    return f"CASE WHEN json_valid({column}) OR {column} IS NULL THEN {column} ELSE mended_json({column}) END"


BEGINNING: Final = sound_document("beginning.body")
ENDING: Final = sound_document("ending.body")


def all_rows(connection: Connection, statement: str, *parameters: object) -> Sequence[Any]:
    return connection.exec_driver_sql(statement, parameters).fetchall()


def some_rows(connection: Connection, statement: str, most: int, *parameters: object) -> tuple[list[Any], Any]:
    """Read up to `most` rows, or `PAGE_BYTES` of values; `statement` ends in a LIMIT.

    Returns:
        The rows, and the last of them if more follow, else None.
    """
    page: list[Any] = []
    size_bytes = 0
    rows = named_rows(connection, statement, *parameters, most + 1)
    for row in rows:
        if len(page) == most or size_bytes >= PAGE_BYTES:
            rows.close()
            return page, page[-1]
        page.append(row)
        size_bytes += len(row.text or "") + len(row.binary or b"") + len(row.metadata or "")
    return page, None


def first_row(connection: Connection, statement: str, *parameters: object) -> Any:
    return connection.exec_driver_sql(statement, parameters).first()


class Conditions:
    """The conditions of a WHERE clause, with their parameters in order."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.parameters: list[object] = []

    def add(self, text: str, *parameters: object) -> None:
        self._texts.append(text)
        self.parameters += (searchable(each) if isinstance(each, str) else each for each in parameters)

    def add_all(self, others: "Conditions") -> None:
        self._texts += others._texts
        self.parameters += others.parameters

    def add_equal(self, column: str, wanted: object) -> None:
        """Require a value of a column; "" and None require nothing."""
        if wanted not in ("", None):
            self.add(f"{column} = ?", wanted)

    def add_among(self, column: str, wanted: Sequence[object]) -> None:
        self.add(f"{column} IN ({', '.join('?' * len(wanted))})", *wanted)

    def add_metadata(self, column: str, wanted: Iterable[tuple[str, str]]) -> None:
        for entry in wanted:
            self.add(f"EXISTS (SELECT 1 FROM json_each({column}) WHERE key = ? AND value = ?)", *entry)

    def __str__(self) -> str:
        return f" WHERE {' AND '.join(self._texts)}" if self._texts else ""


def of_tool(conditions: Conditions, tool: str, column: str = "executions.tool") -> None:
    if is_glob(tool):
        conditions.add(f"{column} GLOB ?", glob_pattern(tool))
    else:
        conditions.add_equal(column, tool)


def glob_pattern(glob: str) -> str:
    """Return our glob as a pattern for SQLite's GLOB, in which brackets are sets of characters."""
    return glob.replace("[", "[[]")


def records_of(rows: Sequence[Any], convert: Callable[[Any], T]) -> list[T]:
    """Convert each row to a record. A damaged row fails the whole query; the error names its session."""
    records: list[T] = []
    for row in rows:
        try:
            records.append(convert(row))
        except damage.own_errors():
            raise
        except Exception as error:
            raise damaged(row.session_id, error) from error
    return records


class Bounds(NamedTuple):
    """The range of commits that a query covers: after `after`, up to and including `last`."""

    after: int
    last: int


def searchable(text: object) -> str | None:
    """Return a text to search for; None, which matches no row, for a text that SQLite cannot store."""
    name = check_name(text)
    return name if is_unicode(name) else None


def read_json(text: str | None) -> Any:
    return None if text is None else stored(text)


def rows_of_page(
    connection: Connection,
    statement: str,
    key: str,
    conditions: Conditions,
    query: Query[Any],
    bounds: Bounds,
    after: Cursor | None,
    most: int,
) -> Sequence[Any]:
    """Read a page in the order of `key`, a commit number, with one row more than `most` if there is one."""
    first, last = bounds
    conditions.add(f"{key} > ?", first)
    conditions.add(f"{key} <= ?", last)
    if after is not None:
        conditions.add(f"{key} {'<' if query.newest_first else '>'} ?", after[0])
    order = f" ORDER BY {key} {'DESC' if query.newest_first else ''} LIMIT ?"
    return all_rows(connection, statement + str(conditions) + order, *conditions.parameters, most + 1)


def page_of(rows: Sequence[Any], most: int, convert: Callable[[Any], T], key: Callable[[Any], Cursor]) -> Page[T]:
    return Page(records_of(rows[:most], convert), key(rows[most - 1]) if len(rows) > most else None)
