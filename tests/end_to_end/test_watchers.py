"""Watchers against a real server: many of them, slow ones, frozen ones, and one that resumes after a restart."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb

from dspex_persist import Context
from dspex_persist.cognitive.changes import Change
from dspex_persist.cognitive.watching import Changes
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.abilities import Prunable
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import (
    EngineClosedError,
    SessionNotFoundError,
    StateError,
    UnavailableError,
    WatchGapError,
)
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring.connecting import connect
from tests.deadline import within
from tests.prepared import Started

SESSION = "watched"
WATCH = "/snakepit.bridge.BridgeService/WatchVariables"
DEADLINE_S = within(60)
FROZEN_CLIENT = f"""
import sys, grpc
import snakepit_bridge_pb2 as pb
channel = grpc.insecure_channel(sys.argv[1])
watch = channel.unary_stream("{WATCH}", pb.WatchVariablesRequest.SerializeToString, pb.VariableUpdate.FromString)
call = watch(pb.WatchVariablesRequest(session_id="{SESSION}"))
call.initial_metadata()
print("watching", flush=True)
for _ in call:
    pass
"""


def serve(folder: Path, *flags: str) -> ServerProcess:
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--db", str(folder / "w.db"), "--listen", "127.0.0.1:0"]
    return ServerProcess.start([*argv, *flags])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with serve(tmp_path, "--stall-timeout", "1", "--heartbeat", "0.5") as server:
        yield server


@contextmanager
def connected(server: ServerProcess) -> Iterator[BridgedState]:
    with BridgedState(f"127.0.0.1:{server.port}") as state:
        state.initialize_session(SESSION)
        state.register_variable(SESSION, "x", "string", "")
        yield state


@pytest.fixture
def state(server: ServerProcess) -> Iterator[BridgedState]:
    with connected(server) as state:
        yield state


@pytest.fixture
def own_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of the memory of its server."""
    monkeypatch.setattr(Started, "own_interpreters", True)


def rss_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) / 1024


def pull_until_it_ends(watch: Watch) -> None:
    while True:
        watch.next(DEADLINE_S)


