"""Processes that are forked instead of started: what tells them from others."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.deadline import within
from tests.prepared import Started, _starter, commands

TELL = """
import json, os, resource, signal, sys, threading
import grpc

print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "session": os.getsid(0),
    "cwd": os.getcwd(), "env": dict(os.environ), "path": sys.path, "argv": sys.argv[1:],
    "umask": f"{os.umask(0):o}", "limit": resource.getrlimit(resource.RLIMIT_CORE),
    "grpc": grpc._cython.cygrpc._GRPC_ENABLE_FORK_SUPPORT,
    "fds": sorted(os.listdir("/proc/self/fd"))[:-1], "threads": threading.active_count(),
    "signals": ["function" if callable(each) and not isinstance(each, int) else str(each)
        for each in map(signal.getsignal, signal.valid_signals())],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "tests": "tests" in sys.modules, "main": sys.modules["__main__"].__name__, "streams": [
        [stream.encoding, stream.errors, stream.fileno(), stream.isatty()]
        for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__)],
}), file=sys.stderr, flush=True)
"""
FOREVER = "import os, signal, sys\nprint(os.getpid(), file=sys.stderr, flush=True)\nwhile True: signal.pause()\n"


def started(kind: "type[subprocess.Popen[Any]]", folder: Path, module: str, **more: Any) -> "subprocess.Popen[str]":
    """Have the command line import a module that tells of its process."""
    (folder / "telling.py").write_text(module)
    argv = [
        sys.executable,
        "-m",
        "dspex_persist",
        "serve",
        "--db",
        "s.db",
        "--listen",
        "127.0.0.1:0",
        "--tools",
        "telling",
    ]
    environment = {**os.environ, "TELLING": "\udcff"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return kind(argv, cwd=folder, env=environment, **pipes, **more)


@pytest.fixture
def is_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new interpreter is an error."""
    _starter()

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(subprocess.Popen, "_execute_child", refuse)


def test_a_fork_differs_from_a_new_interpreter_in_nothing_that_it_can_see(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    mask = os.umask(0o027)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limit[1]))
    told: list[dict[str, Any]] = []
    try:
        for kind in (subprocess.Popen, Started):
            with started(kind, tmp_path, TELL) as process:
                out, err = process.communicate(timeout=within(30))
            line, *complaint = err.splitlines()
            told.append({**json.loads(line), "code": process.returncode, "out": out, "complaint": complaint})
            assert told[-1].pop("pid") == process.pid
    finally:
        os.umask(mask)
        resource.setrlimit(resource.RLIMIT_CORE, limit)
    new, fork = told
    assert fork == new
    assert (fork["parent"], fork["group"]) == (os.getpid(), os.getpgid(0))
    assert (fork["umask"], fork["limit"][0]) == ("27", 0)


@pytest.mark.usefixtures("is_fork")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fork_dies_of_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with started(Started, tmp_path, FOREVER) as process:
        assert process.stderr is not None
        assert int(process.stderr.readline()) == process.pid
        process.send_signal(signal.SIGSTOP)
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT) is not None
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        assert process.wait(within(30)) == -number


@pytest.mark.usefixtures("is_fork")
@pytest.mark.parametrize(
    ("module", "code", "complaint"),
    [
        ("raise SystemExit(7)", 2, "telling"),
        ("import atexit, os; atexit.register(os.write, 2, b'at the end'); print('x')", 2, "at the end$"),
        ("import os; os._exit(9)", 9, "^$"),
    ],
)
def test_a_fork_ends_as_an_interpreter(tmp_path: Path, module: str, code: int, complaint: str) -> None:
    with started(Started, tmp_path, module) as process:
        _, err = process.communicate(timeout=within(30))
        assert process.returncode == code
        assert re.search(complaint, err)


@pytest.mark.parametrize("name", ["PYTHONHASHSEED", "LD_BIND_NOW", "LC_ALL"])
def test_what_is_read_at_the_start_needs_a_new_interpreter(
    tmp_path: Path, is_fork: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with started(Started, tmp_path, "") as process:
        process.communicate(timeout=within(30))
    monkeypatch.setenv(name, "1")
    with pytest.raises(AssertionError):
        started(Started, tmp_path, "")


def test_threads_start_processes_at_once(tmp_path: Path, is_fork: None) -> None:
    with ThreadPoolExecutor(4) as threads:
        processes = list(threads.map(lambda _: started(Started, tmp_path, FOREVER), range(4)))
    for process in processes:
        with process:
            assert process.stderr is not None
            assert int(process.stderr.readline()) == process.pid
            process.kill()
    assert {process.returncode for process in processes} == {-signal.SIGKILL}


PROGRAM = """
import __main__, atexit, sys, threading, warnings

print([__name__, __main__.__dict__ is globals(), sys.argv, "tests" in sys.modules, sys.stdin.read()])
for category in (UserWarning, DeprecationWarning):
    try:
        warnings.warn("one", category)
    except Warning as error:
        print(type(error).__name__)
atexit.register(print, "at exit", flush=True)
threading.Timer(0.05, lambda: print(VALUE)).start()
VALUE = 7
raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["-c", "-m", "file"])
def test_a_program_runs_and_ends_as_in_a_new_interpreter(tmp_path: Path, how: str) -> None:
    (tmp_path / "telling.py").write_text(PROGRAM)
    program = {"-c": ["-c", PROGRAM], "-m": ["-m", "telling"], "file": ["telling.py"]}[how]
    words = ["-W", "error", "-W", "ignore::DeprecationWarning", *program, "a", "b"]
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    new = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within(30),
        check=False,
    )
    prepared = commands().run_python(words, cwd=tmp_path, env=env, timeout_s=within(30))
    assert (new.returncode, new.stderr) == (3, "")
    assert (prepared.returncode, prepared.stdout, prepared.stderr) == (3, new.stdout, "")
    assert new.stdout.endswith("7\nat exit\n")
