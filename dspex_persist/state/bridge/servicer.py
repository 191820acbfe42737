"""BridgeServicer: serves the bridge protocol over any provider with tools. Translates messages; contains no rules."""

import asyncio
from typing import Any

from dspex_persist import clock
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.access.permitted import PERMIT, Permit
from dspex_persist.state.bridge.calls import methods
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import AFTER_SEQUENCE, ARGUMENTS, CONTINUES
from dspex_persist.state.bridge.incoming import Context, check_count, fitting
from dspex_persist.state.bridge.inherited import OneProcess
from dspex_persist.state.bridge.rpcs import RPCS
from dspex_persist.state.bridge.rpcs.sessions import INITIALIZE_SESSION
from dspex_persist.state.bridge.tools import ToolRpcs
from dspex_persist.state.bridge.watch_streams import WatchStreams
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.watch import Watch


@methods(RPCS, "answer")
class BridgeServicer(ToolRpcs):
    """The rpcs of the bridge protocol. Made and used on one event loop.

    Args:
        provider: Runs the commands.
        heartbeat_s: The interval of heartbeats to idle watchers, in seconds.
        stall_timeout_s: How long a stream waits for a client that does not read, before it ends.
        max_message_bytes: The largest response.
    """

    def __init__(
        self,
        provider: WithTools,
        *,
        heartbeat_s: float = 15.0,
        stall_timeout_s: float = 30.0,
        max_message_bytes: int = 100 * 1024 * 1024,
    ) -> None:
        super().__init__(provider, stall_timeout_s, max_message_bytes)
        self._watchers = WatchStreams(self._mailbox, heartbeat_s, stall_timeout_s)
        # A child that a tool forks cannot use gRPC at all, because it would share the server's sockets.
        self._here = OneProcess("the server's own clients")

    async def drain(self) -> None:
        """End all watches, with a status that says where to resume. Running tools may finish."""
        self._runner.drain()
        self._watchers.drain()

    def watch_positions(self) -> dict[int, int]:
        """Return how far the slowest watch of each session is; see `WatchStreams.positions`."""
        return self._watchers.positions()

    async def Ping(self, request: pb.PingRequest, _context: Context) -> pb.PingResponse:
        return pb.PingResponse(message=request.message, server_time=codec.timestamp_of(clock.now()))

    async def InitializeSession(self, request: pb.InitializeSessionRequest, context: Context) -> Any:
        response = await self.answer(INITIALIZE_SESSION, request, context)
        call = self._call(context)
        await self._learn(request.session_id, call)
        for name, tool in (await self._available_tools(request.session_id, call)).items():
            response.available_tools[name].CopyFrom(tool)
        return fitting(response, self._max_message_bytes)

    async def WatchVariables(self, request: pb.WatchVariablesRequest, context: Context) -> None:
        call = self._call(context)
        after, continued = call.number(AFTER_SEQUENCE), call.number(CONTINUES)
        identifiers = request.variable_identifiers
        check_count("variables in the batch", identifiers, self._limits.batch_entries, "batch_entries")
        watched = (request.session_id, tuple(identifiers))
        try:
            watch = await asyncio.to_thread(self._watch, *watched, after, PERMIT.get())
        except InvalidArgumentError as error:
            if error.field == ARGUMENTS[AFTER_SEQUENCE]:
                raise InvalidArgumentError(AFTER_SEQUENCE, error.reason) from error
            raise
        if continued is not None:
            await asyncio.to_thread(_check_continues, watch, continued)
        log = self._log("WatchVariables", request.session_id, call)
        await self._watchers.send(watch, context, log, initial=request.include_initial_values)

    def _watch(self, session_id: str, identifiers: tuple[str, ...], after: int | None, permit: Permit | None) -> Watch:
        watch = self._provider.watch(session_id, identifiers, after_sequence=after)
        if permit is None:
            return watch
        try:
            return permit.watch(watch, session_id)
        except BaseException:
            watch.close()
            raise


def _check_continues(watch: Watch, first_sequence: int) -> None:
    try:
        watch.check_continues(first_sequence)
    except BaseException:
        watch.close()
        raise
