"""Which executions run in this process: finds them, and stops those of which nothing can be kept."""

import asyncio
import contextlib
from collections.abc import Collection
from weakref import WeakValueDictionary

from dspex_persist.state import commands
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionElsewhereError,
    ExecutionNotFoundError,
    SessionNotFoundError,
)
from dspex_persist.state.peers import Peers
from dspex_persist.state.tools.endings import SEEMED_DEAD, SESSION_ENDED, Endings
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.session import ToolSession


class Running:
    """The executions that run in this process. Changed on the runner's home loop.

    Args:
        home: The event loop of the executions.
        endings: Has the store carry out commands.
        peers: The other servers of the sessions; None if there are none.

    Attributes:
        sessions: The session of each, by the id of the execution. Whoever adds one deletes it at its end.
        known: The same, and those that have ended while their code still runs.
    """

    def __init__(self, home: Home, endings: Endings, peers: Peers | None) -> None:
        self.sessions: dict[str, ToolSession] = {}
        self.known: WeakValueDictionary[str, ToolSession] = WeakValueDictionary()
        self._home = home
        self._endings = endings
        self._peers = peers
        if peers is not None:
            peers.on_fenced(lambda: home.mailbox.post(self._interrupt))
            peers.on_ended(self._end_sessions)

    def add(self, session: ToolSession) -> None:
        """List an execution as running, so that `find` returns it."""
        self.sessions[session.execution_id] = self.known[session.execution_id] = session

    def find(self, execution_id: str) -> Execution:
        """Return a running execution; `ExecutionNotFoundError` if no such one is running."""
        return self.session_of(execution_id).execution

    def session_of(self, execution_id: str) -> ToolSession:
        """Return the session of a running execution; raises as `find` does."""
        session = self.sessions.get(execution_id)
        if session is None:
            raise ExecutionNotFoundError(execution_id)
        return session

    async def seek(self, execution_id: str) -> ToolSession:
        """Return the session of a running execution, or say where it runs.

        Raises:
            ExecutionElsewhereError: Another server runs it.
            ExecutionNotFoundError: No such execution is running.
        """
        session = self.sessions.get(execution_id)
        if session is None:
            await self.check_elsewhere(execution_id)
        return self.session_of(execution_id)

    async def check_elsewhere(self, execution_id: str) -> None:
        """Raise `ExecutionElsewhereError` if another server runs an execution."""
        if self._peers is None:
            return
        # It asks the log.
        address = await asyncio.to_thread(self._peers.server_of, execution_id)
        if address is not None:
            raise ExecutionElsewhereError(execution_id, address)

    def is_running(self, execution_id: str) -> bool:
        """Whether `find` would find it."""
        return execution_id in self.sessions

    def has_executions(self, session_id: str) -> bool:
        """Whether something runs in a session; from any thread."""
        return any(session.session_id == session_id for session in list(self.sessions.values()))

    async def still_runs(self, session: ToolSession) -> bool:
        """Whether the store, too, has an execution as running; its session may have ended."""
        try:
            state = await self._endings.submit_here(commands.ReadState(session.session_id), session.origin)
        except SessionNotFoundError:
            return False
        return session.execution_id in state.executions

    async def end_executions(self, session_id: str) -> None:
        """End what runs in a session that has ended at once, and not only when its time is up.

        Args:
            session_id: The session. Another one may have begun with its id.
        """
        running = [session for session in self.sessions.values() if session.session_id == session_id]
        for session in running:
            # What it has called ends with it.
            if session.execution.parent is None and not await self.still_runs(session):
                self._end_now(session, SESSION_ENDED)

    def _end_now(self, session: ToolSession, reason: str) -> None:
        """Have the code of an execution, if it still runs, end as if its time were up."""
        if session.limit is not None:
            # Unless its time is up at this moment.
            with contextlib.suppress(RuntimeError):
                session.limit.reschedule(self._home.loop.time())
                session.over_because = reason

    def _end_sessions(self, session_ids: Collection[str]) -> None:
        for session_id in session_ids:
            if self.has_executions(session_id):
                with contextlib.suppress(EngineClosedError):
                    self._home.start(self.end_executions(session_id))

    def _interrupt(self) -> None:
        """Stop the code of all executions, none of which can write anything any more."""
        for session in tuple(self.sessions.values()):
            if session.execution.parent is None:
                self._end_now(session, SEEMED_DEAD)
