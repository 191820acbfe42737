"""`dspex-persist worker`: tools of a process of its own, registered for sessions of a running server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

from dspex_persist import Context, registered
from dspex_persist.infra.process import ServerProcess
from dspex_persist.registered import WorkerOptions
from dspex_persist.state.bridge.workers.registering import Registrations
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import StateError, ToolFailedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, ToolSpec
from dspex_persist.testing.server import ServedDatabase
from tests.bridge.test_limits_of_callers import AS_ROOT, check_another_user_is_refused
from tests.certificates import Authority
from tests.deadline import within
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import ROOT, environment, serve, target_of, wait_until
from tests.other_users import as_user
from tests.prepared import commands

SESSIONS = ["first", "second"]


def start(target: str, *arguments: str, tools: str = "tests.workers.own_tools", **more: str) -> ServerProcess:
    argv = (sys.executable, "-m", "dspex_persist", "worker", "--tools", tools, "--server", target, *arguments)
    return ServerProcess.start(argv, env=environment(**more), cwd=ROOT, ready_timeout_s=DEADLINE_S)


def sessions(*names: str) -> list[str]:
    return [word for name in names for word in ("--session", name)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serve(tmp_path_factory.mktemp("registered") / "sessions.db", "--sweep-interval", "0.2") as process:
        yield process


@pytest.fixture(scope="module")
def provider(server: ServerProcess) -> Iterator[BridgedState]:
    with BridgedState(target_of(server), timeout_s=DEADLINE_S) as provider:
        for name in SESSIONS:
            provider.initialize_session(name)
            provider.register_variable(name, "a", "integer", 0)
        yield provider


@pytest.fixture(scope="module")
def worker(server: ServerProcess, provider: BridgedState) -> Iterator[ServerProcess]:
    with start(target_of(server), *sessions(*SESSIONS), "--worker-id", "w-1") as process:
        yield process


@pytest.fixture(params=SESSIONS)
def session(request: pytest.FixtureRequest, worker: ServerProcess, provider: BridgedState) -> Context:
    context = Context(request.param, provider)
    context["a"] = 0
    return context


def test_its_tools_are_transactions(session: Context, provider: BridgedState, tmp_path: Path) -> None:
    outcome = provider.execute_tool(session.session_id, "increase", {"amount": 2})
    assert outcome.result is not None
    assert (outcome.error, json.loads(outcome.result.json)) == (None, 2)
    (newest,) = session.history("a", 1)
    assert (newest.value, newest.cause) == (2, outcome.execution_id)
    failed = provider.execute_tool(session.session_id, "fail", {})
    assert (failed.error_code, str(failed.error)) == ("TOOL_FAILED", "ValueError: it went wrong")
    wrong = provider.execute_tool(session.session_id, "increase", {"amount": "many"})
    assert "'amount' of tool 'increase'" in str(wrong.error)
    assert session.call("below", amount=3) == [5, 5]
    assert list(provider.stream_tool(session.session_id, "count", {"to": 3})) == [0, 1, 2]
    failing = provider.stream_tool(session.session_id, "count_and_fail")
    assert next(failing) == 1
    with pytest.raises(ToolFailedError, match="half way"):
        next(failing)
    assert session.call("note") is None
    gate = tmp_path / "gate"
    with ThreadPoolExecutor() as threads:
        holding = threads.submit(provider.execute_tool, session.session_id, "hold", {"gate": str(gate)})
        wait_until((tmp_path / "gate.at").exists, "the tool is there")
        session["a"] = 10
        gate.touch()
        assert holding.result().status is ExecutionStatus.CONFLICT
    assert session["a"] == 10


def test_it_does_nothing_after_its_callers_time(session: Context, provider: BridgedState, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    outcome = provider.execute_tool(session.session_id, "late", {"gate": str(gate)}, timeout_s=1.0)
    assert outcome.status is ExecutionStatus.TIMED_OUT
    gate.touch()
    late = tmp_path / "gate.late"
    wait_until(lambda: late.exists() and late.read_text(), "the tool has ended")
    assert (late.read_text(), session["a"]) == ("FAILED_PRECONDITION", 0)


@pytest.mark.parametrize(
    ("listening", "more", "refuses"),
    [
        ({1002}, {}, True),
        # Root, as systemd does it, may pass connections on to a server of another user.
        ({0}, {}, False),
        ({0, 1002}, {}, False),
        (set(), {}, False),
        ({1002}, {"insecure": True}, False),
        ({1002}, {"url": "grpc+unix:/run/a.sock"}, False),
    ],
)
def test_it_runs_tools_for_the_user_whose_server_it_is(
    listening: set[int], more: dict[str, Any], refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered, "listeners_at", lambda *_: frozenset(listening))
    given = {"url": "grpc://127.0.0.1:50051", "sessions": ("s",), "listen": "", "address": "", "worker_id": "w"}
    more = {"certificates": None, "insecure": False, "tool_threads": 1, "max_message_bytes": 1, **more}
    options = WorkerOptions(**{**given, **more, "limits": Limits()})
    assert (registered._users_of(options, "127.0.0.1:0") is not None) is refuses


@AS_ROOT
def test_it_runs_nothing_for_other_users_of_the_machine(request: pytest.FixtureRequest) -> None:
    nobody = 65534
    # Not below `tmp_path`: any run of pytest that begins meanwhile closes its folder to other users.
    folder = Path(tempfile.mkdtemp(prefix="dspex-nobodys-"))
    request.addfinalizer(lambda: shutil.rmtree(folder))
    os.chown(folder, nobody, nobody)
    serve = ("-m", "dspex_persist", "serve", "--db", str(folder / "a.db"), "--listen", "127.0.0.1:0")
    command = as_user(nobody, sys.executable, *serve)
    server = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        target = f"127.0.0.1:{server.stdout.readline().strip().rpartition(':')[2]}"
        with BridgedState(target, timeout_s=DEADLINE_S) as provider:
            provider.initialize_session("s")
            provider.register_variable("s", "a", "integer", 0)
            with start(target, "--session", "s") as worker:
                outcome = provider.execute_tool("s", "increase", {"amount": 2})
                assert outcome.status is ExecutionStatus.COMMITTED
                check_another_user_is_refused(f"127.0.0.1:{worker.port}", user=1002)
    finally:
        server.terminate()
        server.communicate()


def test_what_is_listed(session: Context, provider: BridgedState, worker: ServerProcess) -> None:
    spec = next(spec for spec in provider.list_tools(session.session_id) if spec.name == "increase")
    assert spec.description == "Add to a."
    assert [(each.name, each.type, each.required) for each in spec.parameters] == [("amount", "integer", True)]
    assert (spec.metadata["dspex.where"], spec.metadata["dspex.circuit"]) == ("worker w-1", "closed")
    assert spec.metadata["dspex.address"] == f"127.0.0.1:{worker.port}"


def test_only_the_server_calls_it(worker: ServerProcess) -> None:
    with grpc.insecure_channel(target_of(worker)) as channel:
        stub = bridge.BridgeServiceStub(channel)
        assert stub.Ping(pb.PingRequest(message="alive?")).message == "alive?"
        request = pb.ExecuteToolRequest(session_id="first", tool_name="count_and_fail")
        with pytest.raises(grpc.RpcError, match="only the server calls this worker"):
            stub.ExecuteTool(request)
        answer = stub.ExecuteTool(
            pb.ExecuteToolRequest(session_id="first", tool_name="fail"), metadata=(("x-dspex-execution-id", "exec_9"),)
        )
        assert (answer.success, "ExecutionEndedError" in answer.error_message) == (False, True)


def test_a_session_that_begins_again_gets_them_again(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with ServedDatabase(path) as served:
        target = f"127.0.0.1:{served.port}"
        with BridgedState(target, timeout_s=DEADLINE_S) as state:

            def calls() -> bool:
                try:
                    return Context("s", state).call("increase", amount=1) == 1
                except StateError:
                    return False

            def begin() -> None:
                Context("s", state).define("a", 0)

            begin()
            with start(target, *sessions("s")) as worker:
                assert calls()
                state.cleanup_session("s")
                begin()
                wait_until(calls, "the tools are registered for the new session")
                # The server comes back with another file.
                served.kill()
                for each in tmp_path.iterdir():
                    each.unlink()
                served.restart()
                begin()
                wait_until(calls, "the tools are registered on the new file")
                assert worker.terminate(DEADLINE_S) == 0


def test_a_call_in_progress_may_finish(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/server.sock"
    with serve(tmp_path / "sessions.db", "--listen", address), BridgedState(address, timeout_s=DEADLINE_S) as state:
        Context("s", state).define("a", 0)
        gate = tmp_path / "gate"
        with start(address, *sessions("s")) as worker, ThreadPoolExecutor() as threads:
            holding = threads.submit(state.execute_tool, "s", "hold", {"gate": str(gate)})
            wait_until((tmp_path / "gate.at").exists, "the tool is there")
            worker.send_signal(signal.SIGTERM)
            gate.touch()
            assert holding.result().status is ExecutionStatus.COMMITTED
            assert worker.wait(DEADLINE_S) == 0
        assert state.get_variable("s", "a").version == 1
        outcome = state.execute_tool("s", "increase", {"amount": 1})
        assert outcome.error_code == "UNAVAILABLE"


def test_with_tls_both_ways(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    ours, theirs = authority.issue("server"), authority.issue("worker")
    ca = str(authority.cert)
    shown = ("--worker-ca", ca, "--worker-cert", str(ours.cert), "--worker-key", str(ours.key))
    demanded = ("--tls-cert", str(theirs.cert), "--tls-key", str(theirs.key), "--client-ca", ca)
    with serve(tmp_path / "sessions.db", *shown) as server, BridgedState(target_of(server)) as state:
        Context("s", state).define("a", 0)
        with start(target_of(server), *sessions("s"), *demanded) as worker:
            assert Context("s", state).call("increase", amount=2) == 2
            (spec,) = [spec for spec in state.list_tools("s") if spec.name == "increase"]
            assert spec.metadata["dspex.address"] == f"grpcs://127.0.0.1:{worker.port}"


def test_looking_keeps_no_session_alive(provider: BridgedState) -> None:
    Context("short", provider, ttl_s=1).define("a", 0)
    looking = Registrations(provider, ["short"], "w", [ToolSpec("t")], "127.0.0.1:1")
    looking.register()

    def has_ended() -> bool:
        looking._look()
        return looking._begin_of("short") is None

    wait_until(has_ended, "the session has expired")


def refused(target: str, *arguments: str, tools: str = "tests.workers.own_tools", **more: str) -> tuple[int, str]:
    words = ["worker", "--tools", tools, "--server", target, *arguments]
    done = commands().run(words, cwd=ROOT, env=environment(**more), timeout_s=within(60))
    assert done.stdout == ""
    return done.returncode, done.stderr


CASES: dict[str, tuple[list[str], int, str]] = {
    "no session": (["--session", "nobody"], 1, "session not found: 'nobody'"),
    "no tools": (["--session", "first", "--tools", "json"], 2, "there are no tools in the module itself"),
    "no server": (
        ["--session", "first", "--server", "nowhere"],
        2,
        "setting server (flag --server): 'nowhere' is invalid",
    ),
    "no module": (["--session", "first", "--tools", "nothing_here"], 2, "the import failed"),
    "another machine": (["--session", "first", "--listen", "0.0.0.0:0"], 2, "with --insecure"),
    "every address": (["--session", "first", "--listen", "0.0.0.0:0", "--insecure"], 2, "with --address"),
    "half of TLS": (["--session", "first", "--tls-cert", __file__], 2, "give --tls-key, too"),
    "no address": (["--session", "first", "--listen", "nowhere"], 75, "nowhere"),
    "not allowed": (
        ["--session", "first", "--address", "192.0.2.1:50060"],
        1,
        "192.0.2.1:50060: the server may not call this address: it is not one of its tool_addresses",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be(case: str, server: ServerProcess, provider: BridgedState) -> None:
    arguments, code, text = CASES[case]
    status, error = refused(target_of(server), *arguments)
    assert status == code, error
    assert text in " ".join(error.split())


def test_a_server_that_is_not_there() -> None:
    status, error = refused("127.0.0.1:1", "--session", "s")
    assert (status, "is the server running?" in error) == (1, True)
    assert refused("grpcs://192.0.2.1:50051", "--session", "s")[0] == 2


def test_names_of_the_server_and_tokens(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"

    def token(name: str, scopes: str) -> str:
        argv = ["token", "new", name, "--scopes", scopes, "--token-file", str(tokens)]
        return commands().run(argv, cwd=tmp_path, env=environment(), timeout_s=within(60)).stdout.split()[-1]

    caller, ours = token("caller", "read,write,execute"), token("worker", "admin,read,write,execute")
    options = ("--tools", "tests.workers.shop_tools:tools", "--token-file", str(tokens))
    with serve(tmp_path / "sessions.db", *options) as process:
        target = target_of(process)
        with BridgedState(target, token=caller) as state:
            # Nobody else may use the session, but the code of its tools belongs to their executions.
            Context("s", state, metadata={"access_control_json": "[]"}).define("a", 0)
            status, error = refused(target, "--session", "s", DSPEX_PERSIST_TOKEN=caller)
            assert (status, "admin" in error) == (1, True)
            status, error = refused(target, "--session", "s")
            assert (status, "token" in error) == (1, True)
            taken = "tests.workers.shop_tools:tools"
            status, error = refused(target, "--session", "s", tools=taken, DSPEX_PERSIST_TOKEN=ours)
            assert status == 1
            assert "already exists: the server has a tool of this name" in error
            one, other = "tests.workers.own_tools:below", "tests.workers.own_tools:increase"
            with start(target, *sessions("s"), "--tools", other, tools=one, DSPEX_PERSIST_TOKEN=ours):
                outcome = state.execute_tool("s", "below", {"amount": 3})
                assert outcome.error is None
                assert state.get_variable("s", "a").version == 1
