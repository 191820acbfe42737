"""Replies: futures of one event loop that any thread settles."""

import asyncio
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest

from dspex_persist.infra.mailbox import LoopMailbox, Reply


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on an event loop."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


def mailbox() -> LoopMailbox:
    return LoopMailbox(asyncio.get_running_loop())


def on_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def settle(reply: Reply[Any], result: object = None, error: BaseException | None = None) -> None:
    assert reply.begin()
    reply.settle(result, error)


class TestSettling:
    @on_loop
    async def test_another_thread_settles_it(self) -> None:
        reply = Reply[int](mailbox())
        on_thread(lambda: settle(reply, 3))
        assert await reply == 3
        assert reply.done()
        assert reply.result() == 3
        assert reply.exception() is None

    @on_loop
    async def test_while_it_is_awaited(self) -> None:
        reply = Reply[int](mailbox())
        waiting = asyncio.ensure_future(awaited(reply))
        await asyncio.sleep(0)
        on_thread(lambda: settle(reply, 3))
        assert await waiting == 3

    @on_loop
    async def test_an_error_is_raised_where_it_is_awaited(self) -> None:
        reply, error = Reply[int](mailbox()), ValueError("x")
        on_thread(lambda: settle(reply, error=error))
        with pytest.raises(ValueError, match="x"):
            await reply
        assert reply.exception() is error

    @on_loop
    async def test_on_the_loop_it_is_done_at_once(self) -> None:
        reply = Reply[int](mailbox())
        reply.settle_here(3, None)
        assert reply.done()
        assert not reply.cancel()
        assert await reply == 3

    @on_loop
    async def test_callbacks_run_on_the_loop(self) -> None:
        reply, threads = Reply[int](mailbox()), list[int]()
        reply.add_done_callback(lambda _: threads.append(threading.get_ident()))
        on_thread(lambda: settle(reply, 3))
        await reply
        reply.add_done_callback(lambda _: threads.append(threading.get_ident()))
        assert threads == [threading.get_ident()] * 2


class TestCancelling:
    @on_loop
    async def test_in_time(self) -> None:
        reply, called = Reply[int](mailbox()), list[bool]()
        reply.add_done_callback(lambda each: called.append(each.cancelled()))
        assert reply.cancel()
        assert not reply.begin(), "the thread that would settle it sees that it was cancelled"
        assert called == [True]
        with pytest.raises(asyncio.CancelledError):
            await reply

    @on_loop
    async def test_too_late(self) -> None:
        reply = Reply[int](mailbox())
        assert reply.begin()
        assert not reply.cancel()
        on_thread(lambda: reply.settle(3, None))
        assert await reply == 3

    @pytest.mark.parametrize("has_begun", [False, True])
    @on_loop
    async def test_by_cancelling_the_task_that_awaits_it(self, has_begun: bool) -> None:
        reply = Reply[int](mailbox())
        if has_begun:
            reply.begin()
        waiting = asyncio.ensure_future(awaited(reply))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert reply.cancelled() is not has_begun
        if has_begun:
            on_thread(lambda: reply.settle(3, None))
            # Posted before this runs.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert reply.result() == 3

    @on_loop
    async def test_only_one_of_cancel_and_begin_wins(self) -> None:
        for _ in range(200):
            reply, began = Reply[int](mailbox()), Future[bool]()
            thread = threading.Thread(target=lambda reply=reply, began=began: began.set_result(reply.begin()))
            thread.start()
            cancelled = reply.cancel()
            thread.join()
            assert cancelled is not began.result()


class TestFollowing:
    """A reply that ends as a future does."""

    @pytest.mark.parametrize("is_done", [False, True])
    @on_loop
    async def test_the_result_and_the_error(self, is_done: bool) -> None:
        for outcome in (3, ValueError("x")):
            future = Future[int]()

            def finish(future: Future[int] = future, outcome: Any = outcome) -> None:
                future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result(outcome)

            if is_done:
                finish()
            reply = mailbox().reply(future)
            assert reply.done() is is_done
            if not is_done:
                on_thread(finish)
            assert (await asyncio.gather(awaited(reply), return_exceptions=True)) == [outcome]

    @on_loop
    async def test_cancelling_it_cancels_the_future(self) -> None:
        future = Future[int]()
        reply = mailbox().reply(future)
        assert reply.cancel()
        assert future.cancelled()
        assert reply.cancelled()
        with pytest.raises(asyncio.CancelledError):
            await reply

    @on_loop
    async def test_a_future_that_runs_is_not_cancelled(self) -> None:
        future = Future[int]()
        future.set_running_or_notify_cancel()
        reply = mailbox().reply(future)
        assert not reply.cancel()
        on_thread(lambda: future.set_result(3))
        assert await reply == 3
        assert not reply.cancel(), "it is done"
        assert not reply.cancelled()

    @pytest.mark.parametrize("end", [lambda future: future.set_result(3), lambda future: future.cancel()])
    @on_loop
    async def test_nothing_is_kept_once_it_is_done(self, end: Callable[[Future[int]], object]) -> None:
        future = Future[int]()
        reply, kept = mailbox().reply(future), weakref.ref(future)
        gc.disable()
        try:
            end(future)
            await asyncio.gather(awaited(reply), return_exceptions=True)
            assert reply.cancelled() is future.cancelled()
            del future, reply
            assert kept() is None, "without the collector, which may come late"
        finally:
            gc.enable()


async def awaited(reply: Reply[Any]) -> Any:
    return await reply
