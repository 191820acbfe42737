"""Commands for sessions: begin or resume, query, keep alive, end."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from dspex_persist.infra.access.tokens import Identity
from dspex_persist.state import budgets
from dspex_persist.state.access import (
    ACCESS,
    OWNER,
    check_keys,
    check_names,
    may_merge,
    parse_rules,
    without_owner,
)
from dspex_persist.state.budgets import Budget
from dspex_persist.state.commands.base import Command, Reads, check_merged_metadata, check_metadata, check_text
from dspex_persist.state.errors import AccessDeniedError, InvalidArgumentError, quote
from dspex_persist.state.events import SessionStarted, SessionUpdated
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import CONCURRENCY, Concurrency, SessionSummary, SessionView
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import UnitOfWork
from dspex_persist.state.values import encode

MOST_TTL_S = 100 * 365 * 86_400
"""The longest TTL of a session."""
_KNOWN: Final = frozenset({CONCURRENCY}) | budgets.KEYS
"""The keys of a session's metadata that start with `dspex.` and that clients may set."""


@dataclass(frozen=True, slots=True)
class InitializeSession(Command[SessionView]):
    """Begin a session, or resume the live one with this id and merge the metadata into its metadata.

    `metadata["ttl_seconds"]` sets its TTL in seconds; "0" means no TTL. `metadata["dspex.concurrency"]` says what an
    execution does while another one runs, `metadata["access_control_json"]` who may use it, see `state.access`.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = SessionView

    def apply(self, uow: UnitOfWork) -> SessionView:
        check_text("session_id", self.session_id, uow.limits.session_id_length, "session_id_length")
        check_session_metadata(self.metadata, uow.limits)
        identity = uow.origin.identity
        if identity is not None:
            check_keys(self.metadata)
        if ACCESS in self.metadata:
            _check_rules(self.metadata[ACCESS], identity)
        state = uow.find_session(self.session_id)
        if state is None:
            encode(dict(self.config), name="config")  # Refuses objects that are not JSON, which could not be stored.
            ttl_s = _ttl_of(self.metadata, uow.session_ttl_s)
            metadata = self.metadata if identity is None else {**self.metadata, OWNER: identity.name}
            uow.start_session(SessionStarted(self.session_id, metadata, ttl_s, self.config))
            return SessionView(resumed=False, variables=())
        self._merge(uow, state)
        return _resumed(uow, state)

    def _merge(self, uow: UnitOfWork, state: SessionState) -> None:
        merged = {**state.session.metadata, **self.metadata}
        ttl_s = _ttl_of(self.metadata, state.session.ttl_s)
        if merged != state.session.metadata or ttl_s != state.session.ttl_s:
            identity = uow.origin.identity
            if identity is not None and not may_merge(self.metadata, state.session.metadata, identity):
                raise AccessDeniedError(identity.name, self.cause, self.session_id, "other rules")
            check_merged_metadata(without_owner(merged), self.metadata, uow.limits, _KNOWN)
            uow.record(self.session_id, SessionUpdated(self.session_id, merged, ttl_s))


def _check_rules(text: str, identity: Identity | None) -> None:
    if identity is None:
        reason = "it protects nothing here, where nobody shows who they are: it needs a server that demands tokens"
        raise InvalidArgumentError(ACCESS, reason)
    if text:
        check_names(parse_rules(text))


def _resumed(uow: UnitOfWork, state: SessionState) -> SessionView:
    return SessionView(resumed=True, variables=tuple(uow.current(variable) for variable in state.variables.values()))


def check_session_metadata(metadata: Mapping[str, str], limits: Limits) -> None:
    """Refuse the metadata of a session if it exceeds the limits, or has a wrong `dspex.concurrency` or budget."""
    check_metadata(metadata, limits, _KNOWN)
    stated = metadata.get(CONCURRENCY)
    if stated is not None and stated not in list(Concurrency):
        known = ", ".join(Concurrency)
        raise InvalidArgumentError("metadata", f"{CONCURRENCY} is {quote(stated)}, it must be one of {known}")
    Budget.of_metadata(metadata)


def _ttl_of(metadata: Mapping[str, str], default_s: float | None) -> float | None:
    text = metadata.get("ttl_seconds")
    if text is None:
        return default_s
    try:
        ttl_s = float(text)
    except ValueError:
        ttl_s = math.nan
    if not 0 <= ttl_s <= MOST_TTL_S:
        reason = f"ttl_seconds is {quote(text)}, it must be a number of seconds from 0 (for ever) to {MOST_TTL_S}"
        raise InvalidArgumentError("metadata", reason)
    return ttl_s or None


@dataclass(frozen=True, slots=True)
class ResumeSession(Command[SessionView | None]):
    """Resume a live session as `InitializeSession` does; None if that has to change something, or has to load it.

    Clients initialize their session again and again, and this does not wait for the writer.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads(self) -> Reads:
        """See `Command.reads`."""
        return Reads.LOADED

    def apply(self, uow: UnitOfWork) -> SessionView | None:
        state = uow.find_session(self.session_id)
        if state is None:
            return None
        session = state.session
        if ACCESS in self.metadata or not self.metadata.items() <= session.metadata.items():
            return None
        if _ttl_of(self.metadata, session.ttl_s) != session.ttl_s:
            return None
        return _resumed(uow, state)


