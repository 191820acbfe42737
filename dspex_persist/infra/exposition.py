"""Serves metrics over HTTP, in the formats of Prometheus, on threads of its own: a busy event loop delays no scrape.

It is the only module that knows prometheus_client, which is an extra: import it where metrics are wanted.
"""

import contextlib
import gzip
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from math import inf
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from dspex_persist.infra import forks
from dspex_persist.infra.access.tls import Certificates, TlsFiles
from dspex_persist.infra.listen import ListenError, TcpAddress
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.metrics import Asker, Counter, Family
from dspex_persist.infra.threads import on_new_thread
from dspex_persist.infra.traces import trace_of

Source = Callable[[], Iterable[Family]]
"""Returns families of metrics; called on any thread, once for each scrape."""
Admit = Callable[[Asker], bool]
"""Returns whether somebody may read the metrics."""

_MOST_CONNECTIONS: Final = 16
_TIMEOUT_S: Final = 10.0
"""How long a client may take to send its request, and to take the answer."""
_PAUSE_S: Final = 0.1
_TEXT: Final = "text/plain; charset=utf-8"
_log: Final = get_logger(__name__)


class MetricsServer:
    """An HTTP server with two pages: `/metrics`, and `/healthz`, which says whether the process can do its work.

    Args:
        address: Where to listen; port 0 takes a free one.
        sources: What `/metrics` shows. If one of them fails, that is logged, and the others are shown.
        health: Returns why the process cannot do its work, or "".
        tls: The files for TLS, which are read again when they change; None to serve without encryption.
        admit: Returns whether somebody may read the metrics, one at a time; None if everybody may. `/healthz` is open.

    Attributes:
        port: The port.

    Raises:
        ListenError: The address is not available.
        TlsError: The files for TLS cannot be used.
    """

    def __init__(
        self,
        address: TcpAddress,
        sources: Sequence[Source],
        *,
        health: Callable[[], str],
        tls: TlsFiles | None = None,
        admit: Admit | None = None,
    ) -> None:
        self.scheme = "http" if tls is None else "https"
        self._address = address
        self._tls = None if tls is None else _Tls(tls)
        self._pages = _Pages(sources, health, admit)
        self._slots = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        # Oldest first.
        self._unasked: dict[_Visit, None] = {}
        self._changing = forks.Lock()
        self._listener = _listen(address)
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        forks.register(self)
        self._ended = on_new_thread(self._accept, "dspex-persist-metrics")

    @property
    def url(self) -> str:
        """The address of the metrics."""
        return f"{self.scheme}://{TcpAddress(self._address.host, self.port)}/metrics"

    def close(self) -> None:
        """Stop listening, and return when nothing more is read for a scrape; answers may still be sent afterwards."""
        self._wake.send(b"x")
        self._ended.result()
        self._pages.close()
        forks.unregister(self)

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`: a child must neither occupy the address, nor keep connections open."""
        forks.blank_sockets(self.port)

    def _accept(self) -> None:
        has_failed = False
        with self._listener, self._wake, self._woken, selectors.DefaultSelector() as selector:
            for each in (self._listener, self._woken):
                selector.register(each, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    return
                try:
                    self._accept_one()
                except BlockingIOError:
                    continue
                except (OSError, RuntimeError) as error:
                    # The system has no descriptor or no thread left, which may last.
                    if not has_failed:
                        _log.warning("a connection for metrics was not accepted", reason=str(error))
                    has_failed = True
                    time.sleep(_PAUSE_S)
                else:
                    has_failed = False

    def _accept_one(self) -> None:
        connection, peer = self._listener.accept()
        if not self._slots.acquire(blocking=False):
            self._make_room()
            if not self._slots.acquire(timeout=_PAUSE_S):
                connection.close()
                return
        visit = _Visit(connection, peer)
        with self._changing:
            self._unasked[visit] = None
        try:
            on_new_thread(partial(self._answer, visit), "dspex-persist-scrape")
        except RuntimeError:
            connection.close()
            self._has_left(visit)
            raise

    def _make_room(self) -> None:
        """End the oldest connection without a request yet: slow clients must not keep out others."""
        with self._changing:
            visit = next(iter(self._unasked), None)
            if visit is not None:
                del self._unasked[visit]
                visit.end()

    def _has_asked(self, visit: "_Visit") -> None:
        with self._changing:
            self._unasked.pop(visit, None)

    def _has_left(self, visit: "_Visit") -> None:
        self._has_asked(visit)
        self._slots.release()

    def _answer(self, visit: "_Visit") -> None:
        connection = visit.connection
        try:
            with connection:
                connection.settimeout(_TIMEOUT_S)
                if self._tls is None:
                    self._handle(connection, visit)
                else:
                    context = self._tls.context()
                    with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as secured:
                        visit.connection = secured
                        secured.do_handshake()
                        self._handle(secured, visit)
        except OSError:
            # The client has gone, or does not speak TLS.
            return
        finally:
            self._has_left(visit)

    def _handle(self, connection: socket.socket, visit: "_Visit") -> None:
        # What the handler calls its server is only passed on.
        server: Any = _Asked(self._pages, partial(self._has_asked, visit))
        _Handler(connection, visit.peer, server)


class _Visit:
    """A connection, and where it comes from."""

    def __init__(self, connection: socket.socket, peer: Any) -> None:
        self.connection = connection
        self.peer = peer

    def end(self) -> None:
        """Have the thread that reads from the connection find its end."""
        with contextlib.suppress(OSError):
            # That of an SSLSocket also changes what the thread uses.
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)


def _listen(address: TcpAddress) -> socket.socket:
    reason = "the host has no address"
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ListenError(str(address), str(error)) from error
    # Of the addresses of a name the one that others expect: they ask 127.0.0.1, not ::1, for localhost.
    for family, _, _, _, name in sorted(found, key=lambda each: each[0] is not socket.AF_INET):
        both = family is socket.AF_INET6 and name[0] == "::" and socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server(name[:2], family=family, dualstack_ipv6=both)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            continue
        # A client may be gone before it is accepted.
        listener.setblocking(False)
        return listener
    raise ListenError(str(address), reason)


class _Tls:
    """The context of TLS for new connections, with the files as they are now."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._certificates = Certificates(files)
        self._context = self._made()

    def context(self) -> ssl.SSLContext:
        """Return the context for a connection."""
        if self._certificates.changed() is not None:
            # They may be changing again; then the next connection finds that.
            with contextlib.suppress(OSError):
                self._context = self._made()
        return self._context

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._files.cert, self._files.key)
        if self._files.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._files.ca)
        return context


class _Page:
    """What is answered to a request."""

    def __init__(
        self, status: HTTPStatus, content: bytes | str, kind: str = _TEXT, headers: dict[str, str] | None = None
    ) -> None:
        self.status = status
        self.content = content if isinstance(content, bytes) else content.encode()
        self.headers = {"Content-Type": kind, "Content-Length": str(len(self.content)), **(headers or {})}


class _Pages:
    """What is at which path. Usable from any thread."""

    def __init__(self, sources: Sequence[Source], health: Callable[[], str], admit: Admit | None) -> None:
        self._health = health
        self._admit = admit
        # One at a time: several scrapes at once would only take longer.
        self._turn = forks.Lock()
        self._closed = False
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(sources))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def answer(self, request: "_Handler") -> _Page:
        """Return the page for a request."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            reason = self._health()
            return _Page(HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK, f"{reason or 'ok'}\n")
        if path != "/metrics":
            return _Page(HTTPStatus.NOT_FOUND, "there is only /metrics and /healthz\n")
        with self._turn:
            if self._closed:
                return _Page(HTTPStatus.SERVICE_UNAVAILABLE, "ending\n")
            if self._admit is not None and not self._admit(_asker_of(request)):
                challenge = {"WWW-Authenticate": "Bearer"}
                return _Page(HTTPStatus.UNAUTHORIZED, "this takes a token with the scope read\n", headers=challenge)
            return self._metrics(request)

    def close(self) -> None:
        """Wait until no metrics are read, and read none any more."""
        with self._turn:
            self._closed = True

    def _metrics(self, request: "_Handler") -> _Page:
        try:
            encode, kind = choose_encoder(request.headers.get("Accept") or "")
        except (TypeError, ValueError):
            # A version that is no number.
            encode, kind = choose_encoder("")
        content = encode(self._registry)
        headers = {"Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(request.headers.get("Accept-Encoding") or ""):
            content = gzip.compress(content, 1)
            headers["Content-Encoding"] = "gzip"
        return _Page(HTTPStatus.OK, content, kind, headers)


class _Asked:
    """The pages, for one request."""

    def __init__(self, pages: _Pages, asked: Callable[[], None]) -> None:
        self._pages = pages
        self._asked = asked

    def answer(self, request: "_Handler") -> _Page:
        """Return the page for a request, which has come."""
        self._asked()
        return self._pages.answer(request)


def _asker_of(request: "_Handler") -> Asker:
    host = str(request.client_address[0])
    scheme, _, token = (request.headers.get("Authorization") or "").partition(" ")
    given = token.strip() if scheme else None
    # Another scheme is a token that nobody has.
    return Asker(
        f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}",
        "" if scheme and scheme.lower() != "bearer" else given,
        _names_of(request.connection),
    )


def _names_of(connection: socket.socket) -> tuple[str, ...]:
    """Return the names in the certificate that a client has shown."""
    facts: Any = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
    if not facts:
        return ()
    common = [text for part in facts.get("subject", ()) for name, text in part if name == "commonName"]
    return (*common, *(text for _, text in facts.get("subjectAltName", ())))


class _Families(Collector):
    """Our families, as prometheus_client wants them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._errors = Counter(
            "dspex_persist_scrape_errors_total", "Parts of the metrics that could not be read; the log has the reason."
        )

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            try:
                families = list(source())
            except Exception as error:  # noqa: BLE001 -- a boundary: the other metrics are needed most when one fails
                self._errors.add()
                _log.error("metrics could not be read", traceback=trace_of(error))
                continue
            for family in families:
                # Lets other threads run: making the text of all of them takes longer than an event loop may wait.
                time.sleep(0)
                yield _metric_of(family)
        yield _metric_of(self._errors.family())


def _metric_of(family: Family) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, buckets, total in family.distributions:
            histogram.add_metric(labels, [(_bound(bound), count) for bound, count in buckets], total)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=family.labels)
    for labels, value in family.samples:
        metric.add_metric(labels, value)
    return metric


def _bound(bound: float) -> str:
    return "+Inf" if bound == inf else str(float(bound))


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    timeout = _TIMEOUT_S

    def version_string(self) -> str:
        """Return what the header Server says."""
        return "dspex-persist"

    def do_GET(self) -> None:
        """Answer a request."""
        self._send(body=True)

    def do_HEAD(self) -> None:
        """Answer a request for the headers only."""
        self._send(body=False)

    def _send(self, *, body: bool) -> None:
        pages: Any = self.server
        try:
            page: _Page = pages.answer(self)
        except Exception as error:  # noqa: BLE001 -- the last boundary: logs every error
            _log.error("a request for metrics failed", traceback=trace_of(error))
            page = _Page(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the log has the reason\n")
        self.send_response(page.status)
        for name, value in page.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(page.content)

    def log_message(self, format: str, *_: Any) -> None:
        """Log nothing: requests come every few seconds."""
