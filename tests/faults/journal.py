"""Checks the journal of executions in a killed server's file against the clients' knowledge and what was running."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.faults.ledger import Ledger, Write

_PUBLISHED = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """One execution in the file; `ended` is the commit that ended it."""

    id: str
    status: str
    ended: int | None


class Journal:
    """Keeps what was in the journal at the last check."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        """The executions that were running when the last server was killed."""
        self.statuses: Counter[str] = Counter()
        self.repeated = 0
        """How many keys have an execution that was interrupted, and one that has committed."""
        self._entries: dict[str, Entry] = {}
        self._checked: set[str] = set()

    def check(self, connection: sqlite3.Connection, after: int, ledger: Ledger, *, started: bool) -> Iterator[str]:
        """Yield the problems in the commits `after` the last check; `started`: a server was ready since then."""
        for row in connection.execute(_ENTRIES, (after,)):
            self._entries[row[0]] = Entry(*row)
        yield from self._check_running(started)
        yield from self._check_visible(connection, after)
        yield from self._check_answers(connection, ledger)
        for key, count in connection.execute(_TWICE):
            yield f"written twice: {count} executions under {key!r} have committed"
        self.running = {entry.id for entry in self._entries.values() if entry.ended is None}
        self.statuses = Counter(entry.status for entry in self._entries.values())
        [(self.repeated,)] = connection.execute(_REPEATED)

    def _check_running(self, started: bool) -> Iterator[str]:
        """The next server marks the executions of a killed one as interrupted, before it is ready."""
        for execution_id in self.running:
            entry = self._entries[execution_id]
            if entry.ended is None and started:
                yield f"still running: {execution_id}, though its server was killed"
            elif entry.ended is not None and entry.status != "interrupted":
                yield f"not interrupted: {entry} ran when its server was killed"

    def _check_visible(self, connection: sqlite3.Connection, after: int) -> Iterator[str]:
        """All writes of an execution are in the commit that ended it, and only if it committed."""
        for execution_id, sequence, count in connection.execute(_WRITTEN, (after, _PUBLISHED)):
            entry = self._entries.get(execution_id)
            if entry is None or (entry.status, entry.ended) != ("committed", sequence):
                yield f"half tool: {count} versions in commit {sequence} are from {entry or execution_id}"

    def _check_answers(self, connection: sqlite3.Connection, ledger: Ledger) -> Iterator[str]:
        for write in ledger.writes.values():
            if write.journal and write.token not in self._checked:
                self._checked.add(write.token)
                yield from self._check_answer(connection, write)

    def _check_answer(self, connection: sqlite3.Connection, write: Write) -> Iterator[str]:
        entry = self._entries.get(write.execution_id)
        if entry is None or entry.status != write.journal:
            yield f"lost: {write} was answered, the journal has {entry}"
        elif write.journal == "committed":
            result = _result_of(connection, entry)
            if (entry.ended, result) != (write.sequence, write.result):
                yield f"lost: {write} was acknowledged, the journal has {entry} with {result}"


def _result_of(connection: sqlite3.Connection, entry: Entry) -> Any:
    for (text,) in connection.execute(_ENDS, (entry.ended,)):
        body = json.loads(text)
        if body["execution_id"] == entry.id and body["result"] is not None:
            return json.loads(body["result"]["json"])
    return None


_ENTRIES = "SELECT execution_id, status, ended_sequence FROM executions WHERE coalesce(ended_sequence, 1 << 62) > ?"
_WRITTEN = """
    SELECT cause, sequence, count(*) FROM versions JOIN commits USING (sequence)
    WHERE sequence > ? AND cause LIKE 'exec!_%' ESCAPE '!' AND kind != ? GROUP BY cause, sequence
"""
_ENDS = "SELECT body FROM events WHERE sequence = ? AND kind = 'execution_ended'"
_TWICE = """
    SELECT idempotency_key, count(*) FROM executions
    WHERE idempotency_key IS NOT NULL AND status = 'committed' GROUP BY session_key, idempotency_key HAVING count(*) > 1
"""
_REPEATED = """
    SELECT count(DISTINCT idempotency_key) FROM executions WHERE status = 'committed' AND idempotency_key IN
        (SELECT idempotency_key FROM executions WHERE status = 'interrupted')
"""
