"""The life of a gRPC server: bind, serve, drain. It knows nothing of the services that it is given."""

import asyncio
import inspect
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, TypeAlias, cast

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from dspex_persist.infra import forks
from dspex_persist.infra.access.tls import Certificates, Material
from dspex_persist.infra.access.tokens import CALLER
from dspex_persist.infra.listen import (
    Address,
    ListenError,
    TcpAddress,
    UnixAddress,
    grpc_name,
    parse_listen,
    prepare,
)
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.metrics import CallMeter, RpcMeter
from dspex_persist.infra.server.guard import (
    Admit,
    Calls,
    Context,
    Metadatum,
    NoRequestError,
    StatusOf,
    UnreadableRequestError,
    admit_all,
)
from dspex_persist.infra.traced_calls import CallSpans, TracedRpc
from dspex_persist.infra.tracing import tracer

_MIB: Final = 1024 * 1024
# How long the clean-up of handlers may take that are cancelled after the grace period.
_CLEAN_UP_S: Final = 5.0
_PENDING_CALLS: Final = 100_000
_UNREQUESTED_S: Final = 86_400
# How often a watch of the health looks whether the process can do its work.
_LOOK_S: Final = 1.0
# So long may somebody take to ask for the health, who need not say who it is. A request may be large.
_STRANGERS_S: Final = 2.0
# Strangers may open them, and one connection carries thousands.
WATCHES_OF_HEALTH: Final = 1_000
# How a call ended, for a meter.
_OK, _GIVEN_UP, _TOO_LATE = "OK", "CANCELLED", "DEADLINE_EXCEEDED"

