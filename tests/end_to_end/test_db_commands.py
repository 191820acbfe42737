"""dspex-persist db, as a process: its output, its exit codes, and that it works while a server runs."""

import json
import os
import pty
import re
import select
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dspex_persist.cli import maintenance
from dspex_persist.state.store.schema import REVISION
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring.connecting import connect
from tests.databases import copy_database
from tests.deadline import within
from tests.prepared import commands

ROOT = Path(__file__).parents[2]
COMMANDS = ("check", "current", "upgrade", "backup", "stats", "prune", "vacuum")
FINE, FAILED, USAGE, PROBLEMS, IN_USE, UNUSABLE = range(6)


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    """A database with a bit of everything, and its anchor."""
    return copy_database(filled, tmp_path / "sessions.db")


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")}
    return kept | {"COLUMNS": "200", "NO_COLOR": "1"} | more


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`dspex-persist db ...` to its end."""
    words = ["db", *map(str, arguments)]
    return commands().run(words, cwd=cwd, env=clean_environment(**environment), timeout_s=within(60))


def run_process(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "dspex_persist", "db", *map(str, arguments)],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=within(60),
        check=False,
    )


def arguments_of(command: str, target: Path) -> list[str | Path]:
    more: dict[str, list[str | Path]] = {"backup": [target], "prune": ["--keep-versions", "1", "--older-than", "30d"]}
    return [command, *more.get(command, [])]


def document_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON object on stdout, which must be its only line."""
    assert len(result.stdout.splitlines()) == 1, result
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def assert_one_sentence(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Assert that the command failed with one sentence and no traceback; return the sentence."""
    assert result.returncode == code, result
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result
    assert "Traceback" not in result.stderr
    return result.stderr


# Help


def test_help_lists_the_commands_and_the_exit_codes(tmp_path: Path) -> None:
    result = run("--help", cwd=tmp_path)
    assert result.returncode == FINE
    for command in COMMANDS:
        assert re.search(rf"^\W*{command} +\w", result.stdout, re.MULTILINE), command
    codes = {int(code) for code in re.findall(r"^ *(\d) {1,2}\w", result.stdout, re.MULTILINE)}
    assert codes == set(range(6))


def test_the_page_of_exit_codes_has_the_same() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert set(range(6)) <= codes


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_its_options(command: str) -> None:
    result = CliRunner().invoke(maintenance.app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == FINE
    assert "--db" in result.stdout
    assert "--json" in result.stdout


# A database at rest


def test_every_command_on_a_sound_database(path: Path, tmp_path: Path) -> None:
    for command in COMMANDS:
        result = run_process(*arguments_of(command, tmp_path / "backup.db"), cwd=tmp_path)
        assert result.returncode == FINE, result
        assert result.stderr == ""
        assert result.stdout.strip(), command


def test_every_command_prints_one_json_object(path: Path, tmp_path: Path) -> None:
    documents = {}
    for command in COMMANDS:
        result = run(*arguments_of(command, tmp_path / "backup.db"), "--json", "--db", path, cwd=ROOT)
        assert (result.returncode, result.stderr) == (FINE, ""), result
        documents[command] = document_of(result)
        assert documents[command]["ok"] is True
        assert documents[command]["path"] == str(path)
    commits = documents["check"]["commits"]
    assert documents["check"] == {
        "ok": True,
        "path": str(path),
        "revision": REVISION,
        "commits": commits,
        "pruned_commits": 20,
        "pruned_versions": 16,
        "pruned_events": 11,
        "anchored": True,
        "problems": [],
        "complete": True,
    }
    assert documents["current"]["is_head"] is True
    assert documents["upgrade"]["backup"] is None
    assert documents["backup"]["commits"] == commits
    assert documents["stats"]["commits"] == commits
    assert documents["vacuum"]["after_bytes"] == path.stat().st_size


def test_stats_shows_ids_of_users_as_they_are(tmp_path: Path) -> None:
    """Rich markup in them is not interpreted."""
    path = tmp_path / "sessions.db"
    with connect(path) as provider:
        provider.initialize_session("[bold red]x[/]")
        provider.register_variable("[bold red]x[/]", "[link=file:y]z[/link]", "integer", 1)
    shown = run("stats", cwd=tmp_path).stdout
    assert "[bold red]x[/]" in shown
    assert "[link=file:y]z[/link]" in shown
    assert "versions_by_sequence" in shown


def test_the_default_database_is_that_of_serve(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run("current", cwd=tmp_path).returncode == FINE
    assert run("current", cwd=elsewhere).returncode == UNUSABLE
    assert run("current", cwd=elsewhere, DSPEX_PERSIST_DB=str(path)).returncode == FINE
    (elsewhere / "dspex-persist.toml").write_text(f'db = "{path}"\n', encoding="utf-8")
    assert run("current", cwd=elsewhere).returncode == FINE
    assert run("current", "--db", tmp_path / "other.db", cwd=elsewhere).returncode == UNUSABLE


# Pruning


def versions_in(path: Path, session_id: str, name: str) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        (count,) = connection.execute(
            "SELECT count(*) FROM versions JOIN variables USING (variable_key) JOIN sessions USING (session_key) "
            "WHERE session_id = ? AND ended_sequence IS NULL AND name = ?",
            (session_id, name),
        ).fetchone()
    return int(count)


def test_pruning_is_tried_confirmed_and_accounted_for(path: Path, tmp_path: Path) -> None:
    before = versions_in(path, "again", "x")
    document = document_of(run("prune", "--keep-versions", "2", "--session", "again", "--json", cwd=tmp_path))
    assert (document["ok"], document["confirmed"], document["sessions"]) == (True, False, 1)
    assert versions_in(path, "again", "x") == before
    shown = run("prune", "--keep-versions", "2", "--session", "again", "--dry-run", cwd=tmp_path).stdout
    assert re.search(rf"{document['versions']} versions and 0 events of 1 session would be deleted", shown)
    result = run("prune", "--keep-versions", "2", "--session", "again", "--confirm", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (FINE, "")
    assert f"{document['versions']} versions and 0 events of 1 session deleted" in result.stdout
    assert versions_in(path, "again", "x") == 2
    checked = run("check", cwd=tmp_path)
    assert checked.returncode == FINE
    assert f"pruned, according to its log: {16 + document['versions']} versions and 11 events" in checked.stdout


def test_sessions_that_ended_are_pruned_by_when_they_ended(path: Path, tmp_path: Path) -> None:
    """Those that live keep all of their history."""
    young = run("prune", "--ended-sessions", "--older-than", "2026-03-01T12:00:00Z", "--json", cwd=tmp_path)
    assert document_of(young)["sessions"] == 0
    old = document_of(run("prune", "--ended-sessions", "--older-than", "1m", "--confirm", "--json", cwd=tmp_path))
    assert (old["confirmed"], old["sessions"]) == (True, 3)
    with closing(sqlite3.connect(path)) as connection:
        statement = "SELECT count(*) FROM variables JOIN sessions USING (session_key) WHERE ended_sequence IS NOT NULL"
        assert connection.execute(statement).fetchone() == (0,)
    assert versions_in(path, "again", "x") == 13
    assert run("check", cwd=tmp_path).returncode == FINE


def test_a_check_finds_other_deletions_from_a_pruned_commit(path: Path, tmp_path: Path) -> None:
    """The trigger allows the deletion, because the commit has been pruned; the check reports it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        statement = (
            "DELETE FROM versions WHERE (variable_key, version) = ("
            "SELECT variable_key, version FROM versions JOIN pruned USING (sequence) LIMIT 1)"
        )
        assert connection.execute(statement).rowcount == 1
    result = run("check", cwd=tmp_path)
    assert result.returncode == PROBLEMS
    assert "it was pruned, and its remaining rows do not match its last marker" in result.stdout


def test_a_server_prunes_by_its_settings_and_answers_meanwhile(filled: Path, tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    shutil.copy(filled, path)
    settings = {"retention_keep_versions": 5, "sweep_interval_s": 0.05}
    with ServedDatabase(path, settings) as server, connect(f"grpc://{server.target}") as client:
        wrote = 0
        deadline = time.monotonic() + within(30)
        while versions_in(path, "binaries", "pickled") > 5 or wrote < 20:
            assert time.monotonic() < deadline
            described = {"shape": [1], "data": [wrote]}
            wrote = client.set_variable("binaries", "pickled", described)
        assert client.get_variable("binaries", "pickled").version == wrote
    result = run("check", "--json", cwd=tmp_path)
    assert result.returncode == FINE, result.stdout
    assert document_of(result)["pruned_versions"] > 15


# Beside a server


@pytest.fixture(scope="module")
def served(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    path = tmp_path_factory.mktemp("served") / "sessions.db"
    shutil.copy(filled, path)
    with ServedDatabase(path) as server:
        yield server


def test_reading_commands_work_while_a_server_writes(served: ServedDatabase, tmp_path: Path) -> None:
    done = threading.Event()
    acknowledged: list[int] = []

    def write() -> None:
        with connect(f"grpc://{served.target}") as client:
            while not done.is_set():
                acknowledged.append(client.set_variable("again", "y", {"number": len(acknowledged)}))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number, command in enumerate(("check", "stats", "backup", "check")):
            target = tmp_path / f"backup{number}.db"
            least = acknowledged[-1] if acknowledged else 0
            result = run(*arguments_of(command, target), "--json", "--db", served.path, cwd=tmp_path)
            assert (result.returncode, result.stderr) == (FINE, ""), result
            assert document_of(result)["ok"]
            if command == "backup":
                with connect(target) as copy:
                    assert copy.get_variable("again", "y").version >= least
    finally:
        done.set()
        writer.join()
    assert len(acknowledged) > 10


@pytest.mark.parametrize("command", ["upgrade", "vacuum", "prune"])
def test_changing_commands_name_the_process_that_has_the_database(
    served: ServedDatabase, tmp_path: Path, command: str
) -> None:
    confirmed = ["--confirm"] if command == "prune" else []
    result = run(*arguments_of(command, tmp_path), *confirmed, "--db", served.path, cwd=tmp_path)
    assert f"in use by process {served.process.pid}, the server at {served.target}: " in assert_one_sentence(
        result, IN_USE
    )
    assert result.stdout == ""
    with connect(f"grpc://{served.target}") as client:
        assert client.heartbeat("main")


def test_check_and_backup_after_a_server_was_killed(filled: Path, tmp_path: Path) -> None:
    """The acknowledged writes are only in the WAL."""
    path = tmp_path / "sessions.db"
    shutil.copy(filled, path)
    with ServedDatabase(path) as server, connect(f"grpc://{server.target}") as client:
        version = client.set_variable("again", "y", {"last": "words"})
    assert Path(f"{path}-wal").stat().st_size > 0
    result = run("check", "--json", cwd=tmp_path)
    assert (result.returncode, document_of(result)["anchored"]) == (FINE, True), result
    assert run("backup", "copy.db", cwd=tmp_path).returncode == FINE
    with connect(tmp_path / "copy.db") as copy:
        assert copy.get_variable("again", "y").version == version


# Exit codes


def test_problems_are_3_and_named(path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (trigger,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'versions_no_update'").fetchone()
        connection.execute("DROP TRIGGER versions_no_update")
        connection.execute("UPDATE versions SET value = '1.2' WHERE variable_key = 1 AND version = 2")
        connection.execute(trigger)
    result = run("check", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (PROBLEMS, "")
    problem = re.search(r"^commit \d+, session 'main', variable 'temperature': ", result.stdout, re.MULTILINE)
    assert problem, result.stdout
    assert "1 problem in " in result.stdout
    document = document_of(run("check", "--json", cwd=tmp_path))
    assert (document["ok"], len(document["problems"])) == (False, 1)
    assert document["problems"][0].keys() == {"where", "what"}
    result = run("backup", "copy.db", "--json", cwd=tmp_path)
    assert (result.returncode, document_of(result)["ok"]) == (PROBLEMS, False)
    assert not (tmp_path / "copy.db").exists()


def test_lost_commits_are_problems_of_a_check(path: Path, tmp_path: Path) -> None:
    older = path.read_bytes()
    with connect(path) as provider:
        provider.initialize_session("gone")
    path.write_bytes(older)
    result = run("check", cwd=tmp_path)
    assert result.returncode == PROBLEMS
    assert re.search(r"^commit \d+: acknowledged", result.stdout, re.MULTILINE)
    sentence = assert_one_sentence(run("vacuum", cwd=tmp_path), UNUSABLE)
    assert "lost acknowledged commits" in sentence


def test_failed_is_1(path: Path, tmp_path: Path) -> None:
    (tmp_path / "there.db").write_text("precious")
    sentence = assert_one_sentence(run("backup", "there.db", cwd=tmp_path), FAILED)
    assert "exists already" in sentence
    assert (tmp_path / "there.db").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["check", "--unknown"], {}),
        (["backup"], {}),
        (["repair"], {}),
        (["prune"], {}),
        (["prune", "--keep-versions", "0"], {}),
        (["prune", "--older-than", "30"], {}),
        (["prune", "--older-than", "once"], {}),
        (["check"], {"DSPEX_PERSIST_DB": ":memory:"}),
        (["check"], {"DSPEX_PERSIST_CONFIG": "missing.toml"}),
    ],
)
def test_wrong_usage_is_2(path: Path, tmp_path: Path, arguments: list[str], environment: dict[str, str]) -> None:
    result = run(*arguments, cwd=tmp_path, **environment)
    assert result.returncode == USAGE, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_an_invalid_setting_is_reported_as_json_too(tmp_path: Path) -> None:
    result = run("check", "--json", cwd=tmp_path, DSPEX_PERSIST_DB=":memory:")
    sentence = assert_one_sentence(result, USAGE)
    assert document_of(result) == {"ok": False, "error": sentence.removeprefix("error: ").strip()}


@pytest.mark.parametrize(
    ("command", "what"),
    [
        *((command, "missing") for command in COMMANDS),
        *(("check", what) for what in ("folder", "garbage", "theirs", "newer")),
    ],
)
def test_unusable_is_5(path: Path, tmp_path: Path, command: str, what: str) -> None:
    """Each for each: tests/store/test_maintenance.py."""
    database = path if what == "newer" else tmp_path / "other.db"
    if what == "folder":
        database.mkdir()
    elif what == "garbage":
        database.write_bytes(b"no database at all\n" * 500)
    elif what == "theirs":
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("CREATE TABLE customers (name TEXT)")
    elif what == "newer":
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = database.read_bytes() if database.is_file() else None
    result = run(*arguments_of(command, tmp_path / "backup.db"), "--json", "--db", database, cwd=tmp_path)
    sentence = assert_one_sentence(result, UNUSABLE)
    assert str(database) in sentence
    assert document_of(result) == {"ok": False, "error": sentence.removeprefix("error: ").strip()}
    assert (database.read_bytes() if database.is_file() else None) == before
    assert not (tmp_path / "backup.db").exists()


# A terminal


def test_progress_is_drawn_on_a_terminal_and_only_on_stderr(path: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dspex_persist", "db", "backup", "copy.db", "--json"],
        cwd=tmp_path,
        env=clean_environment(TERM="xterm"),
        stdout=subprocess.PIPE,
        stderr=slave,
    )
    os.close(slave)
    drawn = read_to_end(master)
    stdout, _ = process.communicate(timeout=within(60))
    os.close(master)
    assert process.returncode == FINE
    assert json.loads(stdout)["ok"] is True
    assert b"checking commits" in drawn
    assert b"\x1b[" in drawn


def read_to_end(terminal: int) -> bytes:
    drawn = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            drawn += os.read(terminal, 65536)
        except OSError:
            # How Linux reports that the other side of the terminal is closed.
            break
    return drawn
