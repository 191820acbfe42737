"""Errors of an engine or a server that cannot answer."""

from dataclasses import dataclass
from typing import Self

from dspex_persist.state.errors.base import StateError
from dspex_persist.state.errors.hints import Hint


@dataclass(eq=False)
class QueueFullError(StateError):
    """The queue of waiting writes is full."""

    template = "the write queue is full ({limit} waiting; setting queue_length)"
    advice = Hint.REPEAT_LATER
    retryable = True
    limit: int


@dataclass(eq=False)
class OutcomeUnknownError(StateError):
    """The disk or the connection failed before the acknowledgement: the outcome is unknown."""

    template = "outcome unknown: {reason}"
    advice = Hint.REPEAT_WITH_KEY
    reason: str


@dataclass(eq=False)
class UnavailableError(StateError):
    """The server cannot be reached, or cannot reach its database."""

    template = "unavailable: {reason}"
    retryable = True
    reason: str

    @classmethod
    def at(cls, address: str, reason: str) -> Self:
        """Return the error for a database that was not reached when it was opened: its address may be wrong."""
        return cls(f"{address}: {reason}").advising(Hint.CHECK_ADDRESS)


@dataclass(eq=False)
class CircuitOpenError(UnavailableError):
    """The server has not answered several times in a row, so calls fail at once for a while.

    Attributes:
        reason: The last failure.
        target: The server.
        since: When the first of these failures was, as ISO 8601.
        retry_in_s: In how many seconds a call is sent again; 0 if another call is trying it now.
    """

    template = (
        "nothing was sent: {target} has not answered since {since} (the last failure: {reason}), and is tried again in "
        "{retry_in_s:.1f} s"
    )
    advice = Hint.REPEAT_LATER
    target: str
    since: str
    retry_in_s: float


@dataclass(eq=False)
class AccessDeniedError(StateError):
    """The rules of a session do not allow what the call asks for; nothing was done.

    Attributes:
        identity: Whose token it is.
        operation: The rpc.
        session_id: The session.
        missing: What the rules would have to allow: `read of 'x'`, `write of all variables`, `execute of 'tool'`.
    """

    template = "{identity} may not call {operation} in session {session_id!q}: its rules do not allow {missing}"
    advice = Hint.ASK_OWNER
    identity: str
    operation: str
    session_id: str
    missing: str


@dataclass(eq=False)
class UnauthenticatedError(StateError):
    """The server demands a token, and the call has none that is valid; nothing was done."""

    template = "not authenticated: {reason}"
    advice = Hint.SEND_TOKEN
    reason: str


@dataclass(eq=False)
class PermissionDeniedError(StateError):
    """The token of the call lacks the scope that the operation takes; nothing was done.

    Attributes:
        identity: Whose token it is.
        operation: The rpc.
        scope: The scope: read, write, execute or admin.
    """

    template = "{identity} may not call {operation}: its token lacks the scope {scope}"
    advice = Hint.ADD_SCOPE
    identity: str
    operation: str
    scope: str


@dataclass(eq=False)
class RateLimitedError(StateError):
    """An identity makes more calls than its line in the server's token file allows; nothing was done.

    Attributes:
        identity: Its name.
        limit: How many it may make, such as "100 calls per second".
        retry_in_s: In how many seconds the call may be repeated.
    """

    template = "{identity} may make {limit} and makes more; nothing was done"
    advice = Hint.CALL_LESS_OFTEN
    retryable = True
    identity: str
    limit: str
    retry_in_s: float


@dataclass(eq=False)
class QuotaExceededError(StateError):
    """An identity would have more sessions or stored bytes than its line in the token file allows; nothing was done.

    Attributes:
        identity: The one that began the session.
        what: Of what: "live sessions" or "stored bytes".
        actual: How many it would have.
        limit: How many it may have.
    """

    template = "{identity} may have {limit:,} {what}, and would have {actual:,}; nothing was done"
    advice = Hint.STORE_LESS
    identity: str
    what: str
    actual: int
    limit: int


@dataclass(eq=False)
class EngineClosedError(StateError):
    """The engine was closed, or is closing."""

    template = "the engine is closed"


@dataclass(eq=False)
class ForkedProcessError(StateError):
    """This process was forked from the one that owns the database, the connection or the execution."""

    template = "{what} belongs to the process that this one was forked from, and works only there"
    advice = Hint.CONNECT_AFTER_FORK
    what: str


@dataclass(eq=False)
class ShuttingDownError(StateError):
    """The server is shutting down and accepts no new calls."""

    template = "nothing was written: the server is shutting down"
    advice = Hint.REPEAT_WHEN_BACK
    retryable = True


@dataclass(eq=False)
class InternalError(StateError):
    """A bug in dspex-persist; the server's log has the reference."""

    template = "{reason}"
    reason: str
