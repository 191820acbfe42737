"""dspex-persist audit: each question in each form, while a server has the file open for writing."""

import csv
import io
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
from rich.cells import cell_len

import dspex_persist
from dspex_persist import Context, Toolbox, ToolContext, cli, open_audit, tool
from dspex_persist.audit import (
    ChangeKind,
    CommitQuery,
    ExecutionQuery,
    ExecutionStatus,
    HistoryQuery,
    KeptHead,
    SessionQuery,
    Source,
    document,
    parse_predicate,
    verify,
)
from dspex_persist.cli.audit.rendering import squeezed
from dspex_persist.cli.audit.sparkline import sparkline
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.model import Value
from tests.deadline import within
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import Gate, OldClient, environment, serve, target_of
from tests.end_to_end.programs import Program, programs_of, run

SESSION = "shop [bold]42[/]"
SECRET = "70451993"
WHY = "ticket 1201 [bold] ß"
MASK = "•••"
TOOLS = ("--tools", "tests.end_to_end.served_tools")
FINE, FAILED, USAGE, PROBLEMS, _, UNUSABLE = range(6)


# The history


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "sessions.db"


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[ServerProcess]:
    """Keep the server running for all tests: they read the file while it has it open."""
    with serve(path, *TOOLS) as process:
        happen(process, path.parent)
        yield process


def happen(server: ServerProcess, folder: Path) -> None:
    """Make a history with everything that audits report, through clients."""
    gate = Gate(folder / "conflict")
    gate.open()
    with dspex_persist.connect(f"grpc://{target_of(server)}") as state:
        state.initialize_session("gone", {"team": "blue"})
        state.register_variable("gone", "a", "integer", 1)
        state.cleanup_session("gone")
        state.initialize_session(SESSION, {"team": "red"})
        for name, value in (("a", 0), ("b", 0), ("c", 0), ("sold", 5)):
            state.register_variable(SESSION, name, "integer", value)
        state.register_variable(SESSION, "pin", "integer", int(SECRET), metadata={"sensitive": "true"})
        state.register_variable(SESSION, "temperature", "float", 0.7, constraints={"min": 0, "max": 2})
        state.register_variable(SESSION, "prompt", "string", "one\ntwo\nthree\n" + "long " * 20)
        state.register_variable(SESSION, "weights", "embedding", [0.5] * 500)
        for step in range(6):
            state.set_variable(SESSION, "temperature", 0.1 * step, metadata={"step": str(step)})
        state.rollback_variable(SESSION, "temperature", 2)
        state.execute_tool(SESSION, "add", {"name": "a", "amount": 2}, metadata={"user": "ann"}, idempotency_key="k1")
        state.execute_tool(SESSION, "fail", metadata={"user": "bob"})
        state.execute_tool(SESSION, "parent", {"child_fails": True, "caught": True})
        state.execute_tool(SESSION, "recorder")
        state.execute_tool(SESSION, "progress", {"gate": str(gate)})
        state.execute_tool(SESSION, "restock", {"name": "pin", "amount": 0}, actor="eve", reason=WHY)
        collide(state, Gate(folder / "gate"))
        state.set_variable(SESSION, "prompt", "one\nTWO\nthree\n" + "long " * 20)
        state.delete_variable(SESSION, "b", actor="dan", reason=f"{WHY}, for b")


def collide(state: Any, gate: Gate) -> None:
    """Run an execution whose first attempt conflicts with another caller's write."""
    running = threading.Thread(target=state.execute_tool, args=(SESSION, "add_with_retries", {"gate": str(gate)}))
    running.start()
    gate.wait()
    state.set_variable(SESSION, "a", 100)
    gate.open()
    running.join()


@dataclass(frozen=True)
class CommandResult:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def cells(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.out)))


@pytest.fixture
def ask(
    server: ServerProcess, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CommandResult]:
    """`dspex-persist audit ...` in this process, on the file that the server has open."""
    for name in [name for name in os.environ if name.startswith("DSPEX_PERSIST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")

    def run_audit(*arguments: str | Path, width: int = 120, code: int = FINE, db: Path | None = path) -> CommandResult:
        place = ("--db", str(db)) if db is not None else ()
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["dspex-persist", "audit", *map(str, arguments), *place])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        result = CommandResult(int(ended.value.code or 0), *capsys.readouterr())
        assert result.code == code, result
        assert "Traceback" not in result.err
        return result

    return run_audit


@pytest.fixture
def executions(path: Path, server: ServerProcess) -> dict[str, str]:
    """The id of the last execution of each tool."""
    with open_audit(path) as audit:
        return {each.tool: each.execution_id for each in audit.iterate(ExecutionQuery(newest_first=False))}


QUESTIONS: dict[str, list[str]] = {
    "history": ["history", SESSION],
    "all history": ["history", "*"],
    "executions": ["executions"],
    "commits": ["commits"],
    "sessions": ["sessions"],
    "show": ["show", "PARENT"],
    "show restock": ["show", "RESTOCK"],
    "state": ["state", SESSION],
    "state before": ["state", SESSION, "--at", "now^"],
    "diff": ["diff", SESSION, "--from", "ADD^"],
    "blame": ["blame", SESSION, "--depth", "3"],
}


def question(name: str, executions: dict[str, str]) -> list[str]:
    ids = {"PARENT": "parent", "RESTOCK": "restock", "ADD^": "add"}
    return [
        executions[ids[word]] + ("^" if word.endswith("^") else "") if word in ids else word for word in QUESTIONS[name]
    ]


