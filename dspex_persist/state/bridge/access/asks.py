"""Ask: a call on a session, and what its caller may do there. What rules are, `state.access` knows."""

from typing import Any, Final

from dspex_persist import clock
from dspex_persist.infra.access.tokens import Identity
from dspex_persist.state.access import EVERYTHING, Access, Grants, May, grants_of
from dspex_persist.state.errors import (
    AccessDeniedError,
    StateError,
    VariableNotFoundError,
    quote,
)
from dspex_persist.state.model import Session
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.tools.runner import ToolRunner
from dspex_persist.state.tools.session import ToolSession

_BATCHES: Final = ("updates", "definitions", "variable_identifiers")
_MUCH_WORK: Final = 2_000
"""So many questions whether a rule is about a variable hold up the event loop."""
_MORE_IN_ID: Final = 64
"""How much longer than its name the id of a variable may be."""


class Ask:
    """A call on a session, and what the caller may do there.

    Attributes:
        rpc: The name of the rpc.
        identity: Who calls.
        request: The request. What the rules do not allow may be taken out of it.
        session_id: The session.
        state: The session; None if it is not live.
        access: Its rules; None if it has none.
        grants: What the caller may do.
        execution: The execution of this session that the call is part of.
        has_shown: Whether the call has shown the capability of that.
        runner: Has the tools.
        limits: What names and batches are within.
        errors: Errors to add to the response, by identifier.
    """

    __slots__ = (
        "access",
        "errors",
        "execution",
        "grants",
        "has_shown",
        "identity",
        "limits",
        "request",
        "rpc",
        "runner",
        "session_id",
        "state",
    )

    def __init__(
        self,
        rpc: str,
        identity: Identity,
        request: Any,
        session_id: str,
        execution: ToolSession | None,
        has_shown: bool,
        runner: ToolRunner,
    ) -> None:
        self.rpc = rpc
        self.identity = identity
        self.request = request
        self.session_id = session_id
        self.state: SessionState | None = None
        self.access: Access | None = None
        self.grants: Grants = EVERYTHING
        self.execution = execution if execution is not None and execution.session_id == session_id else None
        self.has_shown = has_shown
        self.runner = runner
        self.limits = runner.limits
        self.errors: dict[str, StateError] = {}

    def look(self, state: SessionState | None) -> None:
        """Take the rules of the session as they are now."""
        if state is not None and state.lease is not None and state.is_over(clock.steady()):
            state = None
        self.state = state
        self.access = None if state is None else Access.of(state.session.metadata)
        if self.execution is not None and self.has_shown:
            # What a tool does is not limited: whoever may execute it gets what it does.
            self.grants = EVERYTHING
        else:
            self.grants = grants_of(self.access, self.identity)

    @property
    def session(self) -> Session | None:
        """The session, which is another object when its metadata have changed."""
        return None if self.state is None else self.state.session

    @property
    def takes_long(self) -> bool:
        """Whether comparing the names in the request with the rules would block an event loop too long."""
        names = sum(len(getattr(self.request, field, ())) for field in _BATCHES)
        return names * len(self.grants.rules) > _MUCH_WORK

    @property
    def answer_takes_long(self) -> bool:
        """The same for the names in an answer about all variables of the session."""
        if self.state is None or self.access is None:
            return False
        return len(self.state.variables) * len(self.access.rules) > _MUCH_WORK

    def name_of(self, identifier: str) -> str:
        """Return the name of a variable that is given by its name or id; the identifier itself if there is none."""
        found = None
        if self.execution is not None:
            found = self.execution.execution.overlay.find(identifier)
        elif self.state is not None:
            found = self.state.find(identifier)
        return identifier if found is None else found.name

    def may(self, what: May, identifier: str) -> bool:
        """Whether the caller may do something with a variable."""
        return self.grants.may(what, self._compared(self.name_of(identifier)))

    def need(self, what: May, identifier: str) -> None:
        """Raise unless the caller may do something with a variable."""
        if not self.may(what, identifier):
            if self.grants.may(what, self._compared(identifier)):
                # It is the id of a variable about which the caller must not know anything.
                raise VariableNotFoundError(self.session_id, identifier)
            raise self.denied(f"{what} of {quote(identifier)}")

    def need_all(self, what: May) -> None:
        """Raise unless the caller may do something with all variables."""
        if not self.grants.may_with_all(what):
            raise self.denied(f"{what} of all variables")

    def need_any(self, what: May) -> None:
        """Raise unless the caller may do something with some variable."""
        if not self.grants.may_with_any(what):
            raise self.denied(f"{what} of any variable")

    def executable(self) -> list[str]:
        """Return the names of the tools that the caller may execute."""
        tools = self.runner.catalog.available({} if self.state is None else self.state.tools)
        return [name for name in tools if self.grants.may_execute(name)]

    def need_tool(self, tool: str) -> None:
        """Raise unless the caller may execute a tool."""
        if not self.grants.may_execute(self._compared(tool)):
            raise self.denied(f"{May.EXECUTE} of {quote(tool)}")

    def _compared(self, name: str) -> str:
        """Return as much of a name as rules are compared with. Nothing has a longer one; a request can."""
        return name[: self.limits.name_length + _MORE_IN_ID]

    def denied(self, missing: str) -> AccessDeniedError:
        """Return the error for what the rules do not allow."""
        return AccessDeniedError(self.identity.name, self.rpc, self.session_id, missing)
