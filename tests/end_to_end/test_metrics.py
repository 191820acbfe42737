"""`serve --metrics-listen`: what a real server serves, where it refuses to, and whether docs/metrics.md tells all."""

import json
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import grpc
import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from dspex_persist.extras import how_to_install
from dspex_persist.infra.access.tokens import add
from dspex_persist.infra.process import ServerProcess
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import GetVariable, SetVariable
from dspex_persist.state.embedded import SqliteState
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionConflictError,
    IdempotencyConflictError,
    PermissionDeniedError,
    SessionNotFoundError,
)
from dspex_persist.state.model import ExecutionStatus
from dspex_persist.state.values import encode
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring import bridge
from dspex_persist.wiring.bridge import _unfit
from dspex_persist.wiring.connecting import connect
from dspex_persist.wiring.serving import serve
from tests.deadline import within
from tests.end_to_end.metered_tools import MODEL
from tests.engines import remove_keys

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = ROOT / "docs" / "metrics.md"
SHARED: Final = "### Servers that share a log"
GRAFANA: Final = ROOT / "docs" / "grafana"
ALERTS: Final = yaml.safe_load((GRAFANA / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
OF_PROMETHEUS: Final = frozenset({"job", "instance", "le"})
"""Labels that Prometheus adds, and that of buckets."""
NOT_SHOWN: Final = {"dspex_persist_last_commit"}
"""Of our metrics, those that neither the dashboard nor an alert shows."""
OF_METRIC: Final = {
    "dspex_persist_pool_call_failures_total": {"reason": {"saturated", "queue_timeout"}},
    "dspex_persist_pool_worker_ends_total": {"reason": {"crashed"}},
    "dspex_persist_lease_renewals_total": {"outcome": {"ok", "failed"}},
    "dspex_persist_lm_calls_total": {"outcome": {"ok", "error", "cached"}},
}
"""Values of labels that mean something else with another metric."""
BRIDGE: Final = "snakepit.bridge.BridgeService"


def url_of(process: ServerProcess) -> str:
    """Where a server says that its metrics are."""
    found = re.findall(r'"url": "(http\S+/metrics)"', process.stderr_tail)
    assert len(found) == 1, process.stderr_tail
    return str(found[0])


def get(url: str, **headers: str) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=within(30))
    except urllib.error.HTTPError as error:
        return error


def scraped(url: str, **headers: str) -> dict[str, Metric]:
    families = parse(get(url, **headers).read().decode())
    return {f"{each.name}_total" if each.type == "counter" else each.name: each for each in families}


def value_in(metrics: dict[str, Metric], name: str, **labels: str) -> float:
    """The value of a sample; 0 if there is none."""
    samples = metrics[name.removesuffix("_count").removesuffix("_sum")].samples
    return next((each.value for each in samples if each.name == name and each.labels == labels), 0.0)


class Served(ServedDatabase):
    """A server with tokens, a worker and metrics."""

    def __init__(self, folder: Path) -> None:
        self.tokens = {scope: add(folder / "tokens", scope, [scope]) for scope in ("read", "admin")}
        settings = {
            "metrics_listen": "127.0.0.1:0",
            "token_file": "tokens",
            "tools": "tests.end_to_end.metered_tools",
            "workers": 1,
        }
        super().__init__(folder / "a.db", settings, import_from=ROOT)

    def scrape(self) -> dict[str, Metric]:
        """What is served, by name; that of a counter ends in `_total`."""
        return scraped(url_of(self.process), Authorization=f"Bearer {self.tokens['read']}")

    def value(self, name: str, **labels: str) -> float:
        """The value of a sample; 0 if there is none."""
        return value_in(self.scrape(), name, **labels)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="module")
def state(served: Served) -> Iterator[BridgedState]:
    with BridgedState(served.url, token=served.tokens["admin"], timeout_s=within(30)) as state:
        state.initialize_session("s")
        state.register_variable("s", "n", "integer", 0)
        yield state


@pytest.fixture(scope="module")
def metrics(served: Served, state: BridgedState) -> dict[str, Metric]:
    """What the server serves after every kind of traffic."""
    for _ in range(2):
        assert state.set_variable("s", "n", 1, idempotency_key="once") == 1
    with pytest.raises(IdempotencyConflictError):
        state.set_variable("s", "n", 2, idempotency_key="once")
    with connect(served.url, token=served.tokens["read"]) as reader, pytest.raises(PermissionDeniedError):
        reader.set_variable("s", "n", 3)
    for name, is_fine in (("ask_twice", True), ("fail", False), ("nothing", False)):
        assert state.execute_tool("s", name).success is is_fine
    transaction = state.begin_transaction("s")
    assert transaction.run(GetVariable("s", "n")).version == 1
    state.set_variable("s", "n", 4)
    transaction.run(SetVariable("s", "n", encode(5)))
    with pytest.raises(ExecutionConflictError):
        transaction.commit()
    return served.scrape()


