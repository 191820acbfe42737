"""What can be wrong with sessions, and with what they were recorded to."""

from dataclasses import dataclass

from dspex_persist.state.errors.base import StateError
from dspex_persist.state.errors.hints import Hint


@dataclass(eq=False)
class SessionNotFoundError(StateError):
    """No live session has this id: it never began, has ended, or has expired."""

    template = "session not found: {session_id!q}"
    advice = Hint.BEGIN_SESSION
    session_id: str


@dataclass(eq=False)
class SessionExistsError(StateError):
    """A live session has this id, and another one is to begin under it."""

    template = "session {session_id!q} is live here already"
    advice = Hint.ANOTHER_SESSION_ID
    session_id: str


@dataclass(eq=False)
class SessionPrunedError(StateError):
    """Old history of the session is gone, so it cannot be recorded whole. `marker`: the commit that says so."""

    template = "session {session_id!q} cannot be recorded: old history of it was pruned, as commit {marker} says"
    advice = Hint.RECORD_FROM_BACKUP
    session_id: str
    marker: int


@dataclass(eq=False)
class DamagedSessionError(StateError):
    """What the file says of the session makes no sense: it was changed from outside, or the disk has damaged it."""

    template = (
        "session {session_id!q} cannot be read, what the file says of it is damaged ({reason}); other sessions are not "
        "affected"
    )
    advice = Hint.CHECK_OR_RESTORE
    session_id: str
    reason: str


@dataclass(eq=False)
class IdempotencyConflictError(StateError):
    """The idempotency key was used for another request."""

    template = "idempotency key {key!q} was used for another {cause} request"
    advice = Hint.NEW_KEY
    key: str
    cause: str


@dataclass(eq=False)
class NotInHistoryError(StateError):
    """An audit asked for something that the history never had: a session, a variable, an execution."""

    template = "no {what} {name!q} in the history{hint!o:; %}"
    what: str
    name: str
    hint: str


@dataclass(eq=False)
class RecordingError(StateError):
    """A file that is no recording, or not a whole one. `line` counts from 1."""

    template = "{name}, line {line}: {reason}"
    name: str
    line: int
    reason: str
