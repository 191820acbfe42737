"""dspex-persist replay, as a process, on what real clients, tools and a worker have done with a real server."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dspex_persist
from dspex_persist import Tool
from dspex_persist.cli import main
from dspex_persist.infra.process import ServerProcess
from dspex_persist.replay import replay
from dspex_persist.state.audit import ExecutionQuery
from tests.deadline import within
from tests.end_to_end.old_style import OldClient, environment, serve, target_of
from tests.end_to_end.programs import programs_of, run
from tests.end_to_end.test_remote_workers import start_worker
from tests.end_to_end.worker_process import register_tools
from tests.prepared import commands

FINE, FAILED, USAGE, _, _, UNUSABLE, DIVERGED = range(7)

SHOP = '''
from collections.abc import Iterator
from dspex_persist import ToolContext, tool

FEE = 1

@tool(retries=20)
def add(ctx: ToolContext, amount: int) -> int:
    """Read, then write."""
    ctx["a"] += amount
    return ctx["a"]

@tool
def order(ctx: ToolContext, amount: int) -> list:
    """Use all that is recorded, and other tools, one of which runs elsewhere."""
    ctx["b"] = amount + FEE
    ctx.publish("c", amount)
    made = ctx.define("order", {"at": ctx.now().isoformat(), "id": str(ctx.uuid())}, metadata={"by": "order"})
    return [ctx.call(add, amount=amount), ctx.call("increase", amount=2), ctx.random.random(), made, ctx.execution_id]

@tool
def cancel(ctx: ToolContext) -> None:
    """Delete what was ordered, or fail."""
    del ctx["order"]

@tool
def count(ctx: ToolContext, to: int) -> Iterator[int]:
    """Stream."""
    for number in range(to):
        yield number + ctx["b"]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server's tools and its database are."""
    made = tmp_path_factory.mktemp("shop")
    (made / "shop.py").write_text(SHOP)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with serve(folder / "sessions.db", "--tools", "shop") as process:
        yield process


@pytest.fixture(scope="module")
def tape(server: ServerProcess, folder: Path) -> Path:
    """A session of old clients, exported."""
    client = OldClient(target_of(server), "s1")
    with start_worker(target_of(server)) as worker:
        register_tools(client, target_of(worker))
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda amount: client.execute("add", amount=amount), range(24)))
        assert client.execute("order", amount=5).success
    client.set("b", 40)
    list(client.stream("count", to=3))
    assert client.execute("cancel").success
    assert not client.execute("cancel").success
    client.close()
    path = folder / "s1.jsonl"
    assert dspex("session", "export", "s1", "-o", path, "--db", "sessions.db", cwd=folder).returncode == FINE
    return path


Replayed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A folder with tools that are not those of the recording any more."""
    (tmp_path / "shop.py").write_text(SHOP.replace("FEE = 1", "FEE = 2"))
    return tmp_path


def dspex(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return commands().run([*map(str, arguments)], cwd=cwd, env=environment(), timeout_s=within(60))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Replayed:
    """The command in this process, which spares a start of Python: arguments and folder to code, stdout and stderr."""

    def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        argv = ["dspex-persist", "replay", *map(str, arguments)]
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", argv)
            # What the tools' import leaves behind must not meet the next one.
            patch.setattr(sys, "path", [str(cwd), *sys.path])
            sys.modules.pop("shop", None)
            patch.setenv("COLUMNS", "200")
            with pytest.raises(SystemExit) as ended:
                main()
            sys.modules.pop("shop", None)
        return subprocess.CompletedProcess(argv, int(ended.value.code or 0), *capsys.readouterr())

    return run


def document_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on stdout, which has to be all of it."""
    assert len(result.stdout.splitlines()) == 1, result
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_a_recorded_session_replays_clean(tape: Path, folder: Path) -> None:
    result = dspex("replay", tape, "--tools", "shop", cwd=folder)
    assert (result.returncode, result.stderr) == (FINE, ""), result.stdout
    headline = result.stdout.splitlines()[-1]
    assert headline.startswith("session s1: no divergence in ")
    assert "it ran in worker worker-1: what it did was taken from the recording" in result.stdout
    # The file that the server has open replays the same, and is not written to.
    from_file = dspex("replay", "--db", "sessions.db", "s1", "--tools", "shop", "--json", cwd=folder)
    assert from_file.returncode == FINE, from_file
    document = document_of(from_file)
    assert document["ok"]
    outcomes = [each["outcome"] for each in document["executions"] if each["tool"] in ("order", "cancel", "count")]
    assert outcomes == ["same"] * 4
    assert sum(each["status"] == "conflict" for each in document["executions"]) == document["skipped"] - 1


