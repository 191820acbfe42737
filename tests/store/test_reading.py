"""Reading a file: without the right to write to its folder, and when reading fails."""

import gc
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import DspexError, connect, open_audit
from dspex_persist.state import audit as questions
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import NotADatabaseError, ReadFailedError
from dspex_persist.state.model import PrunePolicy, UpdateKind
from dspex_persist.state.store import engine, maintenance
from dspex_persist.state.store.maintenance import transfer
from dspex_persist.state.store.session_store import StoreOptions
from tests.prepared import commands

STRANGER = 23456
DEADLINE_S = 60
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def fill(path: Path) -> None:
    with connect(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        state.set_variable("s", "x", 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.db"
    fill(path)
    return path


# Without the right to write

# Run once as who one is, on a copy: a stranger may not read the interpreter's own modules, and has them then.
_AS_STRANGER = """
import contextlib, io, os, shutil, sys, tempfile
*arguments, path = sys.argv[1:]
def run(path):
    try:
        {program}
    except SystemExit as ended:
        return ended.code or 0
    return 0
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    copy = shutil.copy({original!r}, os.path.join(folder, "x.db"))
    for each in (copy, os.path.join(folder, "missing.db")):
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
            run(each)
os.setgid({uid}); os.setuid({uid}); os.chdir("/")
sys.exit(run(path))
"""
_CLI = "from dspex_persist.cli import main; sys.argv = ['dspex-persist', *arguments, path]; main()"


def as_stranger(*arguments: object, original: Path, program: str = _CLI) -> subprocess.CompletedProcess[str]:
    text = _AS_STRANGER.format(uid=STRANGER, program=program, original=str(original))
    words = ["-c", text, *map(str, arguments)]
    return commands().run_python(words, cwd=Path.cwd(), env=os.environ, timeout_s=DEADLINE_S)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A file that all may read, in a folder where only its owner can make files; pytest's own folders are private."""
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    path = folder / "x.db"
    fill(path)
    path.chmod(0o444)
    folder.chmod(0o555)
    yield path
    shutil.rmtree(folder)


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("audit", "sessions", "--db"),
    ("audit", "history", "s", "x", "--db"),
    ("audit", "commits", "--db"),
    ("audit", "verify", "--db"),
    ("db", "check", "--db"),
    ("db", "current", "--db"),
    ("db", "stats", "--db"),
    ("db", "prune", "--keep-versions", "1", "--db"),
    ("session", "export", "s", "-o", "-", "--db"),
)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {entry.name: (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in folder.iterdir()}


@AS_ROOT
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_closed_file_is_read_in_a_read_only_folder(shared: Path, path: Path, command: tuple[str, ...]) -> None:
    if command[0] == "audit":
        for suffix in (".lock", ".anchor"):
            Path(f"{shared}{suffix}").unlink()
    before = listing(shared.parent)
    result = as_stranger(*command, shared, original=path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout
    assert listing(shared.parent) == before


@AS_ROOT
@pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[4], COMMANDS[6]], ids=" ".join)
def test_the_file_of_a_killed_process_is_refused_with_advice_there(
    shared: Path, path: Path, command: tuple[str, ...]
) -> None:
    program = "import os, sys, dspex_persist; dspex_persist.connect(sys.argv[1]).initialize_session('t'); os.kill(0, 0)"
    program = program.replace("os.kill(0, 0)", f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    subprocess.run([sys.executable, "-c", program, shared], timeout=DEADLINE_S, check=False)
    Path(f"{shared}-shm").unlink()
    result = as_stranger(*command, shared, original=path)
    assert result.returncode == 5
    assert "copy x.db and x.db-wal into a folder of yours" in result.stderr
    assert result.stderr.count("\n") == 1


@AS_ROOT
def test_a_served_file_is_read_there_as_well(shared: Path, path: Path) -> None:
    shared.parent.chmod(0o755)
    shared.chmod(0o644)
    with connect(shared) as state:
        state.initialize_session("t")
        program = "import dspex_persist; print(dspex_persist.open_audit(path).head())"
        result = as_stranger(shared, original=path, program=program)
        assert (result.stdout, result.stderr) == ("4\n", "")


@AS_ROOT
def test_a_missing_right_to_read_is_reported(shared: Path, path: Path) -> None:
    shared.chmod(0o400)
    result = as_stranger("db", "check", "--db", shared, original=path)
    assert result.returncode == 5
    assert "this user may not read x.db" in result.stderr


@AS_ROOT
def test_a_missing_right_to_write_is_reported_with_advice(shared: Path, path: Path) -> None:
    result = as_stranger(shared, original=path, program="import dspex_persist; dspex_persist.connect(path)")
    assert "NotADatabaseError" in result.stderr
    assert "dspex_persist.open_audit" in result.stderr


def test_a_file_opened_for_writing_meanwhile_is_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that considered the file closed must not trust its result once a server has begun to write."""
    monkeypatch.setattr(engine, "_can_write", lambda _: False)
    with open_audit(path) as audit:
        assert audit.head() == 3
        readers = audit._readers  # type: ignore[attr-defined]
        with pytest.raises(ReadFailedError, match="opened it for writing"), engine.snapshot(readers):
            state = EmbeddedState(path)
        state.initialize_session("t")
        assert audit.head() == 4
        state.close()
        assert audit.head() == 4


# When reading fails


class Faults:
    """Faults of the driver: `error` is raised by each of its calls from the `after`-th on."""

    def __init__(self) -> None:
        self.error: sqlite3.Error | None = None
        self.after = 0
        self.calls = 0

    def strike(self) -> None:
        self.calls += 1
        if self.error is not None and self.calls > self.after:
            # A new one: it holds on to where it was raised, and so to what was being read there.
            error = type(self.error)(*self.error.args)
            error.sqlite_errorcode = self.error.sqlite_errorcode
            raise error

    def none(self) -> None:
        self.error, self.calls = None, 0


FAULTS = Faults()


class FaultyCursor(sqlite3.Cursor):
    def execute(self, *arguments: Any) -> "FaultyCursor":
        FAULTS.strike()
        return super().execute(*arguments)  # type: ignore[return-value]

    def __next__(self) -> Any:
        FAULTS.strike()
        return super().__next__()

    def fetchone(self) -> Any:
        FAULTS.strike()
        return super().fetchone()

    def fetchall(self) -> list[Any]:
        FAULTS.strike()
        return super().fetchall()


def faulty_connect(*arguments: Any, factory: type[sqlite3.Connection] = sqlite3.Connection, **named: Any) -> Any:
    class FaultyConnection(factory):  # type: ignore[misc, valid-type]
        def cursor(self, kind: Any = FaultyCursor) -> Any:
            return super().cursor(kind)

        def execute(self, *parameters: Any) -> Any:
            return self.cursor().execute(*parameters)

    if "mode=ro" not in str(arguments[0]):
        # The writer's connection, whose errors have other tests.
        return _connect(*arguments, factory=factory, **named)
    FAULTS.strike()
    return _connect(*arguments, factory=FaultyConnection, **named)


_connect = sqlite3.connect


def fault(code: int, text: str, kind: type[sqlite3.Error] = sqlite3.OperationalError) -> sqlite3.Error:
    error = kind(text)
    error.sqlite_errorcode = code
    return error


KINDS = {
    "io": fault(sqlite3.SQLITE_IOERR, "disk I/O error"),
    "open": fault(sqlite3.SQLITE_CANTOPEN, "unable to open database file"),
    "malformed": fault(sqlite3.SQLITE_CORRUPT, "database disk image is malformed", sqlite3.DatabaseError),
}

Ask = Callable[[EmbeddedState], object]


def pages(query: Any) -> Ask:
    return lambda state: state.audit().page(query)


STATE: dict[str, Ask] = {
    "history": lambda state: state.get_variable_history("s", "x"),
    "record": lambda state: list(state.record("s")[1]),
    "fork": lambda state: state.fork_session("s", f"s{FAULTS.calls}.{FAULTS.after}"),
    "prune": lambda state: state.prune(PrunePolicy(keep_versions=1), confirm=False),
    "head": lambda state: state.audit().head(),
    "resolve": lambda state: state.audit().resolve("1"),
    "state": lambda state: state.audit().state("s", "2"),
    "sessions": pages(questions.SessionQuery()),
    "commits": pages(questions.CommitQuery()),
    "versions": pages(questions.HistoryQuery(session="s")),
    "executions": pages(questions.ExecutionQuery()),
    "watch": lambda state: state.watch("s", ["x"], after_sequence=1).pull(),
    "variable": lambda state: state.watch("s", ["gone"]),
}
FILES: dict[str, Callable[[Path], object]] = {
    "open_audit": lambda path: open_audit(path).close(),
    "check": maintenance.check,
    "current": maintenance.current,
    "stats": maintenance.stats,
    "backup": lambda path: maintenance.backup(path, path.with_name(f"copy{FAULTS.after}.db")),
    "prune": lambda path: maintenance.prune(path, PrunePolicy(keep_versions=1), confirm=False),
    "export": lambda path: transfer.export_session(path, "s", path.with_name("s.jsonl")),
}


WHOLE = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.thorough)])


def walk(work: Callable[[], object], kind: str, most: int = 400, *, whole: bool = True) -> int:
    """Have the n-th call of the driver fail, and all after it, for n = 0, 1, ...; how many there were to fail.

    If not `whole`, each call fails in one of the kinds.
    """
    kinds = list(KINDS)
    first, step = (0, 1) if whole else (kinds.index(kind), len(kinds))
    for after in range(first, most, step):
        FAULTS.error, FAULTS.after, FAULTS.calls = KINDS[kind], after, 0
        try:
            with suppress(DspexError):
                work()
        finally:
            struck = FAULTS.calls > after
            FAULTS.none()
        if not struck:
            return after
    return most


@WHOLE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STATE)
def test_no_error_of_the_driver_leaves_the_engine(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, whole: bool
) -> None:
    monkeypatch.setattr(sqlite3, "connect", faulty_connect)
    with connect(path) as opened:
        assert isinstance(opened, EmbeddedState)
        state = opened

        def ask() -> object:
            # With new connections, so that opening them fails as well.
            state.engine._store.readers.dispose()
            return STATE[name](state)

        assert walk(ask, kind, whole=whole) > 1
        # Errors hold on to what was being read, and the end would wait for that.
        gc.collect()
        assert state.set_variable("s", "x", 2) >= 2, "nothing of that ends the engine"
        assert state.audit().head() > 3


@WHOLE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_nor_a_function_on_a_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, whole: bool
) -> None:
    monkeypatch.setattr(sqlite3, "connect", faulty_connect)
    assert walk(lambda: FILES[name](path), kind, 60, whole=whole) > 1


def test_nor_the_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "connect", faulty_connect)
    assert walk(lambda: connect(path).close(), "io") > 1
    connect(path).close()


@pytest.mark.parametrize("call", ["open", "fstat", "pread", "pwrite", "ftruncate", "stat"])
def test_nor_an_error_of_the_system(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Errors of the package's own file operations, when it opens and closes."""
    real: Any = getattr(os, call)

    def broken(*arguments: Any, **named: Any) -> Any:
        if "x.db" in str(arguments[0]) or isinstance(arguments[0], int):
            raise OSError(5, "Input/output error")
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(engine.os, call, broken)
        for work in (connect, open_audit):
            with suppress(DspexError):
                work(path).close()
    connect(path).close()


def test_too_many_open_files_is_reported(path: Path) -> None:
    program = (
        "import resource, sys, dspex_persist, os\n"
        "dspex_persist.open_audit(sys.argv[1]).close()\n"
        "held = []\n"
        "try:\n"
        "    while True: held.append(os.open('/', os.O_RDONLY))\n"
        "except OSError: pass\n"
        "try: dspex_persist.open_audit(sys.argv[1])\n"
        "except dspex_persist.DspexError as error: print(type(error).__name__, error)\n"
        "for each in held: os.close(each)\n"
        "print(dspex_persist.open_audit(sys.argv[1]).head())\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    result = subprocess.run(
        [sys.executable, "-c", program, path],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
        preexec_fn=limit,
    )
    reason = "could not be read: too many open files; close some, or raise the limit (ulimit -n)"
    assert result.stdout == f"ReadFailedError {path} {reason}\n3\n"


def test_no_caller_waits_for_a_connection(path: Path) -> None:
    """With more readers than pooled connections, each still gets a connection."""
    readers = engine.open_readers(path, size=1)
    with engine.snapshot(readers) as one, engine.snapshot(readers) as two:
        assert one.exec_driver_sql("SELECT count(*) FROM commits").scalar_one() == 3
        assert two.exec_driver_sql("SELECT count(*) FROM commits").scalar_one() == 3
    readers.dispose()


def test_a_damaged_file_is_no_database(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(NotADatabaseError, match="malformed"):
        open_audit(path)


# Watches


def test_a_watch_that_is_behind_sees_new_dependants_of_a_session_that_left_memory(tmp_path: Path) -> None:
    with EmbeddedState(tmp_path / "x.db", StoreOptions(cache_size_bytes=1)) as state:
        state.initialize_session("s")
        for name in "abc":
            state.register_variable("s", name, "integer", 0)
        with state.watch("s", ["b"]) as watch:
            state.add_dependency("s", "b", "a")
            state.set_variable("s", "a", 1)
            # More commits than a watch finds in memory, and then other sessions.
            for number in range(300):
                state.set_variable("s", "c", number)
            for number in range(3):
                state.initialize_session(f"other {number}")
            (update,) = watch.next(DEADLINE_S)
    assert (update.kind, update.dependency) == (UpdateKind.DEPENDENCY_CHANGED, "a")