def answers(path: Path, name: str, executions: dict[str, str], reveal: bool = False) -> list[Any]:
    """The same from the library."""
    with open_audit(path, reveal=reveal) as audit:
        ask: dict[str, Callable[[], Any]] = {
            "history": lambda: audit.iterate(HistoryQuery(session=SESSION)),
            "all history": lambda: audit.iterate(HistoryQuery()),
            "executions": lambda: audit.iterate(ExecutionQuery()),
            "commits": lambda: audit.iterate(CommitQuery()),
            "sessions": lambda: audit.iterate(SessionQuery()),
            "show": lambda: [audit.execution(executions["parent"])],
            "show restock": lambda: [audit.execution(executions["restock"])],
            "state": lambda: audit.state(SESSION),
            "state before": lambda: audit.state(SESSION, "now^"),
            "diff": lambda: audit.diff(SESSION, f"{executions['add']}^"),
            "blame": lambda: audit.blame(SESSION, depth=3),
        }
        return list(ask[name]())


# Forms


@pytest.mark.parametrize("name", QUESTIONS)
def test_json_has_the_names_and_values_of_the_library(
    ask: Callable[..., CommandResult], path: Path, executions: dict[str, str], name: str
) -> None:
    result = ask(*question(name, executions), "--json")
    wanted = [document(each) for each in answers(path, name, executions)]
    assert wanted
    assert result.rows == json.loads(json.dumps(wanted))
    assert result.err == ""


@pytest.mark.parametrize("name", QUESTIONS)
def test_csv_has_a_header_and_one_line_a_row(
    ask: Callable[..., CommandResult], path: Path, executions: dict[str, str], name: str
) -> None:
    cells = ask(*question(name, executions), "--csv").cells
    wanted = [flat(json.loads(json.dumps(document(each)))) for each in answers(path, name, executions)]
    assert len(cells) == len(wanted)
    for row, expected in zip(cells, wanted, strict=True):
        for column, stated in expected.items():
            if column.endswith("value") and expected.get(column.removesuffix("value") + "masked"):
                assert row[column] == MASK
            elif column.endswith("value") or column == "result":
                assert json.loads(row[column] or "null") == stated, column
            else:
                assert row[column] == plainly(stated), column


def flat(stated: dict[str, Any]) -> dict[str, Any]:
    """With the fields of a nested answer in columns of their own."""
    found: dict[str, Any] = {}
    for name, each in stated.items():
        if name in ("summary", "entry", "before", "after"):
            found |= {f"{name}_{inner}": value for inner, value in (each or {}).items()}
        else:
            found[name] = each
    return found


def plainly(stated: Any) -> str:
    if stated is None:
        return ""
    return stated if isinstance(stated, str) else json.dumps(stated)


def test_a_csv_without_rows_has_its_header(ask: Callable[..., CommandResult]) -> None:
    result = ask("history", SESSION, "--tool", "none*", "--csv")
    assert result.out.startswith("session_id,name,variable_id,type,version,kind,value,source,metadata,sequence,")
    assert result.cells == []
    assert ask("history", SESSION, "--tool", "none*", "--json").out == ""
    assert ask("history", SESSION, "--tool", "none*").out == "nothing found\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", QUESTIONS)
def test_tables_fit_the_terminal(
    ask: Callable[..., CommandResult], executions: dict[str, str], name: str, width: int
) -> None:
    lines = ask(*question(name, executions), width=width).out.splitlines()
    assert len(lines) > 2
    assert max(map(cell_len, lines)) <= width


def test_history_as_a_table(ask: Callable[..., CommandResult], executions: dict[str, str]) -> None:
    lines = ask("history", SESSION, "temperature", "--utc").out.splitlines()
    assert lines[0].split() == ["commit", "time", "v", "value", "kind", "by", "for", "metadata"]
    assert re.fullmatch(r" +\d+  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d +7  0\.1 +rolled_back  \S+ +\{.*\}", lines[2])
    assert re.fullmatch(r"temperature  █▁[▁-▇]{5}▂  0 to 0.7", lines[-1])
    whole = ask("history", SESSION, "a").out
    assert re.search(rf" 2 +set +{short(executions['add'])} add\b", whole)
    assert "session" not in whole
    assert "[bold]42[/]" in ask("history", "*", "a").out


def short(execution_id: str) -> str:
    return "_".join(execution_id.split("_")[:2])


def test_everything_that_shows_a_change_says_why(
    ask: Callable[..., CommandResult], executions: dict[str, str], path: Path
) -> None:
    restock, deletion = executions["restock"], f"{WHY}, for b"
    history = ask("history", SESSION, "--limit", "1", width=300).out
    assert "why" in history.splitlines()[0]
    assert f"dan       {deletion}" in history
    assert "why" not in ask("history", SESSION, "temperature", width=300).out.splitlines()[0]
    assert f"because: {WHY}" in ask("blame", SESSION, "pin", width=300).out
    assert f"because: {WHY}" in ask("diff", SESSION, "--from", f"{restock}^", "--to", restock, width=300).out
    shown = ask("show", restock, width=300).out
    assert f"because: {WHY}" in shown
    assert f"set, because: {WHY})" in shown
    assert "dspex.reason" not in shown
    assert WHY in ask("state", SESSION, width=300).out
    commits = ask("commits", SESSION, "--limit", "1", width=300).out
    assert "why" in commits.splitlines()[0]
    assert deletion in commits
    assert ask("commits", SESSION, "--limit", "1", "--json").rows[0]["reason"] == deletion
    assert deletion in ask("commits", SESSION, "--limit", "1", "--csv").out
    (found,) = ask("history", SESSION, "--meta", f"dspex.reason={deletion}", "--json").rows
    assert (found["reason"], found["metadata"], found["name"]) == (deletion, {}, "b")
    page = path.parent / "why.html"
    ask("report", SESSION, "-o", page)
    assert f"{WHY}, for b" in page.read_text(encoding="utf-8")


