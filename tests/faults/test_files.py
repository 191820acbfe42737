"""Other programs change the files of a running server: what it acknowledges, what it reports, how it ends."""

import contextlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dspex_persist import connect
from dspex_persist.errors import DspexError
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.errors import StorageError
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.store import maintenance
from tests.databases import remove, rename, replace, truncate
from tests.deadline import within
from tests.faults.crash_test import server_argv

WRITES = 5
IN_USE, STORAGE_FAILED = 4, 70

pytestmark = [pytest.mark.slow, pytest.mark.timeout(within(120))]


LOCK_WAIT_S = float(os.environ.get("LOCK_WAIT_S", "1"))
"""How long the server tries to get a lock; longer outside of `make test`."""
PATIENT = f"""if True:
    from dspex_persist.cli import main
    from dspex_persist.state.store import engine
    engine.LOCK_WAIT_S = {LOCK_WAIT_S}
    main()
"""


def serve(database: Path, bug: str | None = None) -> ServerProcess:
    return ServerProcess.start(server_argv(database, bug), ready_timeout_s=within(60))


def begin(client: StateProvider) -> None:
    client.initialize_session("s")
    client.register_variable("s", "x", "integer", 0)
    for number in range(WRITES):
        client.set_variable("s", "x", number)


def version_in(database: Path) -> int:
    with connect(database) as state:
        version = state.get_variable("s", "x").version
    assert maintenance.check(database).problems == ()
    return version


def copy_over(file: Path) -> None:
    """Overwrite the file like `cp` of a backup, which keeps the inode."""
    backup = file.with_name("backup")
    maintenance.backup(file, backup)
    shutil.copyfile(backup, file)


def write_to(file: Path) -> None:
    with closing(sqlite3.connect(file.with_name(file.name.removesuffix("-wal")))) as other, other:
        other.execute('UPDATE sessions SET metadata = \'{"by": "hand"}\'')


Spoil = Callable[[Path], None]


def acknowledged_after(database: Path, spoil: Spoil, suffix: str, bug: str | None = None) -> list[int]:
    """Damage the file of a running server; returns the acknowledged versions of the writes after that.

    A server without a bug ends with the documented code, and reports what happened to which file.
    """
    with serve(database, bug) as process, connect(f"grpc://127.0.0.1:{process.port}") as client:
        begin(client)
        spoil(Path(f"{database}{suffix}"))
        acknowledged: list[int] = []
        for number in range(WRITES):
            with contextlib.suppress(DspexError):
                acknowledged.append(client.set_variable("s", "x", number))
        if bug is None:
            assert process.wait(within(30)) == STORAGE_FAILED
            assert "while it was open" in process.stderr_tail
            assert f"{database.name}{suffix}" in process.stderr_tail
            assert "Traceback" not in process.stderr_tail
    return acknowledged


ALWAYS = {(remove, ""), (rename, "-wal"), (replace, ""), (truncate, "-wal")}
"""The cases in every run of the tests. tests/store/test_ownership.py has all of them, for the engine in process."""
CASES = [
    pytest.param(spoil, suffix, marks=[] if (spoil, suffix) in ALWAYS else pytest.mark.thorough)
    for spoil in (remove, rename, replace, truncate)
    for suffix in ("", "-wal")
]


@pytest.mark.parametrize(("spoil", "suffix"), CASES)
def test_no_write_is_acknowledged_after_the_file_is_damaged(tmp_path: Path, spoil: Spoil, suffix: str) -> None:
    database = tmp_path / "served.db"
    if spoil is truncate and not suffix:
        # A new file is empty until its first checkpoint.
        connect(database).close()
    assert acknowledged_after(database, spoil, suffix) == []
    if suffix and spoil is not truncate:
        # The server has checkpointed everything before it ended.
        assert version_in(database) >= WRITES
    elif spoil is rename:
        (tmp_path / "elsewhere").rename(database)
        assert version_in(database) >= WRITES


@pytest.mark.parametrize("spoil", [write_to, copy_over])
def test_no_write_is_acknowledged_after_another_program_has_written(tmp_path: Path, spoil: Spoil) -> None:
    assert acknowledged_after(tmp_path / "served.db", spoil, "") == []


@pytest.mark.parametrize("spoil", [pytest.param(remove, marks=pytest.mark.thorough), replace])
def test_a_server_that_does_not_check_its_file_is_detected(tmp_path: Path, spoil: Spoil) -> None:
    assert acknowledged_after(tmp_path / "served.db", spoil, "", bug="file-not-looked-at") != []


def test_a_write_lock_of_another_program_refuses_writes_only(tmp_path: Path) -> None:
    database = tmp_path / "served.db"
    _, _, _, *arguments = server_argv(database)
    argv = [sys.executable, "-c", PATIENT, *arguments]
    with (
        ServerProcess.start(argv, ready_timeout_s=within(60)) as process,
        connect(f"grpc://127.0.0.1:{process.port}") as client,
    ):
        begin(client)
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(2):
                with pytest.raises(StorageError, match="nothing was written: another program holds the write lock"):
                    client.set_variable("s", "x", 100)
                assert client.get_variable("s", "x").version == WRITES
            other.execute("ROLLBACK")
        assert client.set_variable("s", "x", 101) == WRITES + 1
        assert process.terminate(within(30)) == 0
    assert version_in(database) == WRITES + 1


def by_symlink(database: Path) -> Path:
    database.with_name("link.db").symlink_to(database)
    return database.with_name("link.db")


def by_hard_link(database: Path) -> Path:
    os.link(database, database.with_name("hard.db"))
    return database.with_name("hard.db")


def without_lock(database: Path) -> Path:
    Path(f"{database}.lock").unlink()
    return database


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    database = tmp_path / "served.db"
    written = WRITES
    with serve(database) as process, connect(f"grpc://127.0.0.1:{process.port}") as client:
        begin(client)
        for way in (by_symlink, by_hard_link, without_lock):
            with ServerProcess(server_argv(way(database))) as second:
                assert second.wait(within(60)) == IN_USE, way
                assert "is in use by" in second.stderr_tail
            written += 1
            assert client.set_variable("s", "x", written) == written
        assert process.terminate(within(30)) == 0
    assert version_in(database) == written
