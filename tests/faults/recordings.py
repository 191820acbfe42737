"""The recordings for the power cuts: servers and commands that write under the recorder, and their promises."""

import asyncio
import json
import re
import shutil
import sqlite3
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

from dspex_persist.errors import DspexError
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.commands import Command, InitializeSession, RegisterVariable, SetVariable
from dspex_persist.state.errors import LostCommitsError
from dspex_persist.state.groups import Job
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.session_store import open_groups
from dspex_persist.wiring.recordings import open_recording
from tests.faults.auditor import Auditor
from tests.faults.bridge import Bridge, wire
from tests.faults.checker import Checker
from tests.faults.crash_test import program_argv, server_argv
from tests.faults.ledger import Ledger
from tests.faults.workload import SESSION, Client, Watcher, set_up
from tests.prepared import Prepared

DATABASE = "cut.db"
_CLIENTS = 6
_TIME = re.compile(r"\.replaced-[^-.]+\.\d+")
"""The suffix of a replaced database; the names of its companion files continue after it."""
_READY_S, _ENDING_S, _WORK_S = 60.0, 30.0, 60.0


class Recording(ABC):
    """Something that writes in `folder / "data"`, and the promises that the disk has to keep."""

    files: Mapping[str, bytes] = {}
    """The durable files before the recording."""

    def __init__(self, folder: Path, env: Mapping[str, str], seed: int, planted: str | None) -> None:
        self._folder = folder
        self._database = folder / "data" / DATABASE
        self._env = env
        self._seed = seed
        self._planted = planted

    @abstractmethod
    def record(self) -> None:
        """Run the recorded work, in separate processes."""

    def judge(self, folder: Path, instant: float) -> list[str]:
        """Return the problems of a disk of that instant."""
        database = folder / DATABASE
        try:
            # Like a start: anchor, WAL, migration, interrupted executions.
            open_groups(database).close()
        except DspexError as error:
            return [f"lost: it cannot be opened: {error}"]
        problems = [f"unsound: {problem}" for problem in maintenance.check(database).problems]
        return problems or self.problems(folder, instant)

    @abstractmethod
    def problems(self, folder: Path, instant: float) -> list[str]:
        """Return the problems of a sound disk of that instant, which has been opened and closed again."""

    def _start(self, *flags: str) -> ServerProcess:
        argv = [*server_argv(self._database, self._planted), *flags]
        return ServerProcess.start(argv, env=self._env, ready_timeout_s=_READY_S)

    def _run(self, *arguments: str) -> float:
        """Run a command, which has to succeed; returns the time of its end."""
        argv = [*program_argv(self._planted), *arguments, "--db", str(self._database)]
        subprocess.run(argv, env=dict(self._env), check=True, capture_output=True)
        return time.monotonic()

    @contextmanager
    def _prepared(self) -> Iterator[Callable[..., float]]:
        """Yield a function like `_run` for several commands, without the start-up time of each."""
        with Prepared(self._env) as prepared:

            def run(*arguments: str) -> float:
                words = [*arguments, "--db", str(self._database)]
                ended = prepared.run(words, cwd=self._folder, env=self._env, timeout_s=_WORK_S)
                assert ended.returncode == 0, ended.stdout + ended.stderr
                return time.monotonic()

            yield run


class Served(Recording):
    """The crash test's clients with three servers, of which two are killed."""

    _ACKNOWLEDGED: ClassVar = (("kill", 90), ("terminate", 60), ("kill", 60))

    def record(self) -> None:
        self._ledger = Ledger()
        self._watcher = Watcher(self._ledger, 0)
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        clients: list[Client] = []
        for end, acknowledged in self._ACKNOWLEDGED:
            with await asyncio.to_thread(self._start) as process:
                async with Bridge(process.port) as bridge:
                    if not clients:
                        names = await set_up(bridge, self._ledger, _CLIENTS)
                        clients += [Client(number, self._seed, self._ledger, names) for number in range(_CLIENTS)]
                    users = [asyncio.create_task(user.run(bridge)) for user in (*clients, self._watcher)]
                    await self._until(self._count() + acknowledged)
                    if end == "kill":
                        process.kill()
                    else:
                        await asyncio.to_thread(process.terminate, _ENDING_S)
                    await asyncio.gather(*users)

    def _count(self) -> int:
        return sum(write.status == "ok" for write in self._ledger.writes.values())

    async def _until(self, acknowledged: int) -> None:
        async with asyncio.timeout(_WORK_S):
            while self._count() < acknowledged:  # noqa: ASYNC110  (the ledger has no event)
                await asyncio.sleep(0.005)

    def problems(self, folder: Path, instant: float) -> list[str]:
        ledger, checker = self._ledger.as_of(instant), Checker()
        watcher = self._watcher
        received = [commit for commit, at in zip(watcher.commits, watcher.received_at, strict=True) if at < instant]
        problems = checker.check(folder / DATABASE, ledger)
        problems += checker.check_watcher(SESSION, 0, received)
        problems += [f"still running: {each}" for each in checker.journal.running]
        values = checker.values(SESSION)
        for target, reads in ledger.reads.items():
            seen = max((read.version or 0 for read in reads), default=0)
            if reads and (target not in values or values[target][0] < seen):
                problems.append(f"lost: version {seen} of {target} was read, the file has {values.get(target)}")
        return problems