_log: Final = get_logger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server listens, and its limits. Compressed requests are refused.

    Attributes:
        listen: HOST:PORT (port 0 takes a free one) or unix:PATH.
        certificates: For TLS; None to serve without encryption, as a Unix socket always does.
        max_message_bytes: The largest message, in both directions.
        grace_s: How long a drain lasts at most; calls that still run then are cancelled.
        reflection: Whether to serve reflection.
        keepalive_time_s: After this time without traffic, the server pings a connection.
        keepalive_timeout_s: A connection that does not answer a ping in this time is closed. As long as it answers, it
            may stay idle without a limit.
        handshake_timeout_s: A connection that has not begun HTTP/2 by then is closed.
        client_ping_interval_s: How often clients may ping.
        streams_per_connection: The calls that one connection may have open. A client that wants more waits, or opens
            another connection.
    """

    listen: str
    certificates: Certificates | None = None
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
    """A service of the default descriptor pool, and the object with a method for each of its rpcs.

    A method has the name of its rpc, and takes the request message (with client streaming: an async iterator of
    messages) and the gRPC context. For a single answer it is a coroutine function. For a stream it is an async
    generator function, or a coroutine function that calls `context.write(message)`, which can limit its wait for a
    slow client with `asyncio.timeout`. An rpc without a method is answered with UNIMPLEMENTED.

    `read_within_s` limits how long a client may take to send a request, for services that admit strangers.
    """

    descriptor: ServiceDescriptor
    servicer: object
    read_within_s: float | None = None


ReadsFirst: TypeAlias = Callable[[str, Sequence[Metadatum]], bool]
"""Whether the request of a call may be read before the call is admitted, by the name of its rpc and its headers."""


def reads_all(_rpc: str, _headers: Sequence[Metadatum]) -> bool:
    """Read all requests first, which takes less time."""
    return True


async def serve(
    options: ServerOptions,
    services: Sequence[Service],
    *,
    status_of: StatusOf,
    on_ready: Callable[[int], None],
    stop: asyncio.Event,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    belongs: Callable[[Context], bool] = lambda _: False,
    admit: Admit = admit_all,
    reads_first: ReadsFirst = reads_all,
    meter: CallMeter | None = None,
    spans: CallSpans | None = None,
    is_fit: Callable[[], bool] = lambda: True,
) -> None:
    """Serve until `stop` is set, then drain; returns when no call is left.

    During the drain, health answers NOT_SERVING, new calls are refused (`DrainingError`), and calls in progress may
    finish until `options.grace_s` is over; the rest is cancelled.

    Args:
        options: How to listen, and the limits.
        services: What to serve, in addition to health and, with `options.reflection`, reflection.
        status_of: The table of known errors.
        on_ready: Called with the port (0 for a Unix socket) when the server can answer.
        stop: Starts the drain.
        on_drain: Ends the streams that would not end by themselves; it shares the grace period.
        belongs: Whether a late call belongs to a call in progress, which may be waiting for it, and so is accepted.
        admit: Called first for each call, also of health and reflection, with the full name of the rpc; what it raises
            refuses the call.
        reads_first: Whether a request is read before `admit` is asked. It may have `max_message_bytes`, and strangers
            could send thousands at a time.
        meter: Counts all calls, also those that are refused.
        spans: How calls are traced, but those of health and reflection, which others make all the time.
        is_fit: Whether the process can do its work; if not, health answers NOT_SERVING.

    Raises:
        ListenError: The address is not available.
        TypeError: A method of a servicer is not asynchronous.
    """
    # A server that admits everybody knows nobody, also if it starts while a call of another one is handled.
    CALLER.set(None)
    address = parse_listen(options.listen)
    draining = asyncio.Event()
    # Counted separately, because health and reflection answer until the end.
    calls, own_calls = Calls(status_of, draining, belongs, admit), Calls(status_of, admit=admit)
    server = grpc.aio.server(options=_channel_options(options))
    # Not as registered methods: after each call, gRPC 1.85 again waits for a call of every registered method.
    handlers = [_Handlers(service, calls, reads_first, meter, options.listen, spans) for service in services]
    handlers += [
        _Handlers(service, own_calls, reads_first, meter)
        for service in _own_services(options, services, draining, is_fit)
    ]
    server.add_generic_rpc_handlers(tuple(handlers))
    port = _bind(server, address, options.certificates)
    sockets = _Sockets(port if isinstance(address, TcpAddress) else address.path)
    forks.register(sockets)
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
        # With SO_REUSEPORT, two servers would silently share one port.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.keepalive_time_ms", round(options.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # Only this option closes the connection of a client that freezes while its flow-control window is full.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(options.client_ping_interval_s * 1000)),
        ("grpc.server_handshake_timeout_ms", round(options.handshake_timeout_s * 1000)),
        # Identity only: 90 KB of gzip become a request of 90 MB before any limit applies. The server reports that it
        # does not support compression, and clients do not compress by default.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Without a limit, a client that opens and resets calls costs the server more time than itself.
        ("grpc.max_concurrent_streams", options.streams_per_connection),
        # By default, gRPC silently cancels calls that have waited half a minute to be handled. The deadline of the
        # client decides instead.
        ("grpc.server_max_unrequested_time_in_server", _UNREQUESTED_S),
        # By default, gRPC silently cancels some of the calls that arrive while 1,000 are waiting to be handled, as
        # happens when thousands of watchers reconnect after a restart.
        ("grpc.server.max_pending_requests", _PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
    ]


def _bind(server: grpc.aio.Server, address: Address, certificates: Certificates | None) -> int:
    """Bind `address`; returns its port, or 0 for a Unix socket."""
    prepare(address)  # gRPC does not report why it cannot bind
    try:
        if isinstance(address, TcpAddress):
            if certificates is not None:
                return server.add_secure_port(str(address), _credentials(certificates))
            return server.add_insecure_port(str(address))
        _add_private_socket(server, address)
    except RuntimeError as error:
        raise ListenError(str(address), "gRPC could not bind it") from error
    return 0


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    def configuration(material: Material) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)

    def fetch() -> Any:
        # Called for each new connection, on a thread of gRPC.
        material = certificates.changed()
        return None if material is None else configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        configuration(certificates.material), fetch, require_client_authentication=certificates.asks_clients
    )


class _Sockets:
    """Closes the server's sockets in forked children.

    A child that outlives the server must neither occupy the address nor keep the clients' connections open.
    """

    def __init__(self, address: int | str) -> None:
        self._address = address

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`."""
        forks.blank_sockets(self._address)


