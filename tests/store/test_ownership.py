"""Ownership of a database belongs to the file, not to its name; and what is on disk while it is owned."""

import io
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import connect, open_audit
from dspex_persist.state import commands, imports
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    DatabaseInUseError,
    EngineClosedError,
    FileChangedError,
    InvalidArgumentError,
    NotADatabaseError,
    StorageError,
)
from dspex_persist.state.groups import Job
from dspex_persist.state.limits import Limits
from dspex_persist.state.store import engine, maintenance
from dspex_persist.state.store.maintenance import transfer
from dspex_persist.state.store.session_store import open_groups
from tests import prepared
from tests.databases import remove, rename, replace, truncate
from tests.logs import capture_logs

DEADLINE_S = 60
ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has locks of the whole file, apart from SQLite's"
)

_OPEN = """
import sys, dspex_persist
try:
    dspex_persist.connect(sys.argv[1])
except dspex_persist.DspexError as error:
    print(repr(type(error).__name__), error)
"""
_VISIT = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT count(*) FROM commits").fetchall())
connection.close()
"""


def in_child(program: str, *arguments: object) -> str:
    words = ["-c", program, *map(str, arguments)]
    done = prepared.commands().run_python(words, cwd=Path.cwd(), env=os.environ, timeout_s=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def visit(path: Path) -> None:
    """Read the file with sqlite3, in a process that does nothing else."""
    subprocess.run([sys.executable, "-c", _VISIT, path], capture_output=True, timeout=DEADLINE_S, check=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


@pytest.fixture
def state(path: Path) -> Iterator[EmbeddedState]:
    state = EmbeddedState(path)
    state.initialize_session("s")
    state.register_variable("s", "x", "integer", 0)
    yield state
    with suppress(Exception):
        state.close()


def by_symlink(path: Path) -> Path:
    link = path.with_name("link.db")
    link.symlink_to(path)
    return link


def by_linked_folder(path: Path) -> Path:
    folder = path.parent / "linked"
    folder.symlink_to(path.parent)
    return folder / path.name


def by_hard_link(path: Path) -> Path:
    link = path.with_name("hard.db")
    link.hardlink_to(path)
    return link


def without_lock_file(path: Path) -> Path:
    path.with_name(path.name + ".lock").unlink()
    return path


def as_it_is(path: Path) -> Path:
    return path


NAMES: tuple[Callable[[Path], Path], ...] = (
    as_it_is,
    by_symlink,
    by_linked_folder,
    pytest.param(by_hard_link, marks=ON_LINUX),  # type: ignore[arg-type]
    pytest.param(without_lock_file, marks=ON_LINUX),  # type: ignore[arg-type]
)


class TestASecondOwner:
    @pytest.mark.parametrize("name", NAMES)
    def test_is_refused_in_this_process(self, state: EmbeddedState, path: Path, name: Callable[[Path], Path]) -> None:
        other = name(path)
        with pytest.raises(DatabaseInUseError, match=r"in this process already.*close\(\)") as error:
            connect(other)
        assert str(other) in str(error.value)
        assert state.set_variable("s", "x", 1) == 1

    @pytest.mark.parametrize("name", NAMES)
    def test_is_refused_in_another(self, state: EmbeddedState, path: Path, name: Callable[[Path], Path]) -> None:
        error = in_child(_OPEN, name(path))
        assert error.startswith("'DatabaseInUseError'")
        assert "dspex_persist.serve" in error
        assert "grpc://" in error
        assert state.set_variable("s", "x", 1) == 1

    @pytest.mark.parametrize("name", NAMES)
    def test_may_follow_the_first(self, path: Path, name: Callable[[Path], Path]) -> None:
        with connect(path) as first:
            first.initialize_session("s")
        with connect(name(path)) as second:
            assert second.get_session("s").id == "s"

    @ON_LINUX
    def test_under_another_name_may_not_leave_the_wal_behind(self, path: Path) -> None:
        program = (
            "import os, signal, sys, dspex_persist\n"
            "dspex_persist.connect(sys.argv[1]).initialize_session('s')\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", program, str(path)], timeout=DEADLINE_S, check=False)
        with pytest.raises(NotADatabaseError, match="open it by that name"):
            connect(by_hard_link(path))
        with connect(path) as state:
            assert state.get_session("s").id == "s"

    def test_no_descriptor_stays_behind(self, path: Path) -> None:
        for _ in range(5):
            with connect(path):
                with pytest.raises(DatabaseInUseError):
                    connect(path)
                open_audit(path).close()
        # Only those of the database: others come and go with what earlier tests have left.
        names = [str(each.readlink()) for each in Path("/dev/fd").iterdir() if each.is_symlink()]
        assert [name for name in names if name.startswith(str(path))] == []

    def test_no_descriptor_is_closed_while_a_visitor_reads(self, path: Path) -> None:
        """A reader in the owner's process must not release SQLite's locks when it closes the file."""
        with connect(path) as state:
            state.initialize_session("s")
        with closing(sqlite3.connect(path, isolation_level=None)) as mine:
            mine.execute("BEGIN")
            mine.execute("SELECT count(*) FROM commits").fetchall()
            for _ in range(3):
                connect(path).close()
            visit(path)
            assert path.with_name("x.db-wal").exists(), "a visitor that believed to be alone removed it"
        connect(path).close()
        assert not path.with_name("x.db-wal").exists()


# What the owner's process may do with the file without losing SQLite's locks


def second_connect(path: Path) -> None:
    with suppress(DatabaseInUseError):
        connect(path)


def import_into(path: Path) -> None:
    recording = io.StringIO()
    transfer.export_session(path, "s", recording)
    with pytest.raises(DatabaseInUseError):
        transfer.import_session(path, recording.getvalue().splitlines(keepends=True), session_id="t")


def audit_it(path: Path) -> None:
    with open_audit(path) as audit:
        audit.head()


def change(work: Callable[[Path], object]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        with pytest.raises(DatabaseInUseError):
            work(path)

    act.__name__ = getattr(work, "__name__", "work")
    return act


ACTS: dict[str, Callable[[Path], object]] = {
    "connect": second_connect,
    "import": import_into,
    "audit": audit_it,
    "check": maintenance.check,
    "current": maintenance.current,
    "stats": maintenance.stats,
    "upgrade": change(maintenance.upgrade),
    "vacuum": change(maintenance.vacuum),
    "backup": lambda path: maintenance.backup(path, path.with_name("copy.db")),
}


def own_and_die(path: Path, act: str) -> None:
    """In another process: own the file, do something with it, have a visitor, write, and be killed."""
    state = EmbeddedState(path)
    state.initialize_session("s")
    state.register_variable("s", "x", "integer", 0)
    ACTS[act](path)
    visit(path)
    for number in range(1, 6):
        print(state.set_variable("s", "x", number), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("act", ACTS)
def test_visitors_never_remove_the_wal_whatever_the_owner_did(path: Path, act: str) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.store.test_ownership import own_and_die\n"
        "own_and_die(Path(sys.argv[1]), sys.argv[2])"
    )
    words = ["-c", program, str(path), act]
    owner = prepared.commands().run_python(words, cwd=Path.cwd(), env=os.environ, timeout_s=DEADLINE_S)
    assert owner.returncode == -signal.SIGKILL
    assert owner.stdout.split() == ["1", "2", "3", "4", "5"]
    with connect(path) as state:
        assert state.get_value("s", "x") == 5


# The disk, while the file is open


def writer_has_ended(state: EmbeddedState) -> bool:
    ended = threading.Event()
    thread = state.engine._writer._thread
    thread.join(DEADLINE_S)
    if not thread.is_alive():
        ended.set()
    return ended.is_set()


class TestAFileThatChangesWhileItIsOpen:
    @pytest.mark.parametrize("suffix", ["", "-wal"])
    @pytest.mark.parametrize("spoil", [remove, rename, replace, truncate])
    def test_accepts_no_write_that_would_be_lost(
        self, state: EmbeddedState, path: Path, suffix: str, spoil: Callable[[Path], None]
    ) -> None:
        state.set_variable("s", "x", 1)
        if suffix == "" and spoil is truncate:
            # Until then the file itself is empty, and everything is in the WAL.
            state.engine._groups.sweep()
            engine.checkpoint(state.engine._store._writer, "FULL")
            state.engine._store._guard.note_written()
        spoil(Path(f"{path}{suffix}"))
        with pytest.raises(FileChangedError, match=f"x.db{suffix} was .* while it was open"):
            state.set_variable("s", "x", 2)
        for call in (lambda: state.set_variable("s", "x", 3), lambda: state.get_value("s", "x"), state.audit):
            with pytest.raises(FileChangedError):
                call()

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
    def test_is_noticed_even_without_writes(self, path: Path, suffix: str) -> None:
        errors: list[BaseException] = []
        with EmbeddedState(path, on_fatal=errors.append) as state:
            state.initialize_session("s")
            remove(Path(f"{path}{suffix}"))
            assert writer_has_ended(state)
            assert isinstance(errors[0], FileChangedError)
            with pytest.raises(FileChangedError):
                state.get_session("s")

    @pytest.mark.parametrize("spoil", [remove, rename, replace])
    def test_loses_nothing_if_only_its_wal_is_gone(self, path: Path, spoil: Callable[[Path], None]) -> None:
        program = (
            "import sys, dspex_persist\n"
            "with dspex_persist.connect(sys.argv[1]) as state: print(state.get_value('s', 'x'))"
        )
        with EmbeddedState(path) as state:
            state.initialize_session("s")
            state.register_variable("s", "x", "integer", 0)
            state.set_variable("s", "x", 7)
            spoil(path.with_name("x.db-wal"))
            with pytest.raises(FileChangedError, match="moved into the file"):
                state.set_variable("s", "x", 8)
        assert in_child(program, path) == "7\n"

    def test_another_program_that_wrote_ends_it(self, state: EmbeddedState, path: Path) -> None:
        state.set_variable("s", "x", 1)
        with closing(sqlite3.connect(path)) as other, other:
            other.execute('UPDATE sessions SET metadata = \'{"by": "hand"}\'')
        with pytest.raises(FileChangedError, match="another program has written to it"):
            state.set_variable("s", "x", 2)

    def test_also_without_writes(self, state: EmbeddedState, path: Path) -> None:
        with closing(sqlite3.connect(path)) as other, other:
            other.execute('UPDATE sessions SET metadata = \'{"by": "hand"}\'')
        assert writer_has_ended(state)

    @pytest.mark.parametrize("mode", ["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
    def test_a_checkpoint_of_others_changes_nothing(self, state: EmbeddedState, path: Path, mode: str) -> None:
        state.set_variable("s", "x", 1)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        state.engine._store.check()
        assert state.set_variable("s", "x", 2) == 2
        assert maintenance.check(path).problems == ()

    def test_a_lock_of_others_refuses_the_write_and_no_more(
        self, state: EmbeddedState, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state.engine._store._connection.exec_driver_sql("PRAGMA busy_timeout = 10")
        state.engine._store._connection.commit()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(2):
                with pytest.raises(StorageError, match=r"nothing was written: another program holds the write lock"):
                    state.set_variable("s", "x", 1)
            state.engine._store.check()
            assert state.get_value("s", "x") == 0
            other.execute("ROLLBACK")
        assert state.set_variable("s", "x", 1) == 1

    def test_a_lock_of_others_refuses_an_import_and_no_more(self, path: Path) -> None:
        with closing(open_groups(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
            store.log._connection.exec_driver_sql("PRAGMA busy_timeout = 10")
            store.log._connection.commit()
            other.execute("BEGIN IMMEDIATE")
            job = Job(commands.ImportSession("s", [], ""), imports.IMPORT)
            (refused,) = store.write_group([job])
            assert isinstance(refused.error, StorageError)
            other.execute("ROLLBACK")
            (done,) = store.write_group([job])
            assert (done.error, done.result.commits) == (None, 0)

    def test_a_sweep_that_cannot_read_is_tried_again(
        self, state: EmbeddedState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise sqlite3.OperationalError("unable to open database file")

        state.engine._store.readers.dispose()
        with monkeypatch.context() as broken:
            broken.setattr(sqlite3, "connect", fail)
            assert state.engine._groups.sweep() == 0
        assert state.set_variable("s", "x", 1) == 1


class TestARelativePath:
    def test_is_fixed_when_the_file_is_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "b")
        with connect("x.db") as state:
            state.initialize_session("s")
            state.register_variable("s", "x", "string", "of the other file")
        monkeypatch.chdir(tmp_path / "a")
        with connect("x.db") as state:
            state.initialize_session("s")
            state.register_variable("s", "x", "string", "of this one")
            with open_audit("x.db") as audit:
                monkeypatch.chdir(tmp_path / "b")
                assert len(state.get_variable_history("s", "x")) == 1
                assert audit.head() == state.audit().head() == 2
                assert state.set_variable("s", "x", "new") == 1
        assert {entry.name for entry in (tmp_path / "b").iterdir()} == {"x.db", "x.db.anchor", "x.db.lock"}


class TestAFolderOfOthers:
    @pytest.mark.parametrize("suffix", [".lock", ".anchor"])
    def test_no_link_of_theirs_is_written_to(self, path: Path, suffix: str) -> None:
        victim = path.with_name("victim")
        victim.write_text("precious")
        Path(f"{path}{suffix}").symlink_to(victim)
        with pytest.raises(NotADatabaseError, match=f"x.db{suffix} is a link"):
            connect(path)
        assert victim.read_text() == "precious"

    def test_no_database_is_made_where_a_link_points_to(self, path: Path) -> None:
        path.symlink_to(path.with_name("victim"))
        with pytest.raises(NotADatabaseError, match="which does not exist"):
            connect(path)
        assert not path.with_name("victim").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
    @pytest.mark.parametrize("suffix", [".lock", ".anchor"])
    def test_no_file_of_theirs_is_taken(self, path: Path, suffix: str) -> None:
        file = Path(f"{path}{suffix}")
        file.touch()
        os.chown(file, 23456, 23456)
        with pytest.raises(NotADatabaseError, match="belongs to another user"):
            connect(path)

    def test_nothing_but_a_file_is_taken(self, path: Path) -> None:
        os.mkfifo(f"{path}.lock")
        with pytest.raises(NotADatabaseError, match="not a regular file with one name"):
            connect(path)
        Path(f"{path}.lock").unlink()
        os.mkfifo(path)
        with pytest.raises(NotADatabaseError, match="not a regular file"):
            connect(path)

    def test_a_file_that_others_can_read_is_reported(self, path: Path) -> None:
        connect(path).close()
        path.chmod(0o644)
        with capture_logs() as logs:
            connect(path).close()
        assert [entry["mode"] for entry in logs if "others can read" in entry["event"]] == ["0644"]


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value", "says"),
        [
            ("durability", "ful", "neither 'full' nor 'normal'"),
            ("durability", None, "neither 'full' nor 'normal'"),
            ("limits", {}, "is not a dspex_persist.state.limits.Limits"),
            ("session_ttl_s", "60", "not a number of seconds"),
            ("session_ttl_s", 0, "above 0"),
            ("session_ttl_s", float("nan"), "above 0"),
            ("optimization_lease_s", None, "not a number of seconds"),
            ("outcome_retention_s", -1, "above 0"),
            ("retention_age_s", 1e300, "and at most"),
            ("retention_ended_sessions_s", True, "not a number of seconds"),
            ("retention_keep_versions", 0, "at least 1"),
            ("retention_keep_versions", 1.5, "not a whole number"),
            ("cache_size_bytes", "1MiB", "not a whole number"),
            ("warn_size_bytes", -1, "at least 1"),
            ("sweep_interval_s", 0, "above 0"),
            ("tool_threads", 0, "at least 1"),
        ],
    )
    def test_invalid_ones_are_refused_by_name(self, path: Path, option: str, value: object, says: str) -> None:
        with pytest.raises(InvalidArgumentError, match=f"invalid {option}: .*{says}"):
            connect(path, **{option: value})
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize("limit", [each.name for each in fields(Limits)])
    def test_so_are_invalid_limits(self, path: Path, limit: str) -> None:
        for value, says in (("5", "not a whole number"), (-1, "at least 1"), (None, "not a whole number")):
            limits = Limits(**{limit: value})  # type: ignore[arg-type]
            with pytest.raises(InvalidArgumentError, match=rf"invalid limits\.{limit}: .*{says}"):
                connect(path, limits=limits)
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize("value", ["5", 0, -1, float("nan"), float("inf"), True, None, 10**400])
    def test_the_stall_timeout_of_a_server_is_a_time(self, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=r"invalid timeout_s: it (must be|is too large)"):
            connect("grpc://127.0.0.1:1", timeout_s=value)

    def test_an_unknown_home_folder_is_not_created_in_the_working_directory(self) -> None:
        with pytest.raises(NotADatabaseError, match=r"no folder ~; ~ is a home only to a shell.*expanduser\(\)"):
            connect("~/x.db")

    def test_that_do_not_exist_are_refused_with_those_that_do(self, path: Path) -> None:
        with pytest.raises(TypeError, match="a file has no option durabilty; did you mean durability"):
            connect(path, durabilty="full")
        with pytest.raises(TypeError, match=r"a file has no option colour; the options are .*session_ttl_s"):
            connect(path, colour="blue")
        with pytest.raises(TypeError, match=r"a server has no option durability; the options are .*timeout_s"):
            connect("grpc://127.0.0.1:1", durability="full")
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize("url", ["memory:", ":memory:"])
    def test_memory_leaves_no_file(self, path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(path.parent)
        with connect(url) as state:
            state.initialize_session("s")
        assert list(path.parent.iterdir()) == []

    def test_a_missing_folder_is_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(NotADatabaseError, match="mkdir -p"):
            connect(tmp_path / "missing" / "x.db")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"\xff.db", r"folder/\udcff.db: SQLite has names in UTF-8 only: rename what is not"),
        (b"\xff/x.db", r"folder/\udcff/x.db: SQLite has names in UTF-8 only: rename what is not"),
        (b"a\x1b\0.db", r"a\x1b\x00.db: embedded null byte"),
        (b"..", "Is a directory"),
    ],
)
def test_an_impossible_file_name_is_refused_with_a_reason(tmp_path: Path, name: bytes, reason: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / os.fsdecode(name)
    if path.parent != folder:
        path.parent.mkdir()
    with pytest.raises(NotADatabaseError) as error:
        connect(path)
    assert reason in str(error.value)
    assert str(error.value).isprintable()
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []


def test_a_folder_with_a_strange_name_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a\x1bb").mkdir()
    with pytest.raises(NotADatabaseError) as error:
        connect(tmp_path / "a\x1bb")
    assert str(error.value) == rf"cannot open {tmp_path}/a\x1bb: Is a directory"


def test_the_root_folder_is_not_a_database() -> None:
    with pytest.raises(NotADatabaseError, match="it is a folder: name a file in it"):
        connect("/")


@pytest.mark.parametrize("act", [open_audit, maintenance.check])
def test_the_name_of_a_missing_file_is_printable(tmp_path: Path, act: Callable[[Path], object]) -> None:
    with pytest.raises(NotADatabaseError) as error:
        act(tmp_path / os.fsdecode(b"\xff\x1b.db"))
    assert r"\udcff\x1b.db" in str(error.value)
    assert str(error.value).isprintable()


def test_another_users_of_alembic_are_not_ours(path: Path) -> None:
    with closing(sqlite3.connect(path)) as theirs, theirs:
        theirs.execute("CREATE TABLE alembic_version (version_num TEXT)")
        theirs.execute("INSERT INTO alembic_version VALUES ('v3.2.0.a')")
        theirs.execute("CREATE TABLE trials (x)")
    for act in (connect, open_audit, maintenance.check):
        with pytest.raises(NotADatabaseError, match=r"another program's database \(tables: alembic_version, trials\)"):
            act(path)
    assert not path.with_name(f"{path.name}.anchor").exists()


def test_a_closed_engine_refuses_reads_of_the_file(path: Path) -> None:
    state = EmbeddedState(path)
    state.close()
    with pytest.raises(EngineClosedError):
        state.get_variable_history("s", "x")