def wait_for(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def test_two_thousand_watchers(tmp_path: Path) -> None:
    count, writes = 2_000, 3

    async def watch(multicallable: Any, ready: asyncio.Semaphore) -> list[str]:
        call = multicallable(pb.WatchVariablesRequest(session_id=SESSION))
        await call.initial_metadata()
        ready.release()
        seen: list[str] = []
        async for update in call:
            if update.update_type == "value_change":
                seen.append(update.variable.value.value.decode())
                if len(seen) == writes:
                    return seen
        raise AssertionError("the stream ended early")

    async def run(server: ServerProcess, state: BridgedState) -> list[list[str]]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            multicallable = channel.unary_stream(
                WATCH,
                request_serializer=pb.WatchVariablesRequest.SerializeToString,
                response_deserializer=pb.VariableUpdate.FromString,
            )
            ready = asyncio.Semaphore(0)
            watchers = [asyncio.create_task(watch(multicallable, ready)) for _ in range(count)]
            for _ in watchers:
                await ready.acquire()
            for number in range(writes):
                await asyncio.to_thread(state.set_variable, SESSION, "x", str(number))
            return await asyncio.gather(*watchers)

    # With the default patience: on a busy machine two thousand writes take more than the second of the other tests.
    with serve(tmp_path) as server, connected(server) as state:
        seen = asyncio.run(asyncio.wait_for(run(server, state), DEADLINE_S))
    assert seen == [['"0"', '"1"', '"2"']] * count


@pytest.mark.usefixtures("own_interpreter")
def test_a_client_that_does_not_read_is_ended_and_can_resume(server: ServerProcess, state: BridgedState) -> None:
    writes = 400
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = channel.unary_stream(WATCH, pb.WatchVariablesRequest.SerializeToString, pb.VariableUpdate.FromString)
        call = watch(pb.WatchVariablesRequest(session_id=SESSION))
        call.initial_metadata()
        before = rss_mib(server.pid)
        # 64 KiB each, never read: the transport's window is soon full, and from then on nothing may pile up.
        for number in range(writes):
            state.set_variable(SESSION, "x", f"{number % 10}" * 65_536)
        grown = rss_mib(server.pid) - before
        wait_for("the server to end the stream", lambda: "watcher stalled" in server.stderr_tail)
        received: list[int] = []
        with pytest.raises(grpc.RpcError) as caught:
            received.extend(update.variable.version for update in call if update.update_type == "value_change")
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert received == list(range(1, len(received) + 1))
    assert len(received) < writes
    resume = int(dict(call.trailing_metadata())["x-dspex-after-sequence"])
    with state.watch(SESSION, after_sequence=resume) as resumed:
        later: list[int] = []
        while len(received) + len(later) < writes:
            later += [update.variable.version for update in resumed.next(DEADLINE_S)]
    assert received + later == list(range(1, writes + 1))
    # 25 MiB were written. What may stay: the recent commits (4 MiB), SQLite's page cache (16 MiB), the allocator's.
    assert grown < 80


def test_a_frozen_client_stalls_no_other(server: ServerProcess, state: BridgedState) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "assets" / "stubs")}
    frozen = subprocess.Popen(
        [sys.executable, "-c", FROZEN_CLIENT, f"127.0.0.1:{server.port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        assert frozen.stdout is not None
        assert frozen.stdout.readline() == b"watching\n"
        frozen.send_signal(signal.SIGSTOP)
        with state.watch(SESSION) as watch:
            seen = []
            for number in range(200):
                state.set_variable(SESSION, "x", f"{number}" * 2_000)
                while len(seen) <= number:
                    seen += [update.variable.version for update in watch.next(DEADLINE_S)]
        assert seen == list(range(1, 201))
    finally:
        frozen.kill()
        frozen.wait()
        frozen.stdout.close()


def test_heartbeats_report_the_position_of_the_watch(server: ServerProcess, state: BridgedState) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = channel.unary_stream(WATCH, pb.WatchVariablesRequest.SerializeToString, pb.VariableUpdate.FromString)
        call = watch(pb.WatchVariablesRequest(session_id=SESSION, variable_identifiers=["x"]), timeout=DEADLINE_S)
        beat = next(call)
        assert (beat.update_type, beat.variable_id) == ("heartbeat", "")
        assert int(beat.update_metadata["commit_sequence"]) == 2
        state.register_variable(SESSION, "other", "string", "")
        state.set_variable(SESSION, "other", "not for this watcher")
        while int(beat.update_metadata["commit_sequence"]) < 4:
            beat = next(call)
            assert beat.update_type == "heartbeat"
        call.cancel()


def test_a_watch_goes_on_after_a_kill(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    position = None
    total = 0
    for _ in range(3):
        with (
            serve(tmp_path) as server,
            BridgedState(f"127.0.0.1:{server.port}", watch_patience_s=0) as state,
        ):
            state.initialize_session(SESSION)
            state.register_variable(SESSION, "x", "integer", 0)
            watch = state.watch(SESSION, after_sequence=0 if position is None else position)
            for number in range(300):
                total = state.set_variable(SESSION, "x", number)
            updates = watch.next(DEADLINE_S)
            assert updates
            seen += [(update.sequence, update.variable.version) for update in updates]
            position = updates[-1].sequence
            server.kill()
            # What the stream had brought before the kill was not pulled, and so has to come again.
            with pytest.raises(StateError):
                pull_until_it_ends(watch)
            watch.close()
    with (
        serve(tmp_path) as server,
        BridgedState(f"127.0.0.1:{server.port}") as state,
        state.watch(SESSION, after_sequence=position) as watch,
    ):
        while seen[-1][1] < total:
            seen += [(update.sequence, update.variable.version) for update in watch.next(DEADLINE_S)]
    assert [version for _, version in seen] == list(range(total + 1))
    assert [sequence for sequence, _ in seen] == sorted({sequence for sequence, _ in seen})


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path / "w.db", {"heartbeat_s": 0.5}) as served:
        with BridgedState(served.target) as state:
            state.initialize_session(SESSION)
            state.register_variable(SESSION, "x", "integer", 0)
        yield served


def write(served: ServedDatabase, count: int) -> None:
    with BridgedState(served.target) as state:
        for number in range(count):
            state.set_variable(SESSION, "x", number)


def interrupted(served: ServedDatabase, watch: Watch) -> None:
    """Kill the server, and wait until the watch has noticed."""
    served.kill()
    wait_for("the interruption", lambda: watch.interrupted)


def test_a_watch_goes_on_by_itself_over_kills(served: ServedDatabase, caplog: pytest.LogCaptureFixture) -> None:
    rounds, writes = 2, 100
    with BridgedState(served.target) as state, state.watch(SESSION) as watch, caplog.at_level("INFO", "dspex_persist"):
        seen = []
        for done in range(1, rounds + 1):
            write(served, writes)
            # Some of it has been pulled, some has only arrived, and some is still on its way.
            seen += watch.next(DEADLINE_S)
            interrupted(served, watch)
            served.restart()
            wait_for("the resumption", lambda done=done: watch.resumptions == done)
            assert watch.interrupted is None
        while len(seen) < rounds * writes:
            seen += watch.next(DEADLINE_S)
        assert [update.variable.version for update in seen] == list(range(1, rounds * writes + 1))
        assert [update.sequence for update in seen] == sorted({update.sequence for update in seen})
        assert watch.next(0) == []
    said = [record.getMessage() for record in caplog.records]
    assert sum("watch interrupted" in line for line in said) == sum("watch resumed" in line for line in said) == rounds


def test_a_watch_that_was_idle_resumes_with_what_came_meanwhile(served: ServedDatabase) -> None:
    with BridgedState(served.target) as state, state.watch(SESSION) as watch:
        interrupted(served, watch)
        with connect(served.path) as embedded:
            embedded.set_variable(SESSION, "x", 7)
        served.restart()
        (update,) = watch.next(DEADLINE_S)
        assert (update.variable.version, update.variable.value.json) == (1, "7")


def test_a_watch_that_cannot_resume_gives_up_and_closing_the_state_ends_it(served: ServedDatabase) -> None:
    with (
        BridgedState(served.target, watch_patience_s=0.2) as impatient,
        BridgedState(served.target) as state,
        impatient.watch(SESSION) as watch,
        state.watch(SESSION) as patient,
    ):
        interrupted(served, patient)
        reason = r"the watch did not get back within 0.2 s; resume with after_sequence=2"
        with pytest.raises(UnavailableError, match=reason) as given_up:
            pull_until_it_ends(watch)
        assert str(given_up.value).count("unavailable: ") == 1
        state.close()
        with pytest.raises(EngineClosedError):
            pull_until_it_ends(patient)


def begin_again(state: StateProvider) -> None:
    state.cleanup_session(SESSION)
    state.initialize_session(SESSION)
    state.register_variable(SESSION, "x", "integer", 0)


def prune(state: StateProvider) -> None:
    for number in range(5):
        state.set_variable(SESSION, "x", number)
    Prunable.of(state).prune(PrunePolicy(keep_versions=1), confirm=True)


@pytest.mark.parametrize(("change", "error"), [(begin_again, SessionNotFoundError), (prune, WatchGapError)])
def test_a_watch_does_not_hide_what_it_has_missed(
    served: ServedDatabase, change: Callable[[StateProvider], None], error: type[StateError]
) -> None:
    with BridgedState(served.target) as state, state.watch(SESSION) as watch:
        interrupted(served, watch)
        with connect(served.path) as embedded:
            change(embedded)
        served.restart()
        with pytest.raises(error):
            pull_until_it_ends(watch)


def test_watches_of_a_context_go_on_over_a_restart(served: ServedDatabase) -> None:
    """An iteration, one on an event loop, and a function, while the server is killed and comes back."""
    called: list[int] = []
    writes = 50

    async def iterate(ctx: Context, most: int) -> list[int]:
        async with ctx.watch("x") as changes:
            begun.set()
            return [change.version async for change, _ in _numbered(changes, most)]

    begun = threading.Event()
    with Context(SESSION, served.url) as ctx, ctx.watch("x") as changes, ThreadPoolExecutor(1) as thread:
        subscription = ctx.watch("x", on_change=lambda change: called.append(change.version))
        iterating = thread.submit(asyncio.run, iterate(ctx, 2 * writes))
        assert begun.wait(DEADLINE_S)
        write(served, writes)
        served.kill()
        wait_for("the interruption", lambda: changes.interrupted and subscription.interrupted)
        served.restart()
        wait_for("the resumption", lambda: changes.resumptions == subscription.resumptions == 1)
        write(served, writes)
        expected = list(range(1, 2 * writes + 1))
        found = []
        while len(found) < len(expected):
            change = changes.next(DEADLINE_S)
            assert change is not None
            found.append(change.version)
        assert found == iterating.result(DEADLINE_S) == expected
        wait_for("the calls", lambda: len(called) >= len(expected))
        assert called == expected


async def _numbered(changes: Changes[Any], most: int) -> AsyncIterator[tuple[Change[Any], int]]:
    number = 0
    async for change in changes:
        number += 1
        yield change, number
        if number == most:
            return
