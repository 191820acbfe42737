"""RemoteTools: tools that live in other processes, called over the unified bridge. One event loop, no rules.

For each address there is one connection, kept, and one circuit. An address that cannot be reached several times in a
row is left alone for a while; then one ping decides whether it is called again.
"""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc

from dspex_persist.infra.channels import Options, channel_options
from dspex_persist.infra.listen import ListenError, TcpAddress, parse_listen
from dspex_persist.infra.logs import get_logger
from dspex_persist.state import values
from dspex_persist.state.errors import (
    InvalidArgumentError,
    InvalidValueError,
    RemoteToolError,
    StateError,
    ToolFailedError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.rpc import codec
from dspex_persist.state.rpc.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.rpc.generated.snakepit_bridge_pb2_grpc import BridgeServiceStub
from dspex_persist.state.rpc.headers import EXECUTION_ID
from dspex_persist.state.tools.ports import RemoteCall

A = TypeVar("A")

_MOST_ADDRESSES: Final = 256
# The worker's deadline is a moment behind ours: who is late is cut here, and DEADLINE_EXCEEDED is its own word.
_LATER_S: Final = 1.0
_CLOSED: Final = "this process makes no more calls"
_NOTHING: Final = (b"", b"null")
_LOST: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})

_logger: Final = get_logger(__name__)


