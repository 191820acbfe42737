"""The engine in a forked child: every call fails immediately with a reason, nothing hangs, nothing is written."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, connect
from dspex_persist.state.audit import SessionQuery
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import ForkedProcessError
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.store import engine, maintenance
from dspex_persist.state.store.maintenance import opening
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.wiring.connecting import open_audit
from tests.infra.test_forks import in_child

DEADLINE_S = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def state(path: Path) -> Iterator[EmbeddedState]:
    with connect(path) as opened:
        assert isinstance(opened, EmbeddedState)
        Context("s", opened).define("x", 0)
        yield opened


CALLS: dict[str, Callable[[EmbeddedState], object]] = {
    "read": lambda state: state.get_variable("s", "x"),
    "write": lambda state: state.set_variable("s", "x", 1),
    "history": lambda state: state.get_variable_history("s", "x"),
    "context read": lambda state: Context("s", state)["x"],
    "context write": lambda state: Context("s", state).define("y", 0),
    "list_tools": lambda state: state.list_tools(),
    "watch": lambda state: state.watch("s"),
    "audit": lambda state: state.audit(),
    "record": lambda state: state.record("s"),
    "fork": lambda state: state.fork_session("s", "t"),
    "prune": lambda state: state.prune(PrunePolicy(1), confirm=False),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_refused(state: EmbeddedState, path: Path, call: str) -> None:
    message = in_child(lambda: CALLS[call](state))
    assert message.startswith(f"ForkedProcessError: {path} belongs to the process that this one was forked from")
    assert "spawn" in message
    CALLS[call](state)


def test_objects_made_before_the_fork_are_refused_too(state: EmbeddedState, path: Path) -> None:
    context, source = Context("s", state), state.audit()
    with state.watch("s") as watch, open_audit(path) as from_file:
        calls: list[Callable[[], Any]] = [
            lambda: context["x"],
            lambda: context.set("x", 1),
            lambda: watch.pull(),
            lambda: watch.next(DEADLINE_S),
            lambda: list(watch),
            lambda: source.page(SessionQuery()),
            lambda: from_file.page(SessionQuery()),
        ]
        for call in calls:
            assert in_child(call).startswith("ForkedProcessError")


def test_a_stream_that_was_open_before_the_fork_is_refused(path: Path) -> None:
    """Its chunks are yielded by threads that exist only in the parent, where it continues."""
    with connect(path, tools=CONTRACT_TOOLS) as state:
        state.initialize_session("s")
        state.register_variable("s", "a", "integer", 0)
        begun, not_begun = (state.stream_tool("s", "count", {"to": 4}) for _ in range(2))
        assert next(begun) == 1
        for call in (lambda: next(begun), lambda: list(begun), lambda: next(not_begun)):
            assert in_child(call).startswith(f"ForkedProcessError: {path} belongs to the process")
        assert in_child(begun.close) == "None"
        assert list(begun) == [2, 3, 4]
        assert list(not_begun) == [1, 2, 3, 4]


def let_go(state: EmbeddedState) -> None:
    watch = state.watch("s")
    source = state.audit()

    def in_the_child() -> None:
        watch.close()
        source.close()
        state.close()
        state.close()
        gc.collect()

    assert in_child(in_the_child) == "None"
    watch.close()


def test_closing_does_nothing(state: EmbeddedState, path: Path) -> None:
    let_go(state)
    state.set_variable("s", "x", 5)
    state.close()
    assert maintenance.check(path).problems == ()


PROGRAM = """
import gc, os, sys, threading, dspex_persist
state = dspex_persist.connect(sys.argv[1])
context = dspex_persist.Context("s", state)
context.define("x", 0)
watch, source = state.watch("s"), state.audit()
stop = threading.Event()
def work():
    while not stop.is_set():
        state.set_variable("s", "x", 1)
        state.get_variable_history("s", "x", 10)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
