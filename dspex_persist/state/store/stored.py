"""What units of work and watches read from a database because memory does not have it."""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from sqlalchemy import Connection, Engine

from dspex_persist.state.budgets import Spent
from dspex_persist.state.model import CommitChanges, JournalEntry, VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import damage, log_reader, outcomes
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.unit_of_work import RecordedOutcome, VersionQuery


class StoredSessions:
    """The `Backing` of units of work, read from a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _reading(self, session_id: str) -> AbstractContextManager[None]:
        """Return a context manager around the decoding of a session's rows."""
        return damage.reading(session_id)

    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's state. Damaged rows fail only the calls on this session."""
        with self._reading(session_id):
            return stored_sessions.load(self._connection, session_id)

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one committed version."""
        key = state.keys.get(variable_id)
        with self._reading(state.session.id):
            return stored_variables.find_version(self._connection, key, version) if key is not None else None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return committed versions, newest first; None if the session never had the variable."""
        variable = state.find(query.identifier) if query.as_of is None else None
        key = state.keys.get(variable.id) if variable is not None else None
        if key is None:
            key = stored_variables.find_key(self._connection, state.key, query.identifier, query.as_of)
        with self._reading(state.session.id):
            return stored_variables.history(self._connection, key, query) if key is not None else None

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under an idempotency key."""
        return outcomes.find(self._connection, session_id, key)

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last ended execution with an idempotency key."""
        with self._reading(state.session.id):
            return stored_executions.find_by_key(self._connection, state.key, key)

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """Return what the LM calls of ended executions have used, by tool, and up to which commit."""
        with self._reading(state.session.id):
            return stored_executions.spent(self._connection, state.key)


class StoredLog(StoredSessions):
    """What any thread reads of a log in a database, each time in a snapshot of its own.

    Attributes:
        readers: Connections that only read.
        sessions: How a snapshot reads sessions.
    """

    readers: Engine
    sessions: ClassVar[type[StoredSessions]] = StoredSessions

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[StoredSessions]:
        """See `LogStore`."""
        with snapshot(self.readers) as connection:
            yield self.sessions(connection)

    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """See `LogStore`."""
        with snapshot(self.readers) as connection, self._reading(state.session.id):
            return log_reader.changes_after(connection, state, after, most_commits)

    def find_pruning(self, state: SessionState, after: int) -> int | None:
        """See `LogStore`."""
        with snapshot(self.readers) as connection, self._reading(state.session.id):
            return log_reader.find_pruning(connection, state.key, after)
