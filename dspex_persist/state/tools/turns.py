"""Turns: which execution may run when a session does not let several run at the same time."""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from dspex_persist.state.errors import SessionBusyError, ToolTimedOutError, quote
from dspex_persist.state.model import Concurrency, JournalEntry
from dspex_persist.state.tools.requests import ToolRequest
from dspex_persist.state.tools.session import ToolSession


class Turns:
    """The lines of executions that run one after the other, one line for each session. Used on the home loop.

    Only executions that `queue` or `reject` stand in a line; optimistic ones neither wait nor make others wait. An
    execution keeps its turn until the store has its end, so that the next one sees what it has written. Code of an
    ended execution that runs on can write nothing, as its execution has ended.

    Args:
        most: How many executions may wait in a session.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lines: dict[str, deque[Place]] = {}

    def place(self, request: ToolRequest, asker: ToolSession | None, asker_id: str | None = None) -> "Place":
        """Return the place of a request, which is in no line yet.

        Args:
            request: The request.
            asker: The session of the execution whose code makes the request, if a tool's code does.
            asker_id: The execution that has said so; it may run on another server.
        """
        return Place(self, request, asker, asker_id)

    def line(self, session_id: str) -> "deque[Place]":
        """Return the line of a session."""
        return self._lines.setdefault(session_id, deque())

    def forget(self, session_id: str) -> None:
        """Forget a line that has become empty."""
        del self._lines[session_id]


class Place:
    """The place of a request, in the line of its session once it has joined that. The first one has the turn.

    Attributes:
        concurrency: What the request has seen to so far.
        execution_id: The current attempt, once it has begun.
    """

    def __init__(
        self, turns: Turns, request: ToolRequest, asker: ToolSession | None, asker_id: str | None = None
    ) -> None:
        self.request = request
        self.concurrency = Concurrency.OPTIMISTIC
        self.execution_id = ""
        self._turns = turns
        self._asker = asker
        self._asker_id = asker_id
        self._line: deque[Place] | None = None
        self._is_first: asyncio.Future[None] | None = None

    def __str__(self) -> str:
        return f"{quote(self.request.tool)} (execution {self.execution_id or 'about to begin'})"

    def join(self, concurrency: Concurrency) -> None:
        """Join the line unless the request is optimistic; those that wait go in the order in which they have joined.

        Args:
            concurrency: What to do if another execution has the turn.

        Raises:
            SessionBusyError: Another execution has the turn and this one does not wait, or too many wait already, or it
                would wait for its own caller.
        """
        self.concurrency = concurrency
        if concurrency is Concurrency.OPTIMISTIC or self._line is not None:
            return
        line = self._turns.line(self.request.session_id)
        if line:
            self._check(line)
        self._line, self._is_first = line, asyncio.get_running_loop().create_future()
        line.append(self)
        line[0]._go()

    def _check(self, line: "deque[Place]") -> None:
        request, first = self.request, line[0]
        if first.execution_id in _ids_of(self._asker):
            reason = f"{first} has called this and waits for it; call it as a part of that execution instead"
            raise SessionBusyError(request.session_id, reason)
        # A repeated request waits for the outcome of the first one instead.
        is_repeated = request.idempotency_key is not None and any(
            request.idempotency_key == other.request.idempotency_key for other in line
        )
        if self.concurrency is Concurrency.REJECT and not is_repeated:
            reason = f"{first} is running, and {quote(request.tool)} does not run at the same time"
            raise SessionBusyError(request.session_id, reason)
        if len(line) > self._turns.most:
            reason = f"{len(line) - 1} executions wait for {first} already (setting queued_executions)"
            raise SessionBusyError(request.session_id, reason)

    @property
    def has_turn(self) -> bool:
        """Whether it is the first in its line."""
        return self._line is not None and self._line[0] is self

    def check_waits_for(self, busy: JournalEntry) -> None:
        """Check that the request may wait for an execution of another server that has the turn of the session there.

        Raises:
            SessionBusyError: It does not wait, or would wait for its own caller.
        """
        request, first = self.request, f"{quote(busy.tool)} (execution {busy.id}, on another server)"
        if busy.id == self._asker_id:
            reason = f"{first} has called this and waits for it; call it as a part of that execution instead"
            raise SessionBusyError(request.session_id, reason)
        if self.concurrency is Concurrency.REJECT:
            reason = f"{first} is running, and {quote(request.tool)} does not run at the same time"
            raise SessionBusyError(request.session_id, reason)

    async def turn(self) -> None:
        """Wait for the turn, within the deadline of the request; `ToolTimedOutError` if that passes before."""
        if self._line is None or self._is_first is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self.request.until):
                await self._is_first
                return
        reason = f"it has not had its turn in the {self.request.timeout_s:.3g} s that its caller waits"
        raise ToolTimedOutError("", f"{reason}: {self._line[0]} is running")

    def _go(self) -> None:
        if self._is_first is not None and not self._is_first.done():
            self._is_first.set_result(None)

    def leave(self) -> None:
        """Leave the line, so that the next one has its turn."""
        line, self._line = self._line, None
        if line is None:
            return
        line.remove(self)
        if line:
            line[0]._go()
        else:
            self._turns.forget(self.request.session_id)


def _ids_of(session: ToolSession | None) -> Iterator[str]:
    """Iterate over the ids of an execution and of those whose code waits for it."""
    while session is not None:
        yield session.execution_id
        session = session.asker