def test_an_execution_shows_what_was_computed_from_its_writes(
    ask: Callable[..., CommandResult], tmp_path: Path
) -> None:
    @tool
    def sell(ctx: ToolContext) -> int:
        ctx.publish("price", 3)
        ctx["count"] = 5
        return int(ctx["sum"])

    @tool
    def sell_twice(ctx: ToolContext) -> int:
        ctx.call("sell")
        ctx["count"] = 6
        return int(ctx["sum"])

    path = tmp_path / "derived.db"
    with Context("s", path, tools=[sell, sell_twice]) as ctx:
        ctx.define_many({"count": 1, "price": 2})
        ctx.derive("sum", ["count", "price"], lambda count, price: count * price)
        assert (ctx.call(sell), ctx["sum"]) == (3, 15)
        ctx["price"] = 1
        assert (ctx.call(sell_twice), ctx["sum"]) == (15, 18)
        with ctx.audit() as audit:
            inner, outer, first = (audit.execution(each.execution_id) for each in audit.iterate(ExecutionQuery()))
        assert first.computed == (("sum", 1), ("sum", 2))
        assert (outer.computed, inner.computed) == ((("sum", 4), ("sum", 5)), ())
    shown = ask("show", first.summary.execution_id, db=path).out
    assert "sum: 3 → 15  (version 2, set)" in shown.split("computed")[1]
    page = tmp_path / "page.html"
    ask("report", "s", "-o", page, db=path)
    assert "<dt>computed</dt>" in page.read_text(encoding="utf-8")


def test_tables_say_that_there_is_more_and_how_to_get_it(ask: Callable[..., CommandResult]) -> None:
    lines = ask("commits", "--limit", "3").out.splitlines()
    assert len(lines) == 6
    last = lines[4].split()[0]
    assert lines[5] == f"more than these 3 rows: --limit 0 shows all, --until {int(last) - 1} continues from here"
    oldest = ask("commits", "--limit", "2", "--oldest-first").out.splitlines()
    assert oldest[-1].endswith("--since 2 continues from here")
    everything = ask("commits", "--limit", "0", width=200).out
    assert "more than" not in everything
    assert len(everything.splitlines()) == 2 + len(ask("commits", "--json").rows)


@pytest.mark.parametrize("order", [[], ["--oldest-first"]], ids=["newest first", "oldest first"])
@pytest.mark.parametrize("name", ["history", "all history", "executions", "commits", "sessions"])
def test_following_the_hints_of_a_table_shows_each_row_once(
    ask: Callable[..., CommandResult], executions: dict[str, str], name: str, order: list[str]
) -> None:
    def page(*options: str) -> tuple[list[list[str]], str]:
        lines = ask(*question(name, executions), *order, *options, width=300).out.splitlines()[2:]
        # How far a long value is shown depends on the other rows.
        rows = [[cell[:20] for cell in line.split()] for line in lines if re.search(r"\d\d:\d\d:\d\d", line)]
        return rows, lines[-1]

    seen: list[list[str]] = []
    onward: tuple[str, ...] = ()
    while True:
        rows, footer = page("--limit", "2", *onward)
        seen += rows
        hint = re.search(r"(--until|--since) (\d+) continues from here$", footer)
        if hint is None:
            break
        onward = hint.groups()
    assert seen == page("--limit", "0")[0]


def test_a_table_ends_with_a_whole_commit(ask: Callable[..., CommandResult], tmp_path: Path) -> None:
    tools, path = Toolbox(), tmp_path / "pairs.db"
    tools.add(write_pair)
    with dspex_persist.connect(path, tools=tools) as state:
        state.initialize_session("s")
        for name in ("a", "b"):
            state.register_variable("s", name, "integer", 0)
        for _ in range(2):
            state.execute_tool("s", "write_pair")

    def page(*options: str) -> tuple[list[str], str]:
        lines = ask("history", "s", *options, db=path).out.splitlines()[2:]
        return [line.split()[0] for line in lines if line.startswith(" ")], lines[-1]

    newest, footer = page("--limit", "1")
    assert newest == ["7", "7"]
    assert footer == "more than these 2 rows: --limit 0 shows all, --until 6 continues from here"
    assert page("--limit", "1", "--until", "6")[0] == ["5", "5"]
    assert page("--limit", "3", "--until", "6")[0] == ["5", "5", "3"]
    oldest, footer = page("--limit", "3", "--oldest-first")
    assert oldest == ["2", "3", "5", "5"]
    assert footer == "more than these 4 rows: --limit 0 shows all, --since 5 continues from here"
    last, footer = page("--limit", "1", "--oldest-first", "--since", "5")
    assert last == ["7", "7"]
    assert "more than" not in footer
    # Programs get exactly as many rows as they request.
    assert len(ask("history", "s", "--limit", "1", "--json", db=path).rows) == 1


