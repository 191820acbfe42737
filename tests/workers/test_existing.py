"""Existing workers of two generations in pools of a real server, and our own workers beside them: what they write is
part of the transactions of the tools that they run."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state import errors
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.model import ExecutionStatus
from dspex_persist.state.values import BinaryValue
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import ROOT, STUBS, serve, target_of, wait_until
from tests.outcomes import execute, result_of, until_there

POOL = """
[pools.{generation}]
command = ["{python}", "-m", "tests.workers.stand_in", "--generation", "{generation}", "--port", "{{port}}",
  "--elixir-address", "{{address}}", "--snakepit-run-id", "{{run_id}}"]
size = 1
tools = ["{generation}_is_there"]
nesting = 2
env = {{ PYTHONPATH = "{path}" }}
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """A server for each kind, because the tools of all have the same names."""
    made: dict[str, ServerProcess] = {}
    names = "increase fail hold late below crash pickled nonsense"
    for generation in ("old", "new"):
        folder = tmp_path_factory.mktemp(generation)
        text = POOL.format(generation=generation, python=sys.executable, path=f"{ROOT}:{STUBS}")
        listed = json.dumps(names.split())
        text = text.replace(f'["{generation}_is_there"]', f'{listed}\nstreaming = ["count", "count_and_fail"]')
        (folder / "pools.toml").write_text(text)
        made[generation] = serve(folder / "sessions.db", "--config", str(folder / "pools.toml"))
    made["ours"] = serve(
        tmp_path_factory.mktemp("ours") / "sessions.db", "--tools", "tests.workers.own_tools", "--workers", "1"
    )
    yield made
    for server in made.values():
        server.close()


@pytest.fixture(params=["old", "new", "ours"])
def generation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(servers: dict[str, ServerProcess], generation: str) -> ServerProcess:
    return servers[generation]


def commits(provider: BridgedState, session: str) -> int:
    _, commits = provider.record(session)
    return len(list(commits))


def test_what_it_writes_is_one_commit_with_the_executions_name(provider: BridgedState, session: str) -> None:
    assert result_of(execute(provider, session, "increase", amount=2)) == 2
    done = execute(provider, session, "increase", amount=3)
    assert result_of(done) == 5
    versions = provider.get_variable_history(session, "a")
    assert [version.version for version in versions] == [2, 1, 0]
    with provider.audit() as audit:
        detail = audit.execution(done.execution_id)
    assert dict(detail.writes) == {"a": 2}
    assert [read.name for read in detail.reads] == ["a"]


@pytest.mark.parametrize("generation", ["old", "new"], indirect=True)
def test_it_registers_once_and_ends_no_session(provider: BridgedState, session: str) -> None:
    execute(provider, session, "increase", amount=1)
    before = commits(provider, session)
    for _ in range(3):
        execute(provider, session, "increase", amount=1)
    # Each has its beginning and its end.
    assert commits(provider, session) == before + 6
    assert {"increase", "extra"} <= {spec.name for spec in provider.list_tools(session)}
    # It only exists since the worker has registered it.
    assert result_of(execute(provider, session, "extra")) == "extra"


@pytest.mark.parametrize("generation", ["old", "new"], indirect=True)
def test_a_tool_that_only_workers_know_can_be_called_first(
    provider: BridgedState, session: str, generation: str
) -> None:
    """No setting names it, and no worker has been called for the session: it is known from another session, or a worker
    is asked what it has."""

    def called() -> int:
        return sum(pool.requests for pool in provider.list_workers())

    assert "extra" in {spec.name for spec in provider.list_tools(session)}
    before, lent = commits(provider, session), called()
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda _: execute(provider, session, "extra"), range(2))
    assert (result_of(first), result_of(second)) == ("extra", "extra")
    # One registers at most, and each execution has its beginning and its end.
    assert commits(provider, session) - before in (4, 5)
    assert called() == lent + 2
    for _ in range(2):
        assert execute(provider, session, "nobodys").error_code == "UNKNOWN_TOOL"
    # It was asked once.
    assert called() == lent + 3
    tools = provider.get_session(session).tool_count
    provider.cleanup_session(session)
    provider.initialize_session(session)
    # The new ones believe that they have registered already.
    assert result_of(execute(provider, session, "extra")) == "extra"
    assert provider.get_session(session).tool_count == tools


