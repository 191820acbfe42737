"""Children that a tool forks: their signals are theirs, and when the server is gone nothing of it is left in them."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist import connect
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.errors import UnavailableError
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.server import ServedDatabase

pytestmark = pytest.mark.usefixtures("own_interpreters")

PROGRAM = (sys.executable, "-m", "dspex_persist")
DEADLINE_S = 30
TOOLS = """
import asyncio, multiprocessing, os, signal, time
import dspex_persist
from dspex_persist import ToolContext, tool

def child_of(target, *args):
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    return child

@tool
def end_a_child(signal_number: int) -> int:
    # At once, before the child runs any code of its target.
    child = child_of(time.sleep, 30)
    os.kill(child.pid, signal_number)
    child.join(20)
    return child.exitcode

@tool
async def end_a_child_of_the_loop(signal_number: int) -> int:
    return end_a_child(signal_number)

@tool
def leave_a_child() -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os.write(writing, b"!")
        while True:
            signal.pause()
    os.read(reading, 1)
    return pid

def wait_for(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@tool
def come_back() -> int:
    pid = os.fork()
    return wait_for(pid) if pid else 0

@tool
def come_back_with_an_error() -> int:
    pid = os.fork()
    if pid == 0:
        raise ValueError("of the child")
    return wait_for(pid)

@tool
async def come_back_to_the_loop() -> int:
    pid = os.fork()
    if pid == 0:
        await asyncio.sleep(0)
    return wait_for(pid) if pid else 0

@tool
def use_the_context(ctx: ToolContext) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        results = []
        for work in (
            lambda: ctx["x"],
            lambda: ctx.__setitem__("x", 9),
            lambda: ctx.log("hello"),
            lambda: ctx.call("come_back"),
            lambda: ctx.publish("x", 9),
            lambda: dspex_persist.connect("grpc://127.0.0.1:1"),
        ):
            try:
                work()
                results.append("done")
            except Exception as error:
                results.append(type(error).__name__)
        os.write(writing, " ".join(results).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        results = pipe.read()
    assert wait_for(pid) == 0
    return results
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDatabase]:
    (tmp_path / "forking_tools.py").write_text(TOOLS)
    settings = {"tools": "forking_tools"}
    with ServedDatabase(tmp_path / "s.db", settings, import_from=tmp_path) as server:
        yield server


@pytest.fixture
def state(served: ServedDatabase) -> Iterator[StateProvider]:
    with connect(served.url, timeout_s=DEADLINE_S) as opened:
        opened.initialize_session("s")
        yield opened


@pytest.mark.parametrize("tool", ["end_a_child", "end_a_child_of_the_loop"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_childs_signal_ends_the_child_alone(
    served: ServedDatabase, state: StateProvider, tool: str, number: signal.Signals
) -> None:
    for _ in range(10):
        outcome = state.execute_tool("s", tool, {"signal_number": int(number)})
        assert outcome.result is not None, outcome
        assert int(outcome.result.json) == -number
    assert served.process.exit_code is None
    assert served.stop() == 0


@pytest.mark.parametrize("tool", ["come_back", "come_back_with_an_error", "come_back_to_the_loop"])
def test_a_child_that_comes_back_from_the_tool_is_no_second_server(
    served: ServedDatabase, state: StateProvider, tool: str
) -> None:
    for _ in range(3):
        outcome = state.execute_tool("s", tool)
        assert outcome.result is not None, outcome
        assert outcome.result.json == "70"
    assert len(state.list_tools()) > 1
    if tool == "come_back_with_an_error":
        assert "ValueError: of the child" in served.process.stderr_tail
    assert served.stop() == 0


def test_the_tools_context_is_of_no_use_in_a_child(state: StateProvider) -> None:
    state.register_variable("s", "x", "integer", 1)
    outcome = state.execute_tool("s", "use_the_context")
    assert outcome.result is not None, outcome
    assert outcome.result.json == '"' + " ".join(["ForkedProcessError"] * 6) + '"'
    assert state.get_variable("s", "x").version == 0


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_a_child_that_outlives_the_server_keeps_neither_file_nor_address(tmp_path: Path, listen: str) -> None:
    (tmp_path / "forking_tools.py").write_text(TOOLS)
    address = listen if listen != "unix" else f"unix:{tmp_path / 'socket'}"
    with start(tmp_path, address) as server:
        again = address if listen == "unix" else f"127.0.0.1:{server.port}"
        with connect(url_of(address, server)) as state:
            state.initialize_session("s")
            outcome = state.execute_tool("s", "leave_a_child")
            assert outcome.result is not None, outcome
            child = int(outcome.result.json)
            server.kill()
            # The connection has ended with the server: the child does not hold it open.
            with pytest.raises(UnavailableError):
                state.get_session("s")
        try:
            with start(tmp_path, again) as successor, connect(url_of(again, successor)) as other:
                assert other.initialize_session("s").resumed
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def start(folder: Path, address: str) -> ServerProcess:
    argv = [*PROGRAM, "serve", "--db", "s.db", "--listen", address, "--tools", "forking_tools"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    return ServerProcess.start(argv, env=environment, cwd=folder)


def url_of(address: str, server: ServerProcess) -> str:
    return f"grpc+{address}" if address.startswith("unix") else f"grpc://127.0.0.1:{server.port}"
