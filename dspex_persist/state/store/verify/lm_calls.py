"""Check the table of recorded LM calls."""

import time
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.state.store.lm_rows import rows_of
from dspex_persist.state.store.schema import lm_calls
from dspex_persist.state.store.verify.walk import (
    AFTER_ALL,
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

_COLUMNS: Final = [column.name for column in lm_calls.columns]
_KEY: Final = 3
"""How many columns say which call it is."""
_IN_RANGE: Final = "WHERE sequence > ? AND sequence <= ? ORDER BY sequence, event_ordinal"
_RECORDED: Final = f"SELECT {', '.join(_COLUMNS)} FROM lm_calls_recorded {_IN_RANGE}"
_ENDINGS: Final = """
    SELECT events.sequence, events.ordinal, events.body, commits.created_at
    FROM events JOIN commits ON commits.sequence = events.sequence
    WHERE events.sequence > ? AND events.sequence <= ? AND events.kind = 'execution_ended'
        AND instr(events.body, '"lm"') > 0
    ORDER BY events.sequence, events.ordinal
"""
_LISTED: Final = f"SELECT {', '.join(_COLUMNS)} FROM lm_calls {_IN_RANGE}"
# Counted, as the numbers of a damaged file may be far apart.
_PAGE: Final = f"SELECT sequence FROM commits WHERE sequence > ? ORDER BY sequence LIMIT 1 OFFSET {PAGE_ENTRIES}"
_SESSION_OF: Final = "SELECT session_key FROM commits WHERE sequence = ?"


class LmCallsWalk(Walk):
    """The table has each recorded LM call as it is in its event, and no other."""

    def __init__(self) -> None:
        self._last: float = BEFORE_ALL

    def __str__(self) -> str:
        return f"the LM calls after commit {max(self._last, 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        while self.more:
            (until,) = find_row(connection, _PAGE, self._last) or (AFTER_ALL,)
            self.more = until != AFTER_ALL
            yield from self._compare(connection, until)
            self._last = until
            if time.monotonic() > end:
                return

    def _compare(self, connection: Connection, until: float) -> Iterator[Problem]:
        recorded, listed = (
            {tuple(row[:_KEY]): tuple(row) for row in rows}
            for rows in (_recorded(connection, self._last, until), rows_in(connection, _LISTED, self._last, until))
        )
        for key in sorted(recorded.keys() | listed.keys()):
            for what in _differences(recorded.get(key), listed.get(key)):
                session = find_row(connection, _SESSION_OF, key[0])
                yield Problem(place_of(connection, key[0], session[0] if session else 0, ()), what.format(key[2]))


def _recorded(connection: Connection, after: float, until: float) -> Iterator[Any]:
    """Return the rows that the table should have for the commits after `after`, up to and including `until`."""
    if of_file(connection):
        return rows_in(connection, _RECORDED, after, until)
    endings = rows_in(connection, _ENDINGS, after, until)
    return (row for sequence, ordinal, body, at in endings for row in rows_of(sequence, ordinal, body, at))


def _differences(recorded: Any, listed: Any) -> Iterator[str]:
    if recorded is None:
        yield "lm_calls has LM call {}, which the commit does not have"
    elif listed is None:
        yield "LM call {} is missing in lm_calls"
    else:
        different = [name for name, *pair in zip(_COLUMNS, recorded, listed, strict=True) if pair[0] != pair[1]]
        if different:
            yield f"lm_calls has another {', '.join(different)} for LM call {{}}"
