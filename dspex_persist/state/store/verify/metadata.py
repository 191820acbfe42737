"""Check the index of metadata."""

import time
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.state.errors import quote
from dspex_persist.state.store.verify.walk import (
    BEFORE_ALL,
    PAGE_ENTRIES,
    Problem,
    Walk,
    end_of_page,
    find_row,
    of_file,
    place_of,
    rows_in,
)

# Metadata that is not JSON was reported with its commit.
_ENTRIES: Final = "json_each(iif(json_valid(versions.metadata), versions.metadata, '{}')) AS entry"
_PLACE: Final = "key, value, sequence, variable_key, version"
_NEXT_ENTRIES: Final = f"FROM metadata_entries WHERE ({_PLACE}) > (?, ?, ?, ?, ?) ORDER BY {_PLACE} LIMIT"
_LAST_OF_PAGE: Final = f"SELECT {_PLACE} {_NEXT_ENTRIES} 1 OFFSET {PAGE_ENTRIES - 1}"
_STRAYS: Final = f"""
    SELECT key, sequence, variable_key, version FROM (SELECT {_PLACE} {_NEXT_ENTRIES} {PAGE_ENTRIES}) AS listed
    WHERE NOT EXISTS (
        SELECT 1 FROM versions CROSS JOIN {_ENTRIES}
        WHERE versions.variable_key = listed.variable_key AND versions.version = listed.version
            AND versions.sequence = listed.sequence AND entry.key = listed.key AND entry.value = listed.value
    )
"""
# Without a page: the index of another database is in another order.
_ALL_STRAYS: Final = _STRAYS.replace(f"{_NEXT_ENTRIES} {PAGE_ENTRIES}", "FROM metadata_entries")
_COUNTS: Final = f"""
    SELECT (SELECT count(*) FROM metadata_entries),
        (SELECT count(*) FROM versions CROSS JOIN {_ENTRIES} WHERE versions.metadata IS NOT NULL)
"""
_INDEXED: Final = f"""
    SELECT variable_key, version, sequence, NOT EXISTS (
        SELECT 1 FROM {_ENTRIES} WHERE NOT EXISTS (
            SELECT 1 FROM metadata_entries AS found
            WHERE found.key = entry.key AND found.value = entry.value AND found.sequence = versions.sequence
                AND found.variable_key = versions.variable_key AND found.version = versions.version
        )
    )
    FROM versions WHERE metadata IS NOT NULL AND (variable_key, version) > (?, ?) ORDER BY variable_key, version
"""
_SESSION_OF: Final = "SELECT session_key FROM variables WHERE variable_key = ?"


class StrayWalk(Walk):
    """Each entry of the index is in the metadata of its version. `has_strays`: whether one was not."""

    has_strays = False

    def __init__(self) -> None:
        self._last: tuple[str, str, float, float, float] = ("", "", BEFORE_ALL, BEFORE_ALL, BEFORE_ALL)

    def __str__(self) -> str:
        return f"metadata_entries after key {quote(self._last[0])}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        if not of_file(connection):
            yield from self._name(connection, rows_in(connection, _ALL_STRAYS))
            self.more = False
        while self.more:
            yield from self._name(connection, rows_in(connection, _STRAYS, *self._last))
            last = find_row(connection, _LAST_OF_PAGE, *self._last)
            self.more = last is not None
            self._last = last or self._last
            if time.monotonic() > end:
                return

    def _name(self, connection: Connection, strays: Iterator[Any]) -> Iterator[Problem]:
        for key, sequence, variable_key, version in strays:
            self.has_strays = True
            what = f"metadata_entries has {quote(key)} for version {version}, whose metadata does not"
            yield Problem(_where_of_entry(connection, sequence, variable_key), what)


class IndexedWalk(Walk):
    """Each entry of a version's metadata is in the index.

    If the index has no stray entries and the right number of them, none is missing. Counting comes first, because
    looking up each entry takes longer than the rest of the check.
    """

    def __init__(self, strays: StrayWalk) -> None:
        self._strays = strays
        self._last: tuple[float, float] = (BEFORE_ALL, BEFORE_ALL)

    def __str__(self) -> str:
        return f"the metadata of the versions after variable key {max(self._last[0], 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        if not self._strays.has_strays and self._last[0] == BEFORE_ALL:
            entries, expected = find_row(connection, _COUNTS)
            if entries == expected:
                self.more = False
                return
        for key, version, sequence, indexed in rows_in(connection, _INDEXED, *self._last):
            if not indexed:
                where = _where_of_entry(connection, sequence, key)
                yield Problem(where, f"version {version} has metadata that is missing in metadata_entries")
            self._last = (key, version)
            if time.monotonic() > end:
                return
        self.more = False


def _where_of_entry(connection: Connection, sequence: int, variable_key: int) -> str:
    variable = find_row(connection, _SESSION_OF, variable_key)
    return place_of(connection, sequence, variable[0] if variable else 0, [variable_key])
