"""dspex-persist session, as a process: while a server runs, without one, killed half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from typer.testing import CliRunner

from dspex_persist import Context, cli
from dspex_persist.cli import session as session_commands
from dspex_persist.infra.streams import READER_GONE
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.store import maintenance
from dspex_persist.wiring.connecting import connect
from tests.deadline import within
from tests.end_to_end import programs
from tests.end_to_end.old_style import environment, serve, target_of
from tests.end_to_end.test_db_commands import FAILED, FINE, IN_USE, UNUSABLE, USAGE, assert_one_sentence, document_of
from tests.prepared import commands

TOOLS = ("--tools", "tests.end_to_end.served_tools")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dspex_persist", "session", *map(str, arguments)]


def run_process(*arguments: str | Path, cwd: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """`dspex-persist session ...` to its end, where `sessions.db` is the database unless it says another."""
    words = ["session", *map(str, arguments)]
    return commands().run(words, cwd=cwd, env=environment(), timeout_s=within(60), text=text or "")


Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same within this process, which takes a tenth of the time."""
    for name in [name for name in os.environ if name.startswith("DSPEX_PERSIST_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["dspex-persist", "session", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        stdout, stderr = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), stdout, stderr)

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def filled(path: Path) -> Path:
    """A database with session `s`: a (1) and a secret."""
    with EmbeddedState(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "a", "integer", 0)
        state.set_variable("s", "a", 1)
        state.register_variable("s", "key", "string", "hush", metadata={"sensitive": "true"})
    return path


@pytest.fixture
def served(path: Path) -> Iterator[BridgedState]:
    with serve(path, *TOOLS) as server, BridgedState(target_of(server)) as state:
        yield state


def test_a_session_moves_from_one_server_to_another(served: BridgedState, tmp_path: Path) -> None:
    served.initialize_session("s")
    served.register_variable("s", "a", "integer", 0)
    assert served.execute_tool("s", "add", {"name": "a", "amount": 5}, idempotency_key="once").success
    assert not served.execute_tool("s", "fail").success
    served.set_variable("s", "a", 7)

    result = run_process("export", "s", "-o", "s.jsonl", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (FINE, "")
    assert result.stdout == "s.jsonl: 7 commits of session s\n"
    result = run_process("import", "s.jsonl", "--db", "other.db", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (FINE, "")
    assert result.stdout == "other.db: session s imported (7 commits, 1 to 7)\n"

    assert maintenance.check(tmp_path / "other.db").problems == ()
    with serve(tmp_path / "other.db", *TOOLS) as server, BridgedState(target_of(server)) as there:
        histories = [
            [(each.version, each.value, each.actor, each.created_at) for each in state.get_variable_history("s", "a")]
            for state in (served, there)
        ]
        assert histories[0] == histories[1]
        repeated = there.execute_tool("s", "add", {"name": "a", "amount": 5}, idempotency_key="once")
        assert (repeated.repeated, there.get_value("s", "a")) == (True, 7)
        assert there.execute_tool("s", "add", {"name": "a", "amount": 1}).success
        assert (served.get_value("s", "a"), there.get_value("s", "a")) == (7, 8)


def test_commands_that_change_a_file_wait_for_its_server_to_end(served: BridgedState, run: Run) -> None:
    served.initialize_session("s")
    assert run("export", "s", "-o", "s.jsonl").returncode == FINE
    for arguments in (("import", "s.jsonl", "--as", "copy"), ("fork", "s", "copy")):
        sentence = assert_one_sentence(run(*arguments), IN_USE)
        assert "is in use by process" in sentence
        document = document_of(result := run(*arguments, "--json"))
        assert (result.returncode, document["ok"]) == (IN_USE, False)


def test_a_running_server_imports_and_exports_while_others_write(
    served: BridgedState, tmp_path: Path, run: Run
) -> None:
    server = served._target
    served.initialize_session("s")
    served.register_variable("s", "a", "integer", 0)
    assert served.set_variable("s", "a", 1, idempotency_key="once") == 1
    assert run("export", "s", "-o", "s.jsonl", "--target", server).returncode == FINE
    served.cleanup_session("s")
    served.initialize_session("other")
    result = run("import", "s.jsonl", "--target", server)
    assert (result.returncode, result.stderr) == (FINE, "")
    assert result.stdout == f"grpc://{server}: session s imported (3 commits, 6 to 8)\n"
    assert served.set_variable("s", "a", 1, idempotency_key="once") == 1
    assert [each.version for each in served.get_variable_history("s", "a")] == [1, 0]
    assert run("export", "s", "-o", "again.jsonl", "--target", server).returncode == FINE
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()

    sentence = assert_one_sentence(run("import", "s.jsonl", "--target", server), FAILED)
    assert "'s' is live here already" in sentence
    document = document_of(run("import", "s.jsonl", "--as", "copy", "--target", server, "--json"))
    assert (document["path"], document["session_id"], document["commits"]) == (f"grpc://{server}", "copy", 3)
    lines = (tmp_path / "s.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:-1]))
    for name, reason in (("cut.jsonl", "it ends after 2 commits of 3"), ("missing.jsonl", "cannot be read")):
        assert reason in assert_one_sentence(run("import", name, "--as", "no", "--target", server), FAILED)
    assert not served.heartbeat("no")
    assert run("import", "s.jsonl", "--target", server, "--db", "other.db").returncode == USAGE


def test_recordings_go_through_pipes(filled: Path, tmp_path: Path, run: Run) -> None:
    with EmbeddedState(filled) as state:
        state.initialize_session("ü")
        state.register_variable("ü", "x", "string", "漢\u2028😀")
    exported = run_process("export", "ü", "-o", "-", cwd=tmp_path)
    assert (exported.returncode, exported.stderr) == (FINE, "")
    imported = run_process("import", "-", "--as", "again", cwd=tmp_path, text=exported.stdout)
    assert (imported.returncode, imported.stderr) == (FINE, "")
    again = run("export", "again", "-o", "-")
    assert again.stdout.replace('"again"', '"ü"') == exported.stdout


def test_a_reader_that_has_seen_enough_is_no_fault(filled: Path, tmp_path: Path) -> None:
    with EmbeddedState(filled) as state:
        state.set_variable("s", "key", "x" * 2_000_000)
    with subprocess.Popen(
        command("export", "s", "-o", "-", "--reveal"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == READER_GONE


def test_every_command_prints_one_json_object(filled: Path, tmp_path: Path, run: Run) -> None:
    exported = document_of(run("export", "s", "-o", "s.jsonl", "--reveal", "--json"))
    assert exported == {
        "ok": True,
        "path": "sessions.db",
        "target": "s.jsonl",
        "session_id": "s",
        "commits": 4,
        "masked": False,
    }
    imported = document_of(run("import", "s.jsonl", "--as", "copy", "--json"))
    assert (imported["ok"], imported["session_id"], imported["first_sequence"]) == (True, "copy", 5)
    forked = document_of(run("fork", "s", "new", "--at", "2", "--json"))
    assert forked == {
        "ok": True,
        "path": "sessions.db",
        "session_id": "new",
        "forked_from": "s",
        "forked_at": 2,
        "variables": 1,
    }


def test_an_export_reports_omitted_values_and_an_import_does_not_invent_them(
    filled: Path, tmp_path: Path, run: Run
) -> None:
    result = run("export", "s", "-o", "s.jsonl")
    assert result.stdout.endswith("values of sensitive variables are left out (--reveal)\n")
    assert "hush" not in (tmp_path / "s.jsonl").read_text()
    sentence = assert_one_sentence(run("import", "s.jsonl", "--db", "other.db"), FAILED)
    assert "export the session with --reveal" in sentence
    assert not (tmp_path / "other.db").exists()


def test_a_fork_begins_with_the_variables_of_that_commit(filled: Path, tmp_path: Path, run: Run) -> None:
    result = run("fork", "s", "new", "--at", "3^")
    assert (result.returncode, result.stderr) == (FINE, "")
    assert result.stdout == "sessions.db: session new begun with 1 variable of s as of commit 2\n"
    with connect(filled) as state:
        assert [(each.name, each.value.json) for each in state.list_variables("new")] == [("a", "0")]
        assert state.get_session("new").metadata == {"forked_from": "s", "forked_at": "2"}


def test_a_session_is_shown_with_times_as_audits_show_them(
    filled: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "HERE+3")
    time.tzset()
    try:
        began = datetime.fromisoformat(json.loads(run("show", "s", "--json").stdout)["created_at"])
        for options, offset, name in (((), -3, "HERE"), (("--utc",), 0, "UTC")):
            shown = began + timedelta(hours=offset)
            line = f"began       {shown:%Y-%m-%d %H:%M:%S}.{shown.microsecond // 1000:03d} {name}"
            assert line in run("show", "s", *options).stdout.splitlines()
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("export", "ghost", "-o", "-"), FAILED, "no session 'ghost'"),
        (("export", "s", "-o", "missing/s.jsonl"), FAILED, "No such file"),
        (("export", "s", "-o", "s.jsonl", "--db", "missing.db"), UNUSABLE, "there is no such file"),
        (("import", "missing.jsonl"), FAILED, "cannot be read"),
        (("import", "sessions.db"), FAILED, "line 1"),
        (("fork", "s", "s"), FAILED, "is live here already"),
        (("fork", "s", "new", "--at", "soon"), USAGE, "is not a point in the history"),
        (("fork", "s", "new", "--at", "99"), USAGE, "there is no commit 99 yet"),
        (("export", "s", "-o", "-", "--started", "99"), USAGE, "began with commit 1, not 99"),
        (("fork", "s", "new", "--db", "missing.db"), UNUSABLE, "there is no such file"),
    ],
)
def test_an_error_is_one_sentence_and_a_code(
    filled: Path, tmp_path: Path, run: Run, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    assert sentence in assert_one_sentence(run(*arguments), code)
    assert not (tmp_path / "missing.db").exists()


def test_one_stdout_is_not_for_two(filled: Path, tmp_path: Path, run: Run) -> None:
    result = run("export", "s", "-o", "-", "--json")
    assert result.returncode == USAGE
    assert "name a file" in result.stderr


@pytest.mark.parametrize("name", ["export", "import", "fork"])
def test_help_of_each_command_has_its_options(name: str) -> None:
    result = CliRunner().invoke(session_commands.app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == FINE
    assert "--db" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("program", programs.programs_of("docs/recordings.md"), ids=str)
def test_a_program_on_the_page_prints_what_it_says(program: programs.Program, tmp_path: Path) -> None:
    assert programs.run(program.text, tmp_path) == program.output


def long_recording(run: Run, commits: int) -> list[str]:
    """The lines of a session with that many commits, each some 5 kB."""
    result = run("export", "s", "-o", "-", "--reveal")
    header, *lines = result.stdout.splitlines(keepends=True)
    last: dict[str, Any] = json.loads(lines[-1])
    (version,) = last["versions"]
    value = json.dumps("x" * 5_000)
    for number in range(len(lines) + 1, commits + 1):
        version = version | {"version": version["version"] + 1, "kind": "set", "json": value}
        lines.append(json.dumps(last | {"commit": number, "versions": [version], "events": []}) + "\n")
    return [json.dumps(json.loads(header) | {"commits": commits}) + "\n", *lines]


@pytest.mark.crash
def test_a_killed_import_leaves_nothing(filled: Path, tmp_path: Path, run: Run) -> None:
    lines = long_recording(run, 300)
    before = maintenance.check(filled).commits
    with subprocess.Popen(
        command("import", "-", "--as", "copy"), cwd=tmp_path, env=environment(), stdin=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        # A pipe holds 64 kB: when all of this is in it, most has been read, and is in the transaction.
        process.stdin.writelines(lines[:290])
        process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with EmbeddedState(filled) as state:
        assert state.head_sequence == before
        assert not state.heartbeat("copy")
    (tmp_path / "copy.jsonl").write_text("".join(lines), encoding="utf-8")
    result = run("import", "copy.jsonl", "--as", "copy")
    assert result.returncode == FINE, result
    report = maintenance.check(filled)
    assert (report.commits, report.problems) == (before + 300, ())


# A running server


@pytest.mark.parametrize("revealing", [False, True])
def test_a_server_exports_what_its_file_has(filled: Path, tmp_path: Path, revealing: bool) -> None:
    """Line by line what an export of the file is; the sensitive only if the server was started so."""
    with serve(filled, *(["--audit-reveal"] if revealing else [])) as server:
        target = target_of(server)
        served = run_process("export", "s", "-o", "served.jsonl", "--reveal", "--target", target, cwd=tmp_path)
        read = run_process("export", "s", "-o", "read.jsonl", *(["--reveal"] if revealing else []), cwd=tmp_path)
        streamed = run_process("export", "s", "-o", "-", "--target", f"grpc://{target}", cwd=tmp_path)
    assert (served.returncode, served.stderr) == (read.returncode, read.stderr) == (FINE, "")
    masked = "" if revealing else "; values of sensitive variables are left out (start the server with --audit-reveal)"
    assert served.stdout == f"served.jsonl: 4 commits of session s{masked}\n"
    text = (tmp_path / "served.jsonl").read_text()
    assert text == (tmp_path / "read.jsonl").read_text()
    assert ("hush" in text) == revealing
    assert (tmp_path / "served.jsonl").stat().st_mode & 0o777 == 0o600
    assert "hush" not in streamed.stdout
    assert streamed.stdout.splitlines()[1] == text.splitlines()[1]


def test_a_server_forks_while_it_serves(served: BridgedState, tmp_path: Path, run: Run) -> None:
    served.initialize_session("s")
    served.register_variable("s", "a", "integer", 1)
    served.set_variable("s", "a", 2)
    target = served._target
    result = run("fork", "s", "what-if", "--at", "2", "--target", target, "--json")
    assert document_of(result) == {
        "ok": True,
        "path": f"grpc://{target}",
        "session_id": "what-if",
        "forked_from": "s",
        "forked_at": 2,
        "variables": 1,
    }
    assert served.get_value("what-if", "a") == 1
    (first,) = served.get_variable_history("what-if", "a")
    assert first.actor.startswith("user:")
    result = run("fork", "s", "what-if", "--target", target)
    assert "what-if" in assert_one_sentence(result, FAILED)
    served.register_variable("s", "key", "string", "hush", metadata={"sensitive": "true"})
    result = run("fork", "s", "again", "--target", target)
    assert "--audit-reveal" in assert_one_sentence(result, FAILED)
    assert not served.heartbeat("again")
    result = run("fork", "s", "again", "--at", "soon", "--target", target)
    assert "is not a point in the history" in assert_one_sentence(result, USAGE)
    result = run("export", "s", "-o", "-", "--started", "99", "--target", target)
    assert "began with commit 1, not 99" in assert_one_sentence(result, USAGE)


def test_the_scheme_of_a_server_may_have_capital_letters(path: Path, run: Run, tmp_path: Path) -> None:
    with serve(path, *TOOLS, "--listen", f"UNIX:{tmp_path}/s.sock"):
        for scheme in ("GRPC+UNIX", "Grpc+Unix"):
            with Context("s", f"{scheme}:{tmp_path}/s.sock") as ctx:
                ctx["x"] = 1
                # It is there.
                ctx.ensure_bridged(f"grpc+unix:{tmp_path}/s.sock")
        for scheme in ("UNIX", "GRPC+UNIX", "Grpc+Unix"):
            assert run("show", "s", "--target", f"{scheme}:{tmp_path}/s.sock").returncode == FINE


@pytest.mark.parametrize("command", [("export", "s", "-o", "s.jsonl"), ("fork", "s", "t")])
def test_an_unreachable_server_and_arguments_that_name_no_server(
    run: Run, command: tuple[str, ...], filled: Path
) -> None:
    result = run(*command, "--target", "127.0.0.1:1")
    assert "127.0.0.1:1" in assert_one_sentence(result, FAILED)
    for wrong in (("--db", "sessions.db", "--target", "127.0.0.1:1"), ("--db", "grpc://127.0.0.1:1")):
        result = run(*command, *wrong)
        assert result.returncode == USAGE
        assert "--target" in result.stderr
    assert not (filled.parent / "s.jsonl").exists()
