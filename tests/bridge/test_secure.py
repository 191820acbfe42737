"""TLS between a real server and its clients: what connects, and what each refusal says."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import dspex_persist
from dspex_persist.cli.places import url_of
from dspex_persist.infra.process import ServerProcess
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import InvalidArgumentError, UnavailableError
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring.serving import serve
from tests.certificates import Authority, Pair
from tests.deadline import within


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("server")


@pytest.fixture(scope="module")
def client(authority: Authority) -> Pair:
    return authority.issue("client", "DNS:client")


@pytest.fixture(scope="module")
def served(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    """A server with TLS, whose files a test may replace as long as it puts them back."""
    path = tmp_path_factory.mktemp("served") / "a.db"
    with ServedDatabase(path, {"tls_cert": pair.cert, "tls_key": pair.key}) as served:
        yield served


@pytest.fixture(scope="module")
def mutual(pair: Pair, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    """A server that demands certificates of clients."""
    path = tmp_path_factory.mktemp("mutual") / "a.db"
    with ServedDatabase(path, {"tls_cert": pair.cert, "tls_key": pair.key, "client_ca": authority.cert}) as served:
        yield served


def secure(served: ServedDatabase, host: str = "127.0.0.1") -> str:
    return f"grpcs://{host}:{served.port}"


def refusal(url: str, **options: Any) -> str:
    with BridgedState(url, timeout_s=within(20), **options) as state:
        with pytest.raises(UnavailableError) as raised:
            state.initialize_session("s")
        with pytest.raises(UnavailableError):
            state.get_value("s", "x")
    return str(raised.value)


def test_everything_works_over_tls(served: ServedDatabase, authority: Authority) -> None:
    url = secure(served)
    with dspex_persist.Context("everything", dspex_persist.connect(url, ca=authority.cert)) as ctx:
        ctx["x"] = 1
        assert ctx["x"] == 1
    with dspex_persist.connect(secure(served, "localhost"), ca=str(authority.cert)) as state:
        assert state.url == secure(served, "localhost")
        assert state.initialize_session("everything").resumed
    with dspex_persist.open_audit(url, ca=authority.cert) as audit:
        assert audit.head() > 0


def test_programs_and_commands_take_the_authority_from_the_environment(
    served: ServedDatabase, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPEX_PERSIST_CA", str(authority.cert))
    with dspex_persist.Context("env", secure(served)) as ctx:
        ctx["x"] = 5
    command = (sys.executable, "-m", "dspex_persist", "get", "env", "x", "--target", secure(served))
    got = subprocess.run(command, capture_output=True, text=True, timeout=within(60), check=False)
    assert (got.stdout, got.stderr, got.returncode) == ("5\n", "", 0)
    assert url_of(secure(served)) == secure(served)


def test_each_refusal_says_what_to_do(served: ServedDatabase, authority: Authority) -> None:
    assert refusal(served.url).endswith("as one with TLS does; connect('grpcs://HOST:PORT')")
    untrusted = refusal(secure(served))
    assert "from no authority that is trusted here; trust the one that issued it: connect(url, ca=" in untrusted
    assert secure(served) in untrusted


def test_a_server_without_tls(tmp_path: Path, authority: Authority) -> None:
    with ServedDatabase(tmp_path / "a.db") as plain:
        assert "does not use TLS; connect('grpc://HOST:PORT')" in refusal(secure(plain), ca=authority.cert)


def test_a_certificate_for_another_host_and_one_that_expired(
    served: ServedDatabase, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    """The server reads the files of a certificate again when they change, without a restart."""
    kept = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    kept.replace(pair)
    with BridgedState(secure(served), ca=authority.cert) as before:
        before.initialize_session("before")
        pair.replace(authority.issue("elsewhere", "DNS:example.org"))
        assert "is for another host; connect to a name" in refusal(secure(served), ca=authority.cert)
        assert before.initialize_session("before").resumed, "connections that are open stay"
    other = Authority(tmp_path / "other", "other")
    pair.replace(other.issue("new"))
    with BridgedState(secure(served), ca=other.cert) as after:
        assert after.initialize_session("before").resumed
    pair.replace(authority.issue("expired", days=-1))
    with BridgedState(secure(served), ca=other.cert) as after:
        assert after.initialize_session("before").resumed, "an unusable file leaves the old certificate"
    pair.replace(kept)
    with BridgedState(secure(served), ca=authority.cert) as state:
        assert state.initialize_session("before").resumed


@pytest.mark.parametrize(
    ("dates", "told"),
    [
        ({"days": -1}, "has expired; compare its dates"),
        ({"begins": "20990101000000Z"}, "is not valid yet; compare its dates"),
    ],
    ids=["expired", "not yet valid"],
)
def test_a_client_refuses_a_certificate_by_its_dates(authority: Authority, dates: dict[str, Any], told: str) -> None:
    wrong = authority.issue("wrong-dates", **dates)
    credentials = grpc.ssl_server_credentials([(wrong.key.read_bytes(), wrong.cert.read_bytes())])
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        assert told in refusal(f"grpcs://127.0.0.1:{port}", ca=authority.cert)
        server.stop(None).wait()


def test_clients_show_certificates_to_a_server_that_demands_them(
    mutual: ServedDatabase, authority: Authority, client: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = authority.cert
    with BridgedState(secure(mutual), ca=ca, cert=client.cert, key=client.key) as state:
        state.initialize_session("s")
    assert "connect(url, cert='client.pem', key='client.key')" in refusal(secure(mutual), ca=ca)
    stranger = Authority(tmp_path / "other", "other").issue("stranger")
    assert "without a certificate that it trusts" in refusal(
        secure(mutual), ca=ca, cert=stranger.cert, key=stranger.key
    )
    for name, path in (("CA", ca), ("CERT", client.cert), ("KEY", client.key)):
        monkeypatch.setenv(f"DSPEX_PERSIST_{name}", str(path))
    with BridgedState(secure(mutual)) as state:
        assert state.initialize_session("s").resumed


@pytest.mark.parametrize("dates", [{"days": -1}, {"begins": "20990101000000Z"}], ids=["expired", "not yet valid"])
def test_a_server_refuses_a_certificate_of_a_client_by_its_dates(
    mutual: ServedDatabase, authority: Authority, dates: dict[str, Any]
) -> None:
    """Also one that does not look at its own certificate, as other clients do not."""
    wrong = authority.issue("wrong-client", "DNS:client", **dates)
    credentials = grpc.ssl_channel_credentials(
        authority.cert.read_bytes(), wrong.key.read_bytes(), wrong.cert.read_bytes()
    )
    with grpc.secure_channel(mutual.target, credentials) as channel:
        call: Any = channel.unary_unary("/snakepit.bridge.BridgeService/Ping")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=within(20))
    error: Any = refused.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"ca": "missing.pem"}, "ca", "missing.pem: cannot read it: No such file"),
        ({"ca": "text.pem"}, "ca", "text.pem: it has no certificate"),
        ({"ca": 5}, "ca", "must be the path of a file, not int"),
        ({"cert": "text.pem"}, "key", "go together"),
        ({"key": "text.pem"}, "cert", "go together"),
        ({"cert": "text.pem", "key": "text.pem"}, "cert", "it has no certificate"),
    ],
)
def test_wrong_files_of_a_client(
    options: dict[str, Any], field: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.pem").write_text("text")
    with pytest.raises(InvalidArgumentError, match=reason) as raised:
        dspex_persist.connect("grpcs://127.0.0.1:1", **options)
    assert raised.value.field == field
    with pytest.raises(InvalidArgumentError, match="has no TLS"):
        dspex_persist.connect("grpc://127.0.0.1:1", **options)


def test_the_url_of_a_server_with_tls_that_was_meant() -> None:
    for url in ("grpcs://127.0.0.1:5/", "https://127.0.0.1:5", "GRPCS:127.0.0.1:5"):
        with pytest.raises(InvalidArgumentError, match=r"did you mean grpcs://127\.0\.0\.1:5\?"):
            dspex_persist.connect(url)


@pytest.mark.parametrize(
    ("settings", "setting", "reason"),
    [
        ({"tls_cert": "CERT"}, "tls_cert", "give --tls-key, too"),
        ({"tls_key": "KEY"}, "tls_key", "give --tls-cert, too"),
        ({"client_ca": "CERT"}, "client_ca", "give --tls-cert and --tls-key, too"),
        (
            {"tls_cert": "CERT", "tls_key": "KEY", "listen": "unix:a.sock"},
            "tls_cert",
            "has no TLS: listen on HOST:PORT",
        ),
        ({"tls_cert": "missing", "tls_key": "KEY"}, "tls_cert", "missing: cannot read it"),
        ({"tls_cert": "CERT", "tls_key": "CERT"}, "tls_key", "has no private key"),
        ({"tls_cert": "CERT", "tls_key": "KEY", "client_ca": "missing"}, "client_ca", "missing: cannot read it"),
        ({"advertise": "nowhere"}, "advertise", "expected HOST:PORT"),
        ({"advertise": "10.0.0.7:0"}, "advertise", "names no port"),
        ({"worker_ca": "missing"}, "worker_ca", "missing: cannot read it"),
        ({"worker_cert": "CERT"}, "worker_cert", "go together: give both"),
        ({"worker_cert": "CERT", "worker_key": "CERT"}, "worker_key", "has no private key"),
    ],
)
def test_a_server_refuses_wrong_files_before_it_creates_anything(
    pair: Pair, settings: dict[str, str], setting: str, reason: str, tmp_path: Path
) -> None:
    names = {"CERT": str(pair.cert), "KEY": str(pair.key)}
    given: dict[str, Any] = {name: names.get(text, text) for name, text in settings.items()}
    with pytest.raises(SettingsError, match=reason) as raised:
        serve(Settings(db=tmp_path / "a.db", **given))
    assert raised.value.setting == setting
    assert not list(tmp_path.iterdir())


def test_a_server_with_tls_may_be_reached_from_other_machines(pair: Pair, tmp_path: Path, authority: Authority) -> None:
    serving = (sys.executable, "-m", "dspex_persist", "serve", "--db", str(tmp_path / "a.db"), "--listen", "0.0.0.0:0")
    with (
        ServerProcess.start((*serving, "--tls-cert", str(pair.cert), "--tls-key", str(pair.key))) as server,
        BridgedState(f"grpcs://127.0.0.1:{server.port}", ca=authority.cert) as state,
    ):
        assert not state.initialize_session("s").resumed
