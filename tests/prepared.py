"""Commands that start at once: a process imports the heavy modules once, and forks for each command.

The start of a command is mostly imports: some 0.4 s of CPU time, against some 0.03 s here. What depends on the start
itself (variables that Python reads, warnings at imports, Ctrl-C before `main`) needs a process of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

ROOT: Final = Path(__file__).parents[1]
# What the commands import themselves.
_MODULES: Final = (
    "alembic.command",
    "alembic.config",
    "dspex_persist.audit.pictures",
    "dspex_persist.cli.audit.lists",
    "dspex_persist.cli.audit.tables",
    "dspex_persist.cognitive.migrating",
    "dspex_persist.replay",
    "dspex_persist.state.bridged",
    "dspex_persist.state.store.maintenance.transfer",
    "dspex_persist.wiring.recordings",
    "dspex_persist.wiring.serving",
    "rich._emoji_codes",
    "rich.progress",
    "rich.table",
    "typer._adapters",
    "typer._click.decorators",
)
_NAMES: Final = ("stdin", "stdout", "stderr")


class Prepared:
    """Runs commands of `dspex-persist`, one after the other, each in a fork of a process with the environment `env`."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._lock = threading.Lock()
        self._ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.prepared", str(theirs.fileno())],
                cwd=ROOT,
                env={**env, "PYTHONPATH": path},
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
    ) -> int:
        """Run a command to its end on these descriptors (None: closed), and return its exit code as Popen does."""
        request = {
            "words": [os.fsdecode(word) for word in words],
            "streams": [stream is not None for stream in streams],
            "cwd": os.fspath(cwd),
            "env": dict(env),
            "alarm_s": round(timeout_s),
            "encoding": encoding,
        }
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            try:
                sent = socket.send_fds(self._ours, [line], [stream for stream in streams if stream is not None])
                self._ours.sendall(line[sent:])
                return int(self._answers.readline())
            except BaseException:
                # Of an interrupted test: its answer would be taken for that to the next request.
                self._process.kill()
                raise

    def run(
        self, words: Sequence[str | bytes], *, cwd: Path, env: Mapping[str, str], timeout_s: float, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end with `text` as its input."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(text.encode())
            given.seek(0)
            streams = [stream.fileno() for stream in (given, out, err)]
            code = self.start(words, streams, cwd=cwd, env=env, timeout_s=timeout_s)
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
    while _shared:
        _shared.pop().close()


# In the process that forks


def _serve(connection: socket.socket) -> None:
    import gc

    import typer

    from dspex_persist import cli

    for module in _MODULES:
        import_module(module)
    # The tree of all commands is half of what is left of a short one.
    command = typer.main.get_command(cli.app)
    typer.main.get_command = lambda typer_instance: command  # noqa: ARG005
    own = (os.environ.get("PYTHONPATH") or "").split(os.pathsep)
    path = [each for each in sys.path[1:] if each not in own]
    gc.collect()
    # The children neither look through the modules nor get copies of their pages for that.
    gc.freeze()
    while True:
        line, streams, _, _ = socket.recv_fds(connection, 65536, len(_NAMES))
        while line and not line.endswith(b"\n"):
            line += connection.recv(65536)
        if not line:
            return
        child = os.fork()
        if child == 0:
            connection.close()
            _become(json.loads(line), streams, path, cli.main)
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(f"{code}\n".encode())


def _become(request: Mapping[str, Any], streams: list[int], path: list[str], main: Any) -> NoReturn:
    """Run the command as a new interpreter would, and end."""
    code = 99
    try:
        # Ends a command that would run on, such as a server that should have refused the file.
        signal.alarm(request["alarm_s"])
        _take(request["streams"], streams, request["encoding"])
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        given = os.environ.get("PYTHONPATH")
        sys.path[:] = [str(Path.cwd()), *(given.split(os.pathsep) if given else ()), *path]
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
