"""What units of work read from a database because memory does not have it."""

from collections.abc import Mapping

from sqlalchemy import Connection

from dspex_persist.state.budgets import Spent
from dspex_persist.state.model import JournalEntry, VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import damage, outcomes
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.unit_of_work import RecordedOutcome, VersionQuery


class StoredSessions:
    """The `Backing` of units of work, read from a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's state. Damaged rows fail only the calls on this session."""
        with damage.reading(session_id):
            return stored_sessions.load(self._connection, session_id)

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one committed version."""
        key = state.keys.get(variable_id)
        with damage.reading(state.session.id):
            return stored_variables.find_version(self._connection, key, version) if key is not None else None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return committed versions, newest first; None if the session never had the variable."""
        variable = state.find(query.identifier) if query.as_of is None else None
        key = state.keys.get(variable.id) if variable is not None else None
        if key is None:
            key = stored_variables.find_key(self._connection, state.key, query.identifier, query.as_of)
        with damage.reading(state.session.id):
            return stored_variables.history(self._connection, key, query) if key is not None else None

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under an idempotency key."""
        return outcomes.find(self._connection, session_id, key)

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last ended execution with an idempotency key."""
        with damage.reading(state.session.id):
            return stored_executions.find_by_key(self._connection, state.key, key)

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """Return what the LM calls of ended executions have used, by tool, and up to which commit."""
        with damage.reading(state.session.id):
            return stored_executions.spent(self._connection, state.key)