def test_changed_code_is_reported_with_a_diff_and_an_exit_code(tape: Path, changed: Path) -> None:
    result = dspex("replay", tape, "--tools", "shop", cwd=changed)
    assert result.returncode == DIVERGED
    assert "it writes something else than recorded\n-b v1 = 6\n+b v1 = 7\n" in result.stdout
    assert "writes" in next(line for line in result.stdout.splitlines() if " order " in line)
    assert result.stdout.splitlines()[-1].startswith("session s1: 1 divergence in ")


def test_the_document_says_what_the_library_says(tape: Path, changed: Path, replayed: Replayed) -> None:
    last = len(tape.read_text().splitlines()) - 1
    chosen = ("--only-tool", "order", "--until", str(last))
    result = replayed(tape, "--tools", "shop", *chosen, "--json", cwd=changed)
    assert result.returncode == DIVERGED
    document = document_of(result)
    assert [each["tool"] for each in document["executions"]] == ["order", "add", "increase"]
    assert (document["same"], document["diverged"], document["skipped"]) == (1, 1, 1)
    scope: dict[str, Any] = {"__name__": "shop"}
    exec((changed / "shop.py").read_text(), scope)
    tools = [each for each in scope.values() if isinstance(each, Tool)]
    report = replay(tape, tools, only_tools=["order"], until=last)
    assert json.loads(json.dumps(report.document())) == document


def test_points_choose_executions(tape: Path, folder: Path, replayed: Replayed) -> None:
    everything = document_of(replayed(tape, "--tools", "shop", "--json", cwd=folder))
    last = everything["executions"][-1]
    chosen = ("--from", last["execution_id"], "--until", str(last["commit"]))
    document = document_of(replayed(tape, "--tools", "shop", *chosen, "--json", cwd=folder))
    assert document["executions"] == [last]


def test_with_a_database_commits_and_executions_are_those_of_the_database(
    tmp_path: Path, folder: Path, replayed: Replayed
) -> None:
    scope: dict[str, Any] = {"__name__": "shop"}
    exec((folder / "shop.py").read_text(), scope)
    tools = dspex_persist.Toolbox()
    tools.add(scope["add"])
    path = tmp_path / "two.db"
    with dspex_persist.connect(path, tools=tools) as state:
        for name in ("before", "s1"):
            dspex_persist.Context(name, state).define("a", 0)
        for amount in (1, 2):
            for name in ("s1", "before"):
                dspex_persist.Context(name, state).call("add", amount=amount)
    with dspex_persist.open_audit(path) as audit:
        stored = sorted(audit.iterate(ExecutionQuery(session="s1")), key=lambda each: each.began_sequence)
    ids = [each.execution_id for each in stored]
    document = document_of(replayed("--db", path, "s1", "--tools", "shop", "--json", cwd=folder))
    reported = [(each["execution_id"], each["commit"], each["outcome"]) for each in document["executions"]]
    assert reported == [(each.execution_id, each.began_sequence, "same") for each in stored]
    second = stored[1].began_sequence
    for point in (ids[1], f"exec_{second}", str(second)):
        chosen = replayed("--db", path, "s1", "--tools", "shop", "--from", point, "--until", point, cwd=folder)
        assert (chosen.returncode, ids[1] in chosen.stdout, ids[0] in chosen.stdout) == (FINE, True, False), chosen
    beyond = replayed("--db", path, "s1", "--tools", "shop", "--from", "1", cwd=folder)
    assert beyond.returncode == USAGE
    assert "there is no commit 1: session 's1' has commits 3 to " in beyond.stderr