@tool
def write_pair(ctx: ToolContext) -> None:
    """Two versions in one commit."""
    for name in ("a", "b"):
        ctx[name] += 1


def test_times_are_local_or_utc(
    ask: Callable[..., CommandResult], path: Path, executions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = answers(path, "show", executions)[0].summary.began_at.astimezone(UTC)
    assert f"{began:%Y-%m-%d %H:%M:%S}" in ask("show", executions["parent"], "--utc").out
    local = began + timedelta(hours=3)
    process = audit("show", executions["parent"], "--db", str(path), TZ="XYZ-3")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert f"{local:%Y-%m-%d %H:%M:%S}" in output
    assert "XYZ" in output


# Questions


FILTERS: list[tuple[list[str], dict[str, Any]]] = [
    (["--type", "float"], {"type": "float"}),
    (["--kind", "rolled_back"], {"kind": ChangeKind.ROLLED_BACK}),
    (["--source", "python"], {"source": Source.PYTHON}),
    (["--tool", "parent"], {"tool": "parent"}),
    (["--meta", "step=3"], {"metadata": {"step": "3"}}),
    (["--where", "< 0.5", "--where", ">= 0.2"], {"where": tuple(map(parse_predicate, ("< 0.5", ">= 0.2")))}),
    (["--where", "contains TWO"], {"where": (parse_predicate("contains TWO"),)}),
    (["--since", "10", "--until", "20^"], {"since": "10", "until": "19"}),
    (["--oldest-first", "--limit", "3"], {"newest_first": False, "limit": 3}),
]


@pytest.mark.parametrize(
    ("options", "query"), FILTERS, ids=lambda each: " ".join(each) if isinstance(each, list) else ""
)
def test_filters_of_a_history(
    ask: Callable[..., CommandResult], path: Path, options: list[str], query: dict[str, Any]
) -> None:
    with open_audit(path) as audit:
        wanted = [document(each) for each in audit.iterate(HistoryQuery(**query))]
    assert wanted
    assert ask("history", "*", *options, "--json").rows == json.loads(json.dumps(wanted))


def test_other_filters(ask: Callable[..., CommandResult], path: Path, executions: dict[str, str]) -> None:
    actor = ask("history", SESSION, "a", "--json").rows[-1]["actor"]
    assert ask("history", SESSION, "--actor", actor, "--json").rows
    assert ask("history", SESSION, "--actor", "unknown", "--json").rows == []
    written = ask("history", "*", "--execution", executions["progress"], "--json").rows
    assert [(each["name"], each["kind"]) for each in written] == [("b", "set"), ("a", "published")]
    failed = ask("executions", SESSION, "--status", "failed", "--top", "--json").rows
    assert [each["tool"] for each in failed] == ["fail"]
    assert len(ask("executions", "--tool", "add_with_retries", "--json").rows) == 2
    assert [each["tool"] for each in ask("executions", "--key", "k1", "--json").rows] == ["add"]
    assert [each["tool"] for each in ask("executions", "--meta", "user=bob", "--json").rows] == ["fail"]
    assert {each["cause"] for each in ask("commits", "--cause", "SetVariable", "--json").rows} == {"SetVariable"}
    assert [each["session_id"] for each in ask("sessions", "--ended", "--json").rows] == ["gone"]
    assert [each["session_id"] for each in ask("sessions", "sh?p*", "--live", "--json").rows] == [SESSION]
    assert [each["session_id"] for each in ask("sessions", "--meta", "team=blue", "--json").rows] == ["gone"]


def test_show_prints_one_execution_in_full(ask: Callable[..., CommandResult], executions: dict[str, str]) -> None:
    output = ask("show", executions["parent"]).out
    for part in (
        "parent  exec_",
        "child_fails = true",
        "called",
        f"called by {executions['parent']}",
        "error",
        "ValueError: the child failed",
        "Traceback (most recent call last):",
        "result\n",
    ):
        assert part in output, part
    assert re.search(r"a: 2 → 1  \(version \d, set\)", output)
    assert re.search(r"b = 0 \(v0\)", output)
    read = output.partition("├── read\n")[2].partition("├── wrote")[0]
    assert "a" not in [line.strip("│├└─ ").split(" ")[0] for line in read.splitlines()], "it was only written"
    recorder = ask("show", executions["recorder"]).out
    assert re.search(r"first line  step=1", recorder)
    assert "now: 2" in recorder
    conflicted = ask("show", executions["add_with_retries"]).out
    assert re.search(r"attempt 2 of 2: exec_\w+, exec_\w+ \(this one\)", conflicted)
    first = re.search(r"attempt 2 of 2: (exec_\w+)", conflicted)
    assert first is not None
    assert re.search(r"conflicts\n.*a \(was at version 3, is at version 4\)", ask("show", first[1]).out)
    assert "idempotency key k1" in ask("show", executions["add"]).out
    assert re.search(r"published\n.*a: 1 → 50  \(version \d, published", ask("show", executions["progress"]).out)


def test_an_execution_is_named_by_the_commit_that_began_it(
    ask: Callable[..., CommandResult], executions: dict[str, str]
) -> None:
    whole = executions["add"]
    number = whole.split("_")[1]
    for name in (number, f"exec_{number}"):
        assert ask("show", name, "--json").out == ask("show", whole, "--json").out
    by_number = ask("diff", SESSION, "--from", f"exec_{number}^", "--to", f"exec_{number}", "--json").rows
    assert [(each["name"], each["after"]["value"]) for each in by_number] == [("a", 2)]


def test_diff_looks_like_a_diff(ask: Callable[..., CommandResult], executions: dict[str, str]) -> None:
    output = ask("diff", SESSION, "--from", f"{executions['add']}^").out
    assert re.search(r"^b \(removed, was v\d\)\n- 0$", output, re.MULTILINE)
    assert re.search(
        r"^a \(v0 → v\d by exec_\d+ add_with_retries, for \S+, commit \d+\)\n- 0\n\+ 101$", output, re.MULTILINE
    )
    assert re.search(r"^prompt .*\n@@ -1,4 \+1,4 @@\n  one\n- two\n\+ TWO\n  three$", output, re.MULTILINE)
    assert re.search(rf"^pin .*\n- {MASK}\n\+ {MASK}$", output, re.MULTILINE)
    assert "no difference between" in ask("diff", SESSION, "--from", "now").out
    assert "backwards" not in output


def test_a_diff_of_a_whole_execution_includes_published_values_and_one_of_its_commit_does_not(
    ask: Callable[..., CommandResult], executions: dict[str, str]
) -> None:
    progress = executions["progress"]
    of_commit = ask("diff", SESSION, "--from", f"{progress}^", "--to", progress, "--json").rows
    began = progress.split("_")[1]
    of_all = ask("diff", SESSION, "--from", began, "--to", progress, "--json").rows
    assert [each["name"] for each in of_commit] == ["b"]
    assert [each["name"] for each in of_all] == ["a", "b"]


def test_a_diff_that_goes_backwards_says_so(ask: Callable[..., CommandResult], executions: dict[str, str]) -> None:
    add = executions["add"]
    last = ask("show", add, "--json").rows[0]["summary"]["ended_sequence"]
    lines = ask("diff", SESSION, "--from", add, "--to", f"{add}^").out.splitlines()
    assert lines[0] == f"backwards: from commit {last} to the older commit {last - 1}"
    assert lines[2:] == ["- 2", "+ 0"]


def test_blame_is_a_tree(ask: Callable[..., CommandResult], executions: dict[str, str]) -> None:
    flat_tree = ask("blame", SESSION, "c", "--depth", "0").out
    assert re.match(rf"c = 1  v1, set by {short(executions['parent'])} parent, for \S+, commit", flat_tree)
    assert "derived from" in flat_tree
    assert "to see one step further back: --depth 1" in flat_tree
    deep = ask("blame", SESSION, "a", "--depth", "9").out
    assert re.search(r"^a = 101  v\d, set by exec_\d+ add_with_retries", deep)
    assert re.search(r"^└── a = 100  v\d, set by \S+ \(SetVariable\), commit", deep, re.MULTILINE)
    assert "one step further" not in deep
    # A version from which several are derived is shown once.
    every = ask("blame", SESSION, "--at", executions["parent"], "--depth", "9").out
    assert "(see there)" in every


def test_state_as_of_points(ask: Callable[..., CommandResult], executions: dict[str, str]) -> None:
    def value_of(point: str) -> Any:
        rows = ask("state", SESSION, "--at", point, "--json").rows
        return {each["name"]: each["value"] for each in rows}["a"]

    add = executions["add"]
    assert (value_of(f"{add}^"), value_of(add), value_of("now")) == (0, 2, 101)


# Sensitive variables


@pytest.mark.parametrize("form", ["--utc", "--json", "--csv"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_sensitive_values_are_masked_everywhere(
    ask: Callable[..., CommandResult], executions: dict[str, str], name: str, form: str
) -> None:
    arguments = question(name, executions)
    assert SECRET not in ask(*arguments, form, width=300).out
    revealed = ask(*arguments, form, "--reveal", width=300).out
    shows_values = name not in ("executions", "commits", "sessions", "show")
    assert (SECRET in revealed) == shows_values
    # Nested values are JSON in a cell.
    if shows_values and form != "--json" and (name, form) != ("show restock", "--csv"):
        assert MASK in ask(*arguments, form, width=300).out


def test_masked_values_cannot_be_found_by_value(ask: Callable[..., CommandResult]) -> None:
    guess = ("history", "*", "--where", f"= {SECRET}", "--json")
    assert ask(*guess).rows == []
    assert ask(*guess, "--reveal").rows


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["history", "shoop [bold]42[/]"], FAILED, "no session 'shoop [bold]42[/]' in the history; did you mean"),
        (["history", SESSION, "temprature"], FAILED, "did you mean 'temperature'?"),
        (["show", "exec_1_ab"], FAILED, "no execution 'exec_1_ab' in the history; audit executions lists them"),
        (["show", "999999"], FAILED, "no execution 'exec_999999'"),
        (["history", SESSION, "--since", "yesterday"], USAGE, "invalid --since: 'yesterday' is not a point"),
        (["history", SESSION, "--until", "999999"], USAGE, "invalid --until: there is no commit 999999 yet"),
        (["history", SESSION, "nosuch"], FAILED, "no variable 'nosuch' in the history; there are: 'weights', "),
        (["blame", SESSION, "nosuch"], FAILED, "did not have it then; there are: 'a', "),
        (["state", SESSION, "--at", "1"], USAGE, "invalid --at: session 'shop [bold]42[/]' had not begun by then; it"),
        (["executions", "--tool", "paren"], 1, "no tool 'paren' in the history; did you mean 'parent'?"),
        (["history", SESSION, "--tool", "nope"], 1, "no tool 'nope' in the history; there are: "),
        (["diff", SESSION, "--from", "now", "--to", "2h"], USAGE, "invalid --to: session 'shop [bold]42[/]' had not"),
        (["state", "gone"], USAGE, "is right before it ended"),
        (["diff", SESSION, "--from", "x"], USAGE, "invalid --from: 'x' is not a point"),
        (["diff", SESSION, "--from", "1", "--to", "x"], USAGE, "invalid --to: 'x' is not a point"),
        (["history", SESSION, "--where", "about 3"], USAGE, "write '< 0.5', '= 3' or 'contains text'"),
        (["history", SESSION, "--where", "< x"], USAGE, "which is not a number"),
        (["history", SESSION, "--meta", "step"], USAGE, "'step' is not KEY=VALUE"),
        (["history", SESSION, "--type", "flaot"], USAGE, "did you mean float? possible: "),
        (["history", SESSION, "--follow", "--until", "9"], USAGE, "leave out --until"),
        (["verify", "--anchor", "missing.jsonl"], USAGE, "writing a head creates it"),
        (["verify", "--write"], USAGE, "invalid --anchor: name the file to write the head to"),
    ],
)
def test_wrong_input_says_what_is_possible(
    ask: Callable[..., CommandResult], arguments: list[str], code: int, sentence: str
) -> None:
    result = ask(*arguments, code=code)
    assert result.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert sentence in result.err
    as_json = ask(*arguments, "--json", code=code)
    assert as_json.rows == [{"ok": False, "error": result.err.removeprefix("error: ").strip()}]


