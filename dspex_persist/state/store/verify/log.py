"""Check the log, commit by commit."""

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.anchor import Head
from dspex_persist.state.store import log_reader, pruned
from dspex_persist.state.store.chain import GENESIS, link
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
    rows_in,
)

_PAGE_COMMITS: Final = 10_000
_MOST_RANGES: Final = 1_000
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
_COMMIT_UP_TO: Final = """
    SELECT sequence FROM commits WHERE sequence <= ? AND hash <> x'' ORDER BY sequence DESC LIMIT 1
"""
_COMMIT_BEFORE: Final = "SELECT sequence, hash FROM commits WHERE sequence < ? ORDER BY sequence DESC LIMIT 1"
_BEFORE_THE_FIRST: Final = """
    SELECT sequence FROM commits WHERE sequence < 1
    UNION SELECT sequence FROM versions WHERE sequence < 1
    UNION SELECT sequence FROM events WHERE sequence < 1
"""


def ranges_in(connection: Connection) -> Iterator[tuple[int, int | None]]:
    """Divide the log into ranges of some thousand commits; yield for each the commits after which it begins and with
    which it ends. Both exist; the last range ends with the log (None).
    """
    (last,) = find_row(connection, "SELECT coalesce(max(sequence), 0) FROM commits")
    step = max(_PAGE_COMMITS, last // _MOST_RANGES)
    after = 0
    for place in range(step, last, step):
        row = find_row(connection, _COMMIT_UP_TO, place)
        if row is not None and row[0] >= after + _PAGE_COMMITS:
            yield after, row[0]
            after = row[0]
    yield after, None


class Seen:
    """A cache: the newest version, and the session, of the variables seen so far.

    It is valid for ranges of the log that follow the one that begins after commit `after`.
    """

    def __init__(self) -> None:
        self.after = 0
        self.newest: dict[int, int] = {}
        self.homes: dict[int, int] = {}

    def forget(self) -> None:
        """Empty the cache."""
        self.newest.clear()
        self.homes.clear()


class LogWalk(Walk):
    """Commits are numbered without gaps, their hashes match, and each version follows the one before."""

    def __init__(
        self, anchor: Head | None, progress: Progress, seen: Seen, after: int = 0, until: int | None = None
    ) -> None:
        """Check the commits after `after` up to and including `until`, which both exist; None is the end of the log.

        `progress` is called with the number of commits checked since the last call, and of all commits.
        """
        self._anchor = anchor or Head(0, GENESIS)
        self._progress = progress
        self._after = after
        self._until = until
        self._begun = False
        self._last = after
        """The last commit that was checked."""
        self._paged = after
        """The last commit whose documents were checked, too."""
        self._hash = GENESIS
        """The stored hash of the last commit."""
        self._suspect: bytes | None = None
        """Its computed hash, if that differs from the stored one."""
        if seen.after > after:
            seen.forget()
        seen.after = after
        self._seen = seen

    def __str__(self) -> str:
        return f"the log after commit {self._last}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        if not self._begun:
            yield from self._begin(connection)
        newest, homes = self._seen.newest, self._seen.homes
        # Commits to examine even if their hashes match.
        special = {self._anchor.sequence}
        special.update(sequence for (sequence,) in rows_in(connection, _PRUNED_COMMITS, self._last, _PAGE_COMMITS))
        if len(newest) > _MOST_REMEMBERED:
            self._seen.forget()
        (in_all,) = find_row(connection, "SELECT coalesce(max(sequence), 0) FROM commits")
        read = 0
        until = self._until or log_reader.LARGEST
        for commit in log_reader.iter_commits(connection, self._last, _PAGE_COMMITS, until):
            sequence, session_key, stored, content, rows = commit
            # The hot loop: one hash for each commit, two look-ups for each version, and no avoidable call.
            if sequence != self._last + 1 or sequence in special or link(self._hash, content) != stored:
                yield from self._examine_commit(connection, commit)
                if not stored:
                    continue
            else:
                self._suspect = None
            for row in rows:
                key = row[1]
                if newest.get(key) == row[2] - 1 and homes[key] == session_key and row[3] not in FIRST_OR_LAST:
                    newest[key] = row[2]
                else:
                    yield from self._examine_version(connection, row, session_key)
            read += 1
            self._last = sequence
            self._hash = stored
        yield from unsound_in(connection, self._paged, self._last)
        self._progress(self._last - self._paged, max(in_all, self._last))
        self._paged = self._last
        if read < _PAGE_COMMITS or self._last == self._until:
            self.more = False
            yield from self._examine_end()

    def _begin(self, connection: Connection) -> Iterator[Problem]:
        if self._after == 0:
            for (sequence,) in rows_in(connection, _BEFORE_THE_FIRST):
                yield Problem(f"commit {sequence}", "commits are numbered from 1")
        else:
            self._take_over(connection)
        self._begun = True

    def _take_over(self, connection: Connection) -> None:
        """Set the stored and the computed hash of the commit before the range, as the walk up to there leaves them."""
        self._last, self._hash = find_row(connection, _COMMIT_BEFORE, self._after) or (0, GENESIS)
        for commit in log_reader.iter_commits(connection, self._last, 1, self._after):
            if commit.hash:
                # That walk reports its problems.
                list(self._examine_commit(connection, commit))
                self._hash = commit.hash
        self._last = self._after

    def _examine_commit(self, connection: Connection, commit: log_reader.LoggedCommit) -> Iterator[Problem]:
        """Yield the problems of a commit that is not simply the next one."""
        sequence, session_key, stored, _, rows = commit
        if not stored:
            yield Problem(f"commit {sequence}", "it is missing, but has versions or events")
            return
        problems: list[str] = []
        if sequence != self._last + 1:
            # Without the hash of its predecessor, its own cannot be checked.
            missing = range_text(self._last + 1, sequence - 1)
            yield Problem(missing, f"missing: commit {self._last} is followed by commit {sequence}")
            self._suspect = None
        elif (fits := pruned.fits(connection, commit, self._hash, self._suspect or self._hash)) is not None:
            self._suspect = None
            if not fits:
                problems.append("it was pruned, and its remaining rows do not match its last marker")
        elif (hashed := commit.link(self._hash)) != stored:
            # If only the stored hash of the predecessor was changed, this commit is intact: that was reported there.
            if self._suspect is None or commit.link(self._suspect) != stored:
                problems.append("its rows do not match its hash")
            self._suspect = hashed
        else:
            self._suspect = None
        if sequence == self._anchor.sequence and stored != self._anchor.hash:
            problems.append("according to the anchor, another commit was acknowledged under this number")
        for what in problems:
            yield Problem(place_of(connection, sequence, session_key, [row[1] for row in rows]), what)

    def _examine_version(
        self, connection: Connection, row: log_reader.VersionRow, session_key: int
    ) -> Iterator[Problem]:
        """Yield the problems of a version that is the first, the last, or not simply the next one."""
        sequence, key, number, kind = row[:4]
        self._seen.newest[key] = number if kind != DELETED else AFTER_DELETION
        self._seen.homes[key] = session_key
        if (number == 0) != (kind == REGISTERED):
            where = place_of(connection, sequence, session_key, [key])
            yield Problem(where, f"version {number} is of kind {kind}, but version 0, and no other, is a registration")
        if number != 0:
            what = self._misplacement(connection, row, session_key)
            if what:
                yield Problem(place_of(connection, sequence, session_key, [key]), f"version {number} {what}")

    def _misplacement(self, connection: Connection, row: log_reader.VersionRow, session_key: int) -> str | None:
        before = find_row(connection, _FIND_VERSION_BEFORE, row[1], row[2])
        number, sequence, kind, home = before if before is not None else (-1, 0, None, None)
        if number != row[2] - 1 and find_row(connection, _PRUNED_BETWEEN, sequence, row[0], session_key) is None:
            return f"follows version {row[2] - 1}, which is missing"
        if sequence > row[0]:
            return f"comes before version {number}, which is of commit {sequence}"
        if kind == DELETED:
            return "comes after the variable was deleted"
        if home not in (session_key, None):
            return "belongs to another session than the version before it"
        return None

    def _examine_end(self) -> Iterator[Problem]:
        if self._until is None and self._last < self._anchor.sequence:
            lost = range_text(self._last + 1, self._anchor.sequence)
            yield Problem(lost, f"acknowledged according to the anchor, but the log ends at commit {self._last}")
