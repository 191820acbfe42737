"""With thousands of watchers, the caller that wrote is answered first, and other calls get a turn in between."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from dspex_persist import connect
from dspex_persist.infra.mailbox import SLICE, LoopMailbox
from dspex_persist.state import commands
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import Value

DEADLINE_S = 20


def test_a_write_is_answered_before_the_first_watcher_is_woken(tmp_path: Path) -> None:
    events: list[str] = []
    ended = threading.Event()
    with connect(tmp_path / "s.db") as state:
        assert isinstance(state, EmbeddedState)
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        watches = [state.watch("s") for _ in range(50)]
        for watch in watches[:-1]:
            watch.notify(lambda: events.append("woken"))
        watches[-1].notify(lambda: (events.append("woken"), ended.set())[0])
        future = state.submit(commands.SetVariable("s", "x", Value("1")))
        future.add_done_callback(lambda _: events.append("answered"))
        future.result(DEADLINE_S)
        assert ended.wait(DEADLINE_S)
        assert events == ["answered", *["woken"] * 50]
        assert [[update.version.version for update in watch.pull() if update.version] for watch in watches] == [
            [1]
        ] * 50
        for watch in watches:
            watch.close()


def test_watchers_learn_of_a_session_that_a_sweep_ends(tmp_path: Path) -> None:
    with connect(tmp_path / "s.db", session_ttl_s=0.05, sweep_interval_s=0.02) as state:
        state.initialize_session("s")
        woken = threading.Event()
        with state.watch("s") as watch:
            watch.notify(woken.set)
            assert woken.wait(DEADLINE_S)


def run(test: Callable[[LoopMailbox], object]) -> None:
    async def work() -> None:
        result = test(LoopMailbox(asyncio.get_running_loop()))
        if asyncio.iscoroutine(result):
            await result

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


def test_watchers_are_woken_in_slices_between_which_others_have_their_turn() -> None:
    count = 10 * SLICE + 1
    order: list[str] = []

    async def test(mailbox: LoopMailbox) -> None:
        done = asyncio.Event()

        def turn() -> None:
            order.append("other")
            if order.count("watcher") < count:
                asyncio.get_running_loop().call_soon(turn)
            else:
                done.set()

        wakers = [mailbox.waker(lambda: order.append("watcher")) for _ in range(count)]
        answer: Future[None] = Future()
        waiting = asyncio.ensure_future(mailbox.result(answer))
        waiting.add_done_callback(lambda _: order.append("answered"))
        await asyncio.sleep(0)
        for wake in wakers:
            wake()
        answer.set_result(None)
        asyncio.get_running_loop().call_soon(turn)
        await done.wait()

    run(test)
    assert order.count("watcher") == count
    assert "watcher" * (SLICE + 1) not in "".join(order)
    assert order.index("answered") <= 2 * SLICE + 3, "the answered caller continued while most watchers waited"


def test_a_watcher_waits_for_its_turn_once_and_misses_nothing() -> None:
    seen: list[int] = []
    delivered = 0

    async def test(mailbox: LoopMailbox) -> None:
        nonlocal delivered
        complete = asyncio.Event()

        def look() -> None:
            seen.append(delivered)
            if delivered == 1000:
                complete.set()

        wake = mailbox.waker(look)

        def write() -> None:
            nonlocal delivered
            for number in range(1, 1001):
                delivered = number
                wake()

        await asyncio.to_thread(write)
        await complete.wait()

    run(test)
    assert len(seen) < 1000, "it was woken for each"


@pytest.mark.parametrize("how", ["post", "waker"])
def test_a_mailbox_of_a_loop_that_is_closed_takes_what_comes(how: str) -> None:
    loop = asyncio.new_event_loop()
    mailbox = LoopMailbox(loop)
    loop.close()
    mailbox.post(list) if how == "post" else mailbox.waker(list)()
