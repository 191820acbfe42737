"""Replacing a database with a backup: what is refused, and which files exist after a failure or a kill at any step."""

import errno
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    DatabaseInUseError,
    InvalidArgumentError,
    NewerSchemaError,
    NotADatabaseError,
    OpenError,
    SessionNotFoundError,
    StorageError,
)
from dspex_persist.state.store import engine, maintenance
from dspex_persist.state.store.engine import OwnershipLock
from dspex_persist.state.store.maintenance import restores, swap
from tests.deadline import within

OLD_ASSET = Path(__file__).parents[1] / "assets" / "0001.db"
NEWEST, BACKED_UP, CLOSED = 40, 3, 12

WRITE_AND_DIE = textwrap.dedent(f"""
    import os, signal, sys
    from pathlib import Path
    from dspex_persist.state.embedded import EmbeddedState
    from dspex_persist.state.store import maintenance
    folder = Path(sys.argv[1])
    state = EmbeddedState(folder / "s.db")
    state.initialize_session("s")
    state.register_variable("s", "x", "string", "")
    for version in range(1, {NEWEST + 1}):
        state.set_variable("s", "x", str(version) + "." * 2000)
        if version == {BACKED_UP}:
            maintenance.backup(folder / "s.db", folder / "b.db")
        if version == {CLOSED}:
            # From here on, the WAL does not contain everything.
            state.close()
            state = EmbeddedState(folder / "s.db")
    os.kill(os.getpid(), signal.SIGKILL)
""")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database whose server was killed, and an earlier backup. Do not write to it."""
    folder = tmp_path_factory.mktemp("killed")
    died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, folder], check=False, timeout=within(60))
    assert died.returncode == -signal.SIGKILL
    assert (folder / "s.db-wal").stat().st_size > 0
    return folder


@pytest.fixture
def path(killed: Path, tmp_path: Path) -> Path:
    """The database in a copy of that folder."""
    shutil.copytree(killed, tmp_path / "copy")
    return tmp_path / "copy" / "s.db"


def backup_of(path: Path) -> Path:
    return path.with_name("b.db")


def newest_in(path: Path) -> int:
    with EmbeddedState(path) as state:
        assert not maintenance.check(path).problems
        return state.get_variable("s", "x").version


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Return the digests of all files that a user could miss."""
    digests = {path.name: digest(path) for path in folder.iterdir() if path.stat().st_size}
    return {name: content for name, content in digests.items() if not name.endswith(("-shm", ".lock"))}


# The state of the database


def as_killed(path: Path) -> None:
    """Most of its content is in the WAL."""


def as_closed(path: Path) -> None:
    EmbeddedState(path).close()


def copied_over(path: Path) -> None:
    """Like a restore without the command: the old file's WAL is still there."""
    path.write_bytes(backup_of(path).read_bytes())


def without_wal(path: Path) -> None:
    """Commits that the anchor has recorded are missing."""
    path.with_name("s.db-wal").unlink()


