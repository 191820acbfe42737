"""dspex-persist audit report and web: what they show, what they keep back, and how they look in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

import dspex_persist
from dspex_persist import cli
from dspex_persist.audit import ExecutionQuery, HistoryQuery
from dspex_persist.audit.report import Bounds, gather, render
from dspex_persist.extras import how_to_install
from dspex_persist.state.model import PrunePolicy
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.end_to_end import story
from tests.end_to_end.old_style import environment
from tests.other_users import as_user
from tests.prepared import commands

SESSION = story.SESSION
FAILED, USAGE, UNUSABLE, NO_ADDRESS = 1, 2, 5, 75
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDE, NARROW = 1280, 390

needs_datasette = pytest.mark.skipif(find_spec("datasette") is None, reason="needs dspex-persist[web]")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dspex_persist", "audit", *map(str, arguments)]


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `dspex-persist audit ...` in another process."""
    return commands().run(["audit", *map(str, arguments)], cwd=cwd, env=environment(), timeout_s=within(60))


class Shell:
    """Runs `dspex-persist audit ...` within this process, which saves the start of another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
        """Return the exit code, stdout and stderr."""
        self._monkeypatch.chdir(cwd)
        self._monkeypatch.setattr(sys, "argv", ["dspex-persist", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert isinstance(code, int)
        return code, *self._capsys.readouterr()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "with ? and #.db"
    story.tell(path)
    return path


@pytest.fixture(scope="module")
def report(path: Path) -> Path:
    done = run("report", SESSION, "--db", path, "-o", "report.html", cwd=path.parent)
    assert (done.returncode, done.stderr) == (0, ""), done
    return path.parent / "report.html"


# The report's HTML


class Elements(HTMLParser):
    """The elements of a page, which have to be closed in order; and its text."""

    VOID = frozenset({"meta", "br", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def elements(report: Path) -> Elements:
    return Elements(report.read_text(encoding="utf-8"))


def assert_needs_nothing_else(elements: Elements, page: str) -> None:
    assert not {tag for tag, _ in elements.found} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for tag, attributes in elements.found:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "srcset")}, tag
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.findall(r"@import|url\(", page)
    (policy,) = [each for each in elements.named("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy["content"]).startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_a_report_needs_nothing_else_and_runs_nothing(elements: Elements, report: Path) -> None:
    assert_needs_nothing_else(elements, report.read_text(encoding="utf-8"))


def test_a_report_leads_to_places_that_it_has(elements: Elements) -> None:
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(each["href"])[1:] for each in elements.named("a")} <= set(ids)


def test_a_report_tells_the_story(elements: Elements, path: Path) -> None:
    text = " ".join(elements.text.split())
    for part in (
        f"{SESSION} Executions",
        "15 committed",
        "2 failed",
        "1 conflict",
        "TimeoutError: the judge did not answer",
        "steps (was at version 7, is at version 8)",
        "tidied after",
        "rolled back",
        "team = support",
        "request = r-0",
        "Traceback (most recent call last)",
    ):
        assert part in text, part
    with dspex_persist.open_audit(path) as audit:
        for execution in audit.iterate(ExecutionQuery(session=SESSION)):
            assert execution.execution_id in text
    assert story.OTHER_SESSION not in text


def most_changed(path: Path) -> list[str]:
    """The variables with numbers, those that changed most often first."""
    with dspex_persist.open_audit(path) as audit:
        names = ("progress", "score", "steps", "temperature")
        changes = {name: len(list(audit.iterate(HistoryQuery(session=SESSION, variable=name)))) for name in names}
    return sorted(changes, key=lambda name: (-changes[name], name))


def test_a_report_has_pictures_with_words(elements: Elements, path: Path) -> None:
    labels = [str(each.get("aria-label")) for each in elements.named("svg")]
    assert labels == [
        "Executions by time",
        *(f"{name}, version by version" for name in most_changed(path)),
        "Which values were derived from which",
    ]
    assert len(elements.named("title")) > 60, "each bar, mark and box says what it is"
    assert "Classify the ticket" in elements.text
    assert [each for each in elements.named("html") if each.get("lang") == "en"]


def test_values_are_shown_as_text(elements: Elements) -> None:
    assert story.HOSTILE in elements.text


def test_a_report_masks_sensitive_values(report: Path, path: Path, shell: Shell) -> None:
    assert story.SECRET not in report.read_text(encoding="utf-8")
    code, revealed, _ = shell.run("report", SESSION, "--db", path, "-o", "-", "--reveal", cwd=path.parent)
    assert code == 0
    assert f"{story.SECRET}-2" in revealed
    assert "sensitive variables are shown" in revealed


def test_a_report_shows_what_models_were_asked(elements: Elements, path: Path) -> None:
    text = " ".join(elements.text.split())
    assert "evaluateopenai/gpt-4o-mini8111,23372$0.000221" in text.replace(" ", "")
    assert "openai/gpt-4o-mini judge.predict 180 tokens in, 12 out, $0.0000272, 640 ms" in text
    assert f"{story.TICKETS[0]} {story.HOSTILE} key: •••" in text
    assert "dspy.utils.exceptions.LMTimeoutError: the model did not answer within 30 s" in text
    with dspex_persist.open_audit(path) as audit:
        shown = gather(audit, SESSION, bounds=Bounds(lm_calls=3))
    assert sum(map(len, shown.lm_calls.values())) == 3
    assert "3 of 8 LM calls are shown in full: the newest" in shown.left_out


def test_a_report_is_for_its_owners_eyes(report: Path) -> None:
    assert report.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in report.parent.glob(".report*")] == []


def test_a_large_session_is_cut_and_says_so(path: Path) -> None:
    bounds = Bounds(executions=3, versions=20, versions_of_one=2, variables=4, charts=1, in_lineage=1)
    with dspex_persist.open_audit(path) as audit:
        shown = gather(audit, SESSION, bounds=bounds)
    elements = Elements(render(shown))
    assert (len(shown.variables), len(shown.charts)) == (4, 1)
    assert len([one for one in shown.executions if one.summary.parent_id is None]) == 3
    assert len(shown.left_out) == 5
    assert [row.name for row in shown.charts] == most_changed(path)[:1]
    assert all(sentence in elements.text for sentence in shown.left_out)


def test_a_report_of_a_part(path: Path) -> None:
    with dspex_persist.open_audit(path) as audit:
        first = next(audit.iterate(ExecutionQuery(session=SESSION, newest_first=False)))
        shown = gather(audit, SESSION, since=f"{first.execution_id}^", until=first.execution_id)
        before = {state.name: state.version for state in audit.state(SESSION, f"{first.execution_id}^")}
    changed = {row.name: row for row in shown.variables if row.change}
    assert set(changed) == {"score", "temperature", "steps"}, "progress was published before it"
    assert all(row.first is not None and row.first.version == before[name] for name, row in changed.items())


def test_a_report_of_an_ended_session_with_a_strange_name(tmp_path: Path) -> None:
    name = "*<b>&\"'é\N{GRINNING FACE}"
    with dspex_persist.connect(tmp_path / "ended.db") as state:
        for session, end in ((name, True), ("*other", False)):
            context = dspex_persist.Context(session, state)
            context.define("x" if end else "elsewhere", 1)
            if end:
                context.end()
    with dspex_persist.open_audit(tmp_path / "ended.db") as audit:
        shown = gather(audit, name)
    assert [row.name for row in shown.variables] == ["x"]
    elements = Elements(render(shown))
    assert name in elements.text
    assert "elsewhere" not in elements.text
    assert not elements.named("b")


def test_a_report_shows_controls_as_text(tmp_path: Path) -> None:
    """HTML does not allow them; a terminal obeys some of them, and others reverse the text next to them."""
    name, value = "\u202edetrever", "a\x1b[31mred\x00\x9b\r\n\tb"
    with dspex_persist.connect(tmp_path / "controls.db") as state:
        context = dspex_persist.Context(name, state)
        context.define("x", value, metadata={"why": "\x1b]0;title\x07"})
    with dspex_persist.open_audit(tmp_path / "controls.db") as audit:
        page = render(gather(audit, name))
    assert not {each for each in page if not each.isprintable()} - {"\n", "\t", "\N{NO-BREAK SPACE}"}
    text = Elements(page).text
    assert r"\u202edetrever" in text
    assert r"a\x1b[31mred\x00\x9b\r" in text


def test_a_report_of_an_empty_session(tmp_path: Path) -> None:
    with dspex_persist.connect(tmp_path / "empty.db") as state:
        state.initialize_session("empty")
    with dspex_persist.open_audit(tmp_path / "empty.db") as audit:
        text = Elements(render(gather(audit, "empty"))).text
    assert "No tool was executed." in text


def test_a_report_of_a_pruned_history(tmp_path: Path) -> None:
    story.tell(tmp_path / "pruned.db")
    with dspex_persist.connect(tmp_path / "pruned.db") as state:
        state.prune(PrunePolicy(keep_versions=2), confirm=True)
    with dspex_persist.open_audit(tmp_path / "pruned.db") as audit:
        shown = gather(audit, SESSION)
        part = gather(audit, SESSION, since="20")
    assert "was pruned" in " ".join(part.left_out)
    assert "Lineage" in Elements(render(shown)).text
    assert max(len(row.versions) for row in shown.variables) == 2
    assert shown.lineage is not None
    assert {node.entry.name for node in shown.lineage.nodes if node.is_current and node.entry} >= {"score", "notes"}


def test_large_values_are_cut(tmp_path: Path) -> None:
    with dspex_persist.connect(tmp_path / "large.db") as state:
        context = dspex_persist.Context("large", state)
        context.define("text", "word " * 100_000)
        context["text"] = "other words " * 50_000
    with dspex_persist.open_audit(tmp_path / "large.db") as audit:
        page = render(gather(audit, "large"))
    assert "more characters" in page
    assert len(page) < 100_000


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["no-such", "--db", "{db}"], FAILED, "no session 'no-such' in the history"),
        ([SESSION, "--db", "{db}", "--since", "soon"], USAGE, "'soon' is not a point in the history"),
        ([SESSION, "--db", "{db}", "--since", "now"], USAGE, "has no commits after it"),
        ([SESSION, "--db", "no-such.db"], UNUSABLE, "no-such.db"),
        ([SESSION, "--db", "{db}", "-o", "no/such/folder.html"], USAGE, "No such file or directory"),
    ],
)
def test_a_report_that_cannot_be_made_fails_with_one_sentence(
    arguments: list[str], code: int, sentence: str, path: Path, shell: Shell
) -> None:
    filled = [each.replace("{db}", str(path)) for each in arguments]
    actual, output, errors = shell.run("report", *filled, cwd=path.parent)
    assert (actual, output) == (code, "")
    assert sentence in errors


# The website


@contextmanager
def website(path: Path, *arguments: str, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """Yield the website's address. At the end, a signal ends it, and it must exit with 0 and without output."""
    popen = subprocess.Popen(
        command("web", "--db", path, *arguments),
        cwd=path.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert popen.stdout is not None
        address = popen.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), popen.communicate()
        yield address
        popen.send_signal(end)
        rest, errors = popen.communicate(timeout=within(30))
        assert (popen.returncode, rest, errors) == (0, "", "")
    finally:
        popen.kill()
        popen.communicate()


