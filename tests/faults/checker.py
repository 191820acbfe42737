"""Checks the file of a killed server against what its clients know.

The checker reads copies of the files (the database, its WAL, its anchor; not the -shm, which is memory) with plain SQL.
Each check continues after the last one: commits seen once must never change, which the hash chain shows.
"""

import json
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from dspex_persist.state.anchor import Head, remembered
from dspex_persist.state.store import log_reader
from dspex_persist.state.store.engine import open_readers
from dspex_persist.state.store.verify import iter_problems
from tests.concurrency import linearizability
from tests.faults.journal import Journal
from tests.faults.ledger import Commit, Ledger, Write

SUFFIXES = ("", "-wal", ".anchor")
_SET, _ROLLED_BACK, _DELETED = 1, 2, 3


def copy_files(database: Path, folder: Path) -> Path:
    """Copy the files of a killed server; returns the copy of the database."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in SUFFIXES:
        source = database.with_name(database.name + suffix)
        target = folder / source.name
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copyfile(source, target)
    return folder / database.name


@dataclass(frozen=True, slots=True)
class Row:
    """One version in the file."""

    sequence: int
    session_id: str
    variable_id: str
    version: int
    kind: int
    value: str | None
    token: str | None


class Checker:
    """Keeps everything that was in the file at the last check."""

    def __init__(self) -> None:
        self.head = Head(0, bytes(32))
        self.journal = Journal()
        self._by_place: dict[tuple[str, int], Row] = {}
        self._by_token: defaultdict[str, list[Row]] = defaultdict(list)
        self._newest: dict[str, Row] = {}
        self._commits: defaultdict[str, list[Commit]] = defaultdict(list)
        """By session id."""
        self._checked: set[str] = set()
        self._absent: set[str] = set()
        """Tokens of writes that can no longer appear."""
        self._rollbacks = 0
        self._ended: set[str] = set()

    def check(self, copy: Path, ledger: Ledger, *, started: bool = True) -> list[str]:
        """Return the problems of a copy, into which SQLite may recover the WAL.

        Args:
            copy: The copy of the database.
            ledger: What the clients know.
            started: Whether the server had been ready.
        """
        with closing(sqlite3.connect(copy)) as connection:
            known = self.head.sequence
            problems = [*self._read_commits(connection)]
            problems += self.journal.check(connection, known, ledger, started=started)
            self._ended = {row[0] for row in connection.execute(_ENDED)}
        return [*problems, *self._check_knowledge(ledger)]

    def check_rows(self, rows: Iterable[Row], ended: Collection[str], ledger: Ledger) -> list[str]:
        """Return the problems of what any store has.

        Args:
            rows: All of its versions, in the order of their commits.
            ended: The sessions that have ended.
            ledger: What the clients know.
        """
        problems = [*self._take(rows, frozenset())]
        self._ended = {*ended}
        return [*problems, *self._check_knowledge(ledger)]

    def _check_knowledge(self, ledger: Ledger) -> Iterator[str]:
        yield from self._check_writes(ledger)
        yield from self._check_rollbacks(ledger)
        for variable_id in sorted(ledger.deleted):
            if not self._is_deleted(variable_id):
                yield f"deleted, but still there: {variable_id}"
        for session_id in sorted(ledger.ended.keys() - self._ended):
            yield f"ended, but still there: {session_id}"

    def values(self, session_id: str) -> dict[str, tuple[int, str | None]]:
        """Return version and value of the existing variables, by id."""
        return {
            row.variable_id: (row.version, row.value)
            for row in self._newest.values()
            if row.session_id == session_id and row.kind != _DELETED
        }

    def check_watcher(self, session_id: str, first: int, received: list[Commit]) -> list[str]:
        """A watcher receives the commits after some point: all, in order, each once, and no others."""
        expected = [commit for commit in self._commits[session_id] if commit[0] > first][: len(received)]
        if received == expected:
            return []
        pairs = zip(received, expected, strict=False)
        at = next((i for i, (seen, kept) in enumerate(pairs) if seen != kept), len(expected))
        kept = expected[at] if at < len(expected) else "nothing"
        return [f"watch: a watcher received {received[at]} where the file has {kept}"]

    def head_of(self, session_id: str) -> int:
        """Return the session's last commit that made a version."""
        return self._commits[session_id][-1][0]

    # The log

    def _read_commits(self, connection: sqlite3.Connection) -> Iterator[str]:
        yield from self._check_chain(connection)
        pruned = {row[0] for row in connection.execute(_PRUNED_SESSIONS)}
        yield from self._take(_rows(connection, self.head.sequence), pruned)
        self.head = _head_of(connection)

    def _take(self, rows: Iterable[Row], pruned: Collection[str]) -> Iterator[str]:
        commits: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for row in rows:
            newest = self._newest.get(row.variable_id)
            if row.version != (newest.version + 1 if newest is not None else 0) and row.session_id not in pruned:
                yield f"gap: {row} follows {newest}"
            if newest is not None and newest.kind == _DELETED:
                yield f"deleted, and then written: {row}"
            self._newest[row.variable_id] = row
            self._by_place[row.variable_id, row.version] = row
            if row.token is not None:
                self._by_token[row.token].append(row)
            commits.setdefault((row.session_id, row.sequence), []).append((row.variable_id, row.version))
        for (session_id, sequence), places in commits.items():
            self._commits[session_id].append((sequence, tuple(sorted(places))))

    def _check_chain(self, connection: sqlite3.Connection) -> Iterator[str]:
        """New commits follow the known ones, which have not changed."""
        known = self.head
        # `verify` checks the hashes of these.
        pruned = {row[0] for row in connection.execute(_PRUNED)}
        engine = create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
        with engine.connect() as wrapped:
            if log_reader.find_hash(wrapped, known.sequence) != known.hash:
                yield f"lost: commit {known.sequence} is not the one that was there before"
                return
            sequence, previous = known.sequence, known.hash
            for commit in log_reader.iter_commits(wrapped, known.sequence):
                sequence += 1
                if commit.sequence != sequence:
                    yield f"gap: commit {commit.sequence} where {sequence} should be"
                    return
                if commit.link(previous) != commit.hash and sequence not in pruned:
                    yield f"chain: commit {sequence} does not fit its hash"
                    return
                previous = commit.hash

    # The clients' writes

    def _check_writes(self, ledger: Ledger) -> Iterator[str]:
        for token in self._by_token:
            if token not in ledger.writes:
                yield f"from nowhere: {self._by_token[token]}"
        for write in ledger.writes.values():
            if write.token in self._checked:
                continue
            rows = self._by_token.get(write.token, [])
            yield from self._check_write(write, rows)
            if write.settled:
                self._checked.add(write.token)
                if not rows:
                    self._absent.add(write.token)
        for token in self._absent:
            if token in self._by_token:
                yield f"come back: {self._by_token[token]} was missing before"

    def _check_write(self, write: Write, rows: list[Row]) -> Iterator[str]:
        versions = {row.variable_id: row.version for row in rows}
        if len({row.sequence for row in rows}) > 1:
            twice = len(versions) < len(rows)
            yield f"{'written twice' if twice else 'half batch'}: {write} is in the file as {rows}"
        elif write.status == "refused" and rows:
            # If a repetition is refused because of a version that its first attempt made, it ran twice.
            yield f"{'written twice' if write.key else 'refused, but written'}: {write} is in the file as {rows}"
        elif write.status == "ok" and versions != write.versions:
            yield f"lost: {write} was acknowledged, the file has {rows}"
        elif rows and write.targets and set(versions) != set(write.targets):
            yield f"half batch: {write} is in the file as {rows}"
        for row in rows:
            if row.value != (write.value or str(row.version)):
                yield f"value: {write} is in the file as {row}"
            if write.expected and row.version != write.expected + 1:
                yield f"lost update: {write} is in the file as {row}"

    def _check_rollbacks(self, ledger: Ledger) -> Iterator[str]:
        for rollback in ledger.rollbacks[self._rollbacks :]:
            row = self._by_place.get((rollback.variable_id, rollback.version))
            target = self._by_place.get((rollback.variable_id, rollback.target))
            if row is None or target is None or row.kind != _ROLLED_BACK or row.value != target.value:
                yield f"lost: {rollback} was acknowledged, the file has {row} and {target}"
        self._rollbacks = len(ledger.rollbacks)

    def _is_deleted(self, variable_id: str) -> bool:
        newest = self._newest.get(variable_id)
        return newest is not None and newest.kind == _DELETED