class Promise(NamedTuple):
    """Something acknowledged: when, what, and a function that checks whether a folder has it."""

    at: float
    what: str
    is_kept: Callable[[Path], bool]


class _Promising(Recording):
    """A recording with few promises, each of them listed."""

    def __init__(self, folder: Path, env: Mapping[str, str], seed: int, planted: str | None) -> None:
        super().__init__(folder, env, seed, planted)
        self._promises: list[Promise] = []

    def _promise(self, at: float, what: str, is_kept: Callable[[Path], bool]) -> None:
        self._promises.append(Promise(at, what, is_kept))

    def problems(self, folder: Path, instant: float) -> list[str]:
        due = [promise for promise in self._promises if promise.at < instant]
        return [f"lost: {promise.what}" for promise in due if not promise.is_kept(folder)]


class Commands(_Promising):
    """A server that prunes while clients write, followed by the commands that write."""

    _IMPORTED = 40

    def record(self) -> None:
        recording = self._make_recording()
        with self._start("--audit-prune") as process:
            asyncio.run(self._write_and_prune(process.port))
            process.kill()
        backup = self._database.with_name("backup.db")
        with self._prepared() as run:
            at = run("session", "import", str(recording), "--as", "imported")
            self._promise(at, "the imported session", lambda folder: _versions(folder, "imported") == self._IMPORTED)
            at = run("db", "prune", "--keep-versions", "3", "--session", "plain", "--confirm")
            self._promise(at, "the pruning", lambda folder: _versions(folder, "plain") == 3)
            at = run("db", "backup", str(backup))
            self._promise(at, "the backup", lambda folder: (folder / backup.name).exists())
            run("db", "vacuum")
            at = run("session", "fork", "imported", "forked")
            self._promise(at, "the forked session", lambda folder: _versions(folder, "forked") > 0)

    def problems(self, folder: Path, instant: float) -> list[str]:
        problems = super().problems(folder, instant)
        # Whole or not at all, at every instant.
        if (count := _versions(folder, "imported")) not in (0, self._IMPORTED):
            problems.append(f"half: {count} versions of the import are there")
        backup = folder / "backup.db"
        if backup.exists() and (unsound := maintenance.check(backup).problems):
            problems.append(f"half: the backup has problems: {unsound[:2]}")
        return problems

    def _make_recording(self) -> Path:
        """A recording of a session in another file."""
        other, recording = self._folder / "other.db", self._folder / "recording.jsonl"
        store = open_groups(other)
        commands: list[Command[object]] = [
            InitializeSession("s"),
            RegisterVariable("s", "x", "string", Value('""')),
            *(SetVariable("s", "x", Value(json.dumps("x" * 150 * count))) for count in range(1, self._IMPORTED)),
        ]
        for outcome in store.write_group([Job(command, Origin("test", "test")) for command in commands]):
            assert outcome.error is None, outcome.error
        store.close()
        with open_recording(other, "s", reveal=True) as read, recording.open("w") as file:
            write_recording(*read, file)
        return recording

    async def _write_and_prune(self, port: int) -> None:
        random = Random(self._seed)
        async with Bridge(port) as bridge, Auditor(port) as auditor:
            for session_id in ("plain", "pruned"):
                await bridge.begin(session_id)
                await bridge.register(session_id, "x", "string", "", {})
            for count in range(1, 61):
                for session_id in ("plain", "pruned"):
                    text = str(count) + "." * random.choice((0, 1_500, 9_000))
                    version = await bridge.set(session_id, "x", wire("string", text), {})
                    self._promise_version(session_id, version)
                if count % 20 == 0:
                    await auditor.prune("pruned", keep_versions=2)

    def _promise_version(self, session_id: str, version: int) -> None:
        what = f"version {version} of {session_id}"
        self._promise(time.monotonic(), what, lambda folder: _newest(folder, session_id) >= version)


class Upgraded(_Promising):
    """A file of an older release, upgraded to the current revision."""

    _SOURCE = Path(__file__).parents[1] / "assets" / "0001.db"

    def __init__(self, folder: Path, env: Mapping[str, str], seed: int, planted: str | None) -> None:
        super().__init__(folder, env, seed, planted)
        self.files = {DATABASE: self._SOURCE.read_bytes()}

    def record(self) -> None:
        shutil.copyfile(self._SOURCE, self._database)
        self._run("db", "upgrade")

    def problems(self, folder: Path, instant: float) -> list[str]:
        """The content of the old file stays, and a backup of it exists at every stage of the upgrade."""
        before, after = _count_versions(self._SOURCE), _count_versions(folder / DATABASE)
        problems = [] if after == before else [f"lost: {after} of {before} versions are there"]
        backups = [path for path in folder.glob(f"{DATABASE}.backup-*") if not path.name.endswith("-journal")]
        if not any(_is_sound(path) and _count_versions(path) == before for path in backups):
            problems.append(f"lost: none of {len(backups)} backups from before the upgrade can be read")
        return problems


