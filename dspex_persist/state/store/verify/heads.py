"""Check the row that says where the log of a shared database ends."""

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.store.chain import GENESIS
from dspex_persist.state.store.verify.walk import Problem, Walk, find_row

_HEAD: Final = "SELECT sequence, hash, next_session_key, next_variable_key FROM head"
_LAST: Final = "SELECT sequence, hash FROM commits ORDER BY sequence DESC LIMIT 1"
_KEYS: Final = {
    "next_session_key": "SELECT coalesce(max(session_key), 0) FROM sessions",
    "next_variable_key": "SELECT coalesce(max(variable_key), 0) FROM variables",
}


class HeadWalk(Walk):
    """The row names the last commit, and keys that are free."""

    def __str__(self) -> str:
        return "the head of the log"

    def page(self, connection: Connection) -> Iterator[Problem]:
        self.more = False
        row = find_row(connection, _HEAD)
        if row is None:
            yield Problem("head", "its row is missing")
            return
        sequence, stored, *keys = row
        last, hashed = find_row(connection, _LAST) or (0, GENESIS)
        if sequence != last:
            yield Problem("head", f"it names commit {sequence}, but the log ends at commit {last}")
        elif stored != hashed:
            yield Problem("head", f"its hash is not that of commit {last}")
        for (column, statement), free in zip(_KEYS.items(), keys, strict=True):
            (largest,) = find_row(connection, statement)
            if free <= largest:
                yield Problem("head", f"head.{column} is {free}, but {largest} is in use")
