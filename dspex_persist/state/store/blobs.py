"""Large contents, stored once however many versions share them."""

from collections.abc import Mapping
from hashlib import sha256
from typing import TypeAlias

from sqlalchemy import Connection, bindparam, func, insert, select

from dspex_persist.state.store.schema import blobs

INLINE_BYTES = 1024
"""Contents up to this size stay in the row of their version."""
Kept: TypeAlias = Mapping[str | bytes, tuple[int, bytes]]
"""The keys and the digests of contents, by the contents."""

# Built once: SQLAlchemy needs longer to build a statement than SQLite to run it.
_FIND = select(blobs.c.blob_key).where(blobs.c.digest == bindparam("digest"))
_KEEP = insert(blobs).returning(blobs.c.blob_key)


def digest(content: bytes) -> bytes:
    """Return the SHA-256 of a content, which identifies it."""
    return sha256(content).digest()


def keep(connection: Connection, content: bytes) -> tuple[int, bytes]:
    """Store `content` unless it is there already; return its key and digest."""
    name = digest(content)
    key = connection.execute(_FIND, {"digest": name}).scalar()
    if key is None:
        key = connection.execute(_KEEP, {"digest": name, "content": content}).scalar_one()
    return key, name


def size_bytes(connection: Connection) -> int:
    """Return the total size of all large contents."""
    total: int = connection.execute(select(func.coalesce(func.sum(func.length(blobs.c.content)), 0))).scalar_one()
    return total
