"""A gRPC server's life: bind, serve, drain. Services are handed in; what they say is none of its business.

Every call passes one guard: a request that does not parse is INVALID_ARGUMENT, an error that the caller's
table knows becomes its status, any other becomes INTERNAL with a reference, and its text and traceback go
to the log.
"""

import asyncio
import inspect
import os
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from dspex_persist.errors import DspexError
from dspex_persist.infra import forks
from dspex_persist.infra.listen import (
    Address,
    ListenError,
    TcpAddress,
    UnixAddress,
    is_loopback,
    parse_listen,
    prepare,
)
from dspex_persist.infra.logs import get_logger

__all__ = [
    "DrainingError",
    "ListenError",
    "RpcStatus",
    "ServerOptions",
    "Service",
    "StatusOf",
    "is_loopback",
    "serve",
]

_MIB: Final = 1024 * 1024
# After the grace period handlers are cancelled; this is how long their clean-up may take.
_CLEAN_UP_S: Final = 5.0
_PENDING_CALLS: Final = 100_000
_UNREQUESTED_S: Final = 86_400
# Calls that come late are refused until none has come for so long; who repeats them at once is not waited for longer.
_QUIET_S: Final = 0.05
_LONGEST_QUIET_S: Final = 1.0
# Clients may refuse trailing metadata above 8 KiB, and then see RESOURCE_EXHAUSTED instead of the status.
_DETAILS_MAX_BYTES: Final = 3_500
_TRAILERS_MAX_BYTES: Final = 4_000

_log: Final = get_logger(__name__)

# Quoted: generic in their stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadatum: TypeAlias = tuple[str, str | bytes]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server listens and how patient it is.

    `listen` is HOST:PORT (port 0: a free one) or unix:PATH. `grace_s` bounds a drain: calls that still run
    then are cancelled. A connection that is silent for `keepalive_time_s` is pinged, and cut if it does not
    answer within `keepalive_timeout_s`; one that has not begun to speak HTTP/2 within `handshake_timeout_s` is
    cut, too. One that answers may be idle for as long as it likes. Compressed requests are refused. Clients may
    ping every `client_ping_interval_s`. One connection has at most `streams_per_connection` calls open; a client
    that wants more waits, or opens another connection.
    """

    listen: str
    max_message_bytes: int = 100 * _MIB
    grace_s: float = 10.0
    reflection: bool = True
    keepalive_time_s: float = 30.0
    keepalive_timeout_s: float = 10.0
    handshake_timeout_s: float = 20.0
    client_ping_interval_s: float = 5.0
    streams_per_connection: int = 11_000


@dataclass(frozen=True, slots=True)
class Service:
    """A service of the default descriptor pool, and the object that has a method for each of its rpcs.

    A method is named after its rpc and takes the request message (client streaming: an async iterator of
    them) and the gRPC context. One that answers once is a coroutine function. One that streams is an async
    generator function, or a coroutine function that calls `context.write(message)`: that one can bound its
    wait for a slow client, with `asyncio.timeout`. An rpc whose method the object lacks is answered with
    UNIMPLEMENTED.
    """

    descriptor: ServiceDescriptor
    servicer: object


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """What a client is told about an error. Details are cut, metadata left out, where 8 KiB have no room."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[Metadatum, ...] = ()


StatusOf: TypeAlias = Callable[[Exception], RpcStatus | None]
"""The table of known errors; None for an error that it does not know."""


@dataclass(eq=False)
class UnreadableRequestError(DspexError):
    """The bytes of a request are not a message of the type that its rpc takes."""

    message_type: str

    def __str__(self) -> str:
        return f"the request is not a valid {self.message_type} message"


@dataclass(eq=False)
class DrainingError(DspexError):
    """The call came after the drain had begun: nothing was done. `status_of` may know what to make of it."""

    retryable = True

    def __str__(self) -> str:
        return "the server is shutting down; repeat the call later"