class RemoteTools:
    """Calls tools at the addresses of their registrations, "host:port" or "unix:PATH".

    `allow(address)`: whether an address may be called at all. A call ends within its own `timeout_s`, or within
    `call_timeout_s`; a connection is had within `connect_timeout_s`. After so many `failures` to reach an address in a
    row calls of it fail at once, for `pause_s` first and for twice as long each time, up to `longest_pause_s`.
    A tool that fails, or is slow, is no failure of its address.

    Made and used on one event loop.
    """

    def __init__(
        self,
        *,
        call_timeout_s: float,
        connect_timeout_s: float = 5.0,
        failures: int = 3,
        pause_s: float = 5.0,
        longest_pause_s: float = 60.0,
        allow: Callable[[str], bool],
        limits: Limits | None = None,
    ) -> None:
        self._call_timeout_s = call_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._failures = failures
        self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._allow = allow
        self._limits = limits or Limits()
        # In the order of their last use.
        self._peers: dict[str, _Peer] = {}
        self._closed = False

    async def execute(self, call: RemoteCall) -> Value | None:
        """The tool's result. `ToolFailedError`: it failed. `RemoteToolError`: it could not be asked, or did not say."""
        request = _request(call, stream=False)
        async with self._talk(call) as (talk, options):
            response = await talk.heard(talk.line.stub.ExecuteTool(request, **options))
        if not response.success:
            raise _failed(call, response.error_message or "the tool failed, and did not say why")
        wire = response.result
        return self._result(call, wire) if wire.type_url or wire.value else None

    async def stream(self, call: RemoteCall, emit: Callable[[Value], Awaitable[None]]) -> Value | None:
        """The same for a tool that streams: each chunk's content goes to `emit`, and the next is read when that is
        done. What it sent is all there is: the result is None.

        The last chunk is often empty, a mere mark of the end: then there is nothing of it to emit.
        """
        request = _request(call, stream=True)
        async with self._talk(call) as (talk, options):
            chunks = talk.line.stub.ExecuteStreamingTool(request, **options)
            try:
                while (chunk := await talk.heard(chunks.read())) is not grpc.aio.EOF:
                    if not (chunk.is_final and chunk.data in _NOTHING):
                        await emit(self._chunk(call, chunk))
            finally:
                chunks.cancel()
        return None

    def state_of(self, address: str) -> str:
        """The circuit of an address: closed (it is called), open (it is not), half_open (the next call decides)."""
        peer = self._peers.get(address)
        return "closed" if peer is None else peer.circuit.state

    async def close(self) -> None:
        """Close every connection; calls under way end with `RemoteToolError`, later ones do not begin."""
        self._closed = True
        peers = list(self._peers.values())
        self._peers.clear()
        for peer in peers:
            await peer.close()

    # How every call goes

    @contextlib.asynccontextmanager
    async def _talk(self, call: RemoteCall) -> AsyncIterator[tuple["_Talk", dict[str, Any]]]:
        """Somebody to talk to, and the options of the rpc; what goes wrong becomes an error that names the tool."""
        address = call.tool.address
        limit_s = self._call_timeout_s if call.timeout_s is None else call.timeout_s
        metadata = ((EXECUTION_ID, call.execution_id),) if call.execution_id else ()
        bound = asyncio.timeout(limit_s)
        try:
            async with bound:
                peer = await self._peer(address)
                async with peer.talk() as talk:
                    yield talk, {"timeout": limit_s + _LATER_S, "metadata": metadata}
        except _UnreachableError as error:
            raise RemoteToolError(call.tool.spec.name, address, error.reason) from error
        except _StatusError as error:
            raise _failed(call, error.reason) from error
        except TimeoutError:
            if not bound.expired():
                raise  # whoever takes the chunks has a timeout of its own
            raise RemoteToolError(call.tool.spec.name, address, f"no answer within {limit_s:g} s") from None

    async def _peer(self, address: str) -> "_Peer":
        target = self._target(address)
        while address not in self._peers and len(self._peers) >= _MOST_ADDRESSES:
            await self._forget_one()
        if self._closed:
            raise _UnreachableError(_CLOSED)
        peer = self._peers.pop(address, None)
        if peer is None:
            circuit = Circuit(self._failures, self._pause_s, self._longest_pause_s)
            peer = _Peer(address, target, circuit, self._connect_timeout_s)
        self._peers[address] = peer
        return peer

    def _target(self, address: str) -> str:
        if not address:
            raise _UnreachableError('nobody said where it runs; register it with metadata["address"]')
        try:
            parsed = parse_listen(address)
        except ListenError as error:
            raise _UnreachableError(f"the address cannot be read: {error.reason}") from error
        if not self._allow(address):
            raise _UnreachableError("calls of other machines are refused; allow them with --insecure")
        # With its scheme: "dns:80" is a host too.
        return f"dns:///{parsed}" if isinstance(parsed, TcpAddress) else str(parsed)

    async def _forget_one(self) -> None:
        idle = next((address for address, peer in self._peers.items() if peer.idle), None)
        if idle is None:
            raise _UnreachableError(f"{_MOST_ADDRESSES} other addresses are being called; call it again later")
        await self._peers.pop(idle).close()

    # What comes back

    def _result(self, call: RemoteCall, wire: Any) -> Value:
        try:
            value = codec.value_of("result", wire, limits=self._limits)
            values.parse_json(value.json, name="result", limits=self._limits)
        except StateError as error:
            raise _failed(call, f"it answered what is no value: {error}") from error
        return value

    def _chunk(self, call: RemoteCall, chunk: pb.ToolChunk) -> Value:
        content = chunk.data or b"null"
        try:
            values.parse_json(content, name="chunk", limits=self._limits)
        except InvalidValueError:
            # Workers also send plain text, and bytes. Clients take JSON only.
            return values.encode(_plain(content), name="chunk")
        except StateError as error:
            raise _failed(call, f"it sent what is no value: {error}") from error
        return Value(content.decode())


def _plain(content: bytes) -> object:
    """What is no JSON, as JSON has it: text as a string, bytes under the name that newer clients have for them."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"raw_data_base64": base64.b64encode(content).decode()}


def _failed(call: RemoteCall, reason: str) -> ToolFailedError:
    return ToolFailedError(call.execution_id, reason)


def _request(call: RemoteCall, *, stream: bool) -> pb.ExecuteToolRequest:
    try:
        return pb.ExecuteToolRequest(
            session_id=call.session_id,
            tool_name=call.tool.spec.name,
            parameters={name: codec.loose_any_of(value, call.style) for name, value in call.parameters.items()},
            metadata=call.metadata,
            stream=stream,
            binary_parameters={
                name: value.binary for name, value in call.parameters.items() if value.binary is not None
            },
        )
    except (ValueError, TypeError) as error:
        # What no message can carry, such as a lone surrogate.
        raise InvalidArgumentError("request", str(error)) from error


class _UnreachableError(Exception):
    """Why an address is not called, or was lost."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _StatusError(Exception):
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
            raise _UnreachableError(f"{self._failures} failures in a row; {again} (the last: {self._reason})")
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


