"""Registrations: the tools of a worker, kept registered for sessions of a server."""

import asyncio
import contextlib
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from dspex_persist.infra.logs import get_logger
from dspex_persist.state import commands
from dspex_persist.state.audit import SessionQuery
from dspex_persist.state.bridge.client.state import BridgedState
from dspex_persist.state.errors import (
    NotInHistoryError,
    RemoteToolError,
    SessionNotFoundError,
    StateError,
    ToolExistsError,
)
from dspex_persist.state.model import RegisteredTool, ToolSpec
from dspex_persist.state.tools.remote import REFUSED

EVERY_S: Final = 2.0
"""How often the sessions are looked at, in seconds."""

_logger: Final = get_logger(__name__)

Begin = tuple[int, datetime]
"""What tells a session from others that had its id."""


class Registrations:
    """Keeps tools registered: a session may end and begin again, and the server may go on with another file.

    Looking at the sessions does not keep them alive. A worker that ends takes no registration back: it may be started
    again, and until then its callers are told that it is away, and not that there never was such a tool.

    Args:
        state: The server.
        sessions: The sessions.
        worker_id: How the worker is called.
        specs: The tools.
        address: Where the server reaches them.
    """

    def __init__(
        self, state: BridgedState, sessions: Iterable[str], worker_id: str, specs: Iterable[ToolSpec], address: str
    ) -> None:
        self._state = state
        self._worker_id = worker_id
        self._tools = tuple(RegisteredTool(spec, worker_id, address) for spec in specs)
        self._address = address
        # For which begin of each session they are registered; None if that may be another one by now.
        self._registered: dict[str, Begin | None] = dict.fromkeys(sessions)
        self._fault = ""

    def register(self) -> None:
        """Register them for all sessions.

        Raises:
            SessionNotFoundError: A session is not there.
            PermissionDeniedError: The token may not register tools.
            ToolExistsError: The server has a tool of one of the names.
            RemoteToolError: The server may not call the address.
            StateError: The server cannot be reached, or refuses them.
        """
        for session in self._registered:
            self._register(session, self._begin_of(session))

    async def keep(self) -> None:
        """Register them again whenever that is necessary, until it is cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await asyncio.to_thread(self._look)
            except StateError as error:
                self._note(str(error))
            else:
                self._note("")

    def _look(self) -> None:
        for session, registered in self._registered.items():
            try:
                begin = self._begin_of(session)
            except StateError:
                # Nobody knows what the server is when it answers again.
                self._registered = dict.fromkeys(self._registered)
                raise
            if begin is not None and begin != registered:
                # It may have ended, or expired, meanwhile.
                with contextlib.suppress(SessionNotFoundError):
                    self._register(session, begin)

    def _begin_of(self, session: str) -> Begin | None:
        """Return when the live session began; None if there is none."""
        with self._state.audit() as audit:
            try:
                # It may look like a pattern.
                found = list(audit.iterate(SessionQuery(session=session, live=True)))
            except NotInHistoryError:
                return None
        return next(((each.started_sequence, each.created_at) for each in found if each.session_id == session), None)

    def _register(self, session: str, begin: Begin | None) -> None:
        command = commands.RegisterTools(session, self._worker_id, self._tools)
        registered = self._state.run(command)
        for tool in self._tools:
            if tool.spec.name not in registered:
                raise ToolExistsError(tool.spec.name)
        listed = {spec.name: spec for spec in self._state.list_tools(session)}
        for name in registered:
            if name in listed and listed[name].metadata.get("dspex.circuit") == REFUSED:
                reason = "the server may not call this address: it is not one of its tool_addresses"
                raise RemoteToolError(name, self._address, reason)
        self._registered[session] = begin
        _logger.info("tools registered", session=session, tools=len(registered), address=self._address)

    def _note(self, fault: str) -> None:
        """Log a fault when it begins and when it is over."""
        if fault and fault != self._fault:
            _logger.warning("the tools cannot be kept registered for now", reason=fault)
        elif self._fault and not fault:
            _logger.info("the tools are registered again")
        self._fault = fault