async def serve(
    options: ServerOptions,
    services: Sequence[Service],
    *,
    status_of: StatusOf,
    on_ready: Callable[[int], None],
    stop: asyncio.Event,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    belongs: Callable[[Context], bool] = lambda _: False,
) -> None:
    """Serve `services`, health and (on request) reflection until `stop` is set; return when no call is left.

    `on_ready(port)` is called when the server can answer (port 0 for a Unix socket). To drain, health
    answers NOT_SERVING and new calls are refused (`DrainingError`), `on_drain()` ends what would not end by
    itself (the caller's endless streams), and those in flight finish, all within `grace_s`; what still runs
    then is cancelled. `belongs(context)` says whether a late call belongs to one in flight, which may be waiting
    for it: it is let in. Raises ListenError if the address cannot be had, and TypeError for a servicer whose
    methods are not asynchronous.
    """
    address = parse_listen(options.listen)
    draining = asyncio.Event()
    # Health and reflection answer to the end, so they are counted apart.
    calls, own_calls = _Calls(status_of, draining, belongs), _Calls(status_of)
    server = grpc.aio.server(options=_channel_options(options))
    for service in services:
        server.add_registered_method_handlers(service.descriptor.full_name, _handlers(service, calls))
    for service in _own_services(options, services, draining):
        server.add_registered_method_handlers(service.descriptor.full_name, _handlers(service, own_calls))
    port = _bind(server, address)
    sockets = _Sockets(port if isinstance(address, TcpAddress) else address.path)
    forks.tell(sockets)
    await server.start()
    loop = asyncio.get_running_loop()
    deadline: float | None = None
    try:
        on_ready(port)
        await stop.wait()
        deadline = loop.time() + options.grace_s
        draining.set()
        if on_drain is not None:
            await _end_streams(on_drain, deadline)
        await calls.finished(deadline - loop.time())
        await calls.quiet()
    finally:
        left_s = options.grace_s if deadline is None else max(0.0, deadline - loop.time())
        draining.set()
        await server.stop(left_s)
        if not (await calls.finished(_CLEAN_UP_S) and await own_calls.finished(_CLEAN_UP_S)):
            _log.warning("calls did not end after they were cancelled", calls=calls.active + own_calls.active)


