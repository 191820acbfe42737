"""Looking after a file: check, current, upgrade, backup, stats, vacuum, as functions."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from dspex_persist.cli.hints import text_of
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    DatabaseInUseError,
    InvalidArgumentError,
    LostCommitsError,
    NewerSchemaError,
    NotADatabaseError,
    OpenError,
    StorageError,
)
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.provider import Progress
from dspex_persist.state.store import engine, guard, maintenance
from dspex_persist.state.store.engine import OwnershipLock
from dspex_persist.state.store.maintenance import backups, checks, copies, opening, sizes
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.verify import Problem
from tests.assets.make_database import LARGE_BYTES, LARGE_TEXT, describe
from tests.databases import copy_database
from tests.deadline import within
from tests.logs import capture_logs

Act = Callable[[Path], object]


def back_up(path: Path) -> object:
    return maintenance.backup(path, path.with_name("target.db"))


def prune(path: Path) -> object:
    return maintenance.prune(path, PrunePolicy(keep_versions=1), confirm=True)


EVERYTHING: tuple[Act, ...] = (
    maintenance.check,
    maintenance.current,
    maintenance.upgrade,
    back_up,
    maintenance.stats,
    prune,
    maintenance.vacuum,
)
CHANGING: tuple[Act, ...] = (maintenance.upgrade, prune, maintenance.vacuum)


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, with its anchor."""
    return copy_database(filled, tmp_path / "copy.db")


