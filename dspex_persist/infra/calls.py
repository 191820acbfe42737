"""Calling others over gRPC: one kept connection for each address, and a circuit that leaves alone who does not answer.

An address that cannot be reached several times in a row is left alone for a while; then one ping decides whether it is
called again. One event loop; knows no messages.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc

from dspex_persist.infra.channels import Options, channel_options
from dspex_persist.infra.logs import get_logger

A = TypeVar("A")

CLOSED: Final = "this process makes no more calls"
_LOST: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})

_logger: Final = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """What answers at an address. `what` and `whose`: what logs and errors call it, as in "tools", "the worker's".

    `stub` makes of a channel what its rpcs are called on; `ping` calls, on such, the one that says that it is there.
    """

    what: str
    whose: str
    stub: Callable[[grpc.aio.Channel], Any]
    ping: Callable[[Any], Awaitable[Any]]


class UnreachableError(Exception):
    """Why an address is not called, or was lost."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StatusError(Exception):
    """The worker answered with a status of its own: it is alive, but that is no result."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Circuit:
    """Whether an address is called: after `failures` in a row not for `pause_s`, then it is tried once. Each trial that
    fails doubles the pause, up to `longest_pause_s`; a success closes the circuit."""

    def __init__(self, failures: int, pause_s: float, longest_pause_s: float) -> None:
        self._limit = failures
        self._first_pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._pause_s = pause_s
        self._failures = 0
        self._reason = ""
        self._retry_at: float | None = None
        self._trying = False

    @property
    def state(self) -> str:
        """closed, open or half_open."""
        if self._retry_at is None:
            return "closed"
        return "half_open" if self._trying or time.monotonic() >= self._retry_at else "open"

    def admit(self) -> bool:
        """Whether the caller must try the address out first; refuses it where it has no business calling."""
        if self._retry_at is None:
            return False
        left_s = self._retry_at - time.monotonic()
        if self._trying or left_s > 0:
            again = "it is being tried again now" if self._trying else f"it is tried again in {left_s:.1f} s"
            raise UnreachableError(f"{self._failures} failures in a row; {again} (the last: {self._reason})")
        self._trying = True
        return True

    def give_up(self) -> None:
        """The trial ended without a verdict; the next call is one."""
        self._trying = False

    def succeeded(self) -> bool:
        """Note that the address answered; whether that closed the circuit."""
        closed = self._retry_at is not None
        self._failures, self._retry_at, self._trying = 0, None, False
        self._pause_s = self._first_pause_s
        return closed

    def failed(self, reason: str) -> float | None:
        """Note that the address could not be reached; the pause in seconds, where that opened the circuit."""
        if self._retry_at is not None and not self._trying:
            return None  # of a call that began before; what it has to say is known
        self._failures += 1
        self._reason = reason
        if self._retry_at is None and self._failures < self._limit:
            return None
        pause_s = self._pause_s
        self._retry_at, self._trying = time.monotonic() + pause_s, False
        self._pause_s = min(2 * pause_s, self._longest_pause_s)
        return pause_s


class Channel:
    """One connection. It is retired when it has failed, and closed when its last call has ended."""

    def __init__(self, target: str, connect_timeout_s: float, service: Service) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._channel = grpc.aio.insecure_channel(target, options=_options(target, connect_timeout_s))
        self.stub = service.stub(self._channel)
        self.users = 0
        self.retired = False
        self.failed = False

    @property
    def usable(self) -> bool:
        """Whether a call may go over it. One that failed meanwhile would try again when its back-off says, not now."""
        failing = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
        return not self.retired and self._channel.get_state() not in failing

    async def connect(self) -> None:
        """Wait for the connection, or for its failure: why it failed is what a call says then."""
        settled = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                while (state := self._channel.get_state(try_to_connect=True)) not in settled:
                    if state is grpc.ChannelConnectivity.SHUTDOWN:
                        raise UnreachableError(CLOSED)
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            raise UnreachableError(f"no connection within {self._connect_timeout_s:g} s") from None

    async def close(self) -> None:
        await self._channel.close()


def _options(target: str, connect_timeout_s: float) -> Options:
    return [
        # A proxy of the environment is not meant for workers.
        *channel_options(target, proxies=False),
        # A connection of its own for each line: the back-off of one that failed must not hold up the next.
        ("grpc.use_local_subchannel_pool", 1),
        # This is how long one attempt may take, too.
        ("grpc.min_reconnect_backoff_ms", max(100, round(connect_timeout_s * 1000))),
    ]


class Call:
    """One use of a line, and what it says about the address: it answered, it was lost, or nobody knows."""

    def __init__(self, line: Channel, service: Service) -> None:
        self.line = line
        self._service = service
        self.answered: bool | None = None
        self.reason = ""

    async def connect(self) -> None:
        try:
            await self.line.connect()
        except UnreachableError as error:
            raise self.lost(error.reason) from None

    async def heard(self, answer: Awaitable[A | None]) -> A:
        """The answer; while it is waited for, whether there is anybody is not known."""
        self.answered = None
        try:
            received = await answer
        except grpc.aio.AioRpcError as error:
            raise self._ended(error.code(), error.details() or error.code().name) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not this call was cancelled but its connection, by `close`.
            raise self.lost(CLOSED) from None
        self.answered = True
        if received is None:
            # What gRPC makes of bytes that do not parse.
            raise StatusError(f"{self._service.whose} answer is no message of the protocol")
        return received

    def lost(self, reason: str) -> UnreachableError:
        self.answered, self.reason = False, reason
        return UnreachableError(reason)

    def _ended(self, code: grpc.StatusCode, details: str) -> Exception:
        if code in _LOST:
            return self.lost(f"the call was not answered: {details}")
        self.answered = True
        if code is grpc.StatusCode.UNIMPLEMENTED:
            # Not in gRPC's own words, "Method not found!", which clients that search for "not found" misread.
            return UnreachableError("what answers there does not serve this rpc")
        return StatusError(f"{code.name}: {details}")


class Peer:
    """An address: its circuit, the line in use, and those that end with their last call."""

    def __init__(self, service: Service, address: str, target: str, circuit: Circuit, connect_timeout_s: float) -> None:
        self.circuit = circuit
        self._service = service
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._lines: list[Channel] = []
        self._probe: asyncio.Task[None] | None = None
        self._closed = False
        self._log = _logger.bind(address=address)

    @property
    def idle(self) -> bool:
        """Whether no call of it is under way."""
        return not any(line.users for line in self._lines)

    @contextlib.asynccontextmanager
    async def talk(self) -> AsyncIterator[Call]:
        """A connection for one call, if the circuit lets it pass."""
        if self.circuit.admit():
            await self._try_out()
        async with self._connected() as talk:
            yield talk

    async def close(self) -> None:
        """Close its connections, under whatever call."""
        self._closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait((self._probe,))
        for line in self._lines:
            await line.close()

    async def _try_out(self) -> None:
        # A ping, not the call itself: others need not wait for a tool that takes minutes to know the verdict.
        try:
            await self._ping()
        finally:
            self.circuit.give_up()

    def _probe_soon(self) -> None:
        """Find out whether a call got no answer because it takes long, or because nobody is there any more."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probing())

    async def _probing(self) -> None:
        with contextlib.suppress(UnreachableError):
            await self._ping()

    async def _ping(self) -> None:
        """Return if there is an answer, whatever it says."""
        async with self._connected() as talk:
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    await talk.heard(self._service.ping(talk.line.stub))
            except TimeoutError:
                raise talk.lost(f"no answer to a ping within {self._connect_timeout_s:g} s") from None
            except (StatusError, UnreachableError):
                if not talk.answered:
                    raise

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Call]:
        line = self._line()
        line.users += 1
        talk = Call(line, self._service)
        try:
            await talk.connect()
            yield talk
        finally:
            line.users -= 1
            self._settle(talk)
            await self._tidy()

    def _line(self) -> Channel:
        if not (self._lines and self._lines[-1].usable):
            for line in self._lines:
                line.retired = True
            self._lines.append(Channel(self._target, self._connect_timeout_s, self._service))
        return self._lines[-1]

    def _settle(self, talk: Call) -> None:
        if self._closed:
            return
        if talk.answered is None:
            if self.circuit.state == "closed":
                self._probe_soon()
        elif talk.answered:
            if self.circuit.succeeded():
                self._log.info(f"{self._service.what} can be reached again")
        elif not talk.line.failed:
            # Once for each connection that broke, however many calls it had.
            talk.line.failed = talk.line.retired = True
            self._failed(talk.reason)

    def _failed(self, reason: str) -> None:
        pause_s = self.circuit.failed(reason)
        if pause_s is not None:
            self._log.warning(f"{self._service.what} cannot be reached", reason=reason, retry_in_s=pause_s)

    async def _tidy(self) -> None:
        over = [line for line in self._lines if line.retired and not line.users]
        self._lines = [line for line in self._lines if line not in over]
        for line in over:
            await line.close()