@dataclass(frozen=True, slots=True)
class GetSession(Command[SessionSummary]):
    """Return a summary of the session.

    Attributes:
        besides: The names of tools that it has besides those that workers have registered for it.
    """

    besides: frozenset[str] = frozenset()

    def apply(self, uow: UnitOfWork) -> SessionSummary:
        state = uow.session(self.session_id)
        session, tools = state.session, len(state.tools.keys() | self.besides)
        return SessionSummary(session.id, session.metadata, session.created_at, len(state.variables), tools)


@dataclass(frozen=True, slots=True)
class ReadState(Command[SessionState]):
    """Return the published state itself, for use inside a backend."""

    def apply(self, uow: UnitOfWork) -> SessionState:
        return uow.session(self.session_id)


@dataclass(frozen=True, slots=True)
class PeekSession(Command[SessionState | None]):
    """Return the published state, without counting as a use of the session; None if it is not live."""

    def apply(self, uow: UnitOfWork) -> SessionState | None:
        return uow.peek(self.session_id)


@dataclass(frozen=True, slots=True)
class Heartbeat(Command[bool]):
    """Renew the session's TTL; return whether the session is live."""

    def apply(self, uow: UnitOfWork) -> bool:
        return uow.find_session(self.session_id) is not None


@dataclass(frozen=True, slots=True)
class CleanupSession(Command[int]):
    """End the session, and return how many variables it had (0 if there was no such session). Its history stays."""

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = int

    def apply(self, uow: UnitOfWork) -> int:
        state = uow.find_session(self.session_id)
        if state is None:
            return 0
        uow.end_session(self.session_id, "cleaned up")
        return len(state.variables)


@dataclass(frozen=True, slots=True)
class ExpireSession(Command[bool]):
    """End the session if it has expired; return whether it had."""

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = bool

    def apply(self, uow: UnitOfWork) -> bool:
        if uow.find_expired(self.session_id) is None:
            return False
        uow.end_session(self.session_id, "expired")
        return True


@dataclass(frozen=True, slots=True)
class HoldSession(Command[bool]):
    """Hold all writes of a session, unless a tool is running in it; return whether they are. It makes no commit.

    `begin` is called when the writer has carried out all earlier commands.
    """

    begin: Callable[[], None]

    writes: ClassVar[bool] = True
    passes_holds: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> bool:
        if uow.session(self.session_id).executions:
            return False
        self.begin()
        return True


MOVED: Final = "moved to "
"""What the reason begins with for which a session ended that goes on elsewhere."""


@dataclass(frozen=True, slots=True)
class EndMovedSession(Command[None]):
    """End a session that goes on elsewhere. Its history stays."""

    moved_to: str

    writes: ClassVar[bool] = True
    passes_holds: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        uow.session(self.session_id)
        uow.end_session(self.session_id, f"{MOVED}{self.moved_to}")


@dataclass(frozen=True, slots=True)
class TouchSession(Command[None]):
    """Renew the session's TTL, and save the new expiry if that is due. It makes no commit."""

    writes: ClassVar[bool] = True
    passes_holds: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        uow.find_session(self.session_id)
