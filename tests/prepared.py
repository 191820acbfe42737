"""Commands and servers that start at once: a process imports the heavy modules once, and forks for each of them.

The start of a command is mostly imports: some 0.4 s of CPU time, against some 0.03 s here. What depends on the start
itself (variables that Python reads, warnings at imports, Ctrl-C before `main`) needs a process of its own.
`Prepared.run_python` does the same for programs, and for pytest.

`Started` is for what runs on, such as a server: a Popen whose child is forked there, but is a child of this process,
with its own pid, descriptors, environment, working directory and limits.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final, NoReturn, Self

ROOT: Final = Path(__file__).parents[1]
# What the commands import themselves.
_MODULES: Final = (
    "alembic.command",
    "alembic.config",
    "encodings.idna",
    "uvloop",
    "dspex_persist.audit.pictures",
    "dspex_persist.cli.audit.lists",
    "dspex_persist.cli.audit.tables",
    "dspex_persist.cognitive.migrating",
    "dspex_persist.infra.access.allowed",
    "dspex_persist.infra.log_output",
    "dspex_persist.infra.access.peers",
    "dspex_persist.infra.workers.pool",
    "dspex_persist.replay",
    "dspex_persist.state.bridge.access.scopes",
    "dspex_persist.state.bridge.workers.existing",
    "dspex_persist.state.bridge.access.guard",
    "dspex_persist.state.bridge.workers.pools",
    "dspex_persist.state.bridged",
    "dspex_persist.state.embedded",
    "dspex_persist.state.store.maintenance.transfer",
    "dspex_persist.wiring.bridge",
    "dspex_persist.wiring.recordings",
    "dspex_persist.wiring.serving",
    "rich._emoji_codes",
    "rich.progress",
    "rich.table",
    "typer._adapters",
    "typer._click.decorators",
)
_NAMES: Final = ("stdin", "stdout", "stderr")
# What an interpreter or its libraries read when they start. With other values than here, only a new one will do.
_READ_AT_START: Final = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", "GRPC_", "OPENSSL_", "SSL_", "UV_")
_PATH: Final = "PYTHONPATH"
# What `serve` sets before it imports gRPC, which reads it then. With its fork support, gRPC would start threads in each
# process that a tool forks.
_SERVERS: Final = {"GRPC_VERBOSITY": "ERROR", "GRPC_ENABLE_FORK_SUPPORT": "0"}
_LIMITS: Final = tuple(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
_SET_SUBREAPER: Final = 36
"""Of prctl(2): orphans among the descendants of the process become its children."""


class Prepared:
    """Runs commands of `dspex-persist`, one after the other, each in a fork of a process with the environment `env`."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self.lock = threading.Lock()
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.prepared", str(theirs.fileno())],
                cwd=ROOT,
                # What a new interpreter has on its import path without that, each command adds its own to.
                env={name: text for name, text in env.items() if name != _PATH},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._answers = self._ours.makefile()

    def start(
        self,
        words: Sequence[str | bytes],
        streams: Sequence[int | None],
        *,
        cwd: Path,
        env: Mapping[str, str],
        timeout_s: float,
        encoding: str = "utf-8",
        python: bool = False,
    ) -> int:
        """Run a command to its end on these descriptors (None: closed), and return its exit code as Popen does.

        With `python`, the words are not those of `dspex-persist`, but of `python`; see `run_python`.
        """
        request = {
            "words": [os.fsdecode(word) for word in words],
            "streams": [stream is not None for stream in streams],
            "cwd": os.fspath(cwd),
            "env": dict(env),
            "alarm_s": round(timeout_s),
            "encoding": encoding,
            "python": python,
        }
        with self.lock:
            return self.ask(request, [stream for stream in streams if stream is not None])

    def ask(self, request: Mapping[str, Any], streams: Sequence[int]) -> int:
        """Return the answer to a request; OSError if the process has ended. The caller holds `lock`."""
        line = json.dumps(request).encode() + b"\n"
        try:
            sent = socket.send_fds(self._ours, [line], streams)
            self._ours.sendall(line[sent:])
            answer = self._answers.readline()
            if not answer:
                raise ConnectionError("the process that forks has ended")
            return int(answer)
        except BaseException:
            # Of an interrupted test: its answer would be taken for that to the next request.
            self._process.kill()
            raise

    def run_python(
        self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python` to its end, with any number of `-W FILTER`, and `-c PROGRAM`, `-m MODULE` or a file.

        It runs, and ends, as in a new interpreter, but has imported much before.
        """
        return self.run(words, cwd=cwd, env=env, timeout_s=timeout_s, python=True)

    def run(
        self,
        words: Sequence[str | bytes],
        *,
        cwd: Path,
        env: Mapping[str, str],
        timeout_s: float,
        text: str = "",
        python: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end with `text` as its input."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(text.encode())
            given.seek(0)
            streams = [stream.fileno() for stream in (given, out, err)]
            code = self.start(words, streams, cwd=cwd, env=env, timeout_s=timeout_s, python=python)
            for stream in (out, err):
                stream.seek(0)
            return subprocess.CompletedProcess(list(words), code, out.read().decode(), err.read().decode())

    def is_running(self) -> bool:
        """Whether the process that forks is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process that forks."""
        self._answers.close()
        self._ours.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_shared: list[Prepared] = []


def commands() -> Prepared:
    """Return the one that all tests of this process share; `close` ends it."""
    if not _shared or not _shared[0].is_running():
        close()
        _shared.append(Prepared())
    return _shared[0]


def close() -> None:
    """End the shared one, if there is one."""
    while _starters:
        _starters.pop().close()
    while _shared:
        _shared.pop().close()


class _Starter:
    """Has children of this process forked."""

    def __init__(self) -> None:
        self._env = {**os.environ, **_SERVERS}
        self._prepared = Prepared(self._env)
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def suits(self, env: Mapping[str, str]) -> bool:
        """Whether a fork is as good as a new interpreter in this environment."""
        serving = {**_SERVERS, **env}
        names = {name for name in serving.keys() | self._env.keys() if name.startswith(_READ_AT_START)} - {_PATH}
        return all(serving.get(name) == self._env.get(name) for name in names)

    def fork(self, request: Mapping[str, Any], streams: Sequence[int]) -> int:
        """Fork a child with these standard streams, and return its pid; OSError if the process that forks has ended."""
        with self._prepared.lock:
            self._adopt(True)
            try:
                return self._prepared.ask(request, streams)
            finally:
                self._adopt(False)

    def is_running(self) -> bool:
        return self._prepared.is_running()

    def close(self) -> None:
        self._prepared.close()

    def _adopt(self, wanted: bool) -> None:
        if self._prctl(_SET_SUBREAPER, int(wanted), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


_starters: list[_Starter] = []
_starting = threading.Lock()


def _starter() -> _Starter:
    with _starting:
        if not _starters or not _starters[0].is_running():
            while _starters:
                _starters.pop().close()
            _starters.append(_Starter())
        return _starters[0]


_PROGRAMS: Final = [[sys.executable, "-m", "dspex_persist", command] for command in ("serve", "watch", "worker")]


class Started(subprocess.Popen[Any]):
    """A process that runs a command that runs on: a fork where that does, else a new interpreter."""

    own_interpreters = False
    """Whether all get a new interpreter."""

    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        *more: Any,
    ) -> None:
        shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[2:9]
        gid, gids, uid, umask, session, group = more[10:]
        program = list(args)[:4] if not isinstance(args, str | bytes | os.PathLike) else []
        folder = Path(os.fsdecode(cwd or ".")).absolute()
        wants_more = (executable, preexec_fn, pass_fds, shell, session, umask >= 0, group >= 0)
        given = dict(os.environ if env is None else env)
        if (
            self.own_interpreters
            or sys.platform != "linux"
            or program not in _PROGRAMS
            or any(wants_more)
            or not close_fds
            or any(each is not None for each in (gid, gids, uid))
            or not folder.is_dir()
            or not _starter().suits(given)
        ):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)  # type: ignore[misc]
            return
        request = {
            "words": list(map(os.fsdecode, args[3:])),
            "cwd": os.fspath(folder),
            "env": given,
            "limits": [[number, *resource.getrlimit(number)] for number in _LIMITS],
            "umask": _umask(),
            "parent": os.getpid(),
        }
        streams = [stream if stream >= 0 else number for number, stream in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = _starter().fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def _umask() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("\nUmask:")[2].split()[0], 8)


# In the process that forks


def _prepare() -> tuple[list[str], Any]:
    """Import what commands do, and return the import path that all of them have, and their `main`."""
    import gc

    import typer

    from dspex_persist import cli

    for module in _MODULES:
        import_module(module)
    # The tree of all commands is half of what is left of a short one.
    command = typer.main.get_command(cli.app)
    typer.main.get_command = lambda typer_instance: command  # noqa: ARG005
    path = sys.path[1:]
    gc.collect()
    # The children neither look through the modules nor get copies of their pages for that.
    gc.freeze()
    return path, cli.main


def _serve(connection: socket.socket) -> None:
    path, main = _prepare()
    while True:
        line, streams, _, _ = socket.recv_fds(connection, 65536, len(_NAMES))
        while line and not line.endswith(b"\n"):
            more = connection.recv(65536)
            # Of a test run that was killed, half a request is all that comes.
            line = line + more if more else b""
        if not line:
            return
        request = json.loads(line)
        if "parent" in request:
            child = _forked_twice()
            if child == 0:
                connection.close()
                _start(request, streams, path)
                return
            answer = child
        else:
            child = os.fork()
            if child == 0:
                connection.close()
                if request["python"]:
                    _run_python(request, streams, path)
                    return
                _become(request, streams, path, main)
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for stream in streams:
            os.close(stream)
        connection.sendall(f"{answer}\n".encode())


def _forked_twice() -> int:
    """Fork a child of the process that adopts orphans; it continues once that is its parent."""
    ended, ending = os.pipe()
    told, telling = os.pipe()
    between = os.fork()
    if between == 0:
        os.close(ending)
        child = os.fork()
        if child:
            os.write(telling, str(child).encode())
            os._exit(0)
        os.close(told)
        os.close(telling)
        os.read(ended, 1)
        os.close(ended)
        return 0
    os.waitpid(between, 0)
    child = int(os.read(told, 20))
    for descriptor in (ended, ending, told, telling):
        os.close(descriptor)
    return child


def _start(request: Mapping[str, Any], streams: list[int], path: list[str]) -> None:
    """Run `python -m dspex_persist` on these streams. The interpreter then ends as it does by itself."""
    assert os.getppid() == request["parent"]
    os.umask(request["umask"])
    for number, soft, hard in request["limits"]:
        resource.setrlimit(number, (soft, hard))
    _settle(request, streams, path)
    sys.argv[:] = ["-m", *request["words"]]
    runpy.run_module("dspex_persist", run_name="__main__", alter_sys=True)


def _settle(request: Mapping[str, Any], streams: list[int], path: list[str]) -> None:
    """Take these streams as those that an interpreter starts with, this environment and working directory."""
    _take([True] * len(_NAMES), streams, "utf-8")
    for name in _NAMES:
        stream = getattr(sys, name)
        stream.reconfigure(errors=getattr(sys, f"__{name}__").errors)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["cwd"])
    _move(request["env"], path)
    # Those of the working directory are others.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]


def _run_python(request: Mapping[str, Any], streams: list[int], path: list[str]) -> None:
    """Run `python` with the words of the request. The interpreter then ends as it does by itself."""
    signal.alarm(request["alarm_s"])
    _settle(request, streams, path)
    words = list(request["words"])
    while words[0] == "-W":
        sys.warnoptions.append(words[1])
        warnings._setoption(words[1])  # type: ignore[attr-defined]
        del words[:2]
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    # What is run must stay there for the threads and exit handlers that it leaves.
    main = sys.modules["__main__"] = ModuleType("__main__")
    if words[0] == "-c":
        sys.argv[:] = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec", dont_inherit=True)
    else:
        file = Path(words[0])
        sys.argv[:] = words
        sys.path[0] = str(file.resolve().parent)
        main.__file__ = str(file)
        code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _move(env: Mapping[str, str], path: list[str]) -> None:
    """Take this environment, and what it and the working directory say of imports."""
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    given = os.environ.get(_PATH)
    own = given.split(os.pathsep) if given else []
    sys.path[:] = [str(Path.cwd()), *own, *(each for each in path if each not in own)]


def _become(request: Mapping[str, Any], streams: list[int], path: list[str], main: Any) -> NoReturn:
    """Run the command as a new interpreter would, and end."""
    code = 99
    try:
        # Ends a command that would run on, such as a server that should have refused the file.
        signal.alarm(request["alarm_s"])
        _take(request["streams"], streams, request["encoding"])
        os.chdir(request["cwd"])
        _move(request["env"], path)
        sys.argv[:] = ["dspex-persist", *request["words"]]
        code = _run(main)
    finally:
        os._exit(code)


def _take(wanted: Sequence[bool], streams: list[int], encoding: str) -> None:
    """Make the streams the standard ones; those that are not wanted are closed."""
    passed = iter(streams)
    for number, name in enumerate(_NAMES):
        if not wanted[number]:
            os.close(number)
            setattr(sys, name, None)
            continue
        os.dup2(next(passed), number)
        mode, buffering = ("r", -1) if number == 0 else ("w", -1 if number == 1 else 1)
        errors = "backslashreplace" if number == 2 else "strict"
        opened = open(number, mode, buffering, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, opened)
    for stream in streams:
        os.close(stream)


def _run(main: Any) -> int:
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 -- as the interpreter does
        traceback.print_exc()
        code = 1
    # What the interpreter does at its end.
    threading._shutdown()  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            return 120
    return code


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _connection:
        _serve(_connection)
