"""The head of the log: its last commit, compared with what this server knows of it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from dspex_persist.clock import EARLIEST, from_micros
from dspex_persist.state import anchor
from dspex_persist.state.errors import NotADatabaseError
from dspex_persist.state.log_store import News
from dspex_persist.state.shared import lost
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.chain import GENESIS
from dspex_persist.state.valkey.keys import Keys

FIELDS: Final = ("sequence", "hash", "last_at", "database_id")
_MOST_NEWS: Final = 5_000
"""After more commits of others, all of memory is forgotten."""


class Head(NamedTuple):
    """The last commit: its number, its hash, and its time. `database_id` names what it is the head of."""

    sequence: int
    hash: bytes
    last_at: datetime
    database_id: bytes

    @classmethod
    def of(cls, found: Sequence[bytes | None]) -> "Head":
        """Return the head in `FIELDS` of its hash."""
        sequence, hash_, last_at, database_id = found
        at = EARLIEST if last_at is None else from_micros(int(last_at))
        return cls(int(sequence or 0), hash_ or GENESIS, at, database_id or b"")

    @property
    def entry(self) -> str:
        """The id of its entry in the log."""
        return f"{self.sequence}-0"

    @property
    def anchored(self) -> anchor.Head:
        """What an anchor remembers of it."""
        return anchor.Head(self.sequence, self.hash)


NO_HEAD: Final = Head(0, GENESIS, EARLIEST, b"")


def news_between(client: Any, keys: Keys, name: str, known: Head, head: Head) -> News | None:
    """Return what was committed between two heads; None if nothing.

    Args:
        client: A client of the store.
        keys: The names of the keys.
        name: How errors name the store.
        known: The head that this server knows.
        head: The head of the store.

    Raises:
        LostCommitsError: The known commit is not in the store any more.
    """
    if head == known:
        return None
    if head.database_id != known.database_id:
        raise lost.other_database(name)
    if head.sequence < known.sequence:
        raise lost.gone(name, head.sequence, known.sequence)
    rows: list[Any] = client.xrange(keys.log, known.entry, head.entry, count=_MOST_NEWS + 1)
    if known.sequence:
        # Put back to an older copy, and written on: then another commit has its number.
        if not rows or rows[0][0] != known.entry.encode() or rows[0][1][b"h"] != known.hash:
            raise lost.other_commit(name, known.sequence)
        del rows[0]
    if len(rows) >= _MOST_NEWS:
        return News(known.sequence, head.sequence, head.last_at, None)
    changed = {int(row[b"s"]): codec.text_in(row[b"i"]) for _, row in rows}
    ended = frozenset(int(row[b"s"]) for _, row in rows if b"e" in row)
    return News(known.sequence, head.sequence, head.last_at, changed, ended)


def refuse_headless(client: Any, keys: Keys, name: str) -> None:
    """Raise `NotADatabaseError` if the store has a log, but not what says where it ends."""
    # In this order: the head is there before the first entry.
    if client.exists(keys.log) and not client.exists(keys.head):
        reason = f"its key {keys.head} is missing, which says where the log ends; put a copy of the store back"
        raise NotADatabaseError(name, reason)


def has_commit(client: Any, keys: Keys, head: anchor.Head) -> bool:
    """Whether the log has this commit."""
    entry = f"{head.sequence}-0"
    rows = client.xrange(keys.log, entry, entry)
    return bool(rows) and rows[0][1][b"h"] == head.hash