def get(address: str, path: str, host: str | None = None, data: bytes | None = None, **parts: str) -> tuple[int, str]:
    """Return a page's status and text; with `data`, post that instead."""
    request = urllib.request.Request(f"{address}{path}?{urlencode(parts)}", data, {"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=within(30)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[ServedDatabase]:
    """A server that has the file open, and writes to it."""
    with ServedDatabase(path) as server:
        yield server


@pytest.fixture(scope="module")
def site(path: Path, served: ServedDatabase) -> Iterator[str]:
    with website(path) as address:
        yield address


@needs_datasette
def test_the_site_shows_the_newest_commit_of_a_running_server(site: str, served: ServedDatabase) -> None:
    with dspex_persist.connect(f"grpc://{served.target}") as state:
        state.initialize_session("live")
        state.register_variable("live", "fresh", "integer", 41)
        state.set_variable("live", "fresh", 42, reason="the answer")
    assert ">live<" in get(site, "")[1]
    assert "fresh" in get(site, "session", id="live")[1]
    status, text = get(site, "history/v_variable_history.json", _shape="array", name="fresh")
    assert (status, [row["number"] for row in json.loads(text)]) == (200, [42, 41])
    status, text = get(site, "history/v_commits.json", _shape="array", session_id="live")
    assert (status, [row["reason"] for row in json.loads(text)]) == (200, ["the answer", None, None])
    assert "the answer" in get(site, "history/v_commits", session_id="live")[1]


@needs_datasette
@pytest.mark.parametrize(
    "page",
    [
        "history/versions",
        "history/versions.json",
        "history/VERSIONS.json",
        "history/versions/1,0",
        "history/blobs",
        "history/sqlite_schema",
        "history.db",
        "_internal",
    ],
)
def test_tables_with_sensitive_values_are_not_shown(page: str, site: str) -> None:
    status, text = get(site, page)
    assert status in (403, 404)
    assert story.SECRET not in text


@needs_datasette
def test_users_cannot_run_their_own_sql(site: str) -> None:
    through = json.dumps({"table": "versions", "column": "version", "value": "1"})
    for page, parts in (
        ("history", {"sql": "select value from versions"}),
        ("history.json", {"sql": "select 1"}),
        ("history/v_commits", {"_where": "1 = 1"}),
        ("history/v_commits.json", {"_through": through}),
    ):
        status, text = get(site, page, **parts)
        assert status in (400, 403), page
        assert story.SECRET not in text


@needs_datasette
def test_views_have_words_facets_and_links(site: str) -> None:
    status, text = get(site, "history/v_variable_history", session_id=SESSION, name="api_key")
    assert status == 200
    assert story.SECRET not in text
    assert "the value of a sensitive variable" in text
    assert f'href="/variable?session={SESSION}&amp;name=api_key"' in text
    status, text = get(site, "history/v_executions")
    assert status == 200
    for facet in ("session_id", "tool", "status", "actor"):
        assert f'data-column="{facet}"' in text or f"_facet={facet}" in text or f">{facet}<" in text
    assert "/execution?id=exec_" in text
    assert "The journal: which tools ran, with which arguments, and how they ended." in text


@needs_datasette
def test_every_question_is_answered(site: str, path: Path) -> None:
    with dspex_persist.open_audit(path) as audit:
        newest = next(audit.iterate(ExecutionQuery(session=SESSION)))
    parts = {"session": SESSION, "variable": "score", "execution": newest.execution_id, "time": "2100"}
    home = get(site, "")[1]
    questions = re.findall(r'href="/(history/[a-z]\w+)"', home)
    assert len(questions) > 10
    for question in questions:
        status, text = get(site, f"{question}.json", _shape="array", **({} if "/v_" in question else parts))
        assert status == 200
        assert json.loads(text), question


@needs_datasette
def test_a_page_about_something_missing_says_so(site: str) -> None:
    for page, parts, sentence in (
        ("session", {"id": "missing<i>"}, "no session"),
        ("session", {}, "no session"),
        ("variable", {"session": SESSION, "name": "temperatur"}, "did you mean"),
        ("execution", {"id": "exec_1_none"}, "no execution"),
    ):
        status, text = get(site, page, **parts)
        assert status == 404
        assert sentence in text
        assert "<i>" not in text


@needs_datasette
@pytest.mark.parametrize(
    ("page", "parts"),
    [
        ("history/v_variable_history", {"_next": "xx"}),
        ("history/v_variable_history", {"_timelimit": "x"}),
        ("history/v_variable_history", {"_through": "{"}),
        ("history/v_variable_history", {"_size": "many"}),
        ("history/v_variable_history.json", {"_next": "xx"}),
    ],
)
def test_a_wrong_address_of_a_table_is_a_mistake_of_the_client(site: str, page: str, parts: dict[str, str]) -> None:
    status, text = get(site, page, **parts)
    assert status == 400
    assert "Traceback" not in text


@needs_datasette
def test_wrong_requests_are_not_failures_of_the_site(site: str, path: Path) -> None:
    status, text = get(site, "history/v_variable_history", _sort="nonsense")
    assert (status, "Cannot sort table by nonsense" in text) == (400, True)
    assert get(site, "history/who_changed", data=b"session=s")[0] == 405
    for page in ("databases.json", "versions.json", "plugins.json", "settings.json", "threads.json"):
        status, text = get(site, f"-/{page}")
        assert (status, str(path) in text) == (404, False)


@needs_datasette
def test_an_execution_page_has_the_values_that_it_read(site: str, path: Path) -> None:
    with dspex_persist.open_audit(path) as audit:
        one = next(each for each in map(audit.execution, _ids(audit)) if each.parameters and _read_number(audit, each))
        name, value, version = _read_number(audit, one)
    status, text = get(site, "execution", id=one.summary.execution_id)
    assert status == 200
    plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    assert f"{name} = {value} (v{version})" in plain
    assert f"parameters {next(iter(one.parameters))} " in plain


def _ids(audit: Any) -> list[str]:
    return [each.execution_id for each in audit.iterate(ExecutionQuery())]


def _read_number(audit: Any, one: Any) -> Any:
    for read in one.reads:
        if read.version is not None:
            entry = audit.version(one.summary.session_id, read.variable_id, read.version)
            if entry.value is not None and not entry.masked and entry.type in ("float", "integer"):
                return read.name, entry.value.json, read.version
    return None


@needs_datasette
def test_the_site_answers_to_this_machines_names_only(site: str) -> None:
    assert get(site, "", host="localhost:1234")[0] == 200
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        status, text = get(site, "history/v_commits.json", host=host)
        assert status == 403
        assert SESSION not in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@needs_datasette
def test_the_site_answers_no_other_user_of_this_machine(site: str) -> None:
    asking = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    command = as_user(65534, sys.executable, "-c", asking, site)
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert "HTTP Error 403: Forbidden" in answer.stderr


@needs_datasette
def test_the_site_reveals_where_that_is_wished_and_ends_at_ctrl_c(path: Path) -> None:
    with website(path, "--reveal", end=signal.SIGINT) as address:
        for view in ("v_variable_history", "v_current_variables"):
            status, text = get(address, f"history/{view}.json", _shape="array", name="api_key")
            assert status == 200
            assert json.loads(text)[0]["value"] == f'"{story.SECRET}-2"'
            plain = json.loads(get(address, f"history/{view}.json", _shape="array", _size="1000")[1])
            assert len(plain) == json.loads(get(address, f"history/{view}.json")[1])["filtered_table_rows_count"]
        assert get(address, "history/versions")[0] == 200
        assert get(address, "history.json", sql="select 1")[0] == 200
        assert story.SECRET in get(address, "variable", session=SESSION, name="api_key")[1]


def evaluations(path: Path) -> list[str]:
    """The executions with LM calls, oldest first."""
    with dspex_persist.open_audit(path) as audit:
        query = ExecutionQuery(session=SESSION, tool="evaluate", newest_first=False)
        return [each.execution_id for each in audit.iterate(query)]


@needs_datasette
def test_the_site_shows_lm_calls_and_compares_them(site: str, path: Path) -> None:
    first, second, third, fourth, *_ = evaluations(path)
    status, text = get(site, "execution", id=second)
    assert status == 200
    assert story.SECRET not in text
    assert "189 tokens in, 12 out" in text
    for before in (first, third):
        assert f'href="/compare?before={before}&amp;after={second}"' in text
    status, text = get(site, "compare", before=second, after=fourth)
    assert status == 200
    assert "Classify the ticket<ins> by urgency</ins>." in text
    assert "The same: model, options." in text
    assert story.HOSTILE not in text
    assert story.SECRET not in text
    status, text = get(site, "versions", session=SESSION, name="prompt", before="0", after="1")
    assert (status, "Classify the ticket<ins> by urgency</ins>." in text) == (200, True)
    assert 'title="compare with version 0">diff</a>' in get(site, "variable", session=SESSION, name="prompt")[1]
    assert "Its values are masked" in get(site, "versions", session=SESSION, name="api_key", before="0", after="1")[1]
    for page, parts in (
        ("compare", {"before": "exec_1_none", "after": first}),
        ("versions", {"session": SESSION, "name": "prompt", "before": "0", "after": "99"}),
        ("versions", {"session": SESSION, "name": "p*", "before": "0", "after": "1"}),
        ("versions", {"session": SESSION, "name": "prompt", "before": "0", "after": "²"}),
    ):
        assert get(site, page, **parts)[0] == 404


@needs_datasette
def test_the_table_of_lm_calls_masks_their_texts(site: str, path: Path) -> None:
    assert "the session has sensitive variables: see the execution" in get(site, "history/v_lm_calls")[1]
    (row, *_) = json.loads(get(site, "history/v_lm_calls.json", _shape="array")[1])
    assert (row["messages"], row["masked"]) == (None, 1)
    with website(path, "--reveal") as address:
        (row, *_) = json.loads(get(address, "history/v_lm_calls.json", _shape="array")[1])
    assert story.SECRET in row["messages"]


@needs_datasette
def test_a_port_that_is_taken_is_a_sentence(path: Path, shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = shell.run("web", "--db", path, "--port", str(port), cwd=path.parent)
    assert result == (NO_ADDRESS, "", f"error: cannot listen on 127.0.0.1:{port}: address already in use\n")


def test_a_site_over_no_database_is_a_sentence(tmp_path: Path, shell: Shell) -> None:
    code, output, errors = shell.run("web", "--db", "none.db", cwd=tmp_path)
    assert (code, output) == (UNUSABLE, "")
    assert re.fullmatch(r"error: [^\n]+none\.db[^\n]*\n", errors)


def test_without_the_extra_a_sentence_says_what_to_install(
    path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasette", None)
    result = shell.run("web", "--db", path, cwd=path.parent)
    sentence = "the website needs Datasette, which is not installed: "
    sentence += how_to_install("web")
    assert result == (FAILED, "", f"error: {sentence}\n")


# In a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # The sandbox refuses root, who runs tests in containers.
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page in the browser, with the addresses that it fetched and the complaints on its console."""

    def __init__(self, browser: Any, scheme: str, width: int) -> None:
        self.fetched: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, address: str) -> None:
        self.page.goto(address)

    def assert_in_order(self, home: str) -> None:
        """Assert that the page fits its window, has no complaints, ran no injected code, fetched nothing elsewhere."""
        self.page.wait_for_load_state()
        assert self.complaints == []
        assert [url for url in self.fetched if not url.startswith(home)] == []
        assert self.page.title() != "taken over"
        assert self.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    def contrast(self, selector: str) -> float:
        """Between the first such text and the page, as WCAG counts it."""
        colours = self.page.eval_on_selector(
            selector, "each => [getComputedStyle(each).color, getComputedStyle(document.body).backgroundColor]"
        )
        light, dark = sorted((luminance(colour) for colour in colours), reverse=True)
        return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Visit]:
    visit = Visit(browser, *request.param)
    yield visit
    visit.page.close()


looks = pytest.mark.parametrize(
    "visit", [("light", WIDE), ("dark", NARROW)], indirect=True, ids=["light and wide", "dark and narrow"]
)


@looks
def test_a_report_in_a_browser(visit: Visit, report: Path) -> None:
    visit.open(report.as_uri())
    visit.assert_in_order(report.as_uri())
    page = visit.page
    assert page.title() == f"{SESSION}: report"
    for selector in ("h1", "p.soft", "a", ".status.failed", ".status.committed", ".status.conflict", ".facts dt"):
        assert visit.contrast(selector) >= 4.5, selector
    assert page.locator("g.bar").count() == 18
    assert page.locator(".charts figure").count() == 4
    row = page.locator(".journal details").nth(1)
    assert not row.locator("dl").first.is_visible()
    row.locator("summary").first.click()
    assert row.locator("dl").first.is_visible()
    # A called tool's bar lies under its caller's, and within its time.
    caller, called = (page.locator("g.bar rect").nth(index).bounding_box() for index in (0, 1))
    assert called["y"] >= caller["y"] + caller["height"]
    assert caller["x"] <= called["x"] <= called["x"] + called["width"] <= caller["x"] + caller["width"] + 10
    assert len(page.screenshot(full_page=True)) > 20_000


def test_a_report_is_printed_with_its_folded_parts(browser: Any, report: Path) -> None:
    visit = Visit(browser, "light", WIDE)
    visit.open(report.as_uri())
    visit.page.emulate_media(media="print")
    assert not visit.page.locator("nav").is_visible()
    assert visit.page.pdf().startswith(b"%PDF")
    visit.page.close()


@needs_datasette
@looks
def test_the_site_in_a_browser(visit: Visit, site: str) -> None:
    page = visit.page
    visit.open(site)
    visit.assert_in_order(site)
    page.get_by_role("link", name=SESSION, exact=True).click()
    visit.assert_in_order(site)
    page.locator(".charts").get_by_role("link", name="score", exact=True).click()
    visit.assert_in_order(site)
    assert page.locator("svg[aria-label='score, version by version'] circle").count() == 8
    page.get_by_role("link", name="improve").first.click()
    visit.assert_in_order(site)
    assert "/execution?id=exec_" in page.url
    page.locator("table").get_by_role("link", name="score", exact=True).click()
    visit.assert_in_order(site)
    assert page.url.endswith(f"/variable?session={SESSION}&name=score")
    page.get_by_role("link", name="All of them as a table").click()
    visit.assert_in_order(site)
    assert page.locator("table.rows-and-columns tbody tr").count() == 8
    page.locator("table.rows-and-columns").get_by_role("link", name=re.compile("^exec_")).first.click()
    visit.assert_in_order(site)
    assert "/execution?id=exec_" in page.url
    visit.open(f"{site}history/went_wrong?session={SESSION}")
    visit.assert_in_order(site)
    assert page.locator("table.rows-and-columns tbody tr").count() == 3


@needs_datasette
@looks
def test_lm_calls_in_a_browser(visit: Visit, site: str, path: Path) -> None:
    page = visit.page
    visit.open(f"{site}execution?{urlencode({'id': evaluations(path)[1]})}")
    visit.assert_in_order(site)
    assert page.locator(".call .said.user pre").first.is_visible(), "the first calls are open"
    page.get_by_role("link", name="the one after").click()
    visit.assert_in_order(site)
    before, after = (page.locator(".sides tr").first.locator("td").nth(side).bounding_box() for side in (0, 1))
    assert (before["y"], before["width"]) == (after["y"], pytest.approx(after["width"], abs=2))
    assert before["x"] + before["width"] <= after["x"] + 1
    assert page.locator(".sides ins").count() > 0
    assert visit.contrast(".both .soft") >= 4.5
    page.locator(".both a").first.click()
    visit.assert_in_order(site)
    assert "/execution?id=exec_" in page.url
