"""A bounded pool of daemon threads that never keeps a process from ending, and loops that survive their code."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from dspex_persist.infra.threads import DaemonThreads, LoopEndedError, LoopThread
from tests.deadline import within

DEADLINE_S = within(20)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Busy work waits for it; it opens at the end of the test, so that no thread is left."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test's threads have."""
    return f"test-{request.node.name}"


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}-")]


def until_none_is_left(name: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while threads_of(name):
        assert time.monotonic() < end, f"left: {threads_of(name)}"
        time.sleep(0.002)


def occupy(threads: DaemonThreads, gate: threading.Event, count: int) -> list["Future[bool]"]:
    """Keep `count` threads busy until the gate opens; returns once they are."""
    begun = threading.Semaphore(0)

    def work() -> bool:
        begun.release()
        return gate.wait(DEADLINE_S)

    futures = [threads.submit(work) for _ in range(count)]
    for _ in range(count):
        assert begun.acquire(timeout=DEADLINE_S)
    return futures


def test_work_is_done_on_a_daemon_thread_of_the_name(name: str) -> None:
    threads = DaemonThreads(2, name)
    thread = threads.submit(threading.current_thread).result(DEADLINE_S)
    assert (thread.name, thread.daemon) == (f"{name}-1", True)
    threads.close()
    until_none_is_left(name)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_every_exception_goes_to_the_future_and_ends_no_thread(name: str, error: BaseException) -> None:
    threads = DaemonThreads(1, name)

    def fail() -> None:
        raise error

    assert threads.submit(fail).exception(DEADLINE_S) is error
    assert threads.submit(lambda: "still there").result(DEADLINE_S) == "still there"
    assert len(threads_of(name)) == 1
    threads.close()


def test_threads_are_started_only_when_none_is_free(name: str) -> None:
    threads = DaemonThreads(8, name)
    assert threads_of(name) == []
    for number in range(50):
        # A thread resolves its future before it becomes free: now and then the next work comes in between.
        assert threads.submit(lambda number=number: number).result(DEADLINE_S) == number
    assert len(threads_of(name)) < 8
    threads.close()


def test_work_that_waits_for_other_work_has_enough_threads(name: str) -> None:
    """All threads at the same time: each waits for all the others."""
    threads = DaemonThreads(6, name)
    for _ in range(20):
        meeting = threading.Barrier(6)
        futures = [threads.submit(lambda meeting=meeting: meeting.wait(DEADLINE_S)) for _ in range(6)]
        assert {future.result(DEADLINE_S) for future in futures} == set(range(6))
    assert len(threads_of(name)) == 6
    threads.close()


def test_work_that_blocks_holds_up_none_of_the_others(name: str, gate: threading.Event) -> None:
    threads = DaemonThreads(4, name)
    for busy in range(4):
        assert threads.submit(lambda number=busy: number).result(DEADLINE_S) == busy
        occupy(threads, gate, 1)
    assert len(threads_of(name)) == 4
    threads.close()


def test_without_another_thread_the_existing_ones_do_the_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = DaemonThreads(3, name)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threads.submit(lambda: "refused")
    assert threads.submit(lambda: "begun").result(DEADLINE_S) == "begun"
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        futures = [threads.submit(lambda number=number: number) for number in range(100)]
        assert [future.result(DEADLINE_S) for future in futures] == list(range(100))
    assert len(threads_of(name)) == 1
    threads.close()


def test_a_loop_whose_thread_did_not_start_is_tried_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopThread(name)

    async def work() -> str:
        return "done"

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                loop.start(work())
    assert loop.start(work()).result(DEADLINE_S) == "done"
    loop.close()


def test_there_are_never_too_many_threads_and_further_work_waits_in_order(name: str, gate: threading.Event) -> None:
    threads = DaemonThreads(2, name)
    busy = occupy(threads, gate, 2)
    order: list[int] = []
    waiting = [threads.submit(lambda number=number: order.append(number)) for number in range(20)]
    assert len(threads_of(name)) == 2
    assert not any(future.running() or future.done() for future in waiting)
    gate.set()
    for future in (*busy, *waiting):
        future.result(DEADLINE_S)
    # Two threads take them from the front; they may then overtake each other by one.
    assert all(abs(place - number) <= 1 for place, number in enumerate(order)), order
    assert len(threads_of(name)) == 2
    threads.close()


def test_queued_work_can_be_cancelled_and_running_work_cannot(name: str, gate: threading.Event) -> None:
    threads = DaemonThreads(1, name)
    (busy,) = occupy(threads, gate, 1)
    done: list[str] = []
    given_up = threads.submit(lambda: done.append("given up"))
    kept = threads.submit(lambda: done.append("kept"))
    assert given_up.cancel()
    assert not busy.cancel()
    gate.set()
    kept.result(DEADLINE_S)
    assert busy.result(DEADLINE_S) is True
    assert done == ["kept"]
    threads.close()


def test_closing_ends_idle_threads_and_waits_for_no_busy_one(name: str, gate: threading.Event) -> None:
    threads = DaemonThreads(3, name)
    busy = occupy(threads, gate, 3)
    done: list[str] = []
    threads.submit(lambda: done.append("left"))
    # The gate opens only afterwards: a close that waited for busy threads would never return.
    threads.close()
    threads.close()
    assert len(threads_of(name)) == 3
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(lambda: None)
    gate.set()
    assert [future.result(DEADLINE_S) for future in busy] == [True] * 3
    until_none_is_left(name)
    assert done == []


def test_closing_without_a_thread(name: str) -> None:
    threads = DaemonThreads(3, name)
    threads.close()
    assert threads_of(name) == []


def test_an_idle_thread_keeps_no_reference_to_its_last_work(name: str) -> None:
    class Large:
        pass

    threads = DaemonThreads(1, name)
    large = Large()
    gone = weakref.ref(large)
    threads.submit(lambda large=large: id(large)).result(DEADLINE_S)
    del large
    end = time.monotonic() + DEADLINE_S
    while gone() is not None:
        gc.collect()
        assert time.monotonic() < end
        time.sleep(0.002)
    threads.close()


def test_submitting_from_many_threads_loses_nothing(name: str) -> None:
    threads = DaemonThreads(4, name)
    results: list[int] = []

    def submit(first: int) -> None:
        futures = [threads.submit(lambda n=number: n) for number in range(first, first + 500)]
        results.extend(future.result(DEADLINE_S) for future in futures)

    callers = [threading.Thread(target=submit, args=(number * 500,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_S)
    assert sorted(results) == list(range(3000))
    assert len(threads_of(name)) <= 4
    threads.close()
    until_none_is_left(name)


def test_closing_while_others_submit_leaves_no_thread(name: str) -> None:
    for _ in range(50):
        threads = DaemonThreads(3, name)

        def submit(threads: DaemonThreads = threads) -> None:
            try:
                for _ in range(100):
                    threads.submit(lambda: None)
            except RuntimeError:
                pass

        callers = [threading.Thread(target=submit) for _ in range(3)]
        for caller in callers:
            caller.start()
        threads.close()
        for caller in callers:
            caller.join(DEADLINE_S)
        until_none_is_left(name)


def test_a_stuck_thread_keeps_no_process_from_ending() -> None:
    script = """
import threading
from dspex_persist.infra.threads import DaemonThreads

threads = DaemonThreads(2, "stuck")
begun = threading.Event()
threads.submit(lambda: (begun.set(), threading.Event().wait()))
assert begun.wait()
threads.submit(lambda: None).result()
print("the end")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=within(60)
    )
    assert (ended.stdout, ended.stderr) == ("the end\n", "")


# Event loops.


@pytest.fixture
def loop_thread(name: str) -> Iterator[LoopThread]:
    loop_thread = LoopThread(f"{name}-loop")
    yield loop_thread
    loop_thread.close()


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


async def stop() -> int:
    asyncio.get_running_loop().stop()
    return await answer()


async def raise_in_a_callback(error: type[BaseException]) -> int:
    def leave() -> None:
        raise error

    asyncio.get_running_loop().call_soon(leave)
    return await answer()


async def raise_in_a_task(error: type[BaseException]) -> int:
    async def leave() -> None:
        raise error

    ended = asyncio.create_task(leave())
    await asyncio.wait((ended,))
    assert isinstance(ended.exception(), error)
    return await answer()


@pytest.mark.parametrize(
    "ending",
    [
        stop,
        lambda: raise_in_a_callback(SystemExit),
        lambda: raise_in_a_callback(KeyboardInterrupt),
        lambda: raise_in_a_task(SystemExit),
        lambda: raise_in_a_task(KeyboardInterrupt),
    ],
)
def test_a_loop_that_is_stopped_continues_with_all_its_tasks(
    loop_thread: LoopThread, ending: Callable[[], Any]
) -> None:
    reached, release = threading.Event(), threading.Event()

    async def other() -> int:
        reached.set()
        while not release.is_set():  # noqa: ASYNC110 -- another thread sets it
            await asyncio.sleep(0.001)
        return 7

    running, loop = loop_thread.start(other()), loop_thread.loop
    assert reached.wait(DEADLINE_S)
    assert loop_thread.start(ending()).result(DEADLINE_S) == 42
    release.set()
    assert running.result(DEADLINE_S) == 7
    assert loop_thread.loop is loop


def test_a_closed_loop_is_replaced_and_its_futures_fail(loop_thread: LoopThread) -> None:
    async def wait_forever() -> None:
        await asyncio.get_running_loop().create_future()

    loop = loop_thread.loop
    running = loop_thread.start(wait_forever())

    async def stop_and_close() -> None:
        def close() -> None:
            loop.close()
            raise RuntimeError("Event loop is closed")

        # The loop calls this before each run; another thread could close it just then.
        loop._check_running = close  # type: ignore[attr-defined]
        loop.stop()

    loop_thread.start(stop_and_close())
    with pytest.raises(LoopEndedError, match="there is a new one now"):
        running.result(DEADLINE_S)
    assert loop_thread.start(answer()).result(DEADLINE_S) == 42
    assert loop_thread.loop is not loop


def test_no_other_thread_closes_a_loop_between_two_runs(loop_thread: LoopThread) -> None:
    """That would remove the pipe that wakes the loop, which would then run again and sleep forever."""
    loop = loop_thread.loop
    refused = []

    async def stop_and_close() -> None:
        def close() -> None:
            try:
                loop.close()
            except RuntimeError as error:
                refused.append(str(error))

        # The loop calls this before each run, when other threads do not yet see it running.
        loop._check_running = close  # type: ignore[attr-defined]
        loop.stop()

    loop_thread.start(stop_and_close())
    assert loop_thread.start(answer()).result(DEADLINE_S) == 42
    assert loop_thread.loop is loop
    assert all("is shared and cannot be closed" in each for each in refused)
    assert refused


def test_closing_cancels_all_tasks_and_refuses_new_ones(loop_thread: LoopThread) -> None:
    cancelled = threading.Event()

    async def hold() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    running, loop = loop_thread.start(hold()), loop_thread.loop
    loop_thread.start(answer()).result(DEADLINE_S)
    loop_thread.close()
    assert cancelled.is_set()
    assert running.done()
    deadline = time.monotonic() + DEADLINE_S
    while not loop.is_closed():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            loop_thread.start(answer())
        loop_thread.close()


def test_closing_does_not_wait_for_code_that_ignores_its_cancellation(
    loop_thread: LoopThread, gate: threading.Event
) -> None:
    async def hold() -> None:
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.001)

    loop_thread.start(hold())
    loop_thread.start(answer()).result(DEADLINE_S)
    loop_thread.close(wait_s=0.05)
