"""The gRPC client alone, without a real server."""

import getpass
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspex_persist_audit_pb2 as audit_pb
import dspex_persist_audit_pb2_grpc as audit_stubs
import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as stubs

from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import GetVariable, GetVariableHistory, SetVariable
from dspex_persist.state.errors import (
    InternalError,
    LimitExceededError,
    OutcomeUnknownError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.model import Origin, Value
from tests.deadline import within
from tests.infra.test_forks import in_child

NO_SERVER = "127.0.0.1:1"


class Newer(stubs.BridgeServiceServicer):  # type: ignore[misc, unused-ignore]
    """A server that knows kinds of changes and updates that this release does not."""

    def GetVariableHistory(self, request: Any, context: Any) -> Any:
        return pb.GetVariableHistoryResponse(entries=[pb.VariableHistoryEntry(metadata={"dspex.change": "newer"})])

    def WatchVariables(self, request: Any, context: Any) -> Iterator[Any]:
        context.send_initial_metadata((("x-dspex-position", "0"), ("x-dspex-initial-values", "0")))
        yield pb.VariableUpdate(update_type="newer", update_metadata={"commit_sequence": "1"})


@pytest.fixture
def newer(tmp_path: Path) -> Iterator[str]:
    """The address of a newer server."""
    address = f"unix:{tmp_path}/newer"
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        stubs.add_BridgeServiceServicer_to_server(Newer(), server)
        server.add_insecure_port(address)
        server.start()
        yield address
        server.stop(None).wait()


def test_the_actor_of_a_user_without_a_name_is_the_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", unknown)
    with BridgedState(NO_SERVER) as state:
        assert state.default_origin("SetVariable").actor == f"user:{os.getuid()}"


def test_an_error_about_a_header_names_the_python_argument() -> None:
    with BridgedState(NO_SERVER) as state:
        refused = state.submit(GetVariable("s", "x"), Origin("a" * 256, "read")).exception()
    assert isinstance(refused, LimitExceededError)
    assert "the length of actor" in str(refused)


def test_an_answer_that_cannot_be_decoded_is_an_error(newer: str) -> None:
    with BridgedState(newer) as state:
        refused = state.submit(GetVariableHistory("s", "x")).exception(within(20))
        assert isinstance(refused, InternalError)
        assert "'newer' is not a valid ChangeKind" in str(refused)


def test_an_update_that_cannot_be_decoded_ends_the_watch(newer: str) -> None:
    with (
        BridgedState(newer) as state,
        state.watch("s") as watch,
        pytest.raises(InternalError, match="'newer' is not a valid UpdateKind"),
    ):
        watch.next(within(20))


class Silent(audit_stubs.AuditServiceServicer):  # type: ignore[misc, unused-ignore]
    """A server that begins to answer, then sends nothing more until `ended`."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def RecordSession(self, request: Any, context: Any) -> Iterator[Any]:
        line = {"format": "dspex-persist session", "version": 1, "session_id": "s", "commits": 2, "masked": False}
        yield audit_pb.RecordSessionResponse(lines=[audit_pb.RecordedLine(json=json.dumps(line))])
        self.ended.wait(within(20))

    def ForkSession(self, request: Any, context: Any) -> Any:
        self.ended.wait(within(20))
        return audit_pb.ForkSessionResponse()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """The address of a silent server."""
    address, servicer = f"unix:{tmp_path}/silent", Silent()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        audit_stubs.add_AuditServiceServicer_to_server(servicer, server)
        server.add_insecure_port(address)
        server.start()
        yield address
        servicer.ended.set()
        server.stop(None).wait()


def test_each_part_of_a_recording_has_the_timeout(silent: str) -> None:
    with BridgedState(silent, timeout_s=0.5) as state:
        header, commits = state.record("s")
        assert header.commits == 2
        with pytest.raises(UnavailableError, match=r"did not answer within 0\.5 s"):
            next(commits)


def test_the_outcome_of_a_fork_without_an_answer_is_unknown(silent: str) -> None:
    with BridgedState(silent, timeout_s=0.2) as state, pytest.raises(OutcomeUnknownError):
        state.fork_session("s", "t")
    with BridgedState(NO_SERVER) as state, pytest.raises(UnavailableError, match="cannot connect"):
        state.fork_session("s", "t")


def test_a_forked_child_cannot_read_a_stream_of_its_parent(silent: str) -> None:
    with BridgedState(silent, timeout_s=within(20)) as state:
        _, commits = state.record("s")
        assert in_child(lambda: next(commits)).startswith("ForkedProcessError: the connection to")
        commits.close()  # type: ignore[attr-defined]


def test_a_server_without_the_rpcs_is_reported_as_too_old(newer: str) -> None:
    with BridgedState(newer) as state:
        asks = {"RecordSession": lambda: state.record("s"), "ForkSession": lambda: state.fork_session("s", "t")}
        for rpc, ask in asks.items():
            with pytest.raises(UnsupportedError, match=f"{rpc}; the server at .* is older"):
                ask()


class TimeIsUp(BaseException):
    """Raised by a signal handler, as Ctrl-C is."""


def test_a_signal_ends_the_wait_for_an_answer_and_the_client_lives_on() -> None:
    def time_is_up(_number: int, _frame: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        # It accepts the connection, and never says a word.
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            BridgedState(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=within(60), cache=True) as state,
        ):
            for command in (GetVariable("s", "x"), SetVariable("s", "x", Value("1"))):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(TimeIsUp):
                    state.run(command)
            state.submit(GetVariable("s", "x"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
