"""`serve --metrics-listen`: what a real server serves, where it refuses to, and whether docs/metrics.md tells all."""

import re
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from dspex_persist.infra.tokens import add
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring import connect, serve
from tests.deadline import within

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "metrics.md"


def url_of(served: ServedDatabase) -> str:
    """Where a server says that its metrics are."""
    found = re.findall(r'"url": "(http\S+/metrics)"', served.process.stderr_tail)
    assert len(found) == 1, served.process.stderr_tail
    return str(found[0])


def get(url: str, **headers: str) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=within(30))
    except urllib.error.HTTPError as error:
        return error


def scrape(url: str) -> dict[str, Metric]:
    """What is served, by name; that of a counter ends in `_total`."""
    families = parse(get(url).read().decode())
    return {f"{each.name}_total" if each.type == "counter" else each.name: each for each in families}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    path = tmp_path_factory.mktemp("served") / "a.db"
    with ServedDatabase(path, {"metrics_listen": "127.0.0.1:0"}) as served:
        yield served


@pytest.fixture(scope="module")
def metrics(served: ServedDatabase) -> dict[str, Metric]:
    """What the server serves after every kind of traffic."""
    with connect(served.url) as state:
        state.initialize_session("s")
        state.register_variable("s", "n", "integer", 0)
        assert state.set_variable("s", "n", 1) == 1
    return scrape(url_of(served))


def test_what_is_served_is_what_is_documented(metrics: dict[str, Metric]) -> None:
    documented = {}
    for row in re.findall(
        r"^\| `([a-z_]+)` \| (\w+) \| (.*?) ?\| ", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
    ):
        name, kind, labels = row
        documented[name] = (kind, frozenset(re.findall(r"`(\w+)`", labels)))
    assert {name: (each.type, labels_of(each)) for name, each in metrics.items()} == documented


def labels_of(metric: Metric) -> frozenset[str]:
    return frozenset(label for sample in metric.samples for label in sample.labels if label != "le")


def test_calls_are_counted_by_rpc_and_status(served: ServedDatabase, metrics: dict[str, Metric]) -> None:
    def counted(name: str, method: str) -> dict[str, float]:
        samples = scrape(url_of(served))[name].samples
        of_method = [sample for sample in samples if sample.labels["grpc_method"] == method]
        return {sample.labels.get("grpc_code", ""): sample.value for sample in of_method}

    before = counted("grpc_server_handled_total", "GetVariable")
    with connect(served.url) as state:
        state.get_variable("s", "n")
        with pytest.raises(Exception, match="nobody"):
            state.get_variable("nobody", "n")
    after = counted("grpc_server_handled_total", "GetVariable")
    assert after["OK"] == before.get("OK", 0) + 1
    assert after["NotFound"] == before.get("NotFound", 0) + 1
    assert counted("grpc_server_started_total", "GetVariable") == {"": sum(after.values())}
    assert counted("grpc_server_msg_sent_total", "GetVariable") == {"": after["OK"]}


def test_a_signal_ends_it_with_the_server(tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "a.db", {"metrics_listen": "127.0.0.1:0"}) as served:
        url = url_of(served)
        with ServedDatabase(tmp_path / "b.db", {"metrics_listen": "127.0.0.1:0"}) as another:
            assert url_of(another) != url
            assert get(url_of(another)).status == 200
        assert get(url.replace("/metrics", "/healthz")).status == 200
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(within(30)) == 0
    with pytest.raises(urllib.error.URLError):
        get(url)


def test_a_server_with_tokens_shows_them_to_who_may_read(tmp_path: Path) -> None:
    reader, writer = (add(tmp_path / "tokens", name, [name]) for name in ("read", "write"))
    with ServedDatabase(tmp_path / "a.db", {"metrics_listen": "127.0.0.1:0", "token_file": "tokens"}) as served:
        url = url_of(served)
        assert [get(url, Authorization=f"Bearer {token}").status for token in (reader, writer, "")] == [200, 401, 401]
        assert get(url).status == 401


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("0.0.0.0:0", "can be reached from other machines"),
        ("unix:/tmp/metrics", "is a Unix socket"),
        ("9464", "is invalid"),
        ("127.0.0.1:99999", "is invalid"),
    ],
)
def test_addresses_are_refused_as_those_of_the_server_are(listen: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=reason) as raised:
        serve(Settings(db=tmp_path / "a.db", metrics_listen=listen))
    assert raised.value.setting == "metrics_listen"
    assert not (tmp_path / "a.db").exists()


def test_without_the_extra_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "prometheus_client"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "dspex_persist.infra.exposition", raising=False)
    with pytest.raises(SettingsError, match=r"pip install 'dspex-persist\[metrics\]'"):
        serve(Settings(db=tmp_path / "a.db", metrics_listen="127.0.0.1:0"))


def test_a_server_without_metrics_does_not_need_it(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('not wanted')")
    with ServedDatabase(tmp_path / "a.db", import_from=tmp_path) as served, connect(served.url) as state:
        assert state.initialize_session("s").resumed is False