def _add_private_socket(server: grpc.aio.Server, address: UnixAddress) -> None:
    # With a chmod afterwards, any user could connect for a moment.
    previous = os.umask(0o177)
    try:
        server.add_insecure_port(grpc_name(str(address)))
    finally:
        os.umask(previous)


# --- From descriptors to handlers ---


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
    """The handlers of a service."""

    def __init__(
        self,
        service: Service,
        calls: Calls,
        reads_first: ReadsFirst,
        meter: CallMeter | None,
        listen: str = "",
        spans: CallSpans | None = None,
    ) -> None:
        made = tracer()
        self._reads_first = reads_first
        # By path: the name of the rpc, and two handlers. The second one reads no request before the call is admitted.
        self._rpcs: dict[str, tuple[str, Handler, Handler]] = {}
        for method in service.descriptor.methods:
            traced = None if made is None or spans is None else TracedRpc(method.full_name, listen, spans, made)
            rpc = _rpc_of(method, service.servicer, calls, meter, traced)
            unread = _stream_stream(rpc if method.client_streaming else _reading(rpc, service.read_within_s))
            usual = unread if service.read_within_s is not None else _handler(method, rpc)
            path = f"/{service.descriptor.full_name}/{method.name}"
            self._rpcs[path] = method.full_name, usual, unread

    def service(self, details: Any) -> "Handler | None":
        """Return the handler for a call; None if it is of another service."""
        found = self._rpcs.get(details.method)
        if found is None:
            return None
        name, handler, unread = found
        return handler if self._reads_first(name, details.invocation_metadata) else unread


def _rpc_of(
    method: MethodDescriptor, servicer: object, calls: Calls, meter: CallMeter | None, traced: TracedRpc | None
) -> "_Rpc":
    run = getattr(servicer, method.name, None) or _unimplemented(method)
    _check_kind(method, run)
    parse = _parser(GetMessageClass(method.input_type))
    return _Rpc(
        name=method.full_name,
        run=run,
        parse=parse if traced is None else traced.parser(parse),
        serialize=GetMessageClass(method.output_type).SerializeToString,
        calls=calls,
        meter=None if meter is None else _meter_of(method, meter),
        around=(lambda handle: handle) if traced is None else traced.handler,
    )


def _handler(method: MethodDescriptor, rpc: "_Rpc") -> Handler:
    if method.client_streaming:
        return _stream_stream(rpc)
    return _unary_stream(rpc) if method.server_streaming else _unary_unary(rpc)


def _reading(rpc: "_Rpc", within_s: float | None) -> "_Rpc":
    """Return an rpc that takes a stream of requests, reads the only one, and answers it as another one does."""

    async def run(requests: AsyncIterator[Any], context: Context) -> None:
        try:
            async with asyncio.timeout(within_s):
                request = await anext(requests)
        except (StopAsyncIteration, TimeoutError) as error:
            raise NoRequestError() from error
        answer = rpc.run(request, context)
        if inspect.isasyncgen(answer):
            async with aclosing(answer):
                async for response in answer:
                    await context.write(response)
        elif (response := await answer) is not None:
            await context.write(response)

    return replace(rpc, run=run)


def _meter_of(method: MethodDescriptor, meter: CallMeter) -> RpcMeter:
    streams = {"streams_requests": method.client_streaming, "streams_answers": method.server_streaming}
    return meter.rpc(method.containing_service.full_name, method.name, **streams)


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
    """What a handler needs to answer an rpc. `run` is the servicer's method; `around` wraps the whole handler."""

    name: str
    run: Callable[..., Any]
    parse: Callable[[bytes], Message]
    serialize: Callable[[Any], bytes]
    calls: Calls
    meter: RpcMeter | None
    around: Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]]


