"""Errors of sessions and recordings."""

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
class SessionMovedError(StateError):
    """The session has moved to another backend while the call waited for it. Nothing was written."""

    template = "session {session_id!q} has moved to {moved_to}"
    advice = Hint.OPEN_THERE
    session_id: str
    moved_to: str


@dataclass(eq=False)
class SessionHeldError(StateError):
    """Somebody else is moving the session to another backend. Nothing was done."""

    retryable = True
    template = "session {session_id!q} is being moved"
    advice = Hint.REPEAT_CALL
    session_id: str


@dataclass(eq=False)
class SessionExistsError(StateError):
    """A live session already has this id."""

    template = "session {session_id!q} is live here already"
    advice = Hint.ANOTHER_SESSION_ID
    session_id: str


@dataclass(eq=False)
class SessionPrunedError(StateError):
    """Old history of the session was pruned, so it cannot be exported. `marker`: the commit that pruned it."""

    template = "session {session_id!q} cannot be recorded: commit {marker} pruned a part of its history"
    advice = Hint.RECORD_FROM_BACKUP
    session_id: str
    marker: int


@dataclass(eq=False)
class DamagedSessionError(StateError):
    """The session's data is inconsistent: another program has changed it, or the disk has damaged it.

    `kind`: whether it is in a file, or in a database that servers share.
    """

    template = (
        "session {session_id!q} cannot be read: its data in the {kind} is damaged ({reason}); other sessions are not "
        "affected"
    )
    advice = Hint.CHECK_OR_RESTORE
    session_id: str
    reason: str
    kind: str = "file"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "database":
            self.advice = Hint.CHECK_DATABASE


@dataclass(eq=False)
class IdempotencyConflictError(StateError):
    """The idempotency key was used for another request."""

    template = "idempotency key {key!q} was used for another {cause} request"
    advice = Hint.NEW_KEY
    key: str
    cause: str


@dataclass(eq=False)
class NotInHistoryError(StateError):
    """An audit query for something that is not in the history: a session, a variable, an execution."""

    template = "no {what} {name!q} in the history{hint!o:; %}"
    what: str
    name: str
    hint: str


@dataclass(eq=False)
class RecordingError(StateError):
    """The file is not a recording, or not a complete one. `line` counts from 1."""

    template = "{name}, line {line}: {reason}"
    name: str
    line: int
    reason: str
