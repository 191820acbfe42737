"""Tools in workers of a real server: what its journal and its replay know of them, and what happens when one fails."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.infra.process import ProcessFailedError, ServerProcess
from dspex_persist.replay import replay
from dspex_persist.state import errors
from dspex_persist.state.audit import ExecutionDetail
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.model import ExecutionStatus, ToolOutcome
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import environment
from tests.infra.test_helpers import is_gone
from tests.outcomes import result_of, until_there

TOOLS = "tests.end_to_end.pool_tools"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    """A server with a single worker."""
    path = tmp_path_factory.mktemp("pooled") / "sessions.db"
    with ServedDatabase(path, {"tools": TOOLS, "workers": 1}, import_from=ROOT) as served:
        yield served


@pytest.fixture
def provider(served: ServedDatabase) -> Iterator[BridgedState]:
    with BridgedState(served.target, timeout_s=DEADLINE_S) as provider:
        yield provider


@pytest.fixture
def session(provider: BridgedState, request: pytest.FixtureRequest) -> str:
    name = str(request.node.name)
    provider.initialize_session(name)
    for variable in ("a", "b"):
        provider.register_variable(name, variable, "integer", 0)
    return name


def execute(provider: BridgedState, session: str, tool: str, **parameters: Any) -> ToolOutcome:
    return provider.execute_tool(session, tool, parameters, metadata={"user": "ada"})


def detail_of(provider: BridgedState, execution_id: str) -> ExecutionDetail:
    with provider.audit() as audit:
        return audit.execution(execution_id)


def shown_by(served: ServedDatabase, *flags: str) -> str:
    argv = [sys.executable, "-m", "dspex_persist", "workers", "--target", served.target, *flags]
    return subprocess.run(argv, env=environment(), capture_output=True, text=True, check=True).stdout


def until_gone(pid: int) -> None:
    deadline = time.monotonic() + within(10)
    while not is_gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_it_runs_in_another_process_which_the_tools_share(
    served: ServedDatabase, provider: BridgedState, session: str
) -> None:
    ran = result_of(execute(provider, session, "pid"))
    assert ran not in (served.process.pid, os.getpid())
    assert result_of(execute(provider, session, "pid_below")) == [ran, ran]


def test_the_journal_has_all_and_a_replay_finds_no_difference(provider: BridgedState, session: str) -> None:
    done = execute(provider, session, "everything")
    made = result_of(done)
    later = execute(provider, session, "everything_later")
    failed = execute(provider, session, "broken", word="it was meant to")
    assert (made["user"], made["refused"], made["child"][0]) == ("ada", "of the child", 4)
    detail = detail_of(provider, done.execution_id)
    assert [(line.message, dict(line.fields)) for line in detail.log] == [("begins", {"attempt": 1}), ("ends", {})]
    assert (len(detail.recorded["now"]), detail.recorded["other"]) == (1, [{"answer": 42}])
    assert [each.summary.tool for each in detail.children] == ["broken", "child"]
    broken, child = detail.children
    assert broken.failure is not None
    assert (broken.failure.type, broken.failure.message) == ("LookupError", "of the child")
    assert [line.message for line in (*broken.log, *child.log)] == ["before it breaks", "in the child"]
    assert (detail.published, dict(detail.writes)["a"]) == ((("b", 1),), 1)
    assert [each.name for each in detail.reads] == ["a"]
    assert later.success
    error = detail_of(provider, failed.execution_id).failure
    assert error is not None
    # The frames of the tool's own code, and no others.
    assert error.traceback.count("File ") == 1
    assert "raise LookupError(word)" in error.traceback
    assert isinstance(failed.error, errors.ToolFailedError)
    assert (failed.error.kind, failed.error.reason) == ("LookupError", "LookupError: it was meant to")
    report = replay(provider.record(session), TOOLS)
    assert (len(report.executions), list(report.divergences)) == (6, [])


def test_a_worker_that_ends_fails_its_execution_and_is_replaced(provider: BridgedState, session: str) -> None:
    for how, ending in (("exit", "ended with exit code 3"), ("kill", "was killed by SIGKILL")):
        died = execute(provider, session, "end_process", how=how)
        assert (died.status, died.error_code) == (ExecutionStatus.FAILED, "WORKER_EXIT")
        assert isinstance(died.error, errors.WorkerExitedError)
        assert ending in died.error.reason
        detail = detail_of(provider, died.execution_id)
        assert detail.failure is not None
        assert (detail.failure.type, ending in detail.failure.message) == ("WorkerExitedError", True)
        assert [line.message for line in detail.log] == ["before the end"]
    assert provider.get_variable(session, "a").version == 0
    below = execute(provider, session, "end_below")
    assert below.error_code == "WORKER_EXIT"
    assert result_of(execute(provider, session, "child", amount=1))[0] == 1


def test_a_worker_whose_code_never_returns_is_replaced(provider: BridgedState, session: str, tmp_path: Path) -> None:
    hung = execute(provider, session, "hang", gate=str(tmp_path / "gate"))
    assert (hung.status, hung.error_code) == (ExecutionStatus.TIMED_OUT, "TIMED_OUT")
    assert [line.message for line in detail_of(provider, hung.execution_id).log] == ["before it hangs"]
    first = int(until_there(tmp_path / "gate"))
    busy = execute(provider, session, "pid")
    while not busy.success:
        # It has some seconds to end.
        assert busy.error_code == "QUEUE_TIMEOUT", busy
        busy = execute(provider, session, "pid")
    assert result_of(busy) != first
    until_gone(first)


def test_a_call_that_waits_in_vain_is_refused(provider: BridgedState, session: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        holding = threads.submit(execute, provider, session, "hold", gate=str(tmp_path / "gate"))
        until_there(tmp_path / "gate.at")
        refused = execute(provider, session, "pid")
        (tmp_path / "gate").touch()
        assert result_of(holding.result()) == "held"
    assert (refused.status, refused.error_code) == (ExecutionStatus.FAILED, "QUEUE_TIMEOUT")
    assert "1 of 1 workers busy" in str(refused.error)
    assert "raise workers (--workers) or pools.tools.queue_timeout_s" in str(refused.error)


def test_code_that_goes_on_writes_nothing_into_the_next_execution(
    provider: BridgedState, session: str, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    assert result_of(execute(provider, session, "write_later", gate=str(gate))) == 1
    assert result_of(execute(provider, session, "hold", gate=str(gate))) == "held"
    assert until_there(tmp_path / "gate.late") == "ExecutionEndedError"
    assert provider.get_variable(session, "a").version == 0


def test_a_running_server_lists_its_workers(served: ServedDatabase, provider: BridgedState, session: str) -> None:
    ran = result_of(execute(provider, session, "pid"))
    (pool,) = provider.list_workers()
    assert (pool.pool, pool.state, pool.size, pool.busy) == ("tools", "running", 1, 0)
    assert [(each.pid, each.state) for each in pool.workers] == [(ran, "idle")]
    assert pool.requests > 0
    document = shown_by(served, "--json")
    assert [each["pid"] for each in json.loads(document)["pools"][0]["workers"]] == [ran]
    table = shown_by(served)
    assert "tools: running, 0 of 1 worker busy" in table
    assert str(ran) in table


def test_the_list_of_tools_says_which_pool_runs_them(served: ServedDatabase) -> None:
    argv = [sys.executable, "-m", "dspex_persist", "tools", "list", "--target", served.target]
    shown = subprocess.run([*argv, "--json"], env=environment(), capture_output=True, text=True, check=True).stdout
    assert {(each["where"], each["pool"]) for each in json.loads(shown)["tools"]} == {("pool", "tools")}
    table = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=True).stdout
    assert "pool tools" in table


def test_calls_below_each_other_need_one_worker(provider: BridgedState, session: str) -> None:
    assert result_of(execute(provider, session, "go_down", depth=10)) == 10


def test_nothing_is_left_of_a_server_that_ends(tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "sessions.db", {"tools": TOOLS, "workers": 2}, import_from=ROOT) as served:
        with BridgedState(served.target, timeout_s=DEADLINE_S) as provider:
            provider.initialize_session("s")
            worker = result_of(execute(provider, "s", "pid"))
        assert served.stop() == 0
        assert is_gone(worker)
        served.restart()
        with BridgedState(served.target, timeout_s=DEADLINE_S) as provider:
            worker = result_of(execute(provider, "s", "pid"))
        served.kill()
        until_gone(worker)


def test_a_pool_without_workers_says_why_and_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "moody.py").write_text(
        "import os\nfrom dspex_persist import tool\n"
        "if os.environ.get('DSPEX_WORKER'):\n    raise RuntimeError('not here')\n"
        "@tool\ndef fine() -> int:\n    '''Return 1.'''\n    return 1\n"
    )
    with pytest.raises(ProcessFailedError, match=r"(?s)pool tools has no workers: .*not here.*; correct tools"):
        ServedDatabase(tmp_path / "sessions.db", {"tools": "moody", "workers": 1}, import_from=tmp_path)


def test_sigterm_ends_a_server_whose_workers_are_starting(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, threading\nfrom dspex_persist import tool\n"
        "if worker := os.environ.get('DSPEX_WORKER'):\n"
        "    pathlib.Path(f'{worker}.pid').write_text(str(os.getpid()))\n    threading.Event().wait()\n"
        "@tool\ndef fine() -> int:\n    '''Return 1.'''\n    return 1\n"
    )
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--db", "sessions.db", "--listen", "127.0.0.1:0"]
    with ServerProcess([*argv, "--tools", "slow", "--workers", "1"], env=environment(), cwd=tmp_path) as server:
        worker = int(until_there(tmp_path / "tools-1.pid"))
        # Long before the time is up that a worker has to start.
        assert server.terminate(within(5)) == 0
        assert is_gone(worker)
        with pytest.raises(ProcessFailedError, match="not ready"):
            _ = server.port