class _Line:
    """One connection. It is retired when it has failed, and closed when its last call has ended."""

    def __init__(self, target: str, connect_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._channel = grpc.aio.insecure_channel(target, options=_options(target, connect_timeout_s))
        self.stub: Any = BridgeServiceStub(self._channel)
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
                        raise _UnreachableError(_CLOSED)
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            raise _UnreachableError(f"no connection within {self._connect_timeout_s:g} s") from None

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


class _Talk:
    """One use of a line, and what it says about the address: it answered, it was lost, or nobody knows."""

    def __init__(self, line: _Line) -> None:
        self.line = line
        self.answered: bool | None = None
        self.reason = ""

    async def connect(self) -> None:
        try:
            await self.line.connect()
        except _UnreachableError as error:
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
            raise self.lost(_CLOSED) from None
        self.answered = True
        if received is None:
            # What gRPC makes of bytes that do not parse.
            raise _StatusError("the worker's answer is no message of the protocol")
        return received

    def lost(self, reason: str) -> _UnreachableError:
        self.answered, self.reason = False, reason
        return _UnreachableError(reason)

    def _ended(self, code: grpc.StatusCode, details: str) -> Exception:
        if code in _LOST:
            return self.lost(f"the call was not answered: {details}")
        self.answered = True
        if code is grpc.StatusCode.UNIMPLEMENTED:
            # Not in gRPC's own words, "Method not found!", which clients that search for "not found" misread.
            return _UnreachableError("what answers there does not serve this rpc")
        return _StatusError(f"{code.name}: {details}")


class _Peer:
    """An address: its circuit, the line in use, and those that end with their last call."""

    def __init__(self, address: str, target: str, circuit: Circuit, connect_timeout_s: float) -> None:
        self.circuit = circuit
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._lines: list[_Line] = []
        self._probe: asyncio.Task[None] | None = None
        self._closed = False
        self._log = _logger.bind(address=address)

    @property
    def idle(self) -> bool:
        """Whether no call of it is under way."""
        return not any(line.users for line in self._lines)

    @contextlib.asynccontextmanager
    async def talk(self) -> AsyncIterator[_Talk]:
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
        with contextlib.suppress(_UnreachableError):
            await self._ping()

    async def _ping(self) -> None:
        """Return if there is an answer, whatever it says."""
        async with self._connected() as talk:
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    await talk.heard(talk.line.stub.Ping(pb.PingRequest(message="alive?")))
            except TimeoutError:
                raise talk.lost(f"no answer to a ping within {self._connect_timeout_s:g} s") from None
            except (_StatusError, _UnreachableError):
                if not talk.answered:
                    raise

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Talk]:
        line = self._line()
        line.users += 1
        talk = _Talk(line)
        try:
            await talk.connect()
            yield talk
        finally:
            line.users -= 1
            self._settle(talk)
            await self._tidy()

    def _line(self) -> _Line:
        if not (self._lines and self._lines[-1].usable):
            for line in self._lines:
                line.retired = True
            self._lines.append(_Line(self._target, self._connect_timeout_s))
        return self._lines[-1]

    def _settle(self, talk: _Talk) -> None:
        if self._closed:
            return
        if talk.answered is None:
            if self.circuit.state == "closed":
                self._probe_soon()
        elif talk.answered:
            if self.circuit.succeeded():
                self._log.info("tools can be reached again")
        elif not talk.line.failed:
            # Once for each connection that broke, however many calls it had.
            talk.line.failed = talk.line.retired = True
            self._failed(talk.reason)

    def _failed(self, reason: str) -> None:
        pause_s = self.circuit.failed(reason)
        if pause_s is not None:
            self._log.warning("tools cannot be reached", reason=reason, retry_in_s=pause_s)

    async def _tidy(self) -> None:
        over = [line for line in self._lines if line.retired and not line.users]
        self._lines = [line for line in self._lines if line not in over]
        for line in over:
            await line.close()