async def _end_streams(on_drain: Callable[[], Awaitable[None]], deadline: float) -> None:
    try:
        async with asyncio.timeout_at(deadline):
            await on_drain()
    except TimeoutError:
        _log.warning("streams did not end within the grace period")


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    timeout_ms = round(options.keepalive_timeout_s * 1000)
    return [
        # With SO_REUSEPORT two servers would share one port silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.keepalive_time_ms", round(options.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # A client that is frozen while it owes us window space is cut by this one only.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(options.client_ping_interval_s * 1000)),
        ("grpc.server_handshake_timeout_ms", round(options.handshake_timeout_s * 1000)),
        # Identity alone: 90 KB of gzip are 90 MB of request before anybody can look at it. Clients are told that it is
        # not supported, and by default do not compress.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Without a bound, one connection that opens and resets calls has the server busy for longer than it took.
        ("grpc.max_concurrent_streams", options.streams_per_connection),
        # By default it cancels, without a word, what it could not take up within half a minute: whoever has asked
        # says himself how long he waits.
        ("grpc.server_max_unrequested_time_in_server", _UNREQUESTED_S),
        # By default gRPC cancels some of the calls that arrive while 1,000 wait to be taken up, without a word:
        # thousands of watchers that come back after a restart are just that.
        ("grpc.server.max_pending_requests", _PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
    ]


def _bind(server: grpc.aio.Server, address: Address) -> int:
    """Bind `address`; return its port, 0 for a Unix socket. ListenError if it cannot be had."""
    prepare(address)  # gRPC would not say why it cannot bind
    try:
        if isinstance(address, TcpAddress):
            return server.add_insecure_port(str(address))
        _add_private_socket(server, address)
    except RuntimeError as error:
        raise ListenError(str(address), "gRPC could not bind it") from error
    return 0


class _Sockets:
    """What the server listens on, and its connections. A child that outlives it must not keep the address from its
    successor, nor its clients from noticing its end."""

    def __init__(self, address: int | str) -> None:
        self._address = address

    def forked(self, *, quiet: bool) -> None:
        """See `forks.Heir`."""
        forks.blank_sockets(self._address)


def _add_private_socket(server: grpc.aio.Server, address: UnixAddress) -> None:
    # A chmod afterwards would leave a moment in which everybody may connect.
    previous = os.umask(0o177)
    try:
        server.add_insecure_port(str(address))
    finally:
        os.umask(previous)


# --- The guard around every call ---


class _Calls:
    """The calls in flight: how many there are, whether new ones are taken, and what their errors become."""

    def __init__(
        self,
        status_of: StatusOf,
        closing: asyncio.Event | None = None,
        belongs: Callable[[Context], bool] = lambda _: False,
    ) -> None:
        self.active = 0
        self._status_of = status_of
        self._closing = closing or asyncio.Event()
        self._belongs = belongs
        self._idle: asyncio.Event | None = None
        self._refused = 0

    def enter(self, context: Context) -> None:
        """Count a call in; `leave` counts it out. Once the server closes, only what belongs to a call in flight is
        taken; the rest is refused with `DrainingError`."""
        self.active += 1
        if self._closing.is_set() and not self._belongs(context):
            self._refused += 1
            raise DrainingError()

    def leave(self) -> None:
        """Count a call out."""
        self.active -= 1
        if self._idle is not None and not self.active:
            self._idle.set()

    async def finished(self, timeout_s: float) -> bool:
        """Wait until no call is left, cancelled ones included (gRPC does not wait for their clean-up, and what they
        use is closed next); whether that came to pass."""
        if not self.active:
            return True
        self._idle = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def quiet(self) -> None:
        """Wait until no more calls come to be refused.

        Those that gRPC has taken in but not handed over yet would be answered with CANCELLED, and without a word, when
        it is stopped; a client cannot tell that from having cancelled them itself.
        """
        for _ in range(round(_LONGEST_QUIET_S / _QUIET_S)):
            before = self._refused
            await asyncio.sleep(_QUIET_S)
            if self._refused == before:
                return

    async def fail(self, rpc: str, context: Context, error: BaseException) -> NoReturn:
        """Answer a call that raised `error`; raises what gRPC expects then."""
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if isinstance(error, grpc.aio.AbortError) or (is_cancelled and _is_being_cancelled()):
            _let_go(error)
            raise error
        if is_cancelled:
            # Not the call but something that it waited for was cancelled. gRPC would never answer its client.
            status = _internal_error(rpc, error)
        elif isinstance(error, Exception):
            status = self._status(rpc, error)
        else:
            raise error
        _let_go(error)
        trailers = _fitting_trailers(status.trailing_metadata)
        try:
            await context.abort(status.code, _fitting_details(status.details), trailers)
        except grpc.aio.AbortError as aborted:
            # gRPC's context and this know each other until the collector comes round: what failed need not wait for it.
            aborted.__context__ = None
            raise
        raise AssertionError("abort always raises")

    def _status(self, rpc: str, error: Exception) -> RpcStatus:
        if isinstance(error, UnreadableRequestError):
            return RpcStatus(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            known = self._status_of(error)
        except Exception as table_error:  # noqa: BLE001 -- the boundary itself: reported, never passed on
            return _internal_error(rpc, table_error)
        if known is None and isinstance(error, DrainingError):
            return RpcStatus(grpc.StatusCode.UNAVAILABLE, str(error))
        return known or _internal_error(rpc, error)


def _let_go(error: BaseException) -> None:
    """Have an error that is told no longer hold what its call had: frames that have ended know the whole request."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        waiting += (each.__cause__, each.__context__)
        each.__traceback__ = each.__cause__ = each.__context__ = None


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _internal_error(rpc: str, error: BaseException) -> RpcStatus:
    reference = secrets.token_hex(4)
    _log.error("call failed", rpc=rpc, reference=reference, exc_info=error)
    return RpcStatus(grpc.StatusCode.INTERNAL, f"internal error, reference {reference}")


def _fitting_details(details: str) -> str:
    """`details` as gRPC can send it: cut to what fits, no lone surrogates (it would not answer at all)."""
    text = details[:_DETAILS_MAX_BYTES].encode(errors="replace").decode()
    left_bytes = _DETAILS_MAX_BYTES
    for index, character in enumerate(text):
        # Whatever is not plain ASCII is percent-encoded, byte by byte.
        left_bytes -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if left_bytes < 0:
            return text[:index] + "..."
    return text if len(details) <= _DETAILS_MAX_BYTES else text + "..."


def _fitting_trailers(metadata: tuple[Metadatum, ...]) -> tuple[Metadatum, ...]:
    """The entries that gRPC can send and that fit, one by one: a small one may follow a large one that is left out."""
    kept: list[Metadatum] = []
    left_bytes = _TRAILERS_MAX_BYTES
    for key, value in metadata:
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            continue  # gRPC would refuse it, and not answer at all
        # 32 is what HTTP/2 counts for each entry; binary values travel as base64.
        size_bytes = 32 + len(key) + (len(value) * 4 // 3 if isinstance(value, bytes) else len(value))
        if size_bytes <= left_bytes:
            left_bytes -= size_bytes
            kept.append((key, value))
    return tuple(kept)


# --- From descriptors to handlers ---


def _handlers(service: Service, calls: _Calls) -> dict[str, Handler]:
    return {method.name: _handler(method, service.servicer, calls) for method in service.descriptor.methods}


def _handler(method: MethodDescriptor, servicer: object, calls: _Calls) -> Handler:
    run = getattr(servicer, method.name, None) or _unimplemented(method)
    _check_kind(method, run)
    rpc = _Rpc(
        name=method.full_name,
        run=run,
        parse=_parser(GetMessageClass(method.input_type)),
        serialize=GetMessageClass(method.output_type).SerializeToString,
        calls=calls,
    )
    if method.client_streaming:
        return _stream_stream(rpc)
    return _unary_stream(rpc) if method.server_streaming else _unary_unary(rpc)


def _check_kind(method: MethodDescriptor, run: Callable[..., Any]) -> None:
    if method.client_streaming and not method.server_streaming:
        raise TypeError(f"{method.full_name}: a stream of requests with a single answer is not supported")
    streams = method.server_streaming and inspect.isasyncgenfunction(run)
    if not streams and not inspect.iscoroutinefunction(run):
        raise TypeError(f"{method.full_name}: its method must be asynchronous, a generator only to stream")


def _unimplemented(method: MethodDescriptor) -> Callable[[object, Context], Awaitable[NoReturn]]:
    async def run(_request: object, context: Context) -> NoReturn:
        # gRPC's own text is "Method not found!", which clients that search for "not found" misread.
        details = f"{method.full_name} is not implemented by this server"
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, details)

    return run


def _parser(message_class: type[Message]) -> Callable[[bytes], Message]:
    from_string = message_class.FromString
    message_type = message_class.DESCRIPTOR.full_name

    def parse(serialized: bytes) -> Message:
        try:
            return from_string(serialized)
        except DecodeError as error:
            raise UnreadableRequestError(message_type) from error

    return parse


@dataclass(frozen=True, slots=True)
class _Rpc:
    """What a handler needs. `run` is the servicer's method, of whatever kind its rpc has."""

    name: str
    run: Callable[..., Any]
    parse: Callable[[bytes], Message]
    serialize: Callable[[Any], bytes]
    calls: _Calls


def _unary_unary(rpc: _Rpc) -> Handler:
    name, run, parse, serialize, calls = rpc.name, rpc.run, rpc.parse, rpc.serialize, rpc.calls

    # The hot path. gRPC is given neither deserializer nor serializer: their errors would pass the guard by.
    async def handle(request: bytes, context: Context) -> bytes:
        try:
            calls.enter(context)
            return serialize(await run(parse(request), context))
        except BaseException as error:  # noqa: BLE001 -- the guard: `fail` answers, or raises it again
            # This frame outlives the call in what gRPC is told of it.
            request = b""
            await calls.fail(name, context, error)
        finally:
            calls.leave()

    return grpc.unary_unary_rpc_method_handler(handle)


def _unary_stream(rpc: _Rpc) -> Handler:
    async def handle(request: bytes, context: Context) -> None:
        received = [request]
        request = b""
        await _answer_with_stream(rpc, context, received, lambda: rpc.parse(received.pop()))

    return grpc.unary_stream_rpc_method_handler(handle, response_serializer=rpc.serialize)


def _stream_stream(rpc: _Rpc) -> Handler:
    async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
        await _answer_with_stream(rpc, context, [], lambda: (rpc.parse(request) async for request in requests))

    return grpc.stream_stream_rpc_method_handler(handle, response_serializer=rpc.serialize)


async def _answer_with_stream(
    rpc: _Rpc, context: Context, received: list[bytes], request: Callable[[], object]
) -> None:
    """Send what the servicer's method yields, or let it write (`context.write` serializes) by itself.

    `received`: what has not been read yet. A stream may be open for days, and its frame outlives its end: neither is to
    hold the bytes.
    """
    try:
        rpc.calls.enter(context)
        answer = rpc.run(request(), context)
        if inspect.isasyncgen(answer):
            # Closed here: when the client goes, its clean-up would wait for the garbage collector otherwise.
            async with aclosing(answer):
                async for response in answer:
                    await context.write(response)
        else:
            await answer
    except BaseException as error:  # noqa: BLE001 -- the guard: `fail` answers, or raises it again
        received.clear()
        await rpc.calls.fail(rpc.name, context, error)
    finally:
        rpc.calls.leave()


# --- Health and reflection ---


def _own_services(options: ServerOptions, services: Sequence[Service], draining: asyncio.Event) -> list[Service]:
    find = descriptor_pool.Default().FindServiceByName
    health = find("grpc.health.v1.Health")
    names = [*(service.descriptor.full_name for service in services), health.full_name]
    own = [Service(health, _Health(names, draining))]
    if options.reflection:
        own.append(Service(find("grpc.reflection.v1alpha.ServerReflection"), _Reflection(names, draining)))
    return own


class _Health:
    """grpc.health.v1: SERVING until the drain, which ends every Watch (one left open would hold it up)."""

    def __init__(self, names: Sequence[str], draining: asyncio.Event) -> None:
        self._names = frozenset(("", *names))
        self._draining = draining

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return self._now()

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        known, draining = request.service in self._names, self._draining.is_set()
        yield self._now() if known else _health(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        # Not asked only now: the drain may begin while the first answer is on its way.
        if not draining:
            await self._draining.wait()
            if known:
                yield self._now()

    def _now(self) -> health_pb2.HealthCheckResponse:
        answer = health_pb2.HealthCheckResponse
        return _health(answer.NOT_SERVING if self._draining.is_set() else answer.SERVING)


def _health(status: int) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=status)


class _Reflection:
    """grpc.reflection.v1alpha over the default pool. The drain ends its streams, which tools leave open."""

    def __init__(self, names: Sequence[str], draining: asyncio.Event) -> None:
        # Any: its published types say coroutine where it is an async generator.
        self._inner: Any = reflection.aio.ReflectionServicer(names)
        self._draining = draining

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: Context
    ) -> None:
        async def answer() -> None:
            async for response in self._inner.ServerReflectionInfo(requests, context):
                await context.write(response)

        answering = asyncio.create_task(answer())
        drained = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((answering, drained), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            drained.cancel()
