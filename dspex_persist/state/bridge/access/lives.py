"""Lives: which rules a session has, while it is live and afterwards. Contains no rules itself."""

from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from dspex_persist.state.access import Access
from dspex_persist.state.audit import AuditSource, SessionQuery
from dspex_persist.state.errors import NotInHistoryError
from dspex_persist.state.session_state import SessionState

UNKNOWN: Final = Access("", "[]", ())
"""Stands for the rules of a session that the history does not have: it is nobody's."""


class Life(NamedTuple):
    """A session that had an id: the commit that began it, and its rules, those of its end if it has ended."""

    began: int
    access: Access | None


class Lives:
    """Finds the rules of sessions.

    Args:
        peek: Returns a live session if it is in memory, without using it.
        audit: Returns the history.
    """

    def __init__(self, peek: Callable[[str], SessionState | None], audit: Callable[[], AuditSource]) -> None:
        self.peek = peek
        self._audit = audit

    def all_of(self, session_id: str) -> list[Life]:
        """Return all sessions that had this id, oldest first. It reads the history."""
        lives: list[Life] = []
        with self._audit() as audit, suppress(NotInHistoryError):
            for each in audit.iterate(SessionQuery(session=session_id, newest_first=False)):
                # Compared again, because the id may look like a pattern.
                if each.session_id == session_id:
                    lives.append(Life(each.started_sequence, Access.of(each.metadata)))
        state = self.peek(session_id)
        if state is not None and (not lives or lives[-1].began <= state.session.sequence):
            now = Life(state.session.sequence, Access.of(state.session.metadata))
            lives = [*(life for life in lives if life.began != now.began), now]
        return lives

    def at(self, session_id: str, sequence: int) -> Access | None:
        """Return the rules of the session that had this id at a commit. It may read the history."""
        state = self.peek(session_id)
        if state is not None and state.session.sequence <= sequence:
            return Access.of(state.session.metadata)
        return life_at(self.all_of(session_id), sequence)


def life_at(lives: list[Life], sequence: int) -> Access | None:
    """Return the rules of the last of these sessions that had begun by a commit."""
    return next((life.access for life in reversed(lives) if life.began <= sequence), UNKNOWN)
