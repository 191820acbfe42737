"""The log, commit by commit."""

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.store import log_reader, pruned
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.chain import GENESIS, link
from dspex_persist.state.store.engine import raw_rows
from dspex_persist.state.store.verify.documents import unsound_in
from dspex_persist.state.store.verify.walk import (
    AFTER_DELETION,
    DELETED,
    FIRST_OR_LAST,
    REGISTERED,
    Problem,
    Progress,
    Walk,
    find_row,
    place_of,
    range_text,
)

_PAGE_COMMITS: Final = 10_000
_MOST_REMEMBERED: Final = 200_000
_FIND_VERSION_BEFORE: Final = """
    SELECT versions.version, versions.sequence, versions.kind, commits.session_key
    FROM versions LEFT JOIN commits ON commits.sequence = versions.sequence
    WHERE versions.variable_key = ? AND versions.version < ? ORDER BY versions.version DESC LIMIT 1
"""
_PRUNED_COMMITS: Final = "SELECT DISTINCT sequence FROM pruned WHERE sequence > ? ORDER BY sequence LIMIT ?"
_PRUNED_BETWEEN: Final = """
    SELECT 1 FROM pruned CROSS JOIN commits ON commits.sequence = pruned.sequence
    WHERE pruned.sequence >= ? AND pruned.sequence <= ? AND commits.session_key = ? LIMIT 1
"""
_BEFORE_THE_FIRST: Final = """
    SELECT sequence FROM commits WHERE sequence < 1
    UNION SELECT sequence FROM versions WHERE sequence < 1
    UNION SELECT sequence FROM events WHERE sequence < 1
"""


class LogWalk(Walk):
    """Commit by commit: numbers without gaps, hashes that fit, versions that each follow the one before."""

    def __init__(self, anchor: Head | None, progress: Progress) -> None:
        self._anchor = anchor or Head(0, GENESIS)
        self._progress = progress
        self._last = 0
        """The commit up to which all are checked."""
        self._hash = GENESIS
        """Its hash as it is stored."""
        self._suspect: bytes | None = None
        """What its hash should have been, where that is something else."""
        # The newest version, and the session, of the variables seen last; those of others are looked up.
        self._newest: dict[int, int] = {}
        self._homes: dict[int, int] = {}

    def __str__(self) -> str:
        return f"the log after commit {self._last}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        if self._last == 0:
            for (sequence,) in raw_rows(connection, _BEFORE_THE_FIRST):
                yield Problem(f"commit {sequence}", "commits are numbered from 1")
        first, newest, homes = self._last, self._newest, self._homes
        # Commits that are looked at whatever their hash is.
        special = {self._anchor.sequence}
        special.update(sequence for (sequence,) in raw_rows(connection, _PRUNED_COMMITS, self._last, _PAGE_COMMITS))
        if len(newest) > _MOST_REMEMBERED:
            newest.clear()
            homes.clear()
        (in_all,) = find_row(connection, "SELECT ifnull(max(sequence), 0) FROM commits")
        read = 0
        for commit in log_reader.iter_commits(connection, self._last, _PAGE_COMMITS):
            sequence, session_key, stored, content, rows = commit
            # The hot loop: one hash a commit, two look-ups a version, and no call that can be spared.
            if sequence != self._last + 1 or sequence in special or link(self._hash, content) != stored:
                yield from self._look_at_commit(connection, commit)
                if not stored:
                    continue
            for row in rows:
                key = row[1]
                if newest.get(key) == row[2] - 1 and homes[key] == session_key and row[3] not in FIRST_OR_LAST:
                    newest[key] = row[2]
                else:
                    yield from self._look_at_version(connection, row, session_key)
            read += 1
            self._last = sequence
            self._hash = stored
        yield from unsound_in(connection, first, self._last)
        self._progress(self._last, max(in_all, self._last))
        if read < _PAGE_COMMITS:
            self.more = False
            yield from self._look_at_end()

    def _look_at_commit(self, connection: Connection, commit: log_reader.LoggedCommit) -> Iterator[Problem]:
        """What is wrong with a commit that is not simply the next one."""
        sequence, session_key, stored, _, rows = commit
        if not stored:
            yield Problem(f"commit {sequence}", "it is missing, but has versions or events")
            return
        problems: list[str] = []
        if sequence != self._last + 1:
            # Without the hash of its predecessor nothing can be said of its own.
            missing = range_text(self._last + 1, sequence - 1)
            yield Problem(missing, f"missing: commit {self._last} is followed by commit {sequence}")
            self._suspect = None
        elif (fits := pruned.fits(connection, commit, self._hash, self._suspect or self._hash)) is not None:
            self._suspect = None
            if not fits:
                problems.append("it was pruned, and what is left of it is not what its last marker says")
        elif (hashed := commit.link(self._hash)) != stored:
            # Where the predecessor's hash was changed, that was told, and this commit is what it should be.
            if self._suspect is None or commit.link(self._suspect) != stored:
                problems.append("its rows are not those that its hash was made from")
            self._suspect = hashed
        if sequence == self._anchor.sequence and stored != self._anchor.hash:
            problems.append("it is not the commit that was acknowledged under this number (says the anchor)")
        for what in problems:
            yield Problem(place_of(connection, sequence, session_key, [row[1] for row in rows]), what)

    def _look_at_version(
        self, connection: Connection, row: log_reader.VersionRow, session_key: int
    ) -> Iterator[Problem]:
        """What is wrong with a version that is the first, the last, or not simply the next one."""
        sequence, key, number, kind = row[:4]
        self._newest[key] = number if kind != DELETED else AFTER_DELETION
        self._homes[key] = session_key
        if (number == 0) != (kind == REGISTERED):
            where = place_of(connection, sequence, session_key, [key])
            yield Problem(where, f"version {number} is of kind {kind}, but version 0 alone is the registration")
        if number != 0:
            what = self._misplacement(connection, row, session_key)
            if what:
                yield Problem(place_of(connection, sequence, session_key, [key]), f"version {number} {what}")

    def _misplacement(self, connection: Connection, row: log_reader.VersionRow, session_key: int) -> str | None:
        found = find_row(connection, _FIND_VERSION_BEFORE, row[1], row[2])
        # Before the first one that is there: nothing, of no commit.
        number, sequence, kind, home = found if found is not None else (-1, 0, None, None)
        if number != row[2] - 1 and find_row(connection, _PRUNED_BETWEEN, sequence, row[0], session_key) is None:
            return f"follows version {row[2] - 1}, which is missing"
        if sequence > row[0]:
            return f"comes before version {number}, which is of commit {sequence}"
        if kind == DELETED:
            return "comes after the variable was deleted"
        if home not in (session_key, None):
            return "is of another session than the version before it"
        return None

    def _look_at_end(self) -> Iterator[Problem]:
        if self._last < self._anchor.sequence:
            gone = range_text(self._last + 1, self._anchor.sequence)
            yield Problem(gone, f"acknowledged (says the anchor), but the log ends at commit {self._last}")
