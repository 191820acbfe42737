"""Sends updates and heartbeats to watchers, and ends the streams of those that stop reading."""

import asyncio
from typing import Any

from dspex_persist import clock
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import AFTER_SEQUENCE, INITIAL_VALUES, POSITION
from dspex_persist.state.bridge.incoming import Context
from dspex_persist.state.errors import UnavailableError, WatchStalledError
from dspex_persist.state.model import Update, UpdateKind
from dspex_persist.state.watch import Watch


class WatchStreams:
    """The streams of all watchers. Made and used on one event loop.

    Args:
        mailbox: Wakes the streams when there is something new.
        heartbeat_s: The interval of heartbeats to idle watchers, in seconds.
        stall_timeout_s: How long a stream waits for a watcher that does not read, before it ends.
    """

    def __init__(self, mailbox: LoopMailbox, heartbeat_s: float, stall_timeout_s: float) -> None:
        self.mailbox = mailbox
        self.heartbeat_s = heartbeat_s
        self.stall_timeout_s = stall_timeout_s
        self.draining = False
        self.waiting: set[asyncio.Event] = set()

    def drain(self) -> None:
        """End all streams, each with a status that says where to resume."""
        self.draining = True
        for ready in self.waiting:
            ready.set()

    async def send(self, watch: Watch, context: Context, log: Any, *, initial: bool) -> None:
        """Send the updates of a watch until it ends or the client goes; with `initial`, the current values first."""
        with watch:
            await _WatchStream(self, watch, context, log).run(initial=initial)


class _WatchStream:
    """The stream of one watcher: pulls, sends, waits. It holds at most one page of updates."""

    def __init__(self, streams: WatchStreams, watch: Watch, context: Context, log: Any) -> None:
        self._streams = streams
        self._watch = watch
        self._context = context
        self._ready = asyncio.Event()
        self._sent = watch.position
        self._log = log

    async def run(self, *, initial: bool) -> None:
        streams, ready = self._streams, self._ready
        self._watch.notify(streams.mailbox.waker(ready.set))
        streams.waiting.add(ready)
        self._log.debug("watch begun", after_sequence=self._sent)
        try:
            count = len(self._watch.initial) if initial else 0
            await self._context.send_initial_metadata(((POSITION, str(self._sent)), (INITIAL_VALUES, str(count))))
            if initial:
                await self._send_initial()
            while not streams.draining:
                ready.clear()
                if not await self._send_new():
                    await self._wait()
        finally:
            streams.waiting.discard(ready)
        raise UnavailableError(f"the server is shutting down; resume with {AFTER_SEQUENCE}: {self._sent}")

    async def _send_initial(self) -> None:
        for variable in self._watch.initial:
            update = Update(UpdateKind.INITIAL_VALUE, variable, self._sent, variable.updated_at)
            await self._send(codec.update_message(update))

    async def _send_new(self) -> bool:
        """Send the updates that are available; returns whether there were any."""
        updates = self._watch.pull_ready()
        if updates is None:
            updates = await asyncio.to_thread(self._watch.pull)
        for update in updates:
            if update.part[0] == update.part[1]:
                # Counts as sent even if it stalls, because what gRPC has accepted arrives before the status.
                self._sent = update.sequence
            await self._send(codec.update_message(update))
        return bool(updates)

    async def _wait(self) -> None:
        # Everything up to here has been sent, or does not concern this watcher.
        self._sent = max(self._sent, self._watch.position)
        try:
            async with asyncio.timeout(self._streams.heartbeat_s):
                await self._ready.wait()
        except TimeoutError:
            await self._send(codec.heartbeat_message(self._sent, clock.now()))

    async def _send(self, message: pb.VariableUpdate) -> None:
        timeout_s = self._streams.stall_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._context.write(message)
        except TimeoutError:
            self._log.info("watcher stalled", after_sequence=self._sent)
            raise WatchStalledError(self._sent, timeout_s) from None
