"""`db restore` as it is typed; and that no command writes its output over the database."""

import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dspex_persist import cli, connect
from dspex_persist.testing.server import ServedDatabase
from tests.end_to_end.test_db_commands import (
    FAILED,
    FINE,
    IN_USE,
    PROBLEMS,
    UNUSABLE,
    USAGE,
    assert_one_sentence,
    document_of,
    run,
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database whose server was killed, and a backup of before that. Only to be copied."""
    folder = tmp_path_factory.mktemp("killed")
    path = folder / "sessions.db"
    with connect(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1)
    assert run("backup", "b.db", cwd=folder).returncode == FINE
    with ServedDatabase(path) as server, connect(f"grpc://{server.target}") as client:
        for number in range(2, 30):
            client.set_variable("s", "x", number)
        refused = run("restore", "b.db", cwd=folder)
        assert "in use by process" in assert_one_sentence(refused, IN_USE)
        assert client.get_variable("s", "x").value.json == "29"
        server.process.kill()
    assert Path(f"{path}-wal").stat().st_size > 0
    return folder


@pytest.fixture
def place(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(killed, tmp_path / "place")


def value_in(path: Path) -> str:
    with connect(path) as state:
        return state.get_variable("s", "x").value.json


def test_a_backup_is_put_in_place_and_the_old_file_kept(place: Path) -> None:
    result = run("restore", "b.db", cwd=place)
    assert (result.returncode, result.stderr) == (FINE, "")
    previous = re.search(r"previous database: (\S+)", result.stdout)
    assert previous is not None, result.stdout
    assert run("check", cwd=place).returncode == FINE
    assert value_in(place / "sessions.db") == "1"
    assert value_in(place / previous[1]) == "29"


def test_json(place: Path) -> None:
    result = run("restore", "b.db", "--db", "new.db", "--json", cwd=place)
    document = document_of(result)
    assert (document["ok"], document["path"], document["backup"], document["aside"]) == (True, "new.db", "b.db", None)
    assert value_in(place / "new.db") == "1"
    assert value_in(place / "sessions.db") == "29"


def test_lost_commits_name_the_way_back_and_it_works(place: Path) -> None:
    (place / "sessions.db-wal").unlink()
    sentence = assert_one_sentence(run("vacuum", cwd=place), UNUSABLE)
    named = re.search(r"dspex-persist db restore BACKUP --db (\S+);", sentence)
    assert named is not None
    assert run("restore", "b.db", "--db", named[1], cwd=place).returncode == FINE
    assert value_in(place / "sessions.db") == "1"


def test_a_damaged_backup_changes_nothing(place: Path) -> None:
    with closing(sqlite3.connect(place / "b.db", isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER commits_no_update")
        connection.execute("UPDATE commits SET actor = 'mallory' WHERE sequence = 2")
    result = run("restore", "b.db", cwd=place)
    assert result.returncode == PROBLEMS, result
    assert "nothing was changed" in result.stdout
    assert value_in(place / "sessions.db") == "29"


def test_refusals_are_one_sentence(place: Path) -> None:
    assert "is the database itself" in assert_one_sentence(run("restore", "sessions.db", cwd=place), FAILED)
    assert "no such file" in assert_one_sentence(run("restore", "nowhere.db", cwd=place), UNUSABLE)


# Outputs


def itself(path: Path) -> Path:
    return path


def by_link(path: Path) -> Path:
    (path.parent / "link").symlink_to(path)
    return path.parent / "link"


def by_hard_link(path: Path) -> Path:
    os.link(path, path.parent / "hard")
    return path.parent / "hard"


def side_file(suffix: str) -> Callable[[Path], Path]:
    return lambda path: path.with_name(path.name + suffix)


OUTPUTS = [itself, by_link, by_hard_link, *map(side_file, ("-wal", "-shm", "-journal", ".anchor", ".lock"))]
WRITING: list[list[str]] = [
    ["session", "export", "s", "-o", "OUTPUT"],
    ["audit", "report", "s", "-o", "OUTPUT"],
    ["db", "backup", "OUTPUT"],
]


@pytest.mark.parametrize("command", WRITING, ids=lambda words: words[1])
@pytest.mark.parametrize("output", OUTPUTS)
def test_no_output_is_a_file_of_the_database(
    tmp_path: Path,
    command: list[str],
    output: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "sessions.db"
    with connect(path) as state:
        state.initialize_session("s")
    target = output(path)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    words = [str(target) if word == "OUTPUT" else word for word in command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dspex-persist", *words, "--db", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    errors = capsys.readouterr().err
    assert "give another name" in errors
    assert ended.value.code in (FAILED, USAGE)
    assert "Traceback" not in errors
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_a_backup_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    refused = assert_one_sentence(run("restore", "nope.db", cwd=tmp_path), UNUSABLE)
    assert "there is no such file; name a copy made by `dspex-persist db backup`" in refused
    assert list(tmp_path.glob("*.db*")) == []
