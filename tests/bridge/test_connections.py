"""The client and servers that go away, stop, say nothing, or say something else."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import dspex_persist
from dspex_persist.infra.health import serves
from dspex_persist.infra.listen import UnixAddress
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.audit import HistoryQuery
from dspex_persist.state.bridged import Breaker, BridgedState
from dspex_persist.state.commands import GetVariable
from dspex_persist.state.errors import CircuitOpenError, OutcomeUnknownError, SessionNotFoundError, UnavailableError
from dspex_persist.testing.checks import let_pass
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within

PATIENT = Breaker(failures=1_000_000)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path / "sessions.db") as served:
        yield served


def written(state: BridgedState) -> None:
    state.initialize_session("s")
    state.register_variable("s", "x", "integer", 0)


@pytest.mark.parametrize("name", ["a%20b.sock", "ü?b#c.sock"])
def test_a_socket_of_any_name_is_where_it_is_named(name: str, tmp_path: Path) -> None:
    """gRPC would take the path for a part of a URL."""
    path = tmp_path / name
    command = (sys.executable, "-m", "dspex_persist", "serve", "--db", "a.db", "--listen", f"unix:{path}")
    with ServerProcess.start(command, cwd=tmp_path):
        assert path.is_socket()
        assert serves(UnixAddress(str(path)), None, within(20))
        with dspex_persist.connect(f"grpc+unix:{path}") as state:
            state.initialize_session("s")


def test_calls_go_on_over_a_restart_without_the_program_noticing(served: ServedDatabase) -> None:
    with BridgedState(served.target, timeout_s=within(20), breaker=PATIENT) as state:
        written(state)
        restarted = threading.Thread(target=served.restart)
        served.kill()
        restarted.start()
        assert state.get_value("s", "x") == 0
        restarted.join()
        served.kill()
        restarted = threading.Thread(target=served.restart)
        restarted.start()
        assert state.set_variable("s", "x", 1, idempotency_key="k") == 1
        restarted.join()
        assert state.get_value("s", "x") == 1
        with state.audit() as audit:
            served.kill()
            restarted = threading.Thread(target=served.restart)
            restarted.start()
            assert [each.version for each in audit.iterate(HistoryQuery(session="s"))] == [1, 0]
            restarted.join()
            assert audit.head() == audit.resolve("now")


def test_a_server_that_was_away_is_called_again_by_itself(served: ServedDatabase) -> None:
    with BridgedState(
        served.target, timeout_s=within(5), breaker=Breaker(failures=2, pause_s=0.05, longest_pause_s=0.2)
    ) as state:
        written(state)
        served.kill()
        errors = list[Exception]()
        while not (errors and isinstance(errors[-1], CircuitOpenError)):
            try:
                state.get_value("s", "x")
            except UnavailableError as error:
                errors.append(error)
        assert str(errors[-1]).startswith(f"nothing was sent: {served.target} has not answered since ")
        assert str(errors[-1]).endswith(" s; repeat later")
        assert all(error.retryable for error in errors)  # type: ignore[attr-defined]
        served.restart()
        value = None
        while value is None:
            try:
                value = state.get_value("s", "x")
            except CircuitOpenError as error:
                let_pass(error.retry_in_s)
            except UnavailableError:
                let_pass(0.01)
        assert value == 0


def test_every_call_to_a_server_that_hangs_ends_in_time(served: ServedDatabase) -> None:
    with BridgedState(served.target, timeout_s=0.3, breaker=PATIENT) as state:
        written(state)
        os.kill(served.process.pid, signal.SIGSTOP)
        try:
            late = rf"{served.target} did not answer within 0\.3 s"
            with pytest.raises(UnavailableError, match=late):
                state.get_value("s", "x")
            with pytest.raises(OutcomeUnknownError, match=late):
                state.set_variable("s", "x", 1)
            with pytest.raises(OutcomeUnknownError, match=late):
                state.set_variable("s", "x", 2, idempotency_key="k")
            with pytest.raises(UnavailableError, match=late):
                state.watch("s")
            with pytest.raises(UnavailableError), state.audit() as audit:
                audit.head()
        finally:
            os.kill(served.process.pid, signal.SIGCONT)
        # What was sent meanwhile may still have arrived; with the same key it happens only once.
        with BridgedState(served.target, timeout_s=within(20)) as patient:
            version = patient.set_variable("s", "x", 2, idempotency_key="k")
            assert version in (1, 2)
            assert patient.get_value("s", "x") == 2


def test_the_timeout_of_one_call(served: ServedDatabase) -> None:
    with BridgedState(served.target, timeout_s=within(60), breaker=PATIENT) as state:
        written(state)
        os.kill(served.process.pid, signal.SIGSTOP)
        try:
            late = state.submit(GetVariable("s", "x"), timeout_s=0.2).exception(within(20))
        finally:
            os.kill(served.process.pid, signal.SIGCONT)
        assert "did not answer within 0.2 s" in str(late)


def test_a_listener_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with BridgedState(target, timeout_s=0.2, breaker=Breaker(failures=2, pause_s=within(60))) as state:
            for _ in range(2):
                with pytest.raises(UnavailableError, match=f"{target} did not answer within"):
                    state.get_session("s")
            with pytest.raises(CircuitOpenError, match="the last failure: no answer in time"):
                state.get_session("s")


def test_a_listener_that_speaks_another_protocol() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        target = f"127.0.0.1:{other.getsockname()[1]}"

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = other.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\nwhat?" * 10)

        threading.Thread(target=answer, daemon=True).start()
        with (
            BridgedState(target, timeout_s=within(20)) as state,
            pytest.raises(UnavailableError, match=f"cannot connect to {target} "),
        ):
            state.get_session("s")
        other.shutdown(socket.SHUT_RDWR)


def test_the_first_call_says_at_once_that_there_is_no_server() -> None:
    with BridgedState("127.0.0.1:1", timeout_s=within(600), breaker=Breaker(pause_s=within(60))) as state:
        for _ in range(5):
            with pytest.raises(UnavailableError, match=r"cannot connect to 127\.0\.0\.1:1 .* is the server running\?"):
                state.get_session("s")
        with pytest.raises(CircuitOpenError):
            state.watch("s")
        with pytest.raises(CircuitOpenError), state.audit() as audit:
            audit.head()
    with BridgedState("127.0.0.1:1", breaker=None) as state:
        for _ in range(20):
            with pytest.raises(UnavailableError, match="cannot connect"):
                state.get_session("s")


def test_an_error_of_the_server_is_no_failure_of_the_connection(served: ServedDatabase) -> None:
    with BridgedState(served.target, breaker=Breaker(failures=1)) as state:
        for _ in range(3):
            with pytest.raises(SessionNotFoundError):
                state.get_session("nobody")