class Restored(_Promising):
    """A backup replaces a database whose server was killed, and which would still start."""

    _OLD, _BACKED_UP = 60, 20

    def __init__(self, folder: Path, env: Mapping[str, str], seed: int, planted: str | None) -> None:
        super().__init__(folder, env, seed, planted)
        self._backup = folder / "backup.db"
        self.files = self._damaged(self._make(folder / "old.db"))

    def _make(self, path: Path) -> dict[str, bytes]:
        """The files of a database after a kill, partly checkpointed; also makes the backup."""
        kept: dict[str, bytes] = {}
        for first, last in ((0, self._BACKED_UP), (self._BACKED_UP, self._OLD)):
            groups = open_groups(path)
            commands: list[Command[object]] = []
            if first == 0:
                commands = [InitializeSession("s"), RegisterVariable("s", "x", "string", Value('""'))]
            # Value 0 comes from the registration.
            values = [Value(json.dumps(f"{count}" + "." * 1_500)) for count in range(max(1, first), last)]
            commands += [SetVariable("s", "x", value) for value in values]
            for outcome in groups.write_group([Job(command, Origin("test", "test")) for command in commands]):
                assert outcome.error is None, outcome.error
            kept = {f"{DATABASE}{suffix}": Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal", ".anchor")}
            groups.close()
            if first == 0:
                assert maintenance.backup(path, self._backup).problems == ()
        return kept

    def _damaged(self, files: dict[str, bytes]) -> dict[str, bytes]:
        return files

    def record(self) -> None:
        for name, content in self.files.items():
            self._database.with_name(name).write_bytes(content)
        at = self._run("db", "restore", str(self._backup))
        self._promise(at, "the restored database", lambda folder: _versions(folder, "s") == self._BACKED_UP)

    def problems(self, folder: Path, instant: float) -> list[str]:
        """One of the two is in place, whole; if it is the restored one, the old one exists under another name."""
        problems = super().problems(folder, instant)
        count = _versions(folder, "s")
        if count == self._BACKED_UP:
            problems += self._problems_of_replaced(folder)
        elif count != self._OLD:
            problems.append(f"half: {count} versions are there, neither {self._OLD} nor {self._BACKED_UP}")
        return problems

    def _problems_of_replaced(self, folder: Path) -> Iterator[str]:
        replaced = [path for path in folder.iterdir() if _TIME.fullmatch(path.name.removeprefix(DATABASE))]
        if len(replaced) != 1:
            yield f"lost: the replaced database is missing or not unique: {replaced}"
            return
        try:
            open_groups(replaced[0]).close()
        except DspexError as error:
            yield f"lost: the replaced database cannot be opened: {error}"
            return
        if (count := _count_versions(replaced[0])) != self._OLD:
            yield f"lost: {count} of the {self._OLD} replaced versions are there"


class Rescued(Restored):
    """Like `Restored`, with a database that has lost commits and does not start: its files are kept as evidence."""

    def _damaged(self, files: dict[str, bytes]) -> dict[str, bytes]:
        wal = files[f"{DATABASE}-wal"]
        return {**files, f"{DATABASE}-wal": wal[: len(wal) // 2]}

    def judge(self, folder: Path, instant: float) -> list[str]:
        there = {path.read_bytes() for path in folder.iterdir()}
        problems = [f"lost: {name} as it was" for name, content in self.files.items() if content not in there]
        try:
            open_groups(folder / DATABASE).close()
        except LostCommitsError:
            problems += [f"lost: {promise.what}" for promise in self._promises if promise.at < instant]
            # The remedy is to run the same command again.
            maintenance.restore(self._backup, folder / DATABASE)
        return problems + super().judge(folder, instant)

    def _problems_of_replaced(self, folder: Path) -> Iterator[str]:
        """Check nothing: the replaced database could not be opened before either."""
        yield from ()


def _scalar(database: Path, sql: str, *parameters: str) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute(sql, parameters).fetchone()[0])


def _versions(folder: Path, session_id: str) -> int:
    return _scalar(folder / DATABASE, f"SELECT count(*) {_OF_SESSION}", session_id)


def _newest(folder: Path, session_id: str) -> int:
    return _scalar(folder / DATABASE, f"SELECT coalesce(max(version), -1) {_OF_SESSION}", session_id)


_OF_SESSION = """
    FROM versions JOIN variables USING (variable_key) JOIN sessions USING (session_key)
    WHERE session_id = ? AND ended_sequence IS NULL
"""


def _count_versions(database: Path) -> int:
    return _scalar(database, "SELECT count(*) FROM versions")


def _is_sound(database: Path) -> bool:
    try:
        with closing(sqlite3.connect(database)) as connection:
            return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
    except sqlite3.DatabaseError:
        return False
