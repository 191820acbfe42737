"""Sends updates and heartbeats to watchers, and ends the streams of those that stop reading."""

import asyncio
from collections import OrderedDict
from typing import Any, Final

from dspex_persist import clock
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.access.permitted import PermittedWatch
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import AFTER_SEQUENCE, BEGAN, INITIAL_VALUES, POSITION
from dspex_persist.state.bridge.incoming import Context
from dspex_persist.state.errors import UnavailableError, WatchStalledError
from dspex_persist.state.model import Update, UpdateKind
from dspex_persist.state.watch import Watch

SENDING: Final = 8
"""How many streams send at a time. Messages that gRPC has sent, and new calls, come in one queue: a call that arrives
while thousands of streams send would wait for all of them."""
_TURN_S: Final = 0.01
"""How long a stream may keep others waiting, in seconds, because its watcher reads slowly."""
KEPT_BYTES: Final = 4 * 1024 * 1024
"""The most that is kept of the encoded updates of a commit."""


class Turns:
    """Lets a few streams send at a time, in the order in which they were woken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: OrderedDict[asyncio.Event, None] = OrderedDict()
        self._sending: set[asyncio.Event] = set()
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, ready: asyncio.Event) -> None:
        """Set `ready` when it is its stream's turn to send; the stream calls `give_back` when it has nothing left."""
        if ready in self._sending:
            ready.set()
        else:
            self._waiting[ready] = None
            self._let_send()

    def give_back(self, ready: asyncio.Event) -> None:
        """Give the turn to the next stream."""
        self._sending.discard(ready)
        self._let_send()

    def leave(self, ready: asyncio.Event) -> None:
        """Forget a stream that has ended."""
        self._waiting.pop(ready, None)
        self.give_back(ready)

    def _let_send(self) -> None:
        while self._waiting and len(self._sending) < SENDING:
            ready, _ = self._waiting.popitem(last=False)
            self._sending.add(ready)
            ready.set()
        if self._waiting and self._timer is None:
            self._timer = self._loop.call_later(_TURN_S, self._pass_on)

    def _pass_on(self) -> None:
        # These streams go on sending, but no longer count.
        self._timer = None
        self._sending.clear()
        self._let_send()


class Encoded:
    """The encoded updates of the last commit, which all its watchers get."""

    def __init__(self) -> None:
        self._sequence = 0
        self._size_bytes = 0
        self._messages: dict[tuple[object, ...], bytes] = {}

    def message(self, update: Update) -> bytes:
        """Return the message for a change."""
        if update.sequence != self._sequence:
            self._sequence, self._size_bytes = update.sequence, 0
            self._messages.clear()
        # What distinguishes it from other updates of its commit.
        key = (update.variable.id, update.variable.version, update.kind, update.part, update.dependency)
        message = self._messages.get(key)
        if message is None:
            message = codec.update_message(update).SerializeToString()
            self._size_bytes += len(message)
            if self._size_bytes <= KEPT_BYTES:
                self._messages[key] = message
        return message


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
        self.open: set[_WatchStream] = set()
        self.turns = Turns(asyncio.get_running_loop())
        self.encoded = Encoded()

    def drain(self) -> None:
        """End all streams, each with a status that says where to resume."""
        self.draining = True
        for stream in self.open:
            stream.ready.set()

    def positions(self) -> dict[int, int]:
        """Return how far the slowest stream of each watched session is; from any thread.

        Returns:
            The last commit that was sent, by the number of the session's first commit.
        """
        slowest: dict[int, int] = {}
        for stream in list(self.open):
            key = stream.watch.first_sequence
            slowest[key] = min(stream.sent, slowest.get(key, stream.sent))
        return slowest

    async def send(self, watch: Watch, context: Context, log: Any, *, initial: bool) -> None:
        """Send the updates of a watch until it ends or the client goes; with `initial`, the current values first."""
        with watch:
            await _WatchStream(self, watch, context, log).run(initial=initial)


class _WatchStream:
    """The stream of one watcher: pulls, sends, waits. It holds at most one page of updates."""

    def __init__(self, streams: WatchStreams, watch: Watch, context: Context, log: Any) -> None:
        self._streams = streams
        self.watch = watch
        self._context = context
        self.ready = asyncio.Event()
        self.sent = watch.position
        self._log = log

    async def run(self, *, initial: bool) -> None:
        streams, ready = self._streams, self.ready
        self.watch.notify(streams.mailbox.waker(lambda: streams.turns.ask(ready)))
        streams.open.add(self)
        self._log.debug("watch begun", after_sequence=self.sent)
        try:
            count = len(self.watch.initial) if initial else 0
            facts = ((POSITION, self.sent), (INITIAL_VALUES, count), (BEGAN, self.watch.first_sequence))
            await self._context.send_initial_metadata(tuple((name, str(number)) for name, number in facts))
            if initial:
                await self._send_initial()
            while not streams.draining:
                ready.clear()
                if not await self._send_new():
                    await self._wait()
        finally:
            streams.open.discard(self)
            streams.turns.leave(ready)
        raise UnavailableError(f"the server is shutting down; resume with {AFTER_SEQUENCE}: {self.sent}")

    async def _send_initial(self) -> None:
        for variable in self.watch.initial:
            update = Update(UpdateKind.INITIAL_VALUE, variable, self.sent, variable.updated_at)
            await self._send(self._described(update) or codec.update_message(update))

    def _described(self, update: Update) -> pb.VariableUpdate | None:
        """Return the message for an update in a session with rules, which tells each watcher what concerns it."""
        about = self.watch.about(update.variable) if isinstance(self.watch, PermittedWatch) else ""
        if not about:
            return None
        message = codec.update_message(update)
        message.variable.access_control_json = about
        return message

    async def _send_new(self) -> bool:
        """Send the updates that are available; returns whether there were any."""
        updates = self.watch.pull_ready()
        if updates is None:
            updates = await asyncio.to_thread(self.watch.pull)
        for update in updates:
            if update.part[0] == update.part[1]:
                # Counts as sent even if it stalls, because what gRPC has accepted arrives before the status.
                self.sent = update.sequence
            await self._send(self._described(update) or self._streams.encoded.message(update))
        return bool(updates)

    async def _wait(self) -> None:
        if not self.ready.is_set():
            self._streams.turns.give_back(self.ready)
        # Everything up to here has been sent, or does not concern this watcher.
        self.sent = max(self.sent, self.watch.position)
        traffic = self._streams.mailbox.traffic
        # A stream that waits is no call that others would hold up.
        traffic.calls -= 1
        try:
            async with asyncio.timeout(self._streams.heartbeat_s):
                await self.ready.wait()
        except TimeoutError:
            await self._send(codec.heartbeat_message(self.sent, clock.now()))
        finally:
            traffic.calls += 1

    async def _send(self, message: pb.VariableUpdate | bytes) -> None:
        timeout_s = self._streams.stall_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._context.write(message)
        except TimeoutError:
            self._log.info("watcher stalled", after_sequence=self.sent)
            raise WatchStalledError(self.sent, timeout_s) from None
