"""The life of a gRPC server: bind, serve, drain. It knows nothing of the services that it is given."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

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
from dspex_persist.infra.metrics import CallMeter
from dspex_persist.infra.server.guard import Admit, Calls, Context, StatusOf, admit_all
from dspex_persist.infra.server.handlers import Handlers, ReadsFirst, Service, reads_all
from dspex_persist.infra.server.health import HEALTH, health_service
from dspex_persist.infra.server.reflection import reflection_service
from dspex_persist.infra.traced_calls import CallSpans

_MIB: Final = 1024 * 1024
# How long the clean-up of handlers may take that are cancelled after the grace period.
_CLEAN_UP_S: Final = 5.0
_PENDING_CALLS: Final = 100_000
_UNREQUESTED_S: Final = 86_400

_log: Final = get_logger(__name__)


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
    handlers = [Handlers(service, calls, reads_first, meter, options.listen, spans) for service in services]
    handlers += [
        Handlers(service, own_calls, reads_first, meter)
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


def _own_services(
    options: ServerOptions, services: Sequence[Service], draining: asyncio.Event, is_fit: Callable[[], bool]
) -> list[Service]:
    names = [*(service.descriptor.full_name for service in services), HEALTH]
    own = [health_service(names, draining, is_fit)]
    if options.reflection:
        own.append(reflection_service(names, draining))
    return own


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