@pytest.fixture(scope="module")
def sharing(valkey: str) -> Iterator[dict[str, Metric]]:
    """What one of two servers serves that share a database, and have both written."""
    prefix = f"t{uuid.uuid4().hex}"
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--metrics-listen", "127.0.0.1:0"]
    argv += ["--db", f"redis+{valkey}?prefix={prefix}", "--listen", "127.0.0.1:0"]
    with ServerProcess.start(argv) as one, ServerProcess.start(argv) as other:
        for server, writes in ((one, 3), (other, 2)):
            with connect(f"grpc://127.0.0.1:{server.port}") as state:
                state.initialize_session(f"of {server.port}")
                state.register_variable(f"of {server.port}", "n", "integer", 0)
                for number in range(writes):
                    state.set_variable(f"of {server.port}", "n", number)
        until(lambda: value_in(scraped(url_of(one)), "dspex_persist_foreign_commits_total") == 4)
        assert value_in(scraped(url_of(one)), "dspex_persist_commit_seconds_count") >= 5
        yield scraped(url_of(one))
    remove_keys(valkey, prefix)


# --- What the dashboard and the alert rules ask for ---


def expressions() -> Iterator[tuple[str, str]]:
    """Each expression of the dashboard and of the alert rules, with what it is shown or named by."""
    board = json.loads((GRAFANA / "dspex-persist.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"], target["legendFormat"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"], ""
    for annotation in board["annotations"]["list"]:
        yield annotation.get("expr", ""), annotation.get("textFormat", "")
    for rule in ALERTS:
        yield rule["expr"], " ".join(rule["annotations"].values())


class Asked:
    """What an expression asks for: metrics, with the labels and values that select them; and labels to group by."""

    def __init__(self, expression: str) -> None:
        self.selectors: list[tuple[str, dict[str, str]]] = []
        self.grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")}
        rest = re.sub(r"\b(?:by|on) \([^)]*\)|\b(?:and|or|unless)\b|\[[^\]]*\]|label_values\(", " ", expression)
        for name, labels in re.findall(r"\b([a-z][a-z_0-9]*)\b(?!\s*\()(?:\{([^}]*)\})?", rest):
            matchers = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', labels)
            self.selectors.append((name, dict(matchers)))


def test_the_dashboard_and_the_alerts_ask_for_what_is_served(
    metrics: dict[str, Metric], sharing: dict[str, Metric]
) -> None:
    samples: dict[str, list[dict[str, str]]] = {"up": [{}]}
    for metric in (*metrics.values(), *sharing.values()):
        for sample in metric.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    asked_for = set()
    for expression, legend in expressions():
        asked = Asked(expression)
        known: set[str] = set(OF_PROMETHEUS)
        for name, selected in asked.selectors:
            if name in ("job", "instance"):
                continue
            assert name in samples, f"{name} is not served: {expression}"
            asked_for.add(name)
            labels = {label for each in samples[name] for label in each}
            known |= labels
            assert selected.keys() <= labels | OF_PROMETHEUS, expression
        shown = set(re.findall(r"\{\{ ?(?:\$labels\.)?([a-z_]+) ?\}\}", legend))
        assert asked.grouped | shown <= known, expression
        if asked.grouped and shown:
            assert shown <= asked.grouped, f"{shown} is not in the answer: {expression}"
    ours = {name for name in samples if name.startswith("dspex_persist_") and not name.endswith("_created")}
    unused = {each.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for each in ours - asked_for}
    used = {each.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for each in asked_for}
    assert unused - used == NOT_SHOWN


def test_what_is_selected_is_what_is_counted() -> None:
    """A value that is misspelled in a selector would select nothing, without an error."""
    codes = {code.name.title().replace("_", "") for code in grpc.StatusCode} - {"Ok", "Cancelled"} | {"OK", "Canceled"}
    values = {
        "grpc_code": codes,
        "grpc_type": {"unary", ".*_stream"},
        "grpc_method": {"WatchVariables"},
        "status": {status.value for status in ExecutionStatus},
        "state": {"idle", "busy", "starting"},
        "error": {"StorageError", "DamagedSessionError"},
        "job": {"$job", "dspex-persist"},
        "instance": {"$instance"},
    }
    for expression, _ in expressions():
        for name, selected in Asked(expression).selectors:
            for label, text in selected.items():
                known = values[label] if label in values else OF_METRIC[name][label]
                assert set(text.split("|")) <= known, expression


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads((GRAFANA / "dspex-persist.json").read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Overview",
        "Traffic",
        "Writes",
        "Servers that share a database",
        "Executions",
        "Workers",
        "Watches",
        "Language models",
        "Refusals",
    ]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, f"{panel['title']} covers another panel"
        assert all(x < 24 for x, _ in own)
        cells |= own
        if panel["type"] != "row":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source["uid"] == "${datasource}" for source in sources)
    first = board["templating"]["list"][0]
    assert (first["name"], first["type"]) == ("datasource", "datasource")


def test_an_alert_says_what_is_wrong_and_how_bad_it_is() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        # A comparison: without one, it would always fire.
        assert re.search(r" (==|<|>) [0-9.e]+$", rule["expr"]), rule["alert"]


# --- What is counted ---


def until(condition: Callable[[], bool]) -> None:
    """Poll for what no event tells."""
    deadline = time.monotonic() + within(30)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_served_is_what_is_documented(metrics: dict[str, Metric]) -> None:
    documented = documented_in(DOCUMENT.read_text(encoding="utf-8").partition(SHARED)[0])
    assert {name: (each.type, labels_of(each)) for name, each in metrics.items()} == documented


def test_what_servers_that_share_a_log_serve_is_documented(sharing: dict[str, Metric]) -> None:
    documented = documented_in(DOCUMENT.read_text(encoding="utf-8"))
    served = {name: (each.type, labels_of(each)) for name, each in sharing.items()}
    # Labels of what has not happened, such as a call, are missing.
    assert {name: kind for name, (kind, _) in served.items()}.items() <= {
        name: kind for name, (kind, _) in documented.items()
    }.items()
    of_them = documented_in(DOCUMENT.read_text(encoding="utf-8").partition(SHARED)[2])
    assert {name: served[name] for name in of_them} == of_them


def documented_in(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \| (.*?) ?\| ", text, re.MULTILINE)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def labels_of(metric: Metric) -> frozenset[str]:
    return frozenset(label for sample in metric.samples for label in sample.labels if label != "le")


def test_a_server_counts_its_own_commits_and_those_of_others_apart(sharing: dict[str, Metric]) -> None:
    last, own, foreign = (
        value_in(sharing, f"dspex_persist_{name}") for name in ("last_commit", "commits_total", "foreign_commits_total")
    )
    assert own > 0 < foreign
    assert own + foreign == last


def test_calls_are_counted_by_rpc_and_status(served: Served, metrics: object, state: BridgedState) -> None:
    of_rpc = {"grpc_type": "unary", "grpc_service": BRIDGE, "grpc_method": "GetVariable"}

    def counted() -> dict[str, float]:
        codes = {
            code: served.value("grpc_server_handled_total", **of_rpc, grpc_code=code) for code in ("OK", "NotFound")
        }
        names = ("started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count")
        return codes | {name: served.value(f"grpc_server_{name}", **of_rpc) for name in names}

    before = counted()
    state.get_variable("s", "n")
    with pytest.raises(SessionNotFoundError):
        state.get_variable("nobody", "n")
    grown = {name: value - before[name] for name, value in counted().items()}
    assert grown == {
        "OK": 1,
        "NotFound": 1,
        "started_total": 2,
        "msg_received_total": 2,
        "msg_sent_total": 1,
        "handling_seconds_count": 2,
    }


def test_streams_are_counted_by_their_messages_and_ends(served: Served, metrics: object, state: BridgedState) -> None:
    of_rpc = {"grpc_type": "server_stream", "grpc_service": BRIDGE, "grpc_method": "WatchVariables"}
    with state.watch("s") as watch:
        assert served.value("dspex_persist_watches") == 1
        before = served.value("grpc_server_msg_sent_total", **of_rpc)
        state.set_variable("s", "n", 7)
        assert [update.version.value.json for update in watch.next(within(30)) if update.version] == ["7"]
        assert served.value("grpc_server_msg_sent_total", **of_rpc) == before + 1
    until(lambda: served.value("grpc_server_handled_total", **of_rpc, grpc_code="Canceled") == 1)
    until(lambda: served.value("dspex_persist_watches") == 0)


def test_what_was_done_is_counted(served: Served, metrics: object, state: BridgedState) -> None:
    prefix = "dspex_persist_"
    for name, labels, value in (
        ("idempotent_replays_total", {"kind": "write"}, 1),
        ("conflicts_total", {"kind": "idempotency_key"}, 1),
        ("conflicts_total", {"kind": "transaction"}, 1),
        ("transactions_total", {"status": "conflict"}, 1),
        ("write_errors_total", {"error": "IdempotencyConflictError"}, 1),
        ("denials_total", {"reason": "scope write"}, 1),
        ("executions_total", {"tool": "ask_twice", "status": "committed"}, 1),
        ("executions_total", {"tool": "ask", "status": "committed"}, 2),
        ("executions_total", {"tool": "fail", "status": "failed"}, 1),
        ("execution_seconds_count", {"tool": "ask"}, 2),
        ("execution_refusals_total", {"reason": "ToolNotFoundError"}, 1),
        ("lm_calls_total", {"model": MODEL, "tool": "ask", "outcome": "ok"}, 1),
        ("lm_calls_total", {"model": MODEL, "tool": "ask", "outcome": "cached"}, 1),
        ("lm_tokens_total", {"model": MODEL, "tool": "ask", "kind": "input"}, 100),
        ("lm_tokens_total", {"model": MODEL, "tool": "ask", "kind": "output"}, 20),
        ("lm_cost_usd_total", {"model": MODEL, "tool": "ask"}, 0.25),
        ("lm_call_seconds_sum", {"model": MODEL}, 1.5),
        ("pool_workers", {"pool": "tools", "state": "idle"}, 1),
        ("pool_worker_starts_total", {"pool": "tools"}, 1),
        ("live_sessions", {}, 1),
        ("cache_sessions", {}, 1),
        ("scrape_errors_total", {}, 0),
    ):
        assert served.value(f"{prefix}{name}", **labels) == value, (name, labels)
    assert served.value(f"{prefix}commits_total") == served.value(f"{prefix}last_commit")
    # Not less: the journal of executions is written, too.
    assert served.value(f"{prefix}group_writes_sum") >= served.value(f"{prefix}commits_total")
    assert served.value(f"{prefix}commit_seconds_count") > 0
    assert served.value(f"{prefix}cache_hits_total") > served.value(f"{prefix}cache_misses_total") > 0
    assert served.value(f"{prefix}database_bytes") > 0


def test_an_open_transaction_shows(served: Served, metrics: object, state: BridgedState) -> None:
    with state.begin_transaction("s"):
        assert served.value("dspex_persist_transactions_open") == 1
        assert served.value("dspex_persist_executions_running") == 0
    assert served.value("dspex_persist_transactions_open") == 0


def test_a_signal_ends_it_with_the_server(tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "a.db", {"metrics_listen": "127.0.0.1:0"}) as served:
        url = url_of(served.process)
        with ServedDatabase(tmp_path / "b.db", {"metrics_listen": "127.0.0.1:0"}) as another:
            assert url_of(another.process) != url
            assert get(url_of(another.process)).status == 200
        assert get(url.replace("/metrics", "/healthz")).status == 200
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(within(30)) == 0
    with pytest.raises(urllib.error.URLError):
        get(url)


def test_a_server_with_tokens_shows_them_to_who_may_read(served: Served, tmp_path: Path) -> None:
    url, file = url_of(served.process), served.path.parent / "tokens"
    writer, late = add(file, "write", ["write"]), add(file, "late", ["read"], {"expires": "2100-01-01"})
    file.write_text(file.read_text().replace("=2100-01-01T00:00:00Z", "=2026-01-01"))
    for token, status in ((served.tokens["read"], 200), (served.tokens["admin"], 200), (writer, 401), (late, 401)):
        assert get(url, Authorization=f"Bearer {token}").status == status
    before = served.value("dspex_persist_denials_total", reason="credentials")
    assert [get(url).status, get(url, Authorization="Basic eA==").status] == [401, 401]
    assert served.value("dspex_persist_denials_total", reason="credentials") == before + 2
    assert get(url.replace("/metrics", "/healthz")).status == 200


def test_health_says_why_a_server_cannot_do_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end: Any = SimpleNamespace(stop=threading.Event())
    engine, ready = SqliteState(tmp_path / "a.db"), threading.Event()
    said = [_unfit(end, engine, ready)]
    ready.set()
    said.append(_unfit(end, engine, ready))
    monkeypatch.setattr(bridge, "_STUCK_S", -1)
    said.append(_unfit(end, engine, ready).partition(" for ")[0])
    engine.close()
    said.append(_unfit(end, engine, ready))
    end.stop.set()
    said.append(_unfit(end, engine, ready))
    assert said == [
        "starting",
        "",
        "stuck: the writer has made no progress",
        str(EngineClosedError()),
        "draining",
    ]


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("0.0.0.0:0", "can be reached from other machines"),
        ("unix:/tmp/metrics", "is a Unix socket"),
        ("127.0.0.1:50051", "is the address of the server itself"),
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
    with pytest.raises(SettingsError, match=re.escape(how_to_install("metrics"))):
        serve(Settings(db=tmp_path / "a.db", metrics_listen="127.0.0.1:0"))


def test_a_server_without_metrics_does_not_need_it(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('not wanted')")
    with ServedDatabase(tmp_path / "a.db", import_from=tmp_path) as served, connect(served.url) as state:
        assert state.initialize_session("s").resumed is False
