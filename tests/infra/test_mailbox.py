"""Replies: futures of one event loop that any thread settles."""

import asyncio
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from dspex_persist.infra.mailbox import LoopMailbox, Reply
from tests.deadline import within


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


class TestStarting:
    @on_loop
    async def test_the_result_and_the_error(self) -> None:
        box, error = mailbox(), ValueError("x")

        async def fails() -> None:
            raise error

        assert await asyncio.wrap_future(box.start(asyncio.sleep(0, 3))) == 3
        failed = box.start(fails())
        with pytest.raises(ValueError, match="x"):
            await asyncio.wrap_future(failed)
        assert failed.exception() is error

    @on_loop
    async def test_it_runs_in_the_context_of_the_caller_and_changes_its_own(self) -> None:
        variable: ContextVar[str] = ContextVar("variable", default="")
        box = mailbox()

        async def change() -> str:
            before = variable.get()
            variable.set("changed")
            return before

        def start() -> None:
            variable.set("caller")
            seen.append(box.start(change()))
            seen.append(box.start(change()))

        seen = list[Future[str]]()
        on_thread(lambda: copy_context().run(start))
        assert [await asyncio.wrap_future(each) for each in seen] == ["caller", "caller"]
        assert variable.get() == ""

    @on_loop
    async def test_many_wake_the_loop_once(self) -> None:
        loop = asyncio.get_running_loop()
        box, wakes, started = mailbox(), list[object](), list[Future[int]]()
        wake = loop.call_soon_threadsafe

        def count(*arguments: Any, **named: Any) -> Any:
            wakes.append(arguments)
            return wake(*arguments, **named)

        loop.call_soon_threadsafe = count  # type: ignore[assignment, method-assign]
        on_thread(lambda: started.extend(box.start(asyncio.sleep(0, number)) for number in range(5)))
        assert len(wakes) == 1
        assert [await asyncio.wrap_future(each) for each in started] == [0, 1, 2, 3, 4]

    @on_loop
    async def test_cancelling_it_before_it_begins(self) -> None:
        ran, box = list[int](), mailbox()

        async def run() -> None:
            ran.append(1)

        future = box.start(run())
        assert future.cancel()
        assert future.cancel(), "again"
        done = (await asyncio.to_thread(wait, [future], within(20))).done
        assert done == {future}, "whoever waits for it hears that"
        assert not ran

    @on_loop
    async def test_cancelling_it_cancels_the_task(self) -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def run() -> None:
            try:
                began.set()
                await asyncio.Event().wait()
            finally:
                ended.set()

        future = mailbox().start(run())
        await began.wait()
        on_thread(future.cancel)
        await ended.wait()
        assert (await asyncio.to_thread(wait, [future], within(20))).done == {future}

    @on_loop
    async def test_it_is_cancelled_with_its_task(self) -> None:
        running: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            running.set_result(asyncio.current_task())
            await asyncio.Event().wait()

        future = mailbox().start(run())
        task = await running
        task.cancel()
        await asyncio.wait((task,))
        await asyncio.sleep(0.0)
        assert future.cancelled()
        with pytest.raises(CancelledError):
            future.result(0)

    @pytest.mark.parametrize("start", [LoopMailbox.start, LoopMailbox.start_blocked])
    def test_a_closed_loop_refuses_it(self, start: Callable[..., object]) -> None:
        loop = asyncio.new_event_loop()
        box = LoopMailbox(loop)
        loop.close()
        coroutine = asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            start(box, coroutine)
        coroutine.close()

    @on_loop
    async def test_a_caller_that_waits_at_once(self) -> None:
        box, error = mailbox(), ValueError("x")

        async def fails() -> None:
            raise error

        async def is_cancelled() -> None:
            raise asyncio.CancelledError

        assert await asyncio.to_thread(lambda: box.start_blocked(asyncio.sleep(0, 3)).wait()) == 3
        with pytest.raises(ValueError, match="x") as raised:
            await asyncio.to_thread(lambda: box.start_blocked(fails()).wait())
        assert raised.value is error

        def wait_for_cancelled() -> None:
            with pytest.raises(CancelledError):
                box.start_blocked(is_cancelled()).wait()

        await asyncio.to_thread(wait_for_cancelled)

    @on_loop
    async def test_nothing_is_kept_once_it_is_done(self) -> None:
        class Result:
            pass

        async def run() -> Result:
            return Result()

        gc.disable()
        try:
            future = mailbox().start(run())
            kept = weakref.ref(await asyncio.wrap_future(future))
            del future
            await asyncio.sleep(0.0)
            assert kept() is None, "without the collector, which may come late"
        finally:
            gc.enable()


async def awaited(reply: Reply[Any]) -> Any:
    return await reply
