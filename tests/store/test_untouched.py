"""Reading a file without leaving traces: the result, also while others have it open, and that others can open it."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection

from dspex_persist import connect, open_audit
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import NotADatabaseError
from dspex_persist.state.store import log_reader, maintenance, untouched
from dspex_persist.state.store.engine import checkpoint, open_readers, snapshot
from dspex_persist.state.store.untouched import read_untouched
from tests.deadline import within

WRITE_AND_DIE = """
import os, signal, sys
from dspex_persist import connect
state = connect(sys.argv[1])
state.initialize_session("s")
state.register_variable("s", "x", "integer", 0)
for number in range(20):
    state.set_variable("s", "x", number)
os.kill(os.getpid(), signal.SIGKILL)
"""
WRITTEN = 22


def head(connection: Connection) -> int:
    return log_reader.head(connection).sequence


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database whose process was killed. Do not write to it."""
    folder = tmp_path_factory.mktemp("killed")
    argv = [sys.executable, "-c", WRITE_AND_DIE, folder / "x.db"]
    assert subprocess.run(argv, check=False, timeout=within(60)).returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def path(killed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(killed, tmp_path / "copy") / "x.db"


def as_killed(path: Path) -> None:
    """With a WAL and its shared memory."""


def copied(path: Path) -> None:
    Path(f"{path}-shm").unlink()


def closed(path: Path) -> None:
    connect(path).close()


def read_by_others(path: Path) -> None:
    """Leave an empty WAL, and shared memory that records that, as other readers do."""
    connect(path).close()
    with open_audit(path) as history:
        assert history.head() == WRITTEN
    assert Path(f"{path}-wal").stat().st_size == 0


def as_one_file(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")


@pytest.mark.parametrize("prepare", [as_killed, copied, closed, read_by_others, as_one_file])
def test_it_reads_what_a_reader_reads_and_changes_nothing(path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(path)
    before = contents(path.parent)
    assert read_untouched(path, head) == WRITTEN
    assert contents(path.parent) == before
    readers = open_readers(path)
    with snapshot(readers) as connection:
        assert head(connection) == WRITTEN
    readers.dispose()


@pytest.mark.parametrize("is_one", [True, False])
def test_an_empty_wal_is_ignored(path: Path, is_one: bool) -> None:
    """SQLite would wait ten seconds for it to be filled."""
    header = Path(f"{path}-wal").read_bytes()[:32]
    closed(path)
    Path(f"{path}-wal").write_bytes(header if is_one else b"\xff" * 10_000)
    Path(f"{path}-shm").write_bytes(bytes(32_768))
    before = contents(path.parent)
    assert read_untouched(path, head) == WRITTEN
    assert contents(path.parent) == before
    with connect(path) as state:
        assert state.get_variable("s", "x").version == 20


def test_the_header_of_a_wal_is_recognized_by_its_checksums(path: Path) -> None:
    content = Path(f"{path}-wal").read_bytes()[:33]
    assert untouched._begins_wal(content)
    for at in range(33):
        assert not untouched._begins_wal(content[:at])
    for at in range(32):
        assert not untouched._begins_wal(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_side_files_that_sqlite_would_remove_stay(path: Path) -> None:
    os.truncate(path, 0)
    before = contents(path.parent)
    assert read_untouched(path, lambda connection: connection.exec_driver_sql("PRAGMA page_count").scalar()) == 0
    assert contents(path.parent) == before


def test_others_can_open_write_and_read_the_file_meanwhile(path: Path) -> None:
    """In the same process, where SQLite's shared memory is shared too: they wait until the read has ended."""
    inside, done = threading.Event(), threading.Event()
    results: list[int] = []

    def read(connection: Connection) -> int:
        number = head(connection)
        inside.set()
        # They wait until this ends.
        assert not done.wait(0.2)
        return number

    def open_it() -> None:
        assert inside.wait(within(30))
        with connect(path) as state, open_audit(path) as history:
            results.append(state.set_variable("s", "x", 21))
            results.append(history.head())
        done.set()

    other = threading.Thread(target=open_it)
    other.start()
    assert read_untouched(path, read) == WRITTEN
    other.join(within(30))
    assert results == [21, WRITTEN + 1]


def test_it_reads_the_current_contents_while_a_writer_writes(path: Path) -> None:
    """Whether a commit was just written to the WAL, a checkpoint was made, or the WAL was restarted."""
    with EmbeddedState(path) as state:
        program = """if True:
            import sys
            from pathlib import Path
            from dspex_persist.state.store import log_reader
            from dspex_persist.state.store.untouched import read_untouched
            for line in sys.stdin:
                print(read_untouched(Path(sys.argv[1]), lambda each: log_reader.head(each).sequence), flush=True)
            """
        argv = [sys.executable, "-c", program, path]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdin is not None
            assert reader.stdout is not None
            for number in range(60):
                reader.stdin.write("\n")
                reader.stdin.flush()
                before = state.engine._store.head.sequence
                state.set_variable("s", "x", number)
                if number % 5 == 0:
                    checkpoint(state.engine._store._writer, "FULL")
                head = int(reader.stdout.readline())
                assert before <= head <= state.engine._store.head.sequence
            reader.communicate()


# A crash during a transaction with a rollback journal


@pytest.fixture
def half_made(tmp_path: Path) -> Path:
    """The second transaction of a new file, spilled and not committed: its journal can roll it back."""
    path = tmp_path / "half.db"
    program = """if True:
        import os, sqlite3, sys
        c = sqlite3.connect(sys.argv[1], isolation_level=None)
        c.execute("PRAGMA cache_size = 1")
        c.execute("PRAGMA user_version = 1")
        c.execute("BEGIN")
        c.execute("CREATE TABLE commits (sequence INTEGER PRIMARY KEY, hash BLOB)")
        c.execute("WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 999) "
                  "INSERT INTO commits SELECT i, zeroblob(300) FROM n")
        os.kill(os.getpid(), 9)
        """
    subprocess.run([sys.executable, "-c", program, path], check=False, timeout=within(60))
    assert Path(f"{path}-journal").stat().st_size > 0
    return path


def test_a_half_made_file_is_reported_with_advice_that_works(half_made: Path) -> None:
    before = contents(half_made.parent)
    with pytest.raises(NotADatabaseError, match=r"half made; .*maintenance\.upgrade\(path\) repairs it"):
        maintenance.check(half_made)
    assert contents(half_made.parent) == before
    assert maintenance.upgrade(half_made).found is None
    assert maintenance.check(half_made).problems == ()
