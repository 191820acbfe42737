"""Transactions over gRPC whose client or server disappears."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dspex_persist
from dspex_persist import BridgedState
from dspex_persist.audit import ExecutionQuery
from dspex_persist.state import commands, errors
from dspex_persist.state.model import ExecutionStatus, Value
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment

CLIENT = """
import sys, time
import dspex_persist
from dspex_persist.state import commands
from dspex_persist.state.model import Value

transaction = dspex_persist.connect(sys.argv[1]).begin_transaction("s")
transaction.run(commands.SetVariable("s", "x", Value("1")))
print(transaction.execution_id, flush=True)
time.sleep(600)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path / "sessions.db") as served:
        yield served


@pytest.fixture
def state(served: ServedDatabase) -> Iterator[BridgedState]:
    with BridgedState(served.target) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        yield state


def status_of(state: BridgedState, execution_id: str) -> ExecutionStatus:
    """Return how an execution ended, once it has."""
    deadline = time.monotonic() + within(20)
    with state.audit() as audit:
        while True:
            status = audit.execution(execution_id).summary.status
            if status is not ExecutionStatus.RUNNING:
                return status
            assert time.monotonic() < deadline, "it has not ended"
            time.sleep(0.02)


def test_a_client_that_is_killed_has_written_nothing(served: ServedDatabase, state: BridgedState) -> None:
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, served.url],
        stdout=subprocess.PIPE,
        text=True,
        cwd=served.path.parent,
        env=environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert client.stdout is not None
    with client.stdout:
        execution_id = client.stdout.readline().strip()
        client.kill()
        client.wait(within(10))
    assert status_of(state, execution_id) is ExecutionStatus.CANCELLED
    assert state.get_value("s", "x") == 0


def test_one_that_is_forgotten_ends(state: BridgedState) -> None:
    transaction = state.begin_transaction("s")
    execution_id = transaction.execution_id
    del transaction
    assert status_of(state, execution_id) is ExecutionStatus.CANCELLED


def test_a_restart_ends_it(served: ServedDatabase, state: BridgedState) -> None:
    used, ended = state.begin_transaction("s"), state.begin_transaction("s")
    used.run(commands.SetVariable("s", "x", Value("1")))
    served.restart()
    with pytest.raises(errors.ExecutionEndedError, match=r"has ended \(interrupted\)"):
        used.run(commands.GetVariable("s", "x"))
    with pytest.raises(errors.ExecutionEndedError, match=r"has ended \(interrupted\)"):
        ended.commit()
    assert {used.status, ended.status} == {"interrupted"}
    assert status_of(state, used.execution_id) is ExecutionStatus.INTERRUPTED
    assert state.get_value("s", "x") == 0


def test_a_server_that_is_stopped_waits_for_it(served: ServedDatabase, state: BridgedState) -> None:
    transaction = state.begin_transaction("s")
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + within(10)
    with pytest.raises(errors.ShuttingDownError):  # noqa: PT012
        while time.monotonic() < deadline:
            state.begin_transaction("s").abort()
    transaction.run(commands.SetVariable("s", "x", Value("1")))
    transaction.commit()
    assert served.process.wait(within(20)) == 0
    with dspex_persist.open_audit(served.path) as audit:
        assert audit.execution(transaction.execution_id).summary.status is ExecutionStatus.COMMITTED


def test_how_it_ended_is_in_the_journal(state: BridgedState) -> None:
    with pytest.raises(ZeroDivisionError), state.begin_transaction("s") as failed:
        failed.run(commands.SetVariable("s", "x", Value(str(1 // 0))))
    state.begin_transaction("s", metadata={"why": "so"}).abort()
    with state.begin_transaction("s") as transaction:
        transaction.run(commands.SetVariable("s", "x", Value("1")))
    with state.audit() as audit:
        details = [audit.execution(row.execution_id) for row in audit.page(ExecutionQuery(newest_first=False)).rows]
    assert [each.summary.status.value for each in details] == ["failed", "aborted", "committed"]
    assert [each.summary.tool for each in details] == ["transaction"] * 3
    assert details[0].failure is not None
    assert (details[0].failure.type, "1 // 0" in details[0].failure.traceback) == ("ZeroDivisionError", True)
    assert (details[1].failure, details[1].metadata) == (None, {"why": "so"})
    assert [(each.name, each.version) for each in details[2].history] == [("x", 1)]
