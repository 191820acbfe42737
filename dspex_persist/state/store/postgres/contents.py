"""The large contents of a group, of all its versions at once."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import psycopg

from dspex_persist.state.store import blobs
from dspex_persist.state.unit_of_work import UnitOfWork

_AT_ONCE_BYTES: Final = 4 * 2**20
_FIND: Final = "SELECT digest, blob_key FROM blobs WHERE digest = ANY(%s::bytea[])"
_KEEP: Final = """
    INSERT INTO blobs (digest, content) SELECT * FROM unnest(%s::bytea[], %s::bytea[]) RETURNING digest, blob_key
"""


def keep(begin: Callable[[], "psycopg.Connection[Any]"], units: Iterable[UnitOfWork]) -> blobs.Kept:
    """Store the large contents that are not there already, in the transaction of a group; return all of them.

    Args:
        begin: Returns the connection, in the transaction. Called only if there are any.
        units: The units of work.
    """
    kept: dict[str | bytes, tuple[int, bytes]] = {}
    for page in _pages(dict.fromkeys(_large(units))):
        digests = {blobs.digest(content): content for content in page.values()}
        connection = begin()
        keys = _rows(connection.execute(_FIND, (list(digests),)))
        missing = [digest for digest in digests if digest not in keys]
        if missing:
            keys |= _rows(connection.execute(_KEEP, (missing, [digests[each] for each in missing])))
        names = {content: digest for digest, content in digests.items()}
        kept |= {each: (keys[names[content]], names[content]) for each, content in page.items()}
    return kept


def _rows(cursor: "psycopg.Cursor[Any]") -> dict[bytes, int]:
    return {bytes(digest): key for digest, key in cursor.fetchall()}


def _large(units: Iterable[UnitOfWork]) -> Iterator[str | bytes]:
    for unit in units:
        for change in unit.versions:
            value = change.version.value
            if value is None:
                continue
            if len(value.json) > blobs.INLINE_BYTES:
                yield value.json
            if value.binary is not None and len(value.binary) > blobs.INLINE_BYTES:
                yield value.binary


def _pages(contents: Iterable[str | bytes]) -> Iterator[dict[str | bytes, bytes]]:
    """Yield the contents with their bytes, about `_AT_ONCE_BYTES` at a time."""
    page: dict[str | bytes, bytes] = {}
    size_bytes = 0
    for each in contents:
        content = each.encode() if isinstance(each, str) else each
        page[each] = content
        size_bytes += len(content)
        if size_bytes > _AT_ONCE_BYTES:
            yield page
            page, size_bytes = {}, 0
    if page:
        yield page
