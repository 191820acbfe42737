"""Servers on a shared log that close, fail or fork while others use them: nobody waits for ever, no child writes."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

from dspex_persist.infra import server
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state.bridge.servicer import BridgeServicer
from dspex_persist.state.bridge.status import error_of, status_of
from dspex_persist.state.commands import GetVariable, SetVariable
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionElsewhereError,
    ForkedProcessError,
    LostCommitsError,
    StateError,
    UnavailableError,
)
from dspex_persist.state.model import Value
from dspex_persist.state.shared import SharedState
from dspex_persist.wiring.bridge import BRIDGE_SERVICE
from tests.concurrency.clients import NAME, SESSION
from tests.concurrency.shared_servers import Servers
from tests.concurrency.test_shared_executions import outcome_of, serving
from tests.concurrency.test_shared_histories import begin
from tests.deadline import within


def read(state: SharedState) -> None:
    while True:
        state.get_variable(SESSION, NAME)


def submit(state: SharedState) -> None:
    while True:
        state.submit(GetVariable(SESSION, NAME)).result()


def use_on_a_loop(state: SharedState) -> None:
    async def use() -> None:
        here = state.on_loop(LoopMailbox(asyncio.get_running_loop()))
        while True:
            await here(GetVariable(SESSION, NAME))
            await here(SetVariable(SESSION, NAME, Value('"a"')))

    asyncio.run(use())


def ends_of_users(state: SharedState) -> list[StateError]:
    """Close an engine that others use in every way there is; return the errors that have ended that."""
    ends: list[StateError] = []

    def run(use: Callable[[SharedState], None]) -> None:
        try:
            use(state)
        except StateError as error:
            ends.append(error)

    threads = [threading.Thread(target=run, args=(use,), daemon=True) for use in (read, submit, use_on_a_loop)]
    for thread in threads:
        thread.start()
    state.get_variable(SESSION, NAME)
    state.close()
    for thread in threads:
        thread.join(within(10))
    assert not any(thread.is_alive() for thread in threads), "somebody waits"
    return ends


@pytest.mark.parametrize("optimistic", [False, True], ids=["locking", "optimistic"])
def test_closing_lets_everybody_go(optimistic: bool) -> None:
    for _ in range(5):
        with Servers(2, optimistic=optimistic) as servers:
            begin(servers)
            assert {type(error) for error in ends_of_users(servers.states[1])} == {EngineClosedError}
            assert servers.states[0].get_variable(SESSION, NAME).version >= 0


def test_a_log_that_has_lost_commits_ends_the_engine_and_all_that_wait() -> None:
    with Servers(2) as servers:
        begin(servers)
        log, state = servers.logs[1], servers.states[1]
        state.get_variable(SESSION, NAME)
        servers.states[0].set_variable(SESSION, NAME, "b")
        lost = LostCommitsError("the log", "commit 2 is not the one that this server has seen")

        def refuse() -> None:
            raise lost

        log.news = refuse  # type: ignore[method-assign]
        with pytest.raises(LostCommitsError):
            state.submit(GetVariable(SESSION, NAME)).result(within(10))
        with pytest.raises(LostCommitsError):
            state.get_variable(SESSION, NAME)
        with pytest.raises(LostCommitsError):
            state.set_variable(SESSION, NAME, "c")
        assert servers.states[0].get_variable(SESSION, NAME).version == 1


def test_a_log_that_is_away_is_used_again_when_it_is_back() -> None:
    with Servers(2) as servers:
        begin(servers)
        log, state = servers.logs[1], servers.states[1]
        away, head, news = UnavailableError("the cable"), log.head, log.news

        def refuse() -> None:
            raise away

        log.head = log.news = refuse  # type: ignore[method-assign, assignment]
        for _ in range(2):
            with pytest.raises(UnavailableError, match="the cable"):
                state.get_variable(SESSION, NAME)
        # The head can be read again before the news can.
        log.head = head  # type: ignore[method-assign]
        servers.states[0].set_variable(SESSION, NAME, "b")
        with pytest.raises(UnavailableError, match="the cable"):
            state.submit(GetVariable(SESSION, NAME)).result(within(10))
        log.news = news  # type: ignore[method-assign]
        assert state.get_variable(SESSION, NAME).value.json == '"b"'


def test_a_forked_child_can_use_none_of_it() -> None:
    with Servers(2) as servers:
        begin(servers)
        state = servers.states[1]
        watch = state.watch(SESSION)
        child = os.fork()
        if child == 0:
            refused = 0
            for use in (
                lambda: state.get_variable(SESSION, NAME),
                lambda: state.submit(GetVariable(SESSION, NAME)).result(5),
                lambda: state.set_variable(SESSION, NAME, "child"),
                lambda: state.server_of("exec_1_ab"),
                watch.pull,
            ):
                try:
                    use()
                except ForkedProcessError:
                    refused += 1
            state.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        servers.states[0].set_variable(SESSION, NAME, "parent")
        assert state.get_variable(SESSION, NAME).value.json == '"parent"'
        assert [update.version.value.json for update in watch.next(within(5)) if update.version] == ['"parent"']
        watch.close()


# --- Over gRPC ---


@contextmanager
def served(provider: Any) -> Iterator[str]:
    """Serve a provider with tools, and yield its address."""
    ready: Future[int] = Future()
    ends: list[Any] = []

    async def serve() -> None:
        stop = asyncio.Event()
        ends.append((asyncio.get_running_loop(), stop))
        services = [server.Service(BRIDGE_SERVICE, BridgeServicer(provider))]
        options = server.ServerOptions("127.0.0.1:0", grace_s=0.1)
        await server.serve(options, services, status_of=status_of, on_ready=ready.set_result, stop=stop)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{ready.result(within(10))}"
    finally:
        loop, stop = ends[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(within(10))


def test_a_call_for_an_execution_of_another_server_says_where_to_send_it() -> None:
    with serving() as tools, served(tools.with_tools[1]) as address:
        tools.servers.states[0].announce("10.0.0.7:50051")
        held = tools.execute(0, "hold", value=1)
        tools.stage.wait_begun()
        (execution_id,) = tools.running()
        request = pb.GetVariableRequest(session_id=SESSION, variable_identifier="n")
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
            bridge.BridgeServiceStub(channel).GetVariable(request, metadata=(("x-dspex-execution-id", execution_id),))
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "10.0.0.7:50051" in raised.value.details()
        assert "x-dspex-execution-id" in raised.value.details()
        assert "--advertise" in raised.value.details()
        error = error_of(raised.value.code(), raised.value.details(), raised.value.trailing_metadata())
        assert isinstance(error, ExecutionElsewhereError)
        assert (error.execution_id, error.address) == (execution_id, "10.0.0.7:50051")
        tools.stage.go.set()
        outcome_of(held)