def test_usage_errors(ask: Callable[..., CommandResult], path: Path) -> None:
    assert "choose one" in ask("sessions", "--json", "--csv", code=USAGE).err
    assert "choose one" in ask("sessions", "--target", "127.0.0.1:1", code=USAGE).err
    assert "is invalid" in ask("sessions", "--target", "nowhere", db=None, code=USAGE).err
    kinds = ask("history", SESSION, "--kind", "changed", code=USAGE)
    assert all(kind.value in kinds.err for kind in ChangeKind)
    assert "running" in ask("executions", "--status", "done", code=USAGE).err
    ask("history", code=USAGE)
    assert "no such file" in ask("sessions", db=path.with_name("other.db"), code=UNUSABLE).err


def test_a_damaged_file_is_reported_in_a_sentence(
    ask: Callable[..., CommandResult], backup: Path, tmp_path: Path
) -> None:
    content = bytearray(backup.read_bytes())
    # All but the schema, which opening reads.
    for page in range(40 * 4096, len(content), 4096):
        content[page : page + 4096] = b"\xff" * 4096
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(content)
    result = ask("commits", "--json", db=damaged, code=UNUSABLE)
    assert "damaged.db: " in result.err
    assert result.rows[-1]["ok"] is False


# Places


@pytest.fixture(scope="module")
def backup(server: ServerProcess, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("backup") / "backup.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source:
        source.execute("VACUUM INTO ?", (str(target),))
    return target


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_backup_answers_the_same(
    ask: Callable[..., CommandResult], backup: Path, executions: dict[str, str], name: str
) -> None:
    backup.parent.chmod(0o500)
    try:
        arguments = question(name, executions)
        assert ask(*arguments, "--json", db=backup).out == ask(*arguments, "--json").out
    finally:
        backup.parent.chmod(0o700)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_server_answers_the_same(
    ask: Callable[..., CommandResult], server: ServerProcess, executions: dict[str, str], name: str
) -> None:
    arguments = question(name, executions)
    assert ask(*arguments, "--json", "--target", target_of(server), db=None).rows == ask(*arguments, "--json").rows


def test_errors_of_a_server_are_the_same(ask: Callable[..., CommandResult], server: ServerProcess) -> None:
    for arguments, code in ((["history", "missing"], FAILED), (["state", SESSION, "--at", "999999"], USAGE)):
        there = ask(*arguments, "--json", "--target", target_of(server), db=None, code=code)
        assert there == ask(*arguments, "--json", code=code)


def test_a_server_that_cannot_be_reached(ask: Callable[..., CommandResult], tmp_path: Path) -> None:
    assert "unavailable: " in ask("sessions", "--target", f"unix:{tmp_path}/missing", db=None, code=FAILED).err


def test_the_default_is_the_database_of_serve(
    ask: Callable[..., CommandResult], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPEX_PERSIST_DB", str(path))
    assert ask("sessions", "--json", db=None).out == ask("sessions", "--json").out


# verify


def test_verify_checks_all_and_compares_with_heads_kept_elsewhere(
    ask: Callable[..., CommandResult], path: Path, tmp_path: Path
) -> None:
    assert "is sound" in ask("verify").out
    kept = tmp_path / "heads.jsonl"
    output = ask("verify", "--anchor", kept, "--write").out
    assert "written" in output
    (line,) = kept.read_text().splitlines()
    assert json.loads(line).keys() == {"sequence", "hash", "time"}
    assert "compared with 1 kept head" in ask("verify", "--anchor", kept).out
    (row,) = ask("verify", "--anchor", kept, "--write", "--json").rows
    assert (row["ok"], row["compared"], row["written"]) == (True, 1, json.loads(line))
    assert len(kept.read_text().splitlines()) == 2
    # Without the file next to the database, only the kept heads tell where the log ends.
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(path)) as here, closing(sqlite3.connect(copy)) as there:
        here.backup(there)
    assert "it has no anchor, so commits missing" in ask("verify", db=copy).out
    assert f"up to {json.loads(line)['sequence']}, the newest kept head" in ask("verify", "--anchor", kept, db=copy).out
    output = ask("verify", "--anchor", tmp_path / "new.jsonl", "--write", db=copy).out
    assert "had no head yet, so commits missing" in output
    assert "it has no anchor" not in output
    assert ask("verify", "--csv").out == "where,what\n"
    assert ask("verify", "--jobs", "2").out == ask("verify", "--jobs", "1").out


def test_verify_finds_a_history_that_was_rewritten_or_cut(
    ask: Callable[..., CommandResult], backup: Path, tmp_path: Path
) -> None:
    kept, other = tmp_path / "heads.jsonl", tmp_path / "other.db"
    ask("verify", "--anchor", kept, "--write")
    # As sound as the other, and not the same.
    with dspex_persist.connect(other) as state:
        state.initialize_session(SESSION)
    gone = ask("verify", "--anchor", kept, db=other, code=PROBLEMS)
    assert re.search(r"^commit \d+: kept as the newest of \S+, it is gone: the log ends with commit 1$", gone.out, re.M)
    head = json.loads(kept.read_text())
    kept.write_text(json.dumps({**head, "sequence": 1}) + "\n")
    before = kept.read_bytes()
    rewritten = ask("verify", "--anchor", kept, "--write", db=other, code=PROBLEMS)
    assert "history was rewritten" in rewritten.out
    assert kept.read_bytes() == before
    (row,) = ask("verify", "--anchor", kept, "--json", db=other, code=PROBLEMS).rows
    assert (row["ok"], len(row["problems"])) == (False, 1)
    assert ask("verify", "--anchor", kept, "--csv", db=other, code=PROBLEMS).cells[0]["where"] == "commit 1"


def test_python_verifies_as_the_command_does(backup: Path, tmp_path: Path) -> None:
    kept, other = tmp_path / "heads.jsonl", tmp_path / "other.db"
    assert verify(backup).ok
    with pytest.raises(InvalidArgumentError, match=r"invalid anchor: there is no file .*; writing a head creates it"):
        verify(backup, anchor=kept)
    with pytest.raises(InvalidArgumentError, match="invalid anchor: name the file to write the head to"):
        verify(backup, write=True)
    first = verify(backup, anchor=kept, write=True)
    assert (first.ok, first.compared) == (True, 0)
    assert first.written == KeptHead(**json.loads(kept.read_text()))
    assert first.written.sequence == first.report.commits
    steps: list[str] = []
    again = verify(str(backup), anchor=str(kept), progress=lambda what, _done, _in_all: steps.append(what))
    assert (again.ok, again.compared, again.written) == (True, 1, None)
    assert "checking commits" in steps
    with dspex_persist.connect(other) as state:
        state.initialize_session(SESSION)
    cut = verify(other, anchor=kept, write=True)
    assert (cut.ok, cut.written) == (False, None)
    assert [problem.where for problem in cut.report.problems] == [f"commit {first.report.commits}"]


@pytest.mark.parametrize("content", ["", "nonsense\n", '{"sequence": 0, "hash": "00", "time": ""}\n', "[]\n"])
def test_a_file_that_has_no_heads_is_refused(ask: Callable[..., CommandResult], tmp_path: Path, content: str) -> None:
    kept = tmp_path / "heads.jsonl"
    kept.write_text(content)
    assert str(kept) in ask("verify", "--anchor", kept, code=USAGE).err


# As a process


def audit(*arguments: str, stdout: int = subprocess.PIPE, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dspex_persist", "audit", *arguments],
        env=environment(**more),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


class Lines:
    """The lines of a process's output, as they arrive."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def next(self) -> str:
        try:
            return self._lines.get(timeout=DEADLINE_S)
        except Empty:
            raise AssertionError(f"no further line within {DEADLINE_S:g} s") from None

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = json.loads(self.next())
        return row

    def end(self) -> str:
        """Send Ctrl-C; return what the process wrote to stderr."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        assert self.process.wait(DEADLINE_S) == 0
        return errors

    def close(self) -> None:
        """End the process, in whatever state it is."""
        self.process.kill()
        self._reader.join()
        self.process.__exit__(None, None, None)


@pytest.fixture
def follow() -> Iterator[Callable[..., Lines]]:
    begun: list[Lines] = []

    def following(*arguments: str) -> Lines:
        begun.append(Lines(audit(*arguments, "--follow")))
        return begun[-1]

    yield following
    for lines in begun:
        lines.close()


def test_follow_goes_on_through_restarts_of_the_server(follow: Callable[..., Lines], tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with serve(path) as server:
        client = OldClient(target_of(server), "s", variables=("a",))
        client.set("a", 1)
        history = follow("history", "s", "a", "--db", str(path), "--json")
        table = follow("commits", "--db", str(path), "--limit", "2")
        assert [history.row()["value"] for _ in range(2)] == [0, 1]
        header, _, *past = [table.next() for _ in range(4)]
        assert header.startswith("commit")
        assert [line.split()[0] for line in past] == ["2", "3"]
        client.set("a", 2)
        assert history.row()["value"] == 2
        assert table.next().split()[0] == "4"
        client.close()
        server.kill()
    for value in (3, 4):
        # The first time after a kill, the second after an orderly end.
        with serve(path) as server:
            client = OldClient(target_of(server), "s", variables=())
            client.set("a", value)
            client.close()
            assert history.row()["value"] == value
            os.kill(server.pid, signal.SIGTERM)
            server.wait(DEADLINE_S)
    assert [table.next().split()[0] for _ in range(2)] == ["5", "6"]
    assert (history.end(), table.end()) == ("", "")


def test_follow_tells_when_executions_begin_and_end(follow: Callable[..., Lines], tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with serve(path, *TOOLS) as server:
        client = OldClient(target_of(server), "s")
        first, second = Gate(tmp_path / "first"), Gate(tmp_path / "second")
        running = client.begin("write_three", gate=first, value=1)
        first.wait()
        every = follow("executions", "s", "--db", str(path), "--json")
        failures = follow("executions", "--status", "failed", "--db", str(path), "--json")
        assert (began := every.row())["status"] == "running"
        first.open()
        running.result()
        ended = every.row()
        assert (ended["execution_id"], ended["status"]) == (began["execution_id"], "committed")
        another = client.begin("hold", gate=second)
        second.wait()
        assert every.row()["status"] == "running"
        client.execute("fail")
        failed = failures.row()
        assert (failed["tool"], failed["status"]) == ("fail", ExecutionStatus.FAILED.value)
        second.open()
        another.result()
        seen: list[tuple[str, str]] = []
        while not {("hold", "committed"), ("fail", "failed")} <= set(seen):
            row = every.row()
            seen.append((row["tool"], row["status"]))
        client.close()
        assert (every.end(), failures.end()) == ("", "")


# Much


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several pages: of all forms the smallest takes more than a pipe holds."""
    path = tmp_path_factory.mktemp("large") / "large.db"
    with dspex_persist.connect(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "text", "string", "")
        writes = [
            state.submit(SetVariable("s", "text", Value(json.dumps(f"{number} {'x' * 500}")), {}), None)
            for number in range(2_000)
        ]
        for write in writes:
            write.result()
    return path


def test_large_answers_stream(large: Path) -> None:
    """Printed rows are not kept in memory."""
    program = """
import sys, tracemalloc
from dspex_persist import cli

path = sys.argv[1]
for form in ("--json", "--csv", "--utc"):
    for limit in ("10", "0"):
        tracemalloc.start()
        sys.argv = ["dspex-persist", "audit", "history", "s", form, "--db", path, "--limit", limit]
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, ended
        if limit == "0":
            print(tracemalloc.get_traced_memory()[1], file=sys.stderr)
        tracemalloc.stop()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(large)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=within(60),
        check=True,
    )
    peaks = [int(line) for line in done.stderr.splitlines()]
    assert len(peaks) == 3
    assert max(peaks) < 5 * 2**20, peaks


def test_a_reader_that_stops_is_not_an_error(large: Path) -> None:
    forms = ("--json", "--csv", "--utc")
    for process in [audit("history", "s", form, "--limit", "0", "--db", str(large)) for form in forms]:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(DEADLINE_S)
        process.stderr.close()


def test_a_table_on_a_terminal_has_fifty_rows_and_colours(large: Path) -> None:
    master, slave = pty.openpty()
    process = audit("history", "s", "--db", str(large), stdout=slave, TERM="xterm", COLUMNS="80", NO_COLOR="")
    os.close(slave)
    drawn = b""
    while True:
        try:
            drawn += os.read(master, 65_536)
        except OSError:
            # How Linux reports that the other side of the terminal is closed.
            break
    os.close(master)
    assert process.wait(DEADLINE_S) == 0
    assert process.stderr is not None
    process.stderr.close()
    lines = drawn.decode().splitlines()
    assert len(lines) == 2 + 50 + 1
    assert "\x1b[1m" in lines[0]
    assert lines[-1].startswith("more than these 50 rows: --limit 0 shows all, ")


# Parts


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ([0, 1], "▁█"),
        ([0, 0.5, 1], "▁▅█"),
        ([3, 3, 3], "▅▅▅"),
        ([-1e308, 0, 1e308], "▁▅█"),
        ([1e-300, 0], "█▁"),
    ],
)
def test_sparklines(numbers: list[float], line: str) -> None:
    assert len(sparkline(numbers)) == len(line)
    assert sparkline(numbers)[0] == line[0]
    assert sparkline(numbers)[-1] == line[-1]


def test_columns_give_way_the_widest_first() -> None:
    assert squeezed([10, 30, 5], [4, 4, 5], 45) == [10, 30, 5]
    assert squeezed([10, 30, 5], [4, 4, 5], 25) == [10, 10, 5]
    assert squeezed([10, 30, 5], [10, 4, 5], 20) == [10, 5, 5]
    assert squeezed([10, 30, 5], [10, 10, 5], 3) == [10, 10, 5]


# The page


@pytest.mark.parametrize("program", programs_of("docs/audit.md"), ids=str)
def test_the_programs_of_the_page_print_what_it_says(program: Program, tmp_path: Path) -> None:
    assert run(program.text, tmp_path) == program.output