codes = []
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        import signal
        signal.alarm(20)
        try:
            state.set_variable("s", "x", 2)
        except dspex_persist.DspexError as error:
            assert type(error).__name__ == "ForkedProcessError", error
        with dspex_persist.connect(f"{sys.argv[1]}.{number}") as own:
            own.initialize_session("t")
        if number % 2:
            del state, context, watch, source
            gc.collect()
        sys.exit(7)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop.set()
for thread in threads: thread.join()
watch.close()
state.close()
print(codes)
"""


@pytest.mark.parametrize("children", [4, pytest.param(10, marks=pytest.mark.thorough)])
def test_children_of_a_busy_process_end_quickly_and_silently(path: Path, children: int) -> None:
    argv = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", PROGRAM, str(path), str(children)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.stdout, ended.returncode) == (f"{[7] * children}\n", 0), ended.stderr
    assert ended.stderr == ""
    assert maintenance.check(path).problems == ()


def test_a_child_that_outlives_its_parent_does_not_block_the_file(path: Path) -> None:
    state = connect(path)
    state.initialize_session("s")
    begun, beginning = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(DEADLINE_S)
        os.write(beginning, b"!")
        signal.pause()
        os._exit(1)
    os.read(begun, 1)
    try:
        state.close()
        with connect(path) as again:
            assert again.initialize_session("s").resumed
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(begun)
        os.close(beginning)


def test_a_child_opens_the_file_once_its_parent_has_closed_it(path: Path) -> None:
    state = connect(path)
    state.initialize_session("s")
    closed, closing = os.pipe()
    heard, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(DEADLINE_S)
        os.read(closed, 1)
        with connect(path) as own:
            Context("s", own).define("from_the_child", 1)
        os.write(telling, b"!")
        os._exit(0)
    state.close()
    os.write(closing, b"!")
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(heard, 1) == b"!"
    with connect(path) as again:
        assert again.get_variable("s", "from_the_child").value.json == "1"
    assert maintenance.check(path).problems == ()
    for each in (closed, closing, heard, telling):
        os.close(each)


def test_a_file_that_was_being_read_during_the_fork_is_not_opened_again(state: EmbeddedState, path: Path) -> None:
    """Its connections cannot be closed in the child, and SQLite would take the parent's locks for the child's."""
    begun, ended = threading.Event(), threading.Event()

    def read_long() -> None:
        with opening.reading(path) as readers, engine.snapshot(readers):
            begun.set()
            ended.wait(DEADLINE_S)

    thread = threading.Thread(target=read_long)
    thread.start()
    assert begun.wait(DEADLINE_S)
    try:
        assert in_child(lambda: open_audit(path)).startswith("ForkedProcessError")
        assert in_child(state.close) == "None"
    finally:
        ended.set()
        thread.join()


def refusal(_: object = None) -> str:
    try:
        SHARED[0].get_variable("s", "x")
    except ForkedProcessError as error:
        return str(error)
    return "not refused"


SHARED: list[EmbeddedState] = []


@pytest.mark.parametrize("way", ["multiprocessing", "concurrent.futures", "subprocess"])
def test_every_way_of_forking_is_refused(state: EmbeddedState, path: Path, way: str) -> None:
    SHARED[:] = [state]
    context = multiprocessing.get_context("fork")
    if way == "multiprocessing":
        with context.Pool(1) as pool:
            message = pool.apply_async(refusal).get(DEADLINE_S)
            assert "belongs to the process" in message
            pool.close()
            pool.join()
    elif way == "concurrent.futures":
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            assert "belongs to the process" in executor.submit(refusal).result(DEADLINE_S)
    else:
        tell: Callable[[], object] = lambda: os.write(1, refusal().encode())  # noqa: E731
        ran = subprocess.run(["true"], preexec_fn=tell, check=True, timeout=DEADLINE_S, stdout=subprocess.PIPE)
        assert b"belongs to the process" in ran.stdout
    state.set_variable("s", "x", 3)
    SHARED.clear()
