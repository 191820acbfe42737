"""Check the large contents."""

import time
from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.store.blobs import digest
from dspex_persist.state.store.verify.walk import BEFORE_ALL, Problem, Walk, end_of_page, find_row, place_of, rows_in

_BLOBS: Final = "SELECT blob_key, digest, content FROM blobs WHERE blob_key > ? ORDER BY blob_key"
_UNUSED_BLOBS: Final = """
    SELECT blob_key FROM blobs
    EXCEPT SELECT value_blob FROM versions
    EXCEPT SELECT binary_blob FROM versions
"""
_BLOB_USER: Final = """
    SELECT commits.sequence, commits.session_key, versions.variable_key
    FROM versions JOIN commits ON commits.sequence = versions.sequence
    WHERE value_blob = ?1 OR binary_blob = ?1 ORDER BY versions.sequence LIMIT 1
"""


class BlobWalk(Walk):
    """Each large content matches its digest, and a version refers to it."""

    def __init__(self) -> None:
        self._last: float = BEFORE_ALL

    def __str__(self) -> str:
        return f"the large contents after number {max(self._last, 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        for key, name, content in rows_in(connection, _BLOBS, self._last):
            if digest(content) != name:
                yield Problem(self._where(connection, key), "the content does not match its digest")
            self._last = key
            if time.monotonic() > end:
                return
        self.more = False
        for (key,) in rows_in(connection, _UNUSED_BLOBS):
            yield Problem(f"large content {key}", "no version refers to it")

    def _where(self, connection: Connection, key: int) -> str:
        user = find_row(connection, _BLOB_USER, key)
        if user is None:
            return f"large content {key}"
        sequence, session_key, variable_key = user
        return f"large content {key}, first used by {place_of(connection, sequence, session_key, [variable_key])}"
