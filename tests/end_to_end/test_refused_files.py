"""A command or a server that refuses a file leaves its folder as it was: the same names, the same bytes."""

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.state.anchor import Anchor, Head
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import NotADatabaseError
from tests.deadline import within
from tests.end_to_end.test_db_commands import FINE, IN_USE, PROBLEMS, UNUSABLE, clean_environment
from tests.prepared import commands

OLDEST = Path(__file__).parents[1] / "assets" / "0001.db"
DATABASE = "s.db"
# Here SQLite has written to all of the database's side files: the process is killed while it has the database open.
WRITE_AND_DIE = textwrap.dedent("""
    import os, signal
    from pathlib import Path
    from dspex_persist.state.embedded import EmbeddedState
    from dspex_persist.state.store import maintenance
    from dspex_persist.state.store.maintenance import transfer
    path = Path("s.db")
    state = EmbeddedState(path)
    state.initialize_session("s")
    state.register_variable("s", "x", "string", "")
    maintenance.backup(path, Path("b.db"))
    transfer.export_session(path, "s", Path("s.jsonl"))
    state.close()
    state = EmbeddedState(path)
    for number in range(1, 41):
        state.set_variable("s", "x", str(number) + "." * 2000)
    os.kill(os.getpid(), signal.SIGKILL)
""")
READING = (
    ("audit", "blame", "s"),
    ("audit", "commits"),
    ("audit", "diff", "s", "--from", "1", "--to", "2"),
    ("audit", "executions"),
    ("audit", "history", "s", "x"),
    ("audit", "report", "s", "-o", "../out"),
    ("audit", "sessions"),
    ("audit", "show", "exec_1_a"),
    ("audit", "state", "s"),
    ("audit", "verify"),
    ("db", "backup", "../out"),
    ("db", "check"),
    ("db", "current"),
    ("db", "prune", "--keep-versions", "1"),
    ("db", "stats"),
    ("get", "s"),
    ("replay", "s", "--mode", "state"),
    ("session", "export", "s", "-o", "../out"),
    ("sessions", "list"),
    ("watch", "nothing"),
)
WRITING = (
    ("call", "s", "nothing"),
    ("db", "prune", "--keep-versions", "1", "--confirm"),
    ("db", "upgrade"),
    ("db", "vacuum"),
    ("serve", "--listen", "127.0.0.1:0"),
    ("session", "fork", "s", "t"),
    ("session", "import", "s.jsonl", "--as", "t"),
    ("sessions", "end", "s"),
    ("set", "s", "y", "1", "--create"),
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database whose process was killed, a backup and a recording. Only to be read."""
    folder = tmp_path_factory.mktemp("killed")
    argv = [sys.executable, "-c", WRITE_AND_DIE]
    assert subprocess.run(argv, check=False, cwd=folder, timeout=within(60)).returncode == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} == {
        *("s.db", "s.db-wal", "s.db-shm", "s.db.anchor", "s.db.lock"),
        *("b.db", "s.jsonl"),
    }
    return folder


Run = Callable[[Path, Sequence[str]], tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Run:
    """Run a command in a folder, and return its exit code and output."""
    env = clean_environment()

    def run(folder: Path, words: Sequence[str]) -> tuple[int, str]:
        ended = commands().run(words, cwd=folder, env=env, timeout_s=within(30))
        return ended.returncode, ended.stdout + ended.stderr

    return run


def contents(folder: Path, but: str = "nothing") -> dict[str, str]:
    paths = [path for path in folder.iterdir() if not path.name.endswith(but)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# Why a file is refused. Each changes a copy of the folder.


def with_half_a_wal(folder: Path) -> None:
    os.truncate(folder / "s.db-wal", (folder / "s.db-wal").stat().st_size // 2)


def with_a_damaged_wal(folder: Path) -> None:
    flip(folder / "s.db-wal", (folder / "s.db-wal").stat().st_size // 2)


def without_a_wal(folder: Path) -> None:
    (folder / "s.db-wal").unlink()


def copied_without_a_wal(folder: Path) -> None:
    for suffix in ("-wal", "-shm", ".lock"):
        (folder / f"s.db{suffix}").unlink()


def copied_with_half_a_wal(folder: Path) -> None:
    with_half_a_wal(folder)
    for suffix in ("-shm", ".lock"):
        (folder / f"s.db{suffix}").unlink()


def emptied(folder: Path) -> None:
    """SQLite removes the WAL of an empty file as soon as it reads that."""
    os.truncate(folder / "s.db", 0)


def of_an_older_release_and_behind(folder: Path) -> None:
    for suffix in ("-wal", "-shm", ".lock"):
        (folder / f"s.db{suffix}").unlink()
    shutil.copy(OLDEST, folder / "s.db")
    anchor = Anchor(os.open(folder / "s.db.anchor", os.O_RDWR))
    anchor.write(Head(100_000, bytes(32)))
    anchor.close()


def of_a_newer_release(folder: Path) -> None:
    written_to(folder, "UPDATE alembic_version SET version_num = '9999'")


def of_a_newer_release_and_closed(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "s.db", isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


def of_another_program(folder: Path) -> None:
    replaced_by_foreign(folder)
    written_to(folder, "INSERT INTO customers VALUES ('Ann')", "PRAGMA journal_mode = WAL")


def of_another_program_and_closed(folder: Path) -> None:
    replaced_by_foreign(folder)


def of_another_program_that_was_killed(folder: Path) -> None:
    """In the middle of a transaction: a journal is there, to be rolled back."""
    replaced_by_foreign(folder)
    spilling = "PRAGMA cache_size = 1; BEGIN; WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n "
    spilling += "WHERE i < 3000) INSERT INTO customers SELECT i || hex(zeroblob(200)) FROM n"
    program = f"""import os, sqlite3; c = sqlite3.connect("s.db", isolation_level=None)
for each in {spilling.split("; ")!r}: c.execute(each)
os.kill(os.getpid(), 9)"""
    subprocess.run([sys.executable, "-c", program], check=False, cwd=folder, timeout=within(60))
    assert (folder / "s.db-journal").stat().st_size > 0


def with_a_damaged_header(folder: Path) -> None:
    """And a damaged WAL, where there may be another first page."""
    for name in ("s.db", "s.db-wal"):
        written_over(folder / name, 0, b"\xff" * 100)


def with_a_damaged_header_and_no_wal(folder: Path) -> None:
    copied_without_a_wal(folder)
    written_over(folder / "s.db", 0, b"\xff" * 100)


def with_a_damaged_schema(folder: Path) -> None:
    copied_without_a_wal(folder)
    written_over(folder / "s.db", 100, b"\xff" * 3000)


def flip(file: Path, at: int) -> None:
    written_over(file, at, bytes([file.read_bytes()[at] ^ 1]))


def written_over(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)


def replaced_by_foreign(folder: Path) -> None:
    for path in folder.glob("s.db*"):
        path.unlink()
    with closing(sqlite3.connect(folder / "s.db", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")


def written_to(folder: Path, statement: str, before: str = "") -> None:
    """Run a statement, and leave the files as a process killed after it does: the write is only in the WAL."""
    with closing(sqlite3.connect(folder / "s.db", isolation_level=None)) as connection:
        connection.execute(before)
        connection.execute(statement)
        kept = {path: path.read_bytes() for path in folder.glob("s.db*")}
    for path, content in kept.items():
        path.write_bytes(content)
    assert (folder / "s.db-wal").stat().st_size > 0


Reason = Callable[[Path], None]
LOST: tuple[Reason, ...] = (
    with_half_a_wal,
    with_a_damaged_wal,
    without_a_wal,
    copied_without_a_wal,
    copied_with_half_a_wal,
)
UNREADABLE: tuple[Reason, ...] = (
    of_a_newer_release,
    of_a_newer_release_and_closed,
    of_another_program,
    of_another_program_and_closed,
    of_another_program_that_was_killed,
    with_a_damaged_header,
    with_a_damaged_header_and_no_wal,
    with_a_damaged_schema,
)


LIKE_OTHERS = (of_another_program_and_closed, with_a_damaged_header_and_no_wal)
"""Commands that only read cannot tell these files from others."""


@pytest.mark.parametrize("reason", [*LOST, emptied, of_an_older_release_and_behind, *UNREADABLE])
def test_refused_writing_commands_change_no_file(killed: Path, tmp_path: Path, run: Run, reason: Reason) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    reason(folder)
    before = contents(folder)
    for words in WRITING:
        code, output = run(folder, [*words, "--db", DATABASE])
        assert code == UNUSABLE, (words, output)
        assert output.startswith("error: "), (words, output)
        assert contents(folder) == before, (words, output)


@pytest.mark.parametrize("reason", [reason for reason in UNREADABLE if reason not in LIKE_OTHERS])
def test_refused_reading_commands_change_no_file(killed: Path, tmp_path: Path, run: Run, reason: Reason) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    reason(folder)
    before = contents(folder)
    for words in (*READING, ("audit", "web", "--port", "0")):
        code, output = run(folder, [*words, "--db", DATABASE])
        assert code == UNUSABLE, (words, output)
        assert contents(folder) == before, (words, output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reason", LOST)
def test_reading_a_file_that_lost_commits_changes_nothing(
    killed: Path, tmp_path: Path, run: Run, reason: Reason
) -> None:
    """Such a file can be read; SQLite adds the files that it reads with, and nothing else changes."""
    folder = shutil.copytree(killed, tmp_path / "copy")
    reason(folder)
    before = contents(folder, but="-shm")
    for words in (("db", "check"), ("db", "backup", "../out"), ("audit", "verify"), ("audit", "history", "s", "x")):
        code, output = run(folder, [*words, "--db", DATABASE])
        assert code == (FINE if words[1] == "history" else PROBLEMS), (words, output)
        after = contents(folder)
        assert before.items() <= after.items(), (words, output)
        assert after.keys() - before.keys() <= {"s.db-shm", "s.db-wal"}, (words, output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reason", [*UNREADABLE, emptied])
def test_a_refused_backup_and_the_database_stay_as_they_were(
    killed: Path, tmp_path: Path, run: Run, reason: Reason
) -> None:
    wrong, folder = shutil.copytree(killed, tmp_path / "wrong"), shutil.copytree(killed, tmp_path / "copy")
    reason(wrong)
    before, before_wrong = contents(folder), contents(wrong)
    code, output = run(folder, ["db", "restore", str(wrong / "s.db"), "--db", DATABASE])
    assert code == UNUSABLE, output
    assert (contents(folder), contents(wrong)) == (before, before_wrong)


def test_nothing_is_restored_over_another_programs_file(killed: Path, tmp_path: Path, run: Run) -> None:
    for reason in (of_another_program, of_another_program_and_closed):
        folder = shutil.copytree(killed, tmp_path / reason.__name__)
        reason(folder)
        before = contents(folder)
        code, output = run(folder, ["db", "restore", "b.db", "--db", DATABASE])
        assert (code, "another program's database" in output) == (UNUSABLE, True), output
        assert contents(folder) == before


def test_a_backup_with_problems_changes_nothing(killed: Path, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    with closing(sqlite3.connect(folder / "b.db", isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER commits_no_update")
    before = contents(folder)
    code, output = run(folder, ["db", "restore", "b.db", "--db", DATABASE])
    assert code == PROBLEMS, output
    assert contents(folder) == before


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_file_in_use_is_left_alone(killed: Path, tmp_path: Path, run: Run, has_lock: bool) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    with EmbeddedState(folder / DATABASE) as owner:
        owner.set_variable("s", "x", "newest")
        if not has_lock:
            (folder / "s.db.lock").unlink()
        # The owner's shared memory changes whenever it reads the file.
        before = contents(folder, but="-shm")
        for words in (*WRITING, ("db", "restore", "b.db")):
            code, output = run(folder, [*words, "--db", DATABASE])
            assert code == IN_USE, (words, output)
            assert contents(folder, but="-shm") == before, (words, output)
        assert owner.get_value("s", "x") == "newest"


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal", ".anchor", ".lock"])
def test_the_name_of_a_file_next_to_a_database_is_refused(killed: Path, tmp_path: Path, run: Run, suffix: str) -> None:
    folder = shutil.copytree(killed, tmp_path / "copy")
    before = contents(folder)
    all_commands = (*READING, *WRITING, ("audit", "web", "--port", "0"), ("db", "restore", "b.db"))
    for words in all_commands:
        code, output = run(folder, [*words, "--db", f"{DATABASE}{suffix}"])
        assert code == UNUSABLE, (words, output)
        assert "its name is that of a file next to a database; did you mean s.db?" in output, (words, output)
        assert contents(folder) == before, (words, output)
    code, output = run(folder, ["db", "restore", f"b.db{suffix}"])
    assert code == UNUSABLE, output
    assert contents(folder) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "is_refused"), [("new-wal", True), ("new.lock", False), ("new.anchor", False)])
def test_without_a_database_only_names_of_sqlite_s_files_are_refused(
    tmp_path: Path, name: str, is_refused: bool
) -> None:
    if is_refused:
        with pytest.raises(NotADatabaseError, match=r"did you mean .*/new\?"):
            EmbeddedState(tmp_path / name)
    else:
        EmbeddedState(tmp_path / name).close()
    assert (tmp_path / name).exists() is not is_refused


def test_all_commands_succeed_on_the_unchanged_folder(killed: Path, tmp_path: Path, run: Run) -> None:
    """The folder of these tests is sound, so it is their changes that are refused."""
    for words in (*READING, *WRITING):
        if words[0] != "serve":
            folder = shutil.copytree(killed, tmp_path / "copy", dirs_exist_ok=True)
            wanted: Any = FINE if {"show", "nothing"}.isdisjoint(words) else 1
            if words[0] == "call":
                wanted = 2  # it names no module with tools
            code, output = run(folder, [*words, "--db", DATABASE])
            assert code == wanted, (words, output)
            (tmp_path / "out").unlink(missing_ok=True)
