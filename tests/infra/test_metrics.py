"""What counts, and the HTTP server that shows it."""

import errno
import gzip
import os
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse

from dspex_persist.infra import exposition
from dspex_persist.infra.access.tls import TlsFiles
from dspex_persist.infra.exposition import MetricsServer
from dspex_persist.infra.listen import ListenError, TcpAddress
from dspex_persist.infra.metrics import Asker, CallMeter, Counter, Family, Histogram, Names, gauge, total
from tests.certificates import Authority
from tests.deadline import within

HERE = TcpAddress("127.0.0.1", 0)

Serve = Callable[..., MetricsServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves families, "fit" and on a free port unless the arguments say otherwise."""
    with ExitStack() as stack:

        def begin(*families: Family, **options: Any) -> MetricsServer:
            options = {"sources": [lambda: families], "health": lambda: "", "address": HERE, **options}
            return stack.enter_context(MetricsServer(**options))

        yield begin


def get(url: str, *, tls: ssl.SSLContext | None = None, **headers: str) -> Any:
    """Return the answer to a request, also if that is an error."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): text for name, text in headers.items()})
    try:
        return urllib.request.urlopen(request, timeout=within(20), context=tls)
    except urllib.error.HTTPError as error:
        return error


def samples_of(server: MetricsServer) -> dict[str, float]:
    """What a server shows of ours, by name and labels as in the text."""
    found = {}
    for family in parse(get(server.url).read().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={text}" for name, text in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


# --- Counting ---


def test_counters_count_for_each_combination_of_labels(serve: Serve) -> None:
    plain, labelled = Counter("a_total", "A."), Counter("b_total", "B.", "x", "y")
    labelled.expect("0", "0")
    labelled.add("1", "2")
    labelled.add("1", "2", amount=2.5)
    assert samples_of(serve(plain.family(), labelled.family())).items() >= {
        ("a_total", 0.0),
        ("b_total{x=0,y=0}", 0.0),
        ("b_total{x=1,y=2}", 3.5),
    }


def test_a_bucket_has_what_is_at_most_as_large_as_its_bound(serve: Serve) -> None:
    histogram = Histogram("h_seconds", "H.", (1, 2.5), "x")
    for value in (0.5, 1, 2, 3):
        histogram.of("a").observe(value)
    assert samples_of(serve(histogram.family())).items() >= {
        ("h_seconds_bucket{le=1.0,x=a}", 2.0),
        ("h_seconds_bucket{le=2.5,x=a}", 3.0),
        ("h_seconds_bucket{le=+Inf,x=a}", 4.0),
        ("h_seconds_count{x=a}", 4.0),
        ("h_seconds_sum{x=a}", 6.5),
    }


def test_names_that_others_make_up_are_bounded_and_can_be_sent(serve: Serve) -> None:
    names = Names(3, known=("ours",))
    labels = [names.label(name) for name in ("", "lone \ud800 surrogate", 'a"b\\c\nd' + "e" * 500, "late", "later")]
    assert labels[3:] == ["other", "other"]
    assert [names.label("ours"), names.label("")] == ["ours", "none"]
    assert len(labels[2]) == 100
    counter = Counter("n_total", "N.", "name")
    for label in labels:
        counter.add(label)
    served = list(parse(get(serve(counter.family()).url).read().decode()))
    (family,) = [family for family in served if family.name == "n"]
    assert {sample.labels["name"] for sample in family.samples} == set(labels)


def test_calls_have_the_usual_names_and_codes() -> None:
    meter = CallMeter()
    rpc = meter.rpc("shop.Shop", "Buy", streams_requests=False, streams_answers=True)
    meter.rpc("shop.Shop", "Never", streams_requests=False, streams_answers=False)
    for code in ("OK", "CANCELLED", "NOT_FOUND", "DEADLINE_EXCEEDED"):
        rpc.end(rpc.begin(), code)
    families = {family.name: family for family in meter.families()}
    (started,) = families["grpc_server_started_total"].samples
    assert started == (("server_stream", "shop.Shop", "Buy"), 4)
    codes = [sample.labels[-1] for sample in families["grpc_server_handled_total"].samples]
    assert codes == ["Internal", "OK", "Canceled", "NotFound", "DeadlineExceeded"]
    assert families["grpc_server_handling_seconds"].distributions[0].buckets[-1][1] == 4


def test_an_open_stream_has_begun_and_not_ended() -> None:
    meter = CallMeter()
    rpc = meter.rpc("shop.Shop", "Watch", streams_requests=False, streams_answers=True)
    rpc.begin()
    families = {family.name: family for family in meter.families()}
    counts = [families[f"grpc_server_{name}_total"].samples for name in ("started", "handled")]
    assert [sum(sample.value for sample in samples) for samples in counts] == [1, 0]
    # Of two counts, Prometheus takes the difference only if there are both.
    assert all(counts)


# --- Serving ---


def test_it_serves_metrics_and_health_and_nothing_else(serve: Serve) -> None:
    reasons = [""]
    server = serve(gauge("g", "G.", 2), health=lambda: reasons[0])
    root = server.url.removesuffix("/metrics")
    answer = get(server.url)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "g 2.0\n" in answer.read().decode()
    assert [(get(f"{root}{path}").status) for path in ("/", "/metrics/", "/metricsx", "/../metrics")] == [404] * 4
    assert get(f"{server.url}?name=x").status == 200
    assert (get(f"{root}/healthz").status, get(f"{root}/healthz").read()) == (200, b"ok\n")
    reasons[0] = "the disk is full"
    assert (get(f"{root}/healthz").status, get(f"{root}/healthz").read()) == (503, b"the disk is full\n")
    head = urllib.request.Request(server.url, method="HEAD")
    with urllib.request.urlopen(head, timeout=within(20)) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_it_speaks_the_formats_that_prometheus_asks_for(serve: Serve) -> None:
    server = serve(total("t_total", "T.", 1), Histogram("h", "H.", (1,)).family())
    answer = get(server.url, Accept="application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert {family.name for family in parse_open_metrics(answer.read().decode())} >= {"t", "h", "process_cpu_seconds"}
    answer = get(server.url, Accept_Encoding="gzip")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert b"t_total 1.0" in gzip.decompress(answer.read())


def test_an_accept_header_that_means_nothing_gets_the_usual_format(serve: Serve) -> None:
    answer = get(serve(gauge("g", "G.", 2)).url, Accept="application/openmetrics-text;version=next;q=9")
    assert (answer.status, b"g 2.0\n" in answer.read()) == (200, True)


def test_a_part_that_cannot_be_read_leaves_the_others(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Iterable[Family]:
        raise RuntimeError("the disk is full")

    server = serve(sources=[broken, lambda: [gauge("g", "G.", 1)]])
    assert samples_of(server).items() >= {("g", 1.0), ("dspex_persist_scrape_errors_total", 1.0)}


def test_a_token_is_demanded_for_metrics_but_not_for_health(serve: Serve) -> None:
    server = serve(gauge("g", "G.", 1), admit=lambda asker: asker == Asker("ipv4:127.0.0.1", "secret", ()))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
        answer = get(server.url, **headers)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert b"g 1.0" not in answer.read()
    assert get(server.url, Authorization="bearer secret").status == 200
    assert get(server.url.replace("/metrics", "/healthz")).status == 200


def test_tls_has_the_certificate_of_now_and_may_ask_for_one(serve: Serve, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, later, client = authority.issue("a"), authority.issue("b"), authority.issue("c", "DNS:client")
    askers: list[Asker] = []
    server = serve(
        gauge("g", "G.", 1),
        tls=TlsFiles(pair.cert, pair.key, authority.cert),
        admit=lambda asker: not askers.append(asker),
    )
    assert server.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(authority.cert))
    with pytest.raises((OSError, urllib.error.URLError)):
        get(server.url, tls=trusting)
    trusting.load_cert_chain(client.cert, client.key)

    def subject() -> str:
        plain = socket.create_connection(("127.0.0.1", server.port), timeout=within(20))
        with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
            certificate: Any = secured.getpeercert()
            return str(certificate["subject"][0][0][1])

    assert (get(server.url, tls=trusting).status, subject()) == (200, "a")
    assert askers == [Asker("ipv4:127.0.0.1", None, ("c", "client"))]
    pair.replace(later)
    assert subject() == "b"


def test_localhost_is_the_address_that_others_ask(serve: Serve) -> None:
    server = serve(gauge("g", "G.", 1), address=TcpAddress("localhost", 0))
    assert get(f"http://127.0.0.1:{server.port}/metrics").status == 200


def test_an_address_in_use_is_an_error(serve: Serve) -> None:
    port = serve().port
    with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: address already in use"):
        serve(address=TcpAddress("127.0.0.1", port))
    with pytest.raises(ListenError):
        serve(address=TcpAddress("host.invalid", 0))


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nX: "], ids=["nothing", "little"])
def test_slow_clients_keep_nobody_from_asking(serve: Serve, said: bytes) -> None:
    server = serve(gauge("g", "G.", 1))
    with ExitStack() as stack:
        # More than may be open.
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port))).sendall(said)
        assert samples_of(server)["g"] == 1


def test_clients_that_begin_no_tls_keep_nobody_from_asking(serve: Serve, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("a")
    server = serve(gauge("g", "G.", 1), tls=TlsFiles(pair.cert, pair.key, None))
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert get(server.url, tls=ssl.create_default_context(cafile=str(authority.cert))).status == 200


def test_it_goes_on_when_the_system_has_no_descriptors_or_threads_for_a_while(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, begin = socket.socket.accept, exposition.on_new_thread
    faults: list[Exception] = [OSError(errno.EMFILE, "too many open files")] * 3

    def accept_later(listener: socket.socket) -> Any:
        if faults and isinstance(faults[0], OSError):
            raise faults.pop(0)
        return accept(listener)

    def begin_later(*arguments: Any) -> Any:
        if faults:
            raise faults.pop(0)
        return begin(*arguments)

    server = serve(gauge("g", "G.", 1))
    monkeypatch.setattr(exposition, "_PAUSE_S", 0.001)
    monkeypatch.setattr(socket.socket, "accept", accept_later)
    monkeypatch.setattr(exposition, "on_new_thread", begin_later)
    assert samples_of(server)["g"] == 1
    faults.append(RuntimeError("can't start new thread"))
    with pytest.raises(OSError):
        get(server.url)
    assert samples_of(server)["g"] == 1
    said = [record.getMessage() for record in caplog.records if "was not accepted" in record.getMessage()]
    assert [text.partition("reason=")[2] for text in said] == [
        "'[Errno 24] too many open files'",
        '"can\'t start new thread"',
    ]


def test_its_port_is_free_when_it_has_ended() -> None:
    with MetricsServer(HERE, [], health=lambda: "") as server:
        get(server.url)
    with MetricsServer(TcpAddress("127.0.0.1", server.port), [], health=lambda: "") as again:
        assert get(again.url).status == 200


def test_it_ends_when_nothing_is_read_any_more(serve: Serve) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow() -> list[Family]:
        reading.set()
        assert go_on.wait(within(20))
        return [gauge("g", "G.", 1)]

    server = MetricsServer(HERE, [slow], health=lambda: "")
    with ThreadPoolExecutor() as threads:
        scrape = threads.submit(get, server.url)
        assert reading.wait(within(20))
        closing = threads.submit(server.close)
        with pytest.raises(TimeoutError):
            closing.result(0.05)
        go_on.set()
        closing.result(within(20))
        assert b"g 1.0" in scrape.result(within(20)).read()


def test_a_forked_child_does_not_hold_the_port() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with MetricsServer(HERE, [], health=lambda: "") as server:
            child = os.fork()
            if not child:
                theirs.send(b"forked")
                theirs.recv(1)
                os._exit(0)
            assert ours.recv(6) == b"forked"
        try:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", server.port))
        finally:
            ours.send(b"x")
            os.waitpid(child, 0)