def check_histories(ledger: Ledger) -> list[str]:
    """Check whether the clients' histories of each variable are linearizable, regardless of the file."""
    return [
        f"history of {variable_id}: {violation}"
        for variable_id, first in ledger.initial.items()
        for violation in linearizability.check(ledger.history(variable_id), first)
    ]


def verify(copy: Path) -> list[str]:
    """Return the problems that the product's verification and SQLite's checks find in a copy."""
    anchor = remembered(copy)
    readers = open_readers(copy, size=1)
    try:
        problems = [str(problem) for problem in iter_problems(readers, anchor)]
    finally:
        readers.dispose()
    with closing(sqlite3.connect(copy)) as connection:
        answers = [answer for (answer,) in connection.execute("PRAGMA integrity_check")]
        problems += [f"integrity: {answer}" for answer in answers if answer != "ok"]
        problems += [f"foreign keys: {row}" for row in connection.execute("PRAGMA foreign_key_check")]
    return problems


_ENDED = "SELECT session_id FROM sessions WHERE ended_sequence IS NOT NULL"
_PRUNED = "SELECT sequence FROM pruned"
_PRUNED_SESSIONS = """
    SELECT session_id FROM pruned JOIN commits USING (sequence) JOIN sessions USING (session_key)
"""
_VERSIONS = """
    SELECT versions.sequence, sessions.session_id, variables.variable_id, versions.version, versions.kind,
        coalesce(versions.value, CAST(blobs.content AS TEXT)), versions.metadata
    FROM versions JOIN variables USING (variable_key) JOIN sessions USING (session_key)
    LEFT JOIN blobs ON blobs.blob_key = versions.value_blob
    WHERE versions.sequence > ? ORDER BY versions.sequence, versions.variable_key, versions.version
"""


def _rows(connection: sqlite3.Connection, after: int) -> Iterator[Row]:
    for sequence, session_id, variable_id, version, kind, value, text in connection.execute(_VERSIONS, (after,)):
        token = json.loads(text).get("token") if text else None
        yield Row(sequence, session_id, variable_id, version, kind, value, token)


def _head_of(connection: sqlite3.Connection) -> Head:
    row = connection.execute("SELECT sequence, hash FROM commits ORDER BY sequence DESC LIMIT 1").fetchone()
    return Head(*row) if row is not None else Head(0, bytes(32))
