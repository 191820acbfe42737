"""Rows of the log for questions: conditions, pages, JSON that may be damaged."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from dspex_persist.state.audit import Cursor, Page, Query, T, is_glob
from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.store import damage
from dspex_persist.state.store.schema import is_unicode
from dspex_persist.state.values.json_text import stored

PAGE_BYTES: Final = 4 * 1024 * 1024
"""How much of a history is read at once, but for one version that is larger."""
WINDOW: Final = 50_000
"""Commits that one snapshot walks through at most, where nothing narrows a question down."""


def sound_document(column: str) -> str:
    """A document that SQLite can read: releases before this one wrote bare NaN, and a file may be damaged."""
    return f"CASE WHEN json_valid({column}) OR {column} IS NULL THEN {column} ELSE mended_json({column}) END"


BEGINNING: Final = sound_document("beginning.body")
ENDING: Final = sound_document("ending.body")


def all_rows(connection: Connection, statement: str, *parameters: object) -> Sequence[Any]:
    return connection.exec_driver_sql(statement, parameters).fetchall()


def some_rows(connection: Connection, statement: str, most: int, *parameters: object) -> tuple[list[Any], Any]:
    """Up to `most` rows, and fewer once they are a page full; with the last of them if there are more.

    `statement` ends in its limit.
    """
    found: list[Any] = []
    size_bytes = 0
    rows = connection.exec_driver_sql(statement, (*parameters, most + 1))
    for row in rows:
        if len(found) == most or size_bytes >= PAGE_BYTES:
            rows.close()
            return found, found[-1]
        found.append(row)
        size_bytes += len(row.text or "") + len(row.binary or b"") + len(row.metadata or "")
    return found, None


def first_row(connection: Connection, statement: str, *parameters: object) -> Any:
    return connection.exec_driver_sql(statement, parameters).first()


class Conditions:
    """What a WHERE clause asks for, with the parameters in its order."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.parameters: list[object] = []

    def add(self, text: str, *parameters: object) -> None:
        self._texts.append(text)
        self.parameters += (askable(each) if isinstance(each, str) else each for each in parameters)

    def add_all(self, others: "Conditions") -> None:
        self._texts += others._texts
        self.parameters += others.parameters

    def add_equal(self, column: str, wanted: object) -> None:
        """Nothing, where what is wanted is "" or None."""
        if wanted not in ("", None):
            self.add(f"{column} = ?", wanted)

    def add_among(self, column: str, wanted: Sequence[object]) -> None:
        self.add(f"{column} IN ({', '.join('?' * len(wanted))})", *wanted)

    def add_metadata(self, column: str, wanted: Iterable[tuple[str, str]]) -> None:
        for entry in wanted:
            self.add(f"EXISTS (SELECT 1 FROM json_each({column}) WHERE key = ? AND value = ?)", *entry)

    def __str__(self) -> str:
        return f" WHERE {' AND '.join(self._texts)}" if self._texts else ""


def of_tool(conditions: Conditions, tool: str) -> None:
    if is_glob(tool):
        conditions.add("executions.tool GLOB ?", glob_pattern(tool))
    else:
        conditions.add_equal("executions.tool", tool)


def glob_pattern(glob: str) -> str:
    """SQLite's GLOB knows sets in brackets; ours does not."""
    return glob.replace("[", "[[]")


def made_of(rows: Sequence[Any], made: Callable[[Any], T]) -> list[T]:
    """What each row says. One that makes no sense fails the question, which then leaves its session out."""
    found: list[T] = []
    for row in rows:
        try:
            found.append(made(row))
        except damage.OWN_ERRORS:
            raise
        except Exception as error:
            raise damage.damaged(row.session_id, error) from error
    return found


class Bounds(NamedTuple):
    """The commits asked for: after the first, up to and with the second."""

    after: int
    last: int


def askable(text: object) -> str | None:
    """What SQLite can be asked for; no row has anything else."""
    if not isinstance(text, str):
        raise InvalidArgumentError("question", f"{quote(text)} is not a str, as names and ids are")
    return text if is_unicode(text) else None


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
    """The rows of a page that is in the order of a commit's number, and one more if there is one."""
    first, last = bounds
    conditions.add(f"{key} > ?", first)
    conditions.add(f"{key} <= ?", last)
    if after is not None:
        conditions.add(f"{key} {'<' if query.newest_first else '>'} ?", after[0])
    order = f" ORDER BY {key} {'DESC' if query.newest_first else ''} LIMIT ?"
    return all_rows(connection, statement + str(conditions) + order, *conditions.parameters, most + 1)


def page_of(rows: Sequence[Any], most: int, made: Callable[[Any], T], key: Callable[[Any], Cursor]) -> Page[T]:
    return Page(made_of(rows[:most], made), key(rows[most - 1]) if len(rows) > most else None)
