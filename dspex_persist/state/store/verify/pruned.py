"""Check pruned commits against their markers."""

import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.events import Pruned
from dspex_persist.state.store.chain import GENESIS, commit_text, residue, residue_entry
from dspex_persist.state.store.verify.walk import BEFORE_ALL, Problem, Walk, end_of_page, find_row, rows_in
from dspex_persist.state.values.json_text import stored

_PRUNED: Final = """
    SELECT pruned.sequence, pruned.marker_sequence, pruned.residue,
        commits.session_key, commits.actor, commits.cause, commits.created_at, commits.hash, previous.hash
    FROM pruned
    LEFT JOIN commits ON commits.sequence = pruned.sequence
    LEFT JOIN commits AS previous ON previous.sequence = pruned.sequence - 1
    WHERE (pruned.sequence, pruned.marker_sequence) > (?, ?)
    ORDER BY pruned.sequence, pruned.marker_sequence
"""
_MARKER: Final = "SELECT body FROM events WHERE sequence = ? AND kind = 'pruned'"
_FULL_BYTES: Final = len(GENESIS)
HAS_ROW: Final = "SELECT 1 FROM pruned WHERE sequence = ? AND marker_sequence = ?"


class _Marker:
    """A marker, with the hash of its rows read so far. `last`: the commit of its last row."""

    def __init__(self, event: Pruned) -> None:
        self.last = event.range[1]
        self.digest = event.digest
        self.read = sha256()


class PrunedWalk(Walk):
    """The rows of each marker match its digest.

    Memory holds only the markers of which some rows have been read and some have not. A marker has up to a thousand.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float] = (BEFORE_ALL, BEFORE_ALL)
        self._markers: dict[int, _Marker | None] = {}

    def __str__(self) -> str:
        return f"the pruned commits after {max(self._last[0], 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        markers = self._markers
        for sequence, marker_sequence, kept, *commit in rows_in(connection, _PRUNED, *self._last):
            if marker_sequence not in markers:
                markers[marker_sequence] = _find_marker(connection, marker_sequence)
                if markers[marker_sequence] is None:
                    yield Problem(f"commit {marker_sequence}", f"it prunes commit {sequence}, but has no marker")
            marker = markers[marker_sequence]
            if marker is not None:
                full = kept if len(kept) == _FULL_BYTES else _residue_of_nothing(sequence, *commit)
                marker.read.update(residue_entry(sequence, full))
                if sequence == marker.last:
                    del markers[marker_sequence]
                    yield from self._compare(marker_sequence, marker)
            self._last = (sequence, marker_sequence)
            if time.monotonic() > end:
                return
        self.more = False
        for marker_sequence, marker in markers.items():
            if marker is not None:
                yield from self._compare(marker_sequence, marker)

    def _compare(self, sequence: int, marker: _Marker) -> Iterator[Problem]:
        if marker.read.hexdigest() != marker.digest:
            yield Problem(f"commit {sequence}", "its rows in pruned do not match the digest of its marker")


def _residue_of_nothing(
    sequence: int,
    session_key: int,
    actor: str,
    cause: str,
    created_at: int,
    stored: bytes | None,
    previous: bytes | None,
) -> bytes:
    """The residue of a commit that has lost all its versions and events."""
    content = commit_text(sequence, session_key, actor, cause, created_at, (), ())
    return residue(previous or GENESIS, stored or GENESIS, content)


def _find_marker(connection: Connection, sequence: int) -> _Marker | None:
    row = find_row(connection, _MARKER, sequence)
    try:
        return _Marker(Pruned.from_body(stored(row[0]))) if row is not None else None
    except (LookupError, TypeError, ValueError):
        return None