@pytest.fixture
def fresh(generation: str, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server whose worker nobody has called."""
    text = POOL.format(generation=generation, python=sys.executable, path=f"{ROOT}:{STUBS}")
    (tmp_path / "pools.toml").write_text(text.replace('"{run_id}"]', '"{run_id}", "--ignores-term-s", "0"]'))
    with serve(tmp_path / "sessions.db", "--config", str(tmp_path / "pools.toml")) as server:
        yield server


@pytest.mark.parametrize("generation", ["old", "new"], indirect=True)
def test_a_new_session_of_a_new_server_lists_what_its_workers_have(fresh: ServerProcess, generation: str) -> None:
    with grpc.insecure_channel(target_of(fresh)) as channel, BridgedState(target_of(fresh)) as state:
        stub = bridge.BridgeServiceStub(channel)
        for session in ("first", "second"):
            begun = stub.InitializeSession(pb.InitializeSessionRequest(session_id=session))
            assert set(begun.available_tools) == {f"{generation}_is_there", "increase", "extra"}
            assert sum(pool.requests for pool in state.list_workers()) == 1, "it was asked once"


@pytest.mark.parametrize("generation", ["new"], indirect=True)
def test_a_worker_that_is_stuck_when_it_is_asked_keeps_no_session_from_its_client(fresh: ServerProcess) -> None:
    with BridgedState(target_of(fresh), timeout_s=DEADLINE_S) as state:
        (worker,) = state.list_workers()[0].workers
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            state.initialize_session("s")
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        wait_until(lambda: "extra" in {spec.name for spec in state.list_tools("s")}, "it has told")


def test_a_failure_writes_nothing(provider: BridgedState, session: str, generation: str) -> None:
    failed = execute(provider, session, "fail")
    assert (failed.status, failed.error_code) == (ExecutionStatus.FAILED, "TOOL_FAILED")
    assert "it went wrong" in str(failed.error)
    assert provider.get_variable(session, "a").version == 0
    with provider.audit() as audit:
        failure = audit.execution(failed.execution_id).failure
    assert failure is not None
    if generation == "new":
        assert (failure.type, failure.message, failure.traceback) == ("ValueError", "it went wrong", "in the worker")


def test_a_conflict_is_one(provider: BridgedState, session: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor() as threads:
        holding = threads.submit(execute, provider, session, "hold", gate=str(gate))
        until_there(tmp_path / "gate.at")
        provider.set_variable(session, "a", 10)
        gate.touch()
        outcome = holding.result()
    assert outcome.status is ExecutionStatus.CONFLICT
    assert provider.get_variable(session, "a").version == 1


def test_it_writes_nothing_after_its_callers_time(provider: BridgedState, session: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    outcome = provider.execute_tool(session, "late", {"gate": str(gate)}, timeout_s=1.0)
    assert outcome.status is ExecutionStatus.TIMED_OUT
    until_there(tmp_path / "gate.at")
    gate.touch()
    assert until_there(tmp_path / "gate.late") == "FAILED_PRECONDITION"
    assert provider.get_variable(session, "a").version == 0
    # It got no other call until then.
    assert result_of(execute(provider, session, "increase", amount=1)) == 1


def test_a_call_back_into_the_pool_gets_a_worker(provider: BridgedState, session: str) -> None:
    assert result_of(execute(provider, session, "below", amount=4)) == [4, 4]


def test_a_worker_that_ends_is_replaced(provider: BridgedState, session: str) -> None:
    died = execute(provider, session, "crash")
    assert died.error_code == "WORKER_EXIT"
    assert "exit code 9" in str(died.error)
    assert "last words" in str(died.error)
    assert provider.get_variable(session, "a").version == 0
    assert result_of(execute(provider, session, "increase", amount=1)) == 1


def test_chunks_come_and_errors_within_them_are_read(provider: BridgedState, session: str, generation: str) -> None:
    assert list(provider.stream_tool(session, "count", {"to": 3})) == [0, 1, 2]
    assert provider.get_variable(session, "a").version == 3
    failing = provider.stream_tool(session, "count_and_fail")
    assert next(failing) == 1
    with pytest.raises(errors.ToolFailedError, match="half way"):
        next(failing)


@pytest.mark.parametrize("generation", ["old", "new"], indirect=True)
def test_nothing_is_pickled_or_unpickled(provider: BridgedState, session: str) -> None:
    opaque = result_of(execute(provider, session, "pickled"))
    assert opaque == {"type_url": "type.googleapis.com/snakepit.tensor.binary", "raw_data_base64": "gARLAS4="}
    tensor = BinaryValue({"shape": [1], "dtype": "float32", "binary_format": "float32", "type": "tensor"}, b"\0\0\0\0")
    refused = execute(provider, session, "increase", amount=tensor)
    assert (refused.status, refused.error_code) == (None, "INVALID_PARAMETERS")
    assert "unpickle" in str(refused.error)
    strange = execute(provider, session, "nonsense")
    assert (strange.status, strange.error_code) == (ExecutionStatus.FAILED, "TOOL_FAILED")