def _unary_unary(rpc: _Rpc) -> Handler:
    name, run, parse, serialize, calls = rpc.name, rpc.run, rpc.parse, rpc.serialize, rpc.calls

    # The hot path. Parsing and serializing happen here, because errors in gRPC's own hooks would bypass the guard.
    async def handle(request: bytes, context: Context) -> bytes:
        admission = None
        try:
            admission = calls.enter(name, context)
            return serialize(await run(parse(request), context))
        except BaseException as error:  # noqa: BLE001 -- the guard: `fail` answers, or raises it again
            # The exception that gRPC gets keeps this frame alive after the call.
            request = b""
            await calls.fail(name, context, error)
        finally:
            calls.leave(admission)

    counted = handle if rpc.meter is None else _metered(handle, rpc.meter)
    return grpc.unary_unary_rpc_method_handler(rpc.around(counted))


def _unary_stream(rpc: _Rpc) -> Handler:
    answer = _answer_with_stream if rpc.meter is None else _metered_stream

    async def handle(request: bytes, context: Context) -> None:
        received = [request]
        request = b""
        await answer(rpc, _stream_context(context, rpc.meter), received, lambda _: rpc.parse(received.pop()))

    return grpc.unary_stream_rpc_method_handler(rpc.around(handle), response_serializer=_serializer(rpc))


def _serializer(rpc: _Rpc) -> Callable[[Any], bytes]:
    def serialize(message: Any) -> bytes:
        # A message for many streams is already serialized, once for all of them.
        return message if isinstance(message, bytes) else rpc.serialize(message)

    return serialize


def _stream_stream(rpc: _Rpc) -> Handler:
    answer = _answer_with_stream if rpc.meter is None else _metered_stream

    async def handle(_requests: AsyncIterator[bytes], context: Context) -> None:
        await answer(rpc, _stream_context(context, rpc.meter), [], lambda context: _messages_of(rpc, context))

    return grpc.stream_stream_rpc_method_handler(rpc.around(handle), response_serializer=_serializer(rpc))


def _stream_context(context: Context, meter: RpcMeter | None) -> Context:
    return cast("Context", _StreamContext(context, meter))


class _StreamContext:
    """The context of a stream, which can end with a status whenever it is cancelled; counts messages, if asked to.

    gRPC sends initial metadata with the first message. If waiting for that is cancelled, as when a client does not read
    it, gRPC would send them again with the status: that fails, and the client would never hear of the end.
    """

    def __init__(self, context: Context, meter: RpcMeter | None) -> None:
        self._context = context
        self._meter = meter
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def send_initial_metadata(self, metadata: Any) -> None:
        self._begun = True
        sending = asyncio.ensure_future(self._context.send_initial_metadata(metadata))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            # It does not depend on the client.
            await asyncio.wait((sending,))
            raise

    async def write(self, message: Any) -> None:
        if not self._begun:
            await self.send_initial_metadata(())
        if self._meter is not None:
            self._meter.sent += 1
        await self._context.write(message)

    async def read(self) -> Any:
        message = await self._context.read()
        if self._meter is not None and message is not grpc.aio.EOF:
            self._meter.received += 1
        return message


async def _messages_of(rpc: _Rpc, context: Context) -> AsyncIterator[Any]:
    """Yield a client's messages. gRPC's own iterator would keep the last one until the next garbage collection."""
    while (received := [await context.read()]) != [grpc.aio.EOF]:
        yield rpc.parse(received.pop())


async def _answer_with_stream(
    rpc: _Rpc, context: Context, received: list[bytes], request: Callable[[Context], object]
) -> None:
    """Send what the servicer's method yields, or let it write by itself (`context.write` serializes).

    `received` has the bytes of the request until they are parsed. A stream may be open for days, and its frame lives
    even longer; neither must keep the bytes.
    """
    admission = None
    try:
        admission = rpc.calls.enter(rpc.name, context, asyncio.current_task())
        answer = rpc.run(request(context), context)
        if inspect.isasyncgen(answer):
            # Closed here, because otherwise the clean-up after a client has gone would wait for the garbage collector.
            async with aclosing(answer):
                async for response in answer:
                    await context.write(response)
        else:
            await answer
    except BaseException as error:  # noqa: BLE001 -- the guard: `fail` answers, or raises it again
        received.clear()
        # A stream that was revoked has to say so, instead of that it was cancelled.
        reported = error if admission is None else admission.end(error) or error
        await rpc.calls.fail(rpc.name, context, reported)
    finally:
        rpc.calls.leave(admission)


