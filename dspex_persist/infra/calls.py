"""gRPC calls to other processes: one connection kept for each address, and a circuit breaker for those that fail.

An address that cannot be reached several times in a row is not called for a while; then one ping decides whether calls
resume. Used on one event loop; knows no messages.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc

from dspex_persist.infra.access.tls import CallerFiles, TlsError
from dspex_persist.infra.channels import Options, channel_options
from dspex_persist.infra.circuit import Circuit, OpenCircuitError
from dspex_persist.infra.listen import grpc_name
from dspex_persist.infra.logs import get_logger

A = TypeVar("A")

CLOSED: Final = "this process makes no more calls"
_LOST: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})

_logger: Final = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """The service that is called at an address.

    Attributes:
        what: Its name in logs, such as "tools".
        whose: Its owner in errors, such as "the worker's".
        stub: Returns the stub for a channel.
        ping: Calls, on a stub, an rpc that shows that the process is alive.
    """

    what: str
    whose: str
    stub: Callable[[grpc.aio.Channel], Any]
    ping: Callable[[Any], Awaitable[Any]]


class UnreachableError(Exception):
    """An address could not be called, or the connection was lost during the call."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StatusError(Exception):
    """The process answered with an error status: it is alive, but there is no result."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Channel:
    """One connection. It is retired when it fails, and closed when its last call has ended."""

    def __init__(self, target: str, connect_timeout_s: float, service: Service, tls: CallerFiles | None = None) -> None:
        self._connect_timeout_s = connect_timeout_s
        options = _options(target, connect_timeout_s)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(grpc_name(target), options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, _credentials(tls), options=options)
        self.stub = service.stub(self._channel)
        self.users = 0
        self.retired = False
        self.failed = False

    @property
    def usable(self) -> bool:
        """Whether a call may use it. A failed one would reconnect only after its back-off, not at once."""
        failing = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
        return not self.retired and self._channel.get_state() not in failing

    async def connect(self) -> None:
        """Wait until the connection is ready or has failed; the next call over it then reports why.

        Raises:
            UnreachableError: It took too long, or this process is closing.
        """
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


def _credentials(tls: CallerFiles) -> grpc.ChannelCredentials:
    try:
        return grpc.ssl_channel_credentials(*tls.read())
    except TlsError as error:
        raise UnreachableError(f"no TLS with it: {error}") from error


def _options(target: str, connect_timeout_s: float) -> Options:
    return [
        # The proxies of the environment are not meant for workers.
        *channel_options(target, proxies=False),
        # A separate connection for each channel: the back-off of a failed one must not delay the next.
        ("grpc.use_local_subchannel_pool", 1),
        # This option also bounds the time of one attempt.
        ("grpc.min_reconnect_backoff_ms", max(100, round(connect_timeout_s * 1000))),
    ]


class Call:
    """One call over a channel.

    Attributes:
        answered: Whether the address answered: True, False if the connection was lost, None while that is unknown.
        reason: Why the connection was lost.
    """

    def __init__(self, channel: Channel, service: Service) -> None:
        self.channel = channel
        self._service = service
        self.answered: bool | None = None
        self.reason = ""

    async def connect(self) -> None:
        try:
            await self.channel.connect()
        except UnreachableError as error:
            raise self.lost(error.reason) from None

    async def response(self, answer: Awaitable[A | None]) -> A:
        """Wait for an answer and return it.

        Raises:
            UnreachableError: The connection was lost, or the server there does not have the rpc.
            StatusError: The answer is an error status, or not a message of the protocol.
        """
        self.answered = None
        try:
            received = await answer
        except grpc.aio.AioRpcError as error:
            raise self._ended(error.code(), error.details() or error.code().name) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # `close` cancelled the connection, not this call.
            raise self.lost(CLOSED) from None
        self.answered = True
        if received is None:
            # gRPC returns None for bytes that do not parse.
            raise StatusError(f"{self._service.whose} answer is not a message of the protocol")
        return received

    def lost(self, reason: str) -> UnreachableError:
        """Note that the connection was lost; returns the error to raise."""
        self.answered, self.reason = False, reason
        return UnreachableError(reason)

    def _ended(self, code: grpc.StatusCode, details: str) -> Exception:
        if code in _LOST:
            return self.lost(f"the call was not answered: {details}")
        self.answered = True
        if code is grpc.StatusCode.UNIMPLEMENTED:
            # Not gRPC's own text, "Method not found!", which clients that search for "not found" misread.
            return UnreachableError("the server at this address does not serve this rpc")
        return StatusError(f"{code.name}: {details}")


class Peer:
    """An address, with its circuit breaker, the channel in use, and retired channels whose calls have not ended."""

    def __init__(
        self,
        service: Service,
        address: str,
        target: str,
        circuit: Circuit,
        connect_timeout_s: float,
        tls: CallerFiles | None = None,
    ) -> None:
        self._tls = tls
        self.circuit = circuit
        self._service = service
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._channels: list[Channel] = []
        self._probe: asyncio.Task[None] | None = None
        self._closed = False
        self._log = _logger.bind(address=address)

    @property
    def idle(self) -> bool:
        """Whether no call to the address is in progress."""
        return not any(channel.users for channel in self._channels)

    @contextlib.asynccontextmanager
    async def call(self) -> AsyncIterator[Call]:
        """Connect for one call.

        Raises:
            UnreachableError: The circuit is open, or there is no connection.
        """
        try:
            is_trial = self.circuit.admit()
        except OpenCircuitError as error:
            raise UnreachableError(str(error)) from None
        if is_trial:
            await self._test()
        async with self._connected() as call:
            yield call

    async def close(self) -> None:
        """Close the connections, which ends all calls in progress."""
        self._closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait((self._probe,))
        for channel in self._channels:
            await channel.close()

    async def _test(self) -> None:
        # By a ping, not by the call itself: a tool may take minutes, and other calls wait for the result of the test.
        try:
            await self._ping()
        finally:
            self.circuit.give_up()

    def _probe_soon(self) -> None:
        """Find out whether a call that was given up was only slow, or the process has gone."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probing())

    async def _probing(self) -> None:
        with contextlib.suppress(UnreachableError):
            await self._ping()

    async def _ping(self) -> None:
        """Return once there is any answer."""
        async with self._connected() as call:
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    await call.response(self._service.ping(call.channel.stub))
            except TimeoutError:
                raise call.lost(f"no answer to a ping within {self._connect_timeout_s:g} s") from None
            except (StatusError, UnreachableError):
                if not call.answered:
                    raise

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Call]:
        channel = self._usable_channel()
        channel.users += 1
        call = Call(channel, self._service)
        try:
            await call.connect()
            yield call
        finally:
            channel.users -= 1
            self._settle(call)
            await self._close_retired()

    def _usable_channel(self) -> Channel:
        if not (self._channels and self._channels[-1].usable):
            for channel in self._channels:
                channel.retired = True
            self._channels.append(Channel(self._target, self._connect_timeout_s, self._service, self._tls))
        return self._channels[-1]

    def _settle(self, call: Call) -> None:
        if self._closed:
            return
        if call.answered is None:
            if self.circuit.state == "closed":
                self._probe_soon()
        elif call.answered:
            if self.circuit.succeeded():
                self._log.info(f"{self._service.what} can be reached again")
        elif not call.channel.failed:
            # A broken connection counts as one failure, however many calls it carried.
            call.channel.failed = call.channel.retired = True
            self._failed(call.reason)

    def _failed(self, reason: str) -> None:
        pause_s = self.circuit.failed(reason)
        if pause_s is not None:
            self._log.warning(f"{self._service.what} cannot be reached", reason=reason, retry_in_s=pause_s)

    async def _close_retired(self) -> None:
        unused = [channel for channel in self._channels if channel.retired and not channel.users]
        self._channels = [channel for channel in self._channels if channel not in unused]
        for channel in unused:
            await channel.close()