def test_how_many_divergences_are_shown_can_be_chosen(tape: Path, changed: Path, replayed: Replayed) -> None:
    result = replayed(tape, "--tools", "shop", "--max-shown", "0", cwd=changed)
    assert result.returncode == DIVERGED
    assert "-b v1" not in result.stdout
    assert "1 more: --max-shown 1 shows all" in result.stdout


def test_the_state_alone_is_replayed(tape: Path, folder: Path, tmp_path: Path, replayed: Replayed) -> None:
    from_file = replayed("--db", "sessions.db", "s1", "--mode", "state", cwd=folder)
    assert (from_file.returncode, from_file.stderr) == (FINE, "")
    assert from_file.stdout.startswith("session s1: no divergence in ")
    lines = tape.read_text().splitlines(keepends=True)
    place = next(place for place, line in enumerate(lines) if '"name": "b", "version": 2,' in line)
    lines[place] = lines[place].replace('"version": 2', '"version": 3')
    altered = tmp_path / "altered.jsonl"
    altered.write_text("".join(lines))
    result = replayed(altered, "--mode", "state", "--json", cwd=folder)
    assert result.returncode == DIVERGED
    first = document_of(result)["divergences"][0]
    assert (first["what"], first["commit"], first["summary"]) == ("versions", place, "b version 3: version 2 is due")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere.jsonl", "--tools", "shop"], UNUSABLE, "cannot open nowhere.jsonl: No such file or directory"),
        (["shop.py", "--tools", "shop"], FAILED, "shop.py, line 1: it is not a recording"),
        (["future.jsonl", "--tools", "shop"], FAILED, "it has version 2, but this release reads version 1"),
        (["s1.jsonl"], USAGE, "name the tools: --tools package.module"),
        (["s1.jsonl", "--tools", "nothing.here"], USAGE, "the import failed"),
        (["s1.jsonl", "--tools", "shop", "--from", "noon"], USAGE, "setting from (flag --from): 'noon'"),
        (["s1.jsonl", "--tools", "shop", "--from", "99999"], USAGE, "there is no commit 99999: session 's1' has"),
        (["s1.jsonl", "--tools", "shop", "--from", "20", "--until", "3"], USAGE, "(flag --until): commit 3 is before"),
        (["s1.jsonl", "--tools", "shop", "--only-tool", "ad"], USAGE, "there are add, cancel, count, order"),
        (["s1.jsonl", "--tools", "shop", "--mode", "state"], USAGE, "--mode state runs no tools"),
        (["s1.jsonl", "--tools", "shop", "--reveal"], USAGE, "it needs --db"),
        (["--db", "sessions.db", "s2", "--tools", "shop"], FAILED, "s2"),
        (["--db", "nowhere.db", "s1", "--tools", "shop"], UNUSABLE, "nowhere.db"),
    ],
)
def test_a_refused_replay_says_why_in_one_sentence(
    tape: Path, folder: Path, replayed: Replayed, arguments: list[str], code: int, sentence: str
) -> None:
    (folder / "future.jsonl").write_text(tape.read_text().replace('"version": 1', '"version": 2', 1))
    result = replayed(*arguments, cwd=folder)
    assert result.returncode == code, result
    assert sentence in result.stderr
    assert result.stdout == ""


def test_an_error_is_an_object_for_programs(folder: Path, replayed: Replayed) -> None:
    result = replayed("nowhere.jsonl", "--tools", "shop", "--json", cwd=folder)
    assert result.returncode == UNUSABLE
    assert document_of(result) == {"ok": False, "error": "cannot open nowhere.jsonl: No such file or directory"}


def test_the_program_of_the_page_prints_what_the_page_says(tmp_path: Path) -> None:
    (program,) = programs_of("docs/replay.md")
    assert run(program.text, tmp_path) == program.output
