"""Check the table of refused calls. It is not a part of the log, so each row is only checked to be a possible one."""

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection

from dspex_persist.clock import EARLIEST, LATEST, to_micros
from dspex_persist.state.store.verify.walk import BEFORE_ALL, PAGE_ENTRIES, Problem, Walk, rows_in

_ROWS: Final = """
    SELECT denial_key, at, last_at, rpc, missing, count FROM denials WHERE denial_key > ? ORDER BY denial_key LIMIT ?
"""


class DenialWalk(Walk):
    """Each row counts something that a server can have refused."""

    def __init__(self) -> None:
        self._last: float = BEFORE_ALL

    def __str__(self) -> str:
        return f"the refused calls after row {self._last} of denials"

    def page(self, connection: Connection) -> Iterator[Problem]:
        rows = list(rows_in(connection, _ROWS, self._last, PAGE_ENTRIES))
        for key, at, last_at, rpc, missing, count in rows:
            where = f"row {key} of denials"
            if key < 1:
                yield Problem(where, "its key is below 1")
            if not to_micros(EARLIEST) <= at <= last_at <= to_micros(LATEST):
                yield Problem(where, "its times are out of range, or in the wrong order")
            if not rpc or not missing:
                yield Problem(where, "it does not say what was refused")
            if count < 1:
                yield Problem(where, "it counts no call")
        self.more = len(rows) == PAGE_ENTRIES
        self._last = rows[-1][0] if rows else self._last
