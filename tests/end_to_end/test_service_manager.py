"""A server under a service manager: what it tells, and that it is silent when it is stuck."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dspex_persist import BridgedState
from dspex_persist.infra.process import ProcessFailedError, ServerProcess
from tests.deadline import within
from tests.end_to_end.old_style import environment, target_of, wait_until
from tests.service_manager import ALIVE, READY, STOPPING, ServiceManager

pytestmark = pytest.mark.usefixtures("own_interpreters")

SERVE = (sys.executable, "-m", "dspex_persist", "serve", "--listen", "127.0.0.1:0")
# A tool that does to the server's writer what a disk does that does not answer.
STUCK = """
import threading, time
from pathlib import Path

import dspex_persist


def hold(turn, held):
    with turn:
        held.set()
        while not Path("go").exists():
            time.sleep(0.01)


@dspex_persist.tool
def stick() -> None:
    (writer,) = [each._target.__self__ for each in threading.enumerate() if each.name == "dspex-persist-writer"]
    held = threading.Event()
    threading.Thread(target=hold, args=(writer._turn, held), daemon=True).start()
    held.wait()
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path / "notify") as manager:
        yield manager


def start(manager: ServiceManager, tmp_path: Path, *arguments: str, **more: str) -> ServerProcess:
    argv = (*SERVE, *arguments)
    return ServerProcess.start(argv, env=environment(**manager.environment(0.2), **more), cwd=tmp_path)


def test_it_tells_its_manager_what_it_does(manager: ServiceManager, tmp_path: Path) -> None:
    with start(manager, tmp_path, "--tools", "tests.end_to_end.served_tools", "--workers", "1") as server:
        started = manager.until(READY)
        assert started[0].startswith("EXTEND_TIMEOUT_USEC=")
        assert [line.removeprefix("STATUS=") for line in started if line.startswith("STATUS=")][:-1] == [
            "importing the tools of tests.end_to_end.served_tools",
            "opening sessions.db: recovery, and an upgrade if an older release wrote it",
            "starting the workers of tools",
        ]
        assert started[-1] == f"STATUS=serving sessions.db at {target_of(server)}: commit 0, 0 calls in progress"
        assert manager.next() == [ALIVE]
        with BridgedState(target_of(server)) as state:
            state.initialize_session("s")
        assert manager.until("STATUS=serving")[-1].endswith(": commit 1, 0 calls in progress")
        server.send_signal(signal.SIGSTOP)
        manager.waiting()
        server.send_signal(signal.SIGCONT)
        manager.until(ALIVE)
        server.send_signal(signal.SIGTERM)
        ended = manager.until("STATUS=closing")
        assert "STATUS=shutting down: 0 calls in progress, which may take 10 s" in ended
        assert ended.index(STOPPING) < ended.index("STATUS=closing sessions.db")
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in ended[ended.index(STOPPING) :])
        assert server.wait(within(30)) == 0


def test_it_gives_no_sign_of_life_while_its_writer_is_stuck(manager: ServiceManager, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    path = f"{environment()['PYTHONPATH']}{os.pathsep}{tmp_path}"
    with start(manager, tmp_path, "--tools", "stuck", PYTHONPATH=path) as server:
        manager.until(READY)
        with BridgedState(target_of(server)) as state, ThreadPoolExecutor(1) as threads:
            state.initialize_session("s")
            call = threads.submit(state.execute_tool, "s", "stick")
            wait_until(lambda: "no progress" in server.stderr_tail, "it notices that")
            manager.waiting()
            # The event loop runs.
            assert all(state.get_session("s").id == "s" for _ in range(100))
            assert manager.waiting() == []
            (tmp_path / "go").touch()
            manager.until(ALIVE)
            assert call.result().error_code == ""


def test_it_tells_its_manager_why_it_did_not_start(manager: ServiceManager, tmp_path: Path) -> None:
    (tmp_path / "sessions.db").write_text("not a database" * 1000)
    with pytest.raises(ProcessFailedError) as failed:
        start(manager, tmp_path)
    assert failed.value.exit_code == 5
    assert "sessions.db" in manager.waiting()[-1]


def test_it_refuses_a_socket_that_its_manager_has_opened(tmp_path: Path) -> None:
    argv = ("sh", "-c", 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"', "sh", *SERVE)
    with pytest.raises(ProcessFailedError) as failed:
        ServerProcess.start(argv, env=environment(), cwd=tmp_path)
    assert failed.value.exit_code == 2
    assert "systemd-socket-proxyd" in failed.value.stderr_tail
    assert list(tmp_path.iterdir()) == []