def overwritten(path: Path) -> None:
    path.write_bytes(b"\0" * 50_000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


Damage = Callable[[Path], None]
USABLE: tuple[Damage, ...] = (as_killed, as_closed)
UNUSABLE: tuple[Damage, ...] = (copied_over, without_wal, overwritten, empty, missing)


@pytest.mark.parametrize("damage", [*USABLE, *UNUSABLE])
def test_the_backup_takes_the_place_of_the_old_file_which_is_kept(path: Path, damage: Damage) -> None:
    damage(path)
    before = contents(path.parent)
    report = maintenance.restore(backup_of(path), path)
    assert (report.problems, report.size_bytes) == ((), path.stat().st_size)
    assert maintenance.check(path).anchored
    assert newest_in(path) == BACKED_UP
    assert (report.aside is None) == (damage is missing)
    if report.aside is not None and damage in USABLE:
        assert newest_in(report.aside) == NEWEST
    else:
        # A damaged file is evidence, and stays the same, byte for byte.
        assert set(before.values()) <= set(contents(path.parent).values())
    assert not list(path.parent.glob(".*"))


def test_a_restored_database_can_be_written(path: Path) -> None:
    maintenance.restore(backup_of(path), path)
    with EmbeddedState(path) as state:
        assert state.set_variable("s", "x", "after") == BACKED_UP + 1
    assert newest_in(path) == BACKED_UP + 1


def test_the_replaced_file_can_be_restored_in_turn(path: Path) -> None:
    report = maintenance.restore(backup_of(path), path)
    assert report.aside is not None
    maintenance.restore(report.aside, path)
    assert newest_in(path) == NEWEST


def test_the_file_keeps_its_mode_and_its_link(path: Path) -> None:
    path.chmod(0o640)
    link = path.with_name("link.db")
    link.symlink_to(path)
    maintenance.restore(backup_of(path), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert newest_in(link) == BACKED_UP


def test_an_older_backup_is_upgraded_on_the_way(path: Path) -> None:
    backup = shutil.copy(OLD_ASSET, path.with_name("older.db"))
    older = digest(backup)
    report = maintenance.restore(backup, path)
    assert report.revision == "0001"
    assert maintenance.current(path).is_head
    assert not maintenance.check(path).problems
    assert digest(backup) == older
    assert not [name for name in contents(path.parent) if name.startswith(".")]


# Refusals, which change nothing


def assert_refused(error: type[Exception], words: str, backup: Path, path: Path) -> None:
    before = contents(path.parent)
    with pytest.raises(error, match=words):
        maintenance.restore(backup, path)
    assert contents(path.parent) == before


def test_a_database_in_use(path: Path) -> None:
    lock = OwnershipLock(path)
    try:
        assert_refused(DatabaseInUseError, f"process {os.getpid()}", backup_of(path), path)
    finally:
        lock.release()


@pytest.mark.parametrize("suffix", ["", "-wal", ".anchor"])
def test_the_database_itself_as_its_backup(path: Path, suffix: str) -> None:
    assert_refused(InvalidArgumentError, "s.db", path.with_name(path.name + suffix), path)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_another_name_of_the_database_as_its_backup(path: Path, link: Callable[[Path, Path], None]) -> None:
    link(path, path.with_name("other.db"))
    assert_refused(InvalidArgumentError, "is the database itself", path.with_name("other.db"), path)


def test_a_missing_backup(path: Path) -> None:
    assert_refused(NotADatabaseError, "no such file", path.with_name("nowhere.db"), path)
    path.unlink()
    assert_refused(NotADatabaseError, "no such file", path.with_name("nowhere.db"), path)


def test_a_backup_of_a_newer_release(path: Path) -> None:
    with closing(sqlite3.connect(backup_of(path), isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert_refused(NewerSchemaError, "9999", backup_of(path), path)


@pytest.mark.parametrize("content", [b"", b"no database at all\n" * 500])
def test_a_file_that_is_not_a_backup(path: Path, content: bytes) -> None:
    backup_of(path).write_bytes(content)
    assert_refused(NotADatabaseError, "b.db", backup_of(path), path)


def test_another_programs_database_is_no_backup_and_is_not_replaced(path: Path, tmp_path: Path) -> None:
    theirs = path.with_name("theirs.db")
    with closing(sqlite3.connect(theirs)) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    assert_refused(NotADatabaseError, "another program's", theirs, path)
    assert_refused(NotADatabaseError, "another program's", backup_of(path), theirs)


def test_a_backup_with_problems(path: Path) -> None:
    with closing(sqlite3.connect(backup_of(path), isolation_level=None)) as connection:
        (trigger,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'commits_no_update'").fetchone()
        connection.execute("DROP TRIGGER commits_no_update")
        connection.execute("UPDATE commits SET actor = 'mallory' WHERE sequence = 2")
        connection.execute(trigger)
    before = contents(path.parent)
    report = maintenance.restore(backup_of(path), path)
    assert [problem.where.split(",")[0] for problem in report.problems] == ["commit 2"]
    assert report.aside is None
    assert contents(path.parent) == before


def test_a_database_that_another_program_keeps_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its WAL cannot be emptied then, and its contents must not be lost."""

    def checkpoint_at_once(writer: Engine) -> bool:
        with closing(writer.raw_connection()) as raw:
            raw.cursor().execute("PRAGMA busy_timeout = 0")
        return engine.checkpoint(writer)

    monkeypatch.setattr(restores, "checkpoint", checkpoint_at_once)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM commits").fetchone()
        with pytest.raises(StorageError, match="nothing was written: another program has been reading"):
            maintenance.restore(backup_of(path), path)
    assert newest_in(path) == NEWEST
    assert not list(path.parent.glob("*.replaced-*"))


# Failures and kills in between

_SWAPPING = ("rename", "replace", "link", "unlink", "chmod", "chown", "fsync", "pwrite", "open")


@pytest.mark.parametrize("damage", [as_killed, without_wal])
@pytest.mark.parametrize("name", _SWAPPING)
def test_a_step_that_fails_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, name: str
) -> None:
    """Each call of each kind, while the files are swapped."""
    damage(path)
    for count in range(1, 30):
        before = contents(path.parent)
        with monkeypatch.context() as patching:
            calls = fail_at(patching, name, count)
            error = error_of_restoring(path)
        if error is None:
            assert calls[0] < count, "a failure was not reported"
            break
        assert os.strerror(errno.EIO) in error
        assert calls[0] >= count
        if damage in USABLE:
            assert newest_in(path) == NEWEST
        else:
            assert contents(path.parent) == before
        assert not list(path.parent.glob("*.replaced-*"))
        assert not list(path.parent.glob(".*"))
    assert newest_in(path) == BACKED_UP


def error_of_restoring(path: Path) -> str | None:
    try:
        maintenance.restore(backup_of(path), path)
    except (StorageError, NotADatabaseError) as error:
        return str(error)
    return None


def fail_at(patching: pytest.MonkeyPatch, name: str, count: int) -> list[int]:
    """Make the `count`-th call of a function of `os` by `take_place` fail; return a list with the number of calls."""
    real, real_take, calls, inside = getattr(os, name), swap.take_place, [0], [False]

    def call(*args: object, **kwargs: object) -> object:
        if inside[0]:
            calls[0] += 1
            if calls[0] == count:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))
        return real(*args, **kwargs)

    def take_place(*args: Any, **kwargs: Any) -> Path:
        inside[0] = True
        try:
            return real_take(*args, **kwargs)
        finally:
            inside[0] = False

    patching.setattr(os, name, call)
    patching.setattr(swap, "take_place", take_place)
    return calls


DIE_AT_EACH_STEP = textwrap.dedent("""
    import os, shutil, signal, sys
    from itertools import count
    from pathlib import Path
    from dspex_persist.state.store import maintenance

    STEPS = {"rename", "replace", "link", "unlink", "fsync", "pwrite", "ftruncate", "chmod", "backup"}

    def restore(folder, last):
        steps = 0

        def look(frame, event, function):
            nonlocal steps
            if event == "c_call" and function.__name__ in STEPS and not isinstance(function.__self__, str):
                steps += 1
                if steps == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(look)
        maintenance.restore(folder / "b.db", folder / "s.db")
        os._exit(0)

    folder = Path(sys.argv[1])
    for number in count(1):
        copy = folder.with_name(f"{folder.name}.{number}")
        shutil.copytree(folder, copy)
        child = os.fork()
        if child == 0:
            try:
                restore(copy, number)
            finally:
                os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            sys.exit(code)
""")


@pytest.mark.parametrize("damage", [as_killed, copied_over, missing])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_file(path: Path, damage: Damage) -> None:
    damage(path)
    before = contents(path.parent)
    subprocess.run([sys.executable, "-c", DIE_AT_EACH_STEP, path.parent], check=True, timeout=within(120))
    copies = [copy for copy in path.parent.parent.iterdir() if copy != path.parent]
    results = [after_a_kill(copy / path.name, damage, before) for copy in copies]
    print(Counter(results))
    assert len(copies) > 12
    assert BACKED_UP in results
    assert damage not in USABLE or set(results) == {NEWEST, BACKED_UP}


def after_a_kill(path: Path, damage: Damage, before: Mapping[str, str]) -> int | str:
    """Return the newest version; or, if the database could not be opened before, perhaps why it still cannot."""
    if damage in UNUSABLE:
        assert set(before.values()) <= set(contents(path.parent).values()), "evidence is gone"
    result: int | str
    try:
        with EmbeddedState(path) as state:
            result = state.get_variable("s", "x").version
    except OpenError as error:
        result = type(error).__name__
    except SessionNotFoundError:
        result = "no session"
    assert result in (NEWEST, BACKED_UP) or damage in UNUSABLE
    assert result != "no session" or damage in (missing, empty)
    # In any case, restoring again works.
    maintenance.restore(backup_of(path), path)
    assert newest_in(path) == BACKED_UP
    return result


def test_the_folder_that_one_is_in_is_no_backup(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert_refused(NotADatabaseError, "it is a folder", Path(), path)
