"""HoldRpcs: sessions that a client holds while it moves them, as part of the audit service. Contains no rules."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.infra.threads import DaemonThreads
from dspex_persist.state.abilities import Holdable, SessionHold
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.incoming import Context, RequestHeaders, origin_of
from dspex_persist.state.commands import EndMovedSession
from dspex_persist.state.errors import EngineClosedError, UnavailableError
from dspex_persist.state.model import Origin
from dspex_persist.state.provider import StateProvider

R = TypeVar("R")

LONGEST_S: Final = 300.0
"""After this time a hold ends by itself: its client is alive, as it answers pings, but does not go on."""
_TIMEOUT_S: Final = 30.0
_THREADS: Final = 8
"""So many holds may wait for the tools in their sessions at the same time."""

_logger: Final = get_logger(__name__)


class HoldRpcs:
    """Holds sessions for clients. Made and used on one event loop.

    A hold belongs to the stream of `HoldSession`: it ends with the stream, so that nothing is left of a client that has
    disappeared.

    Args:
        provider: Has the sessions.
        stall_timeout_s: How long to wait for the first message of a stream.
    """

    def __init__(self, provider: StateProvider, stall_timeout_s: float) -> None:
        self._holding = provider
        self._first_timeout_s = stall_timeout_s
        self._here = LoopMailbox(asyncio.get_running_loop())
        self._holders = DaemonThreads(_THREADS, "dspex-persist-holds")
        self._ends = asyncio.Event()

    def end_holds(self) -> None:
        """End all holds, as the server is shutting down."""
        self._ends.set()

    def close_holders(self) -> None:
        """End the threads that wait for tools."""
        self._holders.close()

    async def HoldSession(self, requests: AsyncIterator[pb.HoldSessionRequest], context: Context) -> None:
        origin = replace(
            origin_of(EndMovedSession.__name__, context, RequestHeaders(context)),
            idempotency_key=None,
            optimizer_id=None,
        )
        request = await self._next(requests, self._first_timeout_s)
        if request is None:
            return
        held, session_id = await self._begun(request, origin), request.session
        moving: Future[None] | None = None
        try:
            await context.write(pb.HoldSessionResponse())
            request = await self._next(requests, LONGEST_S)
            if request is None:
                return
            _logger.info("session moves", session_id=session_id, moved_to=request.moved_to, peer=context.peer())
            moving = self._on_thread(partial(held.move, request.moved_to))
            await self._here.result(moving)
            await context.write(pb.HoldSessionResponse(moved=True))
        finally:
            if moving is None:
                held.close()
            else:
                # If the client leaves, the move goes on: whoever can hold the session after it knows how it ended.
                moving.add_done_callback(lambda _: held.close())

    async def _begun(self, request: pb.HoldSessionRequest, origin: Origin) -> SessionHold:
        timeout_s = min(request.timeout_s if request.HasField("timeout_s") else _TIMEOUT_S, LONGEST_S)
        provider = Holdable.of(self._holding)
        begin = partial(provider.hold_session, request.session, timeout_s=timeout_s, origin=origin)
        future = self._on_thread(begin)
        try:
            return await self._here.result(future)
        except BaseException:
            # Cancelled, it still begins on its thread.
            future.add_done_callback(_close)
            raise

    def _on_thread(self, work: Callable[[], R]) -> "Future[R]":
        try:
            return self._holders.submit(work)
        except RuntimeError:
            raise EngineClosedError() from None

    async def _next(
        self, requests: AsyncIterator[pb.HoldSessionRequest], timeout_s: float
    ) -> pb.HoldSessionRequest | None:
        """Return the next message of the client, or None if it has ended its stream."""
        message = asyncio.ensure_future(_next_of(requests))
        ending = asyncio.ensure_future(self._ends.wait())
        try:
            done, _ = await asyncio.wait((message, ending), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if message in done:
                return message.result()
            if ending in done:
                raise UnavailableError("the server is shutting down; the session was not moved, move it later")
            raise UnavailableError(f"the client sent nothing for {timeout_s:g} s; the session was not moved")
        finally:
            message.cancel()
            ending.cancel()


async def _next_of(requests: AsyncIterator[pb.HoldSessionRequest]) -> pb.HoldSessionRequest | None:
    return await anext(requests, None)


def _close(begun: "Future[SessionHold]") -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().close()