# --- Counting calls ---


def _metered(
    handle: Callable[[bytes, Context], Awaitable[bytes]], meter: RpcMeter
) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def metered(request: bytes, context: Context) -> bytes:
        began, code = meter.begin(), _OK
        meter.received += 1
        received = [request]
        request = b""
        try:
            answer = await handle(received.pop(), context)
            meter.sent += 1
            return answer
        except BaseException:
            code = _code_of(context)
            raise
        finally:
            meter.end(began, code)

    return metered


async def _metered_stream(
    rpc: _Rpc, context: Context, received: list[bytes], request: Callable[[Context], object]
) -> None:
    meter = rpc.meter
    assert meter is not None, "its handler is made for a meter"
    began, code = meter.begin(), _OK
    meter.received += len(received)
    try:
        await _answer_with_stream(rpc, context, received, request)
    except BaseException:
        code = _code_of(context)
        raise
    finally:
        meter.end(began, code)


def _code_of(context: Context) -> str:
    """Return the name of the status with which a call ends that has raised."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    left_s: Any = context.time_remaining()
    return _TOO_LATE if left_s is not None and left_s <= 0 else _GIVEN_UP


# --- Health and reflection ---


def _own_services(
    options: ServerOptions, services: Sequence[Service], draining: asyncio.Event, is_fit: Callable[[], bool]
) -> list[Service]:
    find = descriptor_pool.Default().FindServiceByName
    health = find("grpc.health.v1.Health")
    names = [*(service.descriptor.full_name for service in services), health.full_name]
    own = [Service(health, _Health(names, draining, is_fit), read_within_s=_STRANGERS_S)]
    if options.reflection:
        own.append(Service(find("grpc.reflection.v1alpha.ServerReflection"), _Reflection(names, draining)))
    return own


class _Health:
    """grpc.health.v1: SERVING while the process can do its work, until the drain.

    The drain ends every Watch, because an open one would delay it.
    """

    def __init__(self, names: Sequence[str], draining: asyncio.Event, is_fit: Callable[[], bool]) -> None:
        self._names = frozenset(("", *names))
        self._draining = draining
        self._is_fit = is_fit
        self._watches = Counter[str]()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return self._now()

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        host = context.peer().rpartition(":")[0]
        if self._watches[host] >= WATCHES_OF_HEALTH:
            details = f"this host watches the health {WATCHES_OF_HEALTH:,} times already: end some, or ask with Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, details)
        known, draining = request.service in self._names, self._draining.is_set()
        self._watches[host] += 1
        try:
            said = self._now() if known else _health(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            yield said
            # Read before the first answer, because the drain may begin while that is being sent.
            while not draining:
                with suppress(TimeoutError):
                    draining = await asyncio.wait_for(self._draining.wait(), _LOOK_S)
                if known and said != (now := self._now()):
                    said = now
                    yield said
        finally:
            self._watches -= Counter((host,))

    def _now(self) -> health_pb2.HealthCheckResponse:
        answer = health_pb2.HealthCheckResponse
        is_serving = self._is_fit() and not self._draining.is_set()
        return _health(answer.SERVING if is_serving else answer.NOT_SERVING)


def _health(status: int) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=status)


class _Reflection:
    """grpc.reflection.v1alpha over the default pool. The drain ends its streams, which clients leave open."""

    def __init__(self, names: Sequence[str], draining: asyncio.Event) -> None:
        # Any, because its published types declare a coroutine where it has an async generator.
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
            drained.cancel()
            answering.cancel()
            # An answer that is being sent must not come after the status.
            await asyncio.wait((answering,))
