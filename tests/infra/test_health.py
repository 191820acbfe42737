"""The question to the health service, asked without gRPC: of servers in every state, and of what is none."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from dspex_persist.infra.access.tls import TlsError
from dspex_persist.infra.health import NoAnswerError, Tls, serves
from dspex_persist.infra.listen import TcpAddress, UnixAddress
from dspex_persist.infra.process import ServerProcess
from tests.certificates import Authority
from tests.deadline import within
from tests.infra.ping import StartServer

HERE = "127.0.0.1"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@contextmanager
def answering(*chunks: bytes, keep: bool = False) -> Iterator[TcpAddress]:
    """A server that sends these bytes to whoever connects; `keep`: it does not close the connection then."""
    over = threading.Event()

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            for chunk in chunks:
                connection.sendall(chunk)
            if keep:
                over.wait()
            # Whatever has come is read, or closing the connection would reset it.
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65_536):
                pass

    with socket.create_server((HERE, 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield TcpAddress(HERE, listener.getsockname()[1])
        over.set()
        thread.join()


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 1) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def status(number: int) -> bytes:
    return b"\0\0\0\0\2\x08" + bytes([number])


def no_answer(address: TcpAddress | UnixAddress, tls: Tls | None = None, timeout_s: float | None = None) -> str:
    with pytest.raises(NoAnswerError) as caught:
        serves(address, tls, within(10) if timeout_s is None else timeout_s)
    return f"{caught.value.kind}: {caught.value}"


def test_a_server_says_that_it_serves(server: ServerProcess) -> None:
    assert serves(TcpAddress(HERE, server.port), None, within(10))


def test_a_server_at_a_unix_socket(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "ping.sock"
    with start_server("--listen", f"unix:{path}") as server:
        assert serves(UnixAddress(str(path)), None, within(10))
        server.kill()
        assert no_answer(UnixAddress(str(path))) == "refused: nothing listens there"
    path.unlink()
    assert no_answer(UnixAddress(str(path))) == "missing: there is no such socket"


@pytest.mark.parametrize(
    ("chunks", "is_serving"),
    [
        ([SETTINGS, frame(0, status(1))], True),
        # NOT_SERVING, SERVICE_UNKNOWN, and UNKNOWN, which is nothing.
        ([SETTINGS, frame(0, status(2))], False),
        ([SETTINGS, frame(0, status(3))], False),
        ([SETTINGS, frame(0, b"\0\0\0\0\0")], False),
        ([SETTINGS, frame(0, status(1)[:3]), frame(0, status(1)[3:])], True),
        ([SETTINGS, frame(0, b"\3" + status(1) + b"\0\0\0", flags=8)], True),
        ([SETTINGS, frame(8, b"\0\0\0\1", stream=0), frame(6, b"12345678", stream=0), frame(0, status(1))], True),
        ([(SETTINGS + frame(1, b"\x88", flags=4) + frame(0, status(1)))[:-1], b"\1"], True),
    ],
)
def test_answers_in_every_form_that_http2_has(chunks: list[bytes], is_serving: bool) -> None:
    with answering(*chunks) as address:
        assert serves(address, None, within(10)) is is_serving


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "strange: what answers there does not speak gRPC"),
        (b"220 mail.example.org ESMTP\r\n", "strange: what answers there does not speak gRPC"),
        (b"\x15\x03\x01\0\2\2\x46pad", "tls: the server uses TLS"),
        (b"", "tls: the server closed the connection, as one with TLS does"),
        (SETTINGS, "tls: the server closed the connection, as one with TLS does"),
        (SETTINGS + frame(3, b"\0\0\0\7"), "strange: it refused the question"),
        (SETTINGS + frame(1, b"\x88", flags=5), "strange: it has no health service, or refuses to answer"),
        (SETTINGS + b"\xff\xff\xff\0\0\0\0\0\1", "strange: its answer is not one of gRPC"),
    ],
)
def test_what_answers_there_is_no_such_server(answer: bytes, text: str) -> None:
    with answering(answer) as address:
        assert no_answer(address) == text


def test_a_server_that_does_not_answer() -> None:
    with answering(SETTINGS, keep=True) as address:
        assert no_answer(address, timeout_s=0.05) == "slow: no answer within 0.05 s"


@pytest.mark.parametrize("again", [frame(6, b"12345678", flags=1), frame(8, b"\0\0\0\1"), frame(0, b"\1\0", flags=8)])
def test_a_server_that_goes_on_answering_something_else(again: bytes) -> None:
    """The time is over although there is always something to read."""
    with flooding(again) as address:
        assert no_answer(address, timeout_s=0.1) == "slow: no answer within 0.1 s"


def test_a_server_that_sends_an_answer_without_end() -> None:
    with flooding(frame(0, b"\0\xff\xff\xff\xff" + b"x" * 16_000)) as address:
        assert no_answer(address) == "strange: its answer is not one of gRPC"


@contextmanager
def flooding(again: bytes) -> Iterator[TcpAddress]:
    """A server that sends the same to whoever connects, until the connection is closed."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(SETTINGS)
            while True:
                connection.sendall(again * 100)

    with socket.create_server((HERE, 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield TcpAddress(HERE, listener.getsockname()[1])
        thread.join()


def test_nothing_listens_or_the_host_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with socket.socket() as bound:
        bound.bind((HERE, 0))
        assert no_answer(TcpAddress(HERE, bound.getsockname()[1])) == "refused: nothing listens there"
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert no_answer(TcpAddress("nowhere", 1)) == "other: the host is unknown: Name or service not known"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@contextmanager
def encrypted(authority: Authority, *, asks_clients: bool = False) -> Iterator[TcpAddress]:
    """A gRPC server with TLS, and with the health service of gRPC itself."""
    from concurrent.futures import ThreadPoolExecutor

    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    pair = authority.issue("server")
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        credentials = grpc.ssl_server_credentials(
            [(pair.key.read_bytes(), pair.cert.read_bytes())],
            authority.cert.read_bytes() if asks_clients else None,
            asks_clients,
        )
        port = server.add_secure_port(f"{HERE}:0", credentials)
        server.start()
        try:
            yield TcpAddress(HERE, port)
        finally:
            server.stop(None).wait()


def test_tls(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other").cert
    with encrypted(authority) as address:
        assert serves(address, Tls(HERE, authority.cert), within(10))
        assert serves(address, Tls("another.example.org", verify=False), within(10))
        assert no_answer(address) == "tls: the server closed the connection, as one with TLS does"
        assert no_answer(address, Tls(HERE, other)).startswith("trust: its certificate is not trusted: ")
        assert no_answer(address, Tls(HERE)).startswith("trust: ")
        hostname = no_answer(address, Tls("another.example.org", authority.cert))
        assert "trust: its certificate is not trusted: Hostname mismatch" in hostname
        with pytest.raises(TlsError, match="cannot read it"):
            serves(address, Tls(HERE, tmp_path / "missing"), within(10))


def test_tls_with_certificates_of_clients(authority: Authority) -> None:
    client = authority.issue("client")
    with encrypted(authority, asks_clients=True) as address:
        assert serves(address, Tls(HERE, authority.cert, client.cert, client.key), within(10))
        assert no_answer(address, Tls(HERE, authority.cert)) in (
            # Whether the alert of the server or the end of the connection is seen first, is a matter of luck.
            "certificate: the server demands a certificate that it trusts",
            "certificate: the server closed the connection, as it does without a certificate that it trusts",
        )


def test_tls_of_a_server_without_it(server: ServerProcess) -> None:
    address = TcpAddress(HERE, server.port)
    assert no_answer(address, Tls(HERE, verify=False)) == "plain: the server does not use TLS"
