"""RemoteTools: calls tools in other processes over the bridge protocol. Used on one event loop; contains no rules."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc

from dspex_persist.infra.access.tls import CallerFiles
from dspex_persist.infra.calls import CLOSED, Call, Peer, Service, StatusError, UnreachableError
from dspex_persist.infra.circuit import Circuit
from dspex_persist.infra.listen import ListenError, TcpAddress, parse_callee
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.tracing import Headers
from dspex_persist.state import values
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.capabilities import Capabilities
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.generated.snakepit_bridge_pb2_grpc import BridgeServiceStub
from dspex_persist.state.bridge.headers import ASKED_BY, EXECUTION_ID
from dspex_persist.state.bridge.traced import calling_tool
from dspex_persist.state.errors import (
    InvalidArgumentError,
    InvalidValueError,
    RemoteToolError,
    StateError,
    ToolFailedError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.tools.ports import RemoteCall

A = TypeVar("A")

_MOST_ADDRESSES: Final = 256
# The worker's deadline is a moment after ours: the limit here cuts off a late worker, not gRPC's DEADLINE_EXCEEDED.
_LATER_S: Final = 1.0
_NOTHING: Final = (b"", b"null")

_logger: Final = get_logger(__name__)


_SERVICE: Final = Service(
    "tools", "the worker's", BridgeServiceStub, lambda stub: stub.Ping(pb.PingRequest(message="alive?"))
)


class RemoteTools:
    """Calls tools at the addresses of their registrations, "HOST:PORT", "grpcs://HOST:PORT" or "unix:PATH".

    A tool that fails, or is slow, does not count as a failure of its address. Made and used on one event loop.

    Args:
        call_timeout_s: The time limit of a call that sets none, in seconds.
        connect_timeout_s: The time limit of a connection attempt.
        failures: After this many failures in a row to reach an address, calls to it fail at once, for `pause_s`.
        pause_s: The length of the first pause, in seconds. Each further one is twice as long.
        longest_pause_s: The longest pause.
        allow: Whether an address may be called at all.
        tls: The certificates for addresses with TLS.
        limits: The limits of results.
        capabilities: What the workers get as the ids of executions, if an id alone does not let them speak for one.
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
        tls: CallerFiles | None = None,
        limits: Limits | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        self._call_timeout_s = call_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._failures = failures
        self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._allow = allow
        self._tls = tls or CallerFiles()
        self._limits = limits or Limits()
        self._capabilities = capabilities
        # Ordered by last use.
        self._peers: dict[str, Peer] = {}
        self._closed = False

    async def execute(self, call: RemoteCall) -> Value | None:
        """See `RemotePort.execute`."""
        request = _request(call, stream=False)
        async with self._connected(call, request) as (connection, options):
            response = await connection.response(connection.channel.stub.ExecuteTool(request, **options))
        if not response.success:
            raise _failed(call, response.error_message or "the tool failed without a message")
        wire = response.result
        return self._result(call, wire) if wire.type_url or wire.value else None

    async def stream(self, call: RemoteCall, emit: Callable[[Value], Awaitable[None]]) -> Value | None:
        """See `RemotePort.stream`. Reads a chunk when `emit` is done with the one before; the result is always None."""
        request = _request(call, stream=True)
        async with self._connected(call, request) as (connection, options):
            chunks = connection.channel.stub.ExecuteStreamingTool(request, **options)
            try:
                while (chunk := await connection.response(chunks.read())) is not grpc.aio.EOF:
                    if not says_nothing(chunk):
                        await emit(self._chunk(call, chunk))
            finally:
                chunks.cancel()
        return None

    def state_of(self, address: str) -> str:
        """Return the state of an address: closed (it is called), open (it is not), half_open (a test decides)."""
        peer = self._peers.get(address)
        return "closed" if peer is None else peer.circuit.state

    def allows(self, address: str) -> bool:
        """See `RemotePort.allows`."""
        try:
            return self._allow(address)
        except ListenError:
            # Calls say what is wrong with it.
            return True

    async def close(self) -> None:
        """Close all connections; calls in progress and later ones fail with `RemoteToolError`."""
        self._closed = True
        peers = list(self._peers.values())
        self._peers.clear()
        for peer in peers:
            await peer.close()

    # Connections

    @contextlib.asynccontextmanager
    async def _connected(
        self, call: RemoteCall, request: pb.ExecuteToolRequest
    ) -> AsyncIterator[tuple["Call", dict[str, Any]]]:
        """Connect to the tool's address; yields the connection and the options of the rpc. Errors name the tool."""
        facts = {"dspex.worker": call.tool.worker_id}
        with calling_tool(call.tool.address, facts, streams=request.stream) as place:
            request.metadata.update(place)
            async with self._connected_for(call, place) as connected:
                yield connected

    @contextlib.asynccontextmanager
    async def _connected_for(self, call: RemoteCall, place: Headers) -> AsyncIterator[tuple["Call", dict[str, Any]]]:
        address = call.tool.address
        limit_s = self._call_timeout_s if call.timeout_s is None else call.timeout_s
        texts = {EXECUTION_ID: call.execution_id, ASKED_BY: call.asked_by}
        metadata = (*((name, self._shown(text)) for name, text in texts.items() if text), *place)
        bound = asyncio.timeout(limit_s)
        try:
            async with bound:
                peer = await self._peer(address)
                async with peer.call() as connection:
                    yield connection, {"timeout": limit_s + _LATER_S, "metadata": metadata}
        except UnreachableError as error:
            raise RemoteToolError(call.tool.spec.name, address, error.reason) from error
        except StatusError as error:
            raise _failed(call, error.reason) from error
        except TimeoutError:
            if not bound.expired():
                raise  # a timeout of the code that receives the chunks
            raise RemoteToolError(call.tool.spec.name, address, f"no answer within {limit_s:g} s") from None

    def _shown(self, execution_id: str) -> str:
        return execution_id if self._capabilities is None else self._capabilities.of(execution_id)

    async def _peer(self, address: str) -> "Peer":
        target, tls = self._target(address)
        while address not in self._peers and len(self._peers) >= _MOST_ADDRESSES:
            await self._forget_one()
        if self._closed:
            raise UnreachableError(CLOSED)
        peer = self._peers.pop(address, None)
        if peer is None:
            circuit = Circuit(self._failures, self._pause_s, self._longest_pause_s)
            peer = Peer(_SERVICE, address, target, circuit, self._connect_timeout_s, tls)
        self._peers[address] = peer
        return peer

    def _target(self, address: str) -> tuple[str, CallerFiles | None]:
        """Return gRPC's name for an address, and the files for TLS if it has that."""
        if not address:
            raise UnreachableError('its address is unknown; register it with metadata["address"]')
        try:
            parsed, has_tls = parse_callee(address)
        except ListenError as error:
            raise UnreachableError(f"the address is not valid: {error.reason}") from error
        if not self._allow(address):
            raise UnreachableError(
                "calls to other machines are refused; allow them with --insecure, or this one with tool_addresses"
            )
        # With a scheme, because a host may be called "dns", as in "dns:80".
        target = f"dns:///{parsed}" if isinstance(parsed, TcpAddress) else str(parsed)
        return target, self._tls if has_tls else None

    async def _forget_one(self) -> None:
        idle = next((address for address, peer in self._peers.items() if peer.idle), None)
        if idle is None:
            raise UnreachableError(f"{_MOST_ADDRESSES} other addresses are being called; call it again later")
        await self._peers.pop(idle).close()

    # Results

    def _result(self, call: RemoteCall, wire: Any) -> Value:
        try:
            return result_in(wire, self._limits)
        except StateError as error:
            raise _failed(call, f"its result is not a value: {error}") from error

    def _chunk(self, call: RemoteCall, chunk: pb.ToolChunk) -> Value:
        try:
            return chunk_in(chunk, self._limits)
        except StateError as error:
            raise _failed(call, f"a chunk is not a value: {error}") from error


def result_in(wire: Any, limits: Limits) -> Value:
    """Return the result in a worker's answer; `StateError` if it is not a value, or exceeds a limit."""
    value = codec.value_of("result", wire, limits=limits)
    values.parse_json(value.json, name="result", limits=limits)
    return value


def chunk_in(chunk: pb.ToolChunk, limits: Limits) -> Value:
    """Return a worker's chunk, which may be text or bytes instead of JSON; `StateError` if it exceeds a limit."""
    content = chunk.data or b"null"
    try:
        values.parse_json(content, name="chunk", limits=limits)
    except InvalidValueError:
        # Workers may send plain text or bytes, but clients accept only JSON.
        return values.encode(_plain(content), name="chunk")
    return Value(content.decode())


def says_nothing(chunk: pb.ToolChunk) -> bool:
    """Whether a chunk only marks the end of the stream, as the last one often does."""
    return bool(chunk.is_final and chunk.data in _NOTHING)


def _plain(content: bytes) -> object:
    """A chunk that is not JSON: text as a string, bytes in base64 under the key that newer clients use."""
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
        # A message cannot carry some texts, such as a lone surrogate.
        raise InvalidArgumentError("request", str(error)) from error