@contextmanager
def tampering(path: Path) -> Iterator[sqlite3.Connection]:
    """The triggers are there again afterwards."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for _, sql in triggers:
            connection.execute(sql)


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return sorted(connection.iterdump())


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# Files that are not databases of this package


@pytest.mark.parametrize("act", EVERYTHING)
def test_a_missing_file_is_an_error_and_stays_missing(tmp_path: Path, act: Act) -> None:
    with pytest.raises(NotADatabaseError, match="there is no such file"):
        act(tmp_path / "missing.db")
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("act", EVERYTHING)
def test_a_folder_is_refused(tmp_path: Path, act: Act) -> None:
    folder = tmp_path / "folder.db"
    folder.mkdir()
    with pytest.raises(NotADatabaseError, match="it is a folder"):
        act(folder)
    assert names_in(tmp_path) == {"folder.db"}


@pytest.mark.parametrize("act", EVERYTHING)
@pytest.mark.parametrize("content", [b"not a database\n" * 1000, b"SQLite format 3\0" + bytes(200)])
def test_a_file_of_something_else_is_refused_unchanged(tmp_path: Path, act: Act, content: bytes) -> None:
    path = tmp_path / "other.db"
    path.write_bytes(content)
    with pytest.raises(NotADatabaseError):
        act(path)
    assert path.read_bytes() == content
    assert names_in(tmp_path) == {"other.db"}


@pytest.mark.parametrize("act", EVERYTHING)
def test_another_programs_database_is_refused_unchanged(tmp_path: Path, act: Act) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    content = path.read_bytes()
    with pytest.raises(NotADatabaseError, match="another program's database"):
        act(path)
    assert path.read_bytes() == content
    assert names_in(tmp_path) == {"other.db"}


@pytest.mark.parametrize("act", EVERYTHING)
def test_a_newer_file_is_refused_by_name_unchanged(path: Path, act: Act) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    content = path.read_bytes()
    with pytest.raises(NewerSchemaError, match=r"9999.*newer release"):
        act(path)
    assert path.read_bytes() == content
    assert not list(path.parent.glob("*backup*"))


@pytest.mark.parametrize("act", [maintenance.check, back_up, maintenance.stats, prune, maintenance.vacuum])
@pytest.mark.parametrize("revision", [None, "0000"])
def test_an_empty_or_older_file_is_refused_with_advice(
    tmp_path: Path, path: Path, act: Act, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if revision is None:
        path = tmp_path / "empty.db"
        path.touch()
    else:
        monkeypatch.setattr(opening, "REVISION", "9999")
    with pytest.raises(NotADatabaseError, match=r"maintenance\.upgrade\(path\)") as refused:
        act(path)
    assert f"dspex-persist db upgrade --db {path}" in text_of(refused.value)


# check


def test_check_of_a_sound_file(path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    report = maintenance.check(path, lambda *progress: reports.append(progress))
    assert report.problems == ()
    assert report.complete
    assert report.anchored
    assert report.revision == REVISION
    assert report.commits > 50
    assert reports[0] == ("checking the pages of the file", 0, 0)
    assert reports[-1] == ("checking commits", report.commits, report.commits)


def test_check_of_a_copy_without_an_anchor(path: Path) -> None:
    Path(f"{path}.anchor").unlink()
    report = maintenance.check(path)
    assert (report.problems, report.anchored) == ((), False)
    assert not Path(f"{path}.anchor").exists()


def test_a_torn_anchor_is_none(path: Path) -> None:
    Path(f"{path}.anchor").write_bytes(b"torn")
    assert not maintenance.check(path).anchored


def test_check_reports_everything_at_once(path: Path) -> None:
    with tampering(path) as connection:
        connection.execute("UPDATE versions SET value = '99' WHERE variable_key = 4 AND version = 1")
        connection.execute("UPDATE blobs SET content = x'00' WHERE blob_key = 1")
        connection.execute("DELETE FROM variables WHERE variable_key = 7")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER events_no_delete")
    problems = maintenance.check(path).problems
    where = [problem.where for problem in problems]
    assert "table events" in where
    assert "commit 5, session 'main', variable 'retries'" not in where
    assert any(place.startswith("large content 1, first used by commit ") for place in where)
    assert any("variable 'retries'" in place for place in where)
    assert Problem("commit 8, session 'main', variable 'empty'", "its row in variables is missing") in problems
    assert Problem("table versions", "it refers to a row of variables that does not exist") in problems


def test_check_reads_commits_that_are_only_in_the_wal(path: Path) -> None:
    """A server that was killed leaves its last commits there."""
    with EmbeddedState(path) as provider:
        provider.set_variable("again", "y", {"n": 1})
        crashed = path.with_name("crashed.db")
        for suffix in ("", "-wal", ".anchor"):
            shutil.copy(f"{path}{suffix}", f"{crashed}{suffix}")
    assert Path(f"{crashed}-wal").stat().st_size > 0
    last = maintenance.check(path).commits
    report = maintenance.check(crashed)
    assert (report.problems, report.commits) == ((), last)
    for side_file in ("-wal", "-shm"):
        Path(f"{crashed}{side_file}").unlink(missing_ok=True)
    (problem,) = maintenance.check(crashed).problems
    assert problem.where == f"commit {last}"


def test_check_of_damaged_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'commits_by_session'").fetchone()
    content[(page - 1) * 4096 : page * 4096] = bytes(4096)
    path.write_bytes(content)
    problems = maintenance.check(path).problems
    assert any(problem.where == "file" for problem in problems)


@pytest.mark.parametrize("seed", range(30))
def test_check_of_a_damaged_first_page_ends_with_a_reason(path: Path, seed: int) -> None:
    """The first page has the header and the schema: the file is refused, or the check reports the damage."""
    print(f"seed {seed}")
    randomly = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[randomly.randrange(4096)] ^= 1 << randomly.randrange(8)
    path.write_bytes(content)
    assert all(words_of_check(path))


def words_of_check(path: Path) -> list[str]:
    try:
        return [str(problem) for problem in maintenance.check(path).problems]
    except OpenError as refused:
        return [str(refused)]


def test_check_stops_after_many_problems(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_PROBLEMS", 5)
    with tampering(path) as connection:
        connection.execute("UPDATE commits SET cause = 'x'")
    report = maintenance.check(path)
    assert len(report.problems) == 5
    assert not report.complete


# current and upgrade


def test_current(path: Path, tmp_path: Path) -> None:
    report = maintenance.current(path)
    assert (report.revision, report.head, report.is_head) == (REVISION, REVISION, True)
    empty = tmp_path / "empty.db"
    empty.touch()
    report = maintenance.current(empty)
    assert (report.revision, report.is_head) == (None, False)
    assert empty.stat().st_size == 0


def test_upgrade_of_a_current_file_changes_nothing(path: Path) -> None:
    before = dump(path)
    report = maintenance.upgrade(path)
    assert (report.found, report.revision, report.backup) == (REVISION, REVISION, None)
    assert dump(path) == before
    assert not list(path.parent.glob("*backup*"))


def test_upgrade_of_an_empty_file_makes_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    report = maintenance.upgrade(path)
    assert (report.found, report.revision, report.backup) == (None, REVISION, None)
    assert maintenance.check(path).problems == ()
    with EmbeddedState(path) as provider:
        provider.initialize_session("s")


@pytest.mark.parametrize("act", CHANGING)
def test_functions_that_change_the_file_take_the_lock(path: Path, act: Act) -> None:
    before = path.read_bytes()
    lock = OwnershipLock(path)
    try:
        with pytest.raises(DatabaseInUseError, match=f"process {os.getpid()}"):
            act(path)
    finally:
        lock.release()
    assert path.read_bytes() == before
    act(path)
    OwnershipLock(path).release()


@pytest.mark.parametrize("act", CHANGING)
def test_functions_that_change_the_file_refuse_lost_commits(path: Path, act: Act) -> None:
    with EmbeddedState(path) as provider:
        provider.initialize_session("more")
        provider.cleanup_session("more")
    behind = path.with_name("behind.db")
    with tampering(path) as connection:
        connection.execute("DELETE FROM commits WHERE sequence = (SELECT max(sequence) FROM commits)")
    shutil.copy(path, behind)
    shutil.copy(f"{path}.anchor", f"{behind}.anchor")
    before = dump(behind)
    with pytest.raises(LostCommitsError):
        act(behind)
    assert dump(behind) == before


# backup


def test_backup_is_a_single_private_file(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    reports: list[tuple[str, int, int]] = []
    report = maintenance.backup(path, target, lambda *progress: reports.append(progress))
    assert report.problems == ()
    assert report.size_bytes == target.stat().st_size
    assert report.commits == maintenance.check(path).commits
    assert dump(target) == dump(path)
    assert target.stat().st_mode & 0o777 == 0o600
    pages = target.stat().st_size // 4096
    assert ("copying pages", pages, pages) in reports
    assert reports[-1][0] == "checking commits"
    assert {name for name in names_in(tmp_path) if "target" in name} == {"target.db"}


def test_backup_can_be_read_from_read_only_media(path: Path, tmp_path: Path) -> None:
    """It must not be in WAL mode, for which SQLite would have to create files next to it."""
    maintenance.backup(path, tmp_path / "target.db")
    before = names_in(tmp_path)
    assert maintenance.check(tmp_path / "target.db").problems == ()
    assert names_in(tmp_path) == before


def test_backup_serves_its_contents(path: Path, tmp_path: Path) -> None:
    maintenance.backup(path, tmp_path / "target.db")
    assert describe(tmp_path / "target.db") == describe(path)


def test_backup_while_a_writer_writes(tmp_path: Path) -> None:
    """The copy is of one moment: it has whole batches, and all commits acknowledged before it began."""
    path = tmp_path / "live.db"
    names = [f"v{number}" for number in range(50)]
    with EmbeddedState(path) as provider:
        provider.initialize_session("s")
        for name in names:
            provider.register_variable("s", name, "string", "-" * 900)
        done = threading.Event()
        acknowledged = 0

        def write() -> None:
            nonlocal acknowledged
            while not done.is_set():
                text = str(acknowledged + 1)
                provider.set_variables("s", dict.fromkeys(names, text + "-" * 900), atomic=True)
                acknowledged += 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for number in range(4):
                least = acknowledged
                target = tmp_path / f"backup{number}.db"
                assert maintenance.backup(path, target).problems == ()
                with EmbeddedState(target) as copy:
                    texts = {variable.value.json.split("-")[0] for variable in copy.list_variables("s")}
                assert len(texts) == 1, "half of a batch"
                assert int(texts.pop().strip('"') or 0) >= least
        finally:
            done.set()
            writer.join()
    assert acknowledged > 0


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_backup_overwrites_nothing(path: Path, tmp_path: Path, there: str) -> None:
    target = tmp_path / "target.db"
    if there == "file":
        target.write_text("precious")
    elif there == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = names_in(tmp_path)
    with pytest.raises(InvalidArgumentError, match="exists already"):
        maintenance.backup(path, target)
    assert names_in(tmp_path) - {"copy.db-wal", "copy.db-shm"} == before
    assert there != "file" or target.read_text() == "precious"


def test_backup_does_not_overwrite_a_file_created_meanwhile(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"

    def on_progress(_step: str, _done: int, _in_all: int) -> None:
        target.write_text("precious")

    with pytest.raises(InvalidArgumentError, match="exists already"):
        maintenance.backup(path, target, on_progress)
    assert target.read_text() == "precious"
    assert not list(tmp_path.glob(".*partial*"))


def test_backup_to_a_missing_folder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="No such file"):
        maintenance.backup(path, tmp_path / "missing" / "target.db")


def test_backup_of_a_file_with_problems_leaves_nothing(path: Path, tmp_path: Path) -> None:
    with tampering(path) as connection:
        connection.execute("UPDATE commits SET actor = 'mallory' WHERE sequence = 9")
    report = maintenance.backup(path, tmp_path / "target.db")
    assert [problem.where.split(",")[0] for problem in report.problems] == ["commit 9"]
    assert not (tmp_path / "target.db").exists()
    assert not list(tmp_path.glob(".*"))


def test_backup_of_a_file_behind_its_anchor_leaves_nothing(path: Path, tmp_path: Path) -> None:
    older = path.read_bytes()
    with EmbeddedState(path) as provider:
        provider.initialize_session("more")
    path.write_bytes(older)
    assert maintenance.backup(path, tmp_path / "target.db").problems
    assert not (tmp_path / "target.db").exists()


@pytest.mark.parametrize("step", ["copying pages", "checking commits"])
def test_a_backup_that_is_interrupted_leaves_nothing(path: Path, tmp_path: Path, step: str) -> None:
    def on_progress(now: str, _done: int, _in_all: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maintenance.backup(path, tmp_path / "target.db", on_progress)
    assert not (tmp_path / "target.db").exists()
    assert not list(tmp_path.glob(".*"))


# stats


def test_a_backup_to_a_file_system_without_locks_gives_up(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite always reports a file system without locks as busy."""
    real = copies.copy_pages

    def copy(connection: Connection, partial: Path, progress: Progress) -> None:
        with closing(sqlite3.connect(partial, isolation_level=None)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            real(connection, partial, progress)

    monkeypatch.setattr(backups, "copy_pages", copy)
    monkeypatch.setattr(copies, "_MOST_BUSY", 2)
    before = names_in(tmp_path)
    with pytest.raises(StorageError, match="allows no locks"):
        maintenance.backup(path, tmp_path / "target.db")
    assert names_in(tmp_path) - {"copy.db-wal", "copy.db-shm"} == before


def test_stats_are_true(path: Path) -> None:
    report = maintenance.stats(path)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:

        def count(query: str) -> Any:
            return connection.execute(query).fetchone()[0]

        assert report.commits == count("SELECT max(sequence) FROM commits")
        assert report.versions == count("SELECT count(*) FROM versions")
        pages = count("PRAGMA page_count") * count("PRAGMA page_size")
        schema = count("SELECT sum(pgsize) FROM dbstat WHERE name = 'sqlite_schema'")
        free = count("PRAGMA freelist_count") * count("PRAGMA page_size")
    assert report.file_bytes == path.stat().st_size == pages
    assert report.exact
    # Each page but the free ones belongs to a table or an index (the schema's own table is not listed).
    assert pages - sum(table.size_bytes for table in report.tables) == schema + free
    assert {"versions", "versions_by_sequence", "commits", "events"} <= {table.name for table in report.tables}
    assert next(table for table in report.tables if table.name == "versions").rows == report.versions
    assert next(table for table in report.tables if table.name == "versions_by_sequence").rows is None
    sizes = [table.size_bytes for table in report.tables]
    assert sizes == sorted(sizes, reverse=True)
    assert (report.sessions_live, report.sessions_ended) == (7, 4)
    assert report.variables_deleted == 5 + 2, "five deleted, two of sessions that have ended"
    assert report.variables_live == 27


def test_stats_show_what_sharing_saved(path: Path) -> None:
    """The large text is in four versions, the large bytes in two."""
    report = maintenance.stats(path)
    with EmbeddedState(path) as provider:
        text = len(provider.get_variable("main", "prompt").value.json.encode())
    assert text >= len(LARGE_TEXT)
    assert report.large_contents == 2
    assert report.large_bytes == text + len(LARGE_BYTES)
    assert report.shared_bytes == 2 * text + len(LARGE_BYTES)


def test_stats_name_the_largest(path: Path) -> None:
    report = maintenance.stats(path)
    sizes = [share.size_bytes for share in report.largest_variables]
    assert sizes == sorted(sizes, reverse=True)
    largest = report.largest_variables[0]
    assert (largest.session_id, largest.variable, largest.versions) == ("main", "document", 3)
    assert [share.session_id for share in report.largest_sessions[:2]] == ["main", "binaries"]
    assert sum(share.versions for share in report.largest_sessions) == report.versions


def test_stats_without_dbstat_use_lengths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = maintenance.stats(path)
    monkeypatch.setattr(sizes, "measure_pages", lambda _: None)
    report = maintenance.stats(path)
    assert not report.exact
    assert {table.kind for table in report.tables} == {"table"}
    for table in report.tables:
        measured = next(other for other in exact.tables if other.name == table.name)
        assert table.rows == measured.rows
        assert table.size_bytes <= measured.size_bytes
    blobs = next(table for table in report.tables if table.name == "blobs")
    assert blobs.size_bytes == exact.large_bytes + 2 * 32 + 2, "content, digest, key"


def test_a_sqlite_without_dbstat_is_noticed(path: Path) -> None:
    class WithoutDbstat:
        def exec_driver_sql(self, statement: str) -> NoReturn:
            raise OperationalError(statement, None, sqlite3.OperationalError("no such table: dbstat"))

    class Damaged:
        def exec_driver_sql(self, statement: str) -> NoReturn:
            raise OperationalError(statement, None, sqlite3.OperationalError("disk I/O error"))

    assert sizes.measure_pages(cast(Connection, WithoutDbstat())) is None
    with pytest.raises(OperationalError):
        sizes.measure_pages(cast(Connection, Damaged()))


def test_stats_of_a_live_file_show_its_wal(path: Path) -> None:
    with EmbeddedState(path) as provider:
        provider.set_variable("again", "y", {"n": 1})
        assert maintenance.stats(path).wal_bytes > 0
    assert maintenance.stats(path).wal_bytes == 0


def test_a_held_wal_is_reported_once_and_again_when_it_is_held_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LARGE_WAL_BYTES", 6 * 1024 * 1024)
    # The size to which SQLite truncates a WAL when it restarts it, and which the guard accepts.
    for module in (engine, guard):
        monkeypatch.setattr(module, "WAL_LIMIT_BYTES", 1024 * 1024)
    with EmbeddedState(path) as provider, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        for _ in range(2):
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM commits").fetchall()
            with capture_logs() as logs:
                for number in range(20):
                    provider.set_variable("again", "y", {"n": f"{number}{os.urandom(500_000).hex()}"})
            warnings = [each for each in logs if each["event"] == "WAL is large"]
            assert [each["log_level"] for each in warnings] == ["warning"]
            assert warnings[0]["size_bytes"] > guard.LARGE_WAL_BYTES
            assert guard.WAL_IS_HELD in (maintenance.stats(path).warning or "")
            reader.execute("COMMIT")
            # No reader holds it: the next write restarts it.
            for number in range(200):
                provider.set_variable("again", "y", {"n": number})
                if maintenance.stats(path).wal_bytes <= guard.LARGE_WAL_BYTES:
                    break
            else:
                pytest.fail("the WAL has not become small again")


def test_the_warning_about_sqlite() -> None:
    assert "3.51.3" in (maintenance.sqlite_warning("3.40.1") or "")
    assert maintenance.sqlite_warning("3.51.2")
    assert maintenance.sqlite_warning("3.51.3") is None
    assert maintenance.sqlite_warning("3.53.0") is None
    assert maintenance.sqlite_warning("4.0.0") is None


# vacuum


def test_vacuum_gives_free_pages_back_and_keeps_everything(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE ballast (content BLOB)")
        connection.execute("INSERT INTO ballast VALUES (zeroblob(500000))")
        connection.execute("DROP TABLE ballast")
    assert maintenance.stats(path).free_bytes >= 500_000
    before, described = dump(path), describe(path)
    report = maintenance.vacuum(path)
    assert report.before_bytes - report.after_bytes >= 500_000
    assert report.after_bytes == path.stat().st_size
    assert maintenance.stats(path).free_bytes == 0
    assert dump(path) == before
    assert describe(path) == described
    assert maintenance.check(path).problems == ()


def test_vacuum_without_room_changes_nothing(path: Path) -> None:
    """In a process that may write no file larger than 64 KiB: the WAL would be."""
    before = dump(path)
    script = """
import resource, signal, sys
from pathlib import Path
from dspex_persist.state.errors import StorageError
from dspex_persist.state.store import engine, guard, maintenance
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    maintenance.vacuum(Path(sys.argv[1]))
except StorageError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=within(60), check=True)
    assert ended.stdout.startswith("nothing was written: "), ended
    assert dump(path) == before
    assert maintenance.check(path).problems == ()
