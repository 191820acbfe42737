"""The writer thread: groups, order, cancelling, closing, and that no caller ever hangs."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from contextvars import ContextVar
from itertools import chain
from queue import SimpleQueue
from typing import Any

import pytest

from dspex_persist.infra.futures import Blocked
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.state.commands import Heartbeat
from dspex_persist.state.errors import (
    EngineClosedError,
    OutcomeUnknownError,
    QueueFullError,
    StorageError,
    VersionConflictError,
)
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.log_store import WouldWaitError
from dspex_persist.state.model import Origin
from dspex_persist.state.writer import LoopWrites, Writer
from tests.deadline import within

DEADLINE_S = within(20)


def job(name: str) -> Job:
    return Job(Heartbeat(name), Origin("tester", "test"))


def names(jobs: Sequence[Job]) -> list[str]:
    return [job.command.session_id for job in jobs]


class Sink:
    """Accepts groups and answers each job with its name; can be held, and made to fail."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.begun = threading.Semaphore(0)
        self.may_write = threading.Event()
        self.may_write.set()
        self.failure: BaseException | None = None
        self.may_begin = True
        self.idle = threading.Semaphore(0)
        self.idle_failure: BaseException | None = None
        self.idle_threads: set[str] = set()
        self.write_threads: list[str] = []
        self.fatal: list[BaseException] = []
        self.ended = threading.Event()

    @property
    def written(self) -> list[str]:
        """The jobs of all groups."""
        return list(chain.from_iterable(self.groups))

    def write_group(self, jobs: Sequence[Job], *, wait: bool = True) -> list[Outcome]:
        if not wait and not self.may_begin:
            raise WouldWaitError
        self.begun.release()
        self.write_threads.append(threading.current_thread().name)
        assert self.may_write.wait(DEADLINE_S)
        self.groups.append(names(jobs))
        if self.failure is not None:
            raise self.failure
        return [Outcome(name) for name in names(jobs)]

    def on_idle(self) -> None:
        self.idle_threads.add(threading.current_thread().name)
        self.idle.release()
        if self.idle_failure is not None:
            raise self.idle_failure

    def on_fatal(self, error: BaseException) -> None:
        self.fatal.append(error)
        self.ended.set()


Start = Callable[..., Writer]


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def start(sink: Sink) -> Iterator[Start]:
    with ExitStack() as writers:

        def start(
            queue_length: int = 10_000,
            idle_s: float = 60,
            write_group: Any = None,
            on_fatal: Any = None,
            check: Any = None,
            **options: Any,
        ) -> Writer:
            writer = Writer(
                write_group or sink.write_group,
                queue_length=queue_length,
                check=check or (lambda: None),
                on_idle=sink.on_idle,
                idle_s=idle_s,
                on_fatal=on_fatal or sink.on_fatal,
                **options,
            )
            writers.callback(writer.close)
            writers.callback(sink.may_write.set)
            return writer

        yield start


def hold(sink: Sink, writer: Writer) -> Future[Any]:
    """Submit a first group that keeps the writer busy until `may_write` is set."""
    sink.may_write.clear()
    first = writer.submit(job("first"))
    assert sink.begun.acquire(timeout=DEADLINE_S)
    return first


class TestGroups:
    def test_an_answer_goes_to_its_caller(self, start: Start) -> None:
        assert start().submit(job("a")).result(DEADLINE_S) == "a"

    def test_jobs_queued_while_it_writes_form_the_next_group_in_order(self, sink: Sink, start: Start) -> None:
        writer = start()
        hold(sink, writer)
        queued = [writer.submit(job(f"{number}")) for number in range(50)]
        sink.may_write.set()
        assert [future.result(DEADLINE_S) for future in queued] == [f"{number}" for number in range(50)]
        assert sink.groups == [["first"], [f"{number}" for number in range(50)]]

    def test_a_group_is_bounded(self, sink: Sink, start: Start) -> None:
        writer = start()
        hold(sink, writer)
        queued = [writer.submit(job(f"{number}")) for number in range(2_500)]
        sink.may_write.set()
        wait(queued, DEADLINE_S)
        assert [len(group) for group in sink.groups] == [1, 1024, 1024, 452]
        assert sink.written[1:] == [f"{number}" for number in range(2_500)]

    def test_an_error_goes_to_its_own_caller(self, start: Start) -> None:
        error = VersionConflictError("x", 1, 2)

        def write_group(jobs: Sequence[Job], **_: Any) -> list[Outcome]:
            return [Outcome(error=error) if name == "bad" else Outcome(name) for name in names(jobs)]

        writer = start(write_group=write_group)
        futures = [writer.submit(job(name)) for name in ("a", "bad", "b")]
        wait(futures, DEADLINE_S)
        assert [future.exception() for future in futures] == [None, error, None]
        assert futures[2].result() == "b"

    def test_a_lone_job_is_not_delayed_and_several_wait_a_moment(
        self, sink: Sink, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []
        monkeypatch.setattr(time, "sleep", slept.append)
        writer = start()
        for number in range(5):
            writer.submit(job(f"{number}")).result(DEADLINE_S)
        assert slept == []
        hold(sink, writer)
        queued = [writer.submit(job(f"{number}")) for number in range(5)]
        sink.may_write.set()
        wait(queued, DEADLINE_S)
        assert all(0 < gap_s <= 0.005 for gap_s in slept)
        assert len(slept) <= 1

    def test_a_callback_may_submit_again(self, start: Start) -> None:
        """Callbacks run on the writer's thread, which must not wait for itself."""
        writer = start()
        second: Future[Future[Any]] = Future()
        writer.submit(job("a")).add_done_callback(lambda _: second.set_result(writer.submit(job("b"))))
        assert second.result(DEADLINE_S).result(DEADLINE_S) == "b"

    def test_a_callback_that_raises_does_no_harm(self, start: Start, caplog: pytest.LogCaptureFixture) -> None:
        writer = start()
        writer.submit(job("a")).add_done_callback(lambda _: [][0])
        assert writer.submit(job("b")).result(DEADLINE_S) == "b"


class TestBlockedCallers:
    """They wake each other, one after the other."""

    def test_each_gets_its_own_outcome(self, sink: Sink, start: Start) -> None:
        writer = start()
        first = hold(sink, writer)
        with ThreadPoolExecutor(100) as callers:
            outcomes = [callers.submit(writer.run, job(f"{number}")) for number in range(100)]
            deadline = time.monotonic() + DEADLINE_S
            while writer.length < 101:
                assert time.monotonic() < deadline
            sink.may_write.set()
            assert [outcome.result(DEADLINE_S) for outcome in outcomes] == [f"{number}" for number in range(100)]
        assert first.result(DEADLINE_S) == "first"

    @pytest.mark.parametrize("then", ["nothing", "another job", "the end"])
    def test_one_who_has_gone_does_not_keep_the_others_asleep(self, sink: Sink, start: Start, then: str) -> None:
        writer = start()
        hold(sink, writer)
        tickets: list[Blocked[str]] = [Blocked() for _ in range(5)]
        writer.queue([(job(f"{number}"), ticket) for number, ticket in enumerate(tickets)])
        results: SimpleQueue[str] = SimpleQueue()
        # As after Ctrl-C in the main thread, nobody waits with the second and the fourth.
        for ticket in tickets[::2]:
            threading.Thread(target=lambda ticket=ticket: results.put(ticket.wait()), daemon=True).start()
        sink.may_write.set()
        if then == "another job":
            assert writer.run(job("another")) == "another"
        elif then == "the end":
            writer.close()
        assert sorted(results.get(timeout=DEADLINE_S) for _ in range(3)) == ["0", "2", "4"]


class TestCancelling:
    def test_a_job_cancelled_before_its_turn_is_left_out(self, sink: Sink, start: Start) -> None:
        writer = start()
        hold(sink, writer)
        queued = [writer.submit(job(name)) for name in ("a", "b", "c", "d")]
        assert queued[0].cancel()
        assert queued[2].cancel()
        sink.may_write.set()
        assert queued[1].result(DEADLINE_S) == "b"
        assert queued[3].result(DEADLINE_S) == "d"
        assert sink.groups == [["first"], ["b", "d"]]
        with pytest.raises(CancelledError):
            queued[0].result(DEADLINE_S)

    def test_all_callers_of_a_group_may_cancel(self, sink: Sink, start: Start) -> None:
        writer = start()
        hold(sink, writer)
        queued = [writer.submit(job(name)) for name in ("a", "b")]
        assert all(future.cancel() for future in queued)
        sink.may_write.set()
        assert writer.submit(job("c")).result(DEADLINE_S) == "c"
        assert not sink.fatal

    def test_a_job_whose_turn_has_come_cannot_be_cancelled(self, sink: Sink, start: Start) -> None:
        writer = start()
        first = hold(sink, writer)
        assert not first.cancel()
        sink.may_write.set()
        assert first.result(DEADLINE_S) == "first"


class TestQueueLimit:
    def test_beyond_it_is_refused_naming_the_setting(self, sink: Sink, start: Start) -> None:
        writer = start(queue_length=3)
        hold(sink, writer)
        queued = [writer.submit(job(f"{number}")) for number in range(3)]
        refused = writer.submit(job("one more")).exception(DEADLINE_S)
        assert isinstance(refused, QueueFullError)
        assert refused.retryable
        assert "queue_length" in str(refused)
        assert "3" in str(refused)
        sink.may_write.set()
        wait(queued, DEADLINE_S)
        assert writer.submit(job("later")).result(DEADLINE_S) == "later"
        assert "one more" not in sink.written


class TestClosing:
    def test_queued_jobs_are_written_and_later_ones_refused(self, sink: Sink, start: Start) -> None:
        writer = start()
        hold(sink, writer)
        queued = [writer.submit(job(f"{number}")) for number in range(10)]
        closing = threading.Thread(target=writer.close)
        closing.start()
        while not (late := writer.submit(job("late"))).done():
            # It was accepted before `close` refused further jobs, so it must be written.
            queued.append(late)
            closing.join(0.001)
        assert isinstance(late.exception(), EngineClosedError)
        sink.may_write.set()
        closing.join(DEADLINE_S)
        assert not closing.is_alive()
        assert all(future.done() and future.exception() is None for future in queued)
        assert len(sink.written) == len(queued) + 1

    def test_closing_again_and_from_many_threads(self, start: Start) -> None:
        writer = start()
        closing = [threading.Thread(target=writer.close) for _ in range(8)]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in closing)
        writer.close()
        assert isinstance(writer.submit(job("a")).exception(DEADLINE_S), EngineClosedError)

    def test_a_callback_may_close_it(self, start: Start) -> None:
        writer = start()
        closed = threading.Event()

        def close(_: Future[Any]) -> None:
            writer.close()
            closed.set()

        writer.submit(job("a")).add_done_callback(close)
        assert closed.wait(DEADLINE_S)

    def test_every_submit_that_races_with_closing_is_answered(self, sink: Sink, start: Start) -> None:
        writer = start()
        answered: list[Future[Any]] = []

        def submit() -> None:
            while True:
                future = writer.submit(job("x"))
                answered.append(future)
                if future.done() and isinstance(future.exception(), EngineClosedError):
                    return

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert sink.begun.acquire(timeout=DEADLINE_S)
        writer.close()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not wait(answered, DEADLINE_S).not_done
        written = sum(future.exception() is None for future in answered)
        assert written == len(sink.written)


WRITER = "dspex-persist-writer"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def in_thread(function: Callable[[], Any], name: str = "caller") -> Any:
    """Call a function on a thread other than the main one; return or raise its outcome."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done.result(DEADLINE_S)


class TestLeading:
    """A caller that waits writes its own job while no other thread writes."""

    def test_alone_it_writes_on_its_own_thread(self, sink: Sink, start: Start) -> None:
        writer = start()
        assert in_thread(lambda: [writer.run(job("a")), writer.run(job("b"))]) == ["a", "b"]
        assert sink.write_threads == ["caller", "caller"]
        assert sink.groups == [["a"], ["b"]]

    def test_the_main_thread_does_not(self, sink: Sink, start: Start) -> None:
        """Ctrl-C raises there, between any two lines of a group."""
        assert start().run(job("a")) == "a"
        assert sink.write_threads == [WRITER]

    def test_the_main_thread_does_where_a_loop_takes_the_signals(
        self, sink: Sink, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(interrupts, "_taken_by_loop", True)
        assert start().run(job("a")) == "a"
        assert sink.write_threads == [threading.main_thread().name]

    def test_a_caller_deep_in_a_recursion_does_not(self, sink: Sink, start: Start) -> None:
        writer = start()

        def descend(left: int) -> Any:
            return writer.run(job("deep")) if left == 0 else descend(left - 1)

        assert in_thread(lambda: descend(sys.getrecursionlimit() - 150)) == "deep"
        assert sink.write_threads == [WRITER]

    def test_while_somebody_writes_it_is_queued(self, sink: Sink, start: Start) -> None:
        writer = start()
        first = hold(sink, writer)
        with ThreadPoolExecutor(8) as callers:
            running = [callers.submit(writer.run, job(f"{number}")) for number in range(8)]
            wait_until(lambda: writer._put == 9)
            sink.may_write.set()
            assert {future.result(DEADLINE_S) for future in running} == {f"{number}" for number in range(8)}
        assert first.result(DEADLINE_S) == "first"
        assert set(sink.write_threads) == {WRITER}

    def test_earlier_jobs_of_the_same_caller_come_first(self, sink: Sink, start: Start) -> None:
        writer = start()

        def write() -> None:
            for number in range(200):
                writer.submit(job(f"{number}"))
                writer.run(job(f"{number} again"))

        in_thread(write)
        assert sink.written == [name for number in range(200) for name in (f"{number}", f"{number} again")]

    def test_errors_go_to_the_caller(self, start: Start) -> None:
        error = VersionConflictError("x", 1, 2)
        writer = start(write_group=lambda _jobs, **_: [Outcome(error=error)])
        with pytest.raises(VersionConflictError) as caught:
            in_thread(lambda: writer.run(job("a")))
        assert caught.value is error

    def test_groups_do_not_see_the_callers_context(self, start: Start) -> None:
        variable: ContextVar[str] = ContextVar("variable", default="")
        seen: list[str] = []

        def write_group(jobs: Sequence[Job], **_: Any) -> list[Outcome]:
            seen.append(variable.get())
            return [Outcome() for _ in jobs]

        writer = start(write_group=write_group)

        def write() -> None:
            variable.set("the caller's")
            writer.run(job("a"))

        in_thread(write)
        assert seen == [""]

    @pytest.mark.parametrize(
        "failure", [RuntimeError("boom"), OutcomeUnknownError("disk"), KeyboardInterrupt(), SystemExit(1)], ids=repr
    )
    def test_an_error_that_ends_its_group_ends_the_writer(
        self, sink: Sink, start: Start, failure: BaseException
    ) -> None:
        writer = start()
        sink.failure = failure
        expected = OutcomeUnknownError if isinstance(failure, Exception) else type(failure)
        with pytest.raises(expected):
            in_thread(lambda: writer.run(job("a")))
        assert sink.fatal == [failure]
        with pytest.raises(OutcomeUnknownError):
            writer.run(job("later"))
        writer._thread.join(DEADLINE_S)
        assert not writer._thread.is_alive()
        writer.close()
        assert sink.groups == [["a"]]

    def test_jobs_queued_meanwhile_fail_as_not_written(self, sink: Sink, start: Start) -> None:
        writer = start()
        sink.may_write.clear()
        sink.failure = RuntimeError("boom")
        with ThreadPoolExecutor(1) as callers:
            leading = callers.submit(writer.run, job("a"))
            assert sink.begun.acquire(timeout=DEADLINE_S)
            queued = [writer.submit(job(name)) for name in ("b", "c")]
            sink.may_write.set()
            assert isinstance(leading.exception(DEADLINE_S), OutcomeUnknownError)
        assert all(isinstance(future.exception(DEADLINE_S), EngineClosedError) for future in queued)
        assert sink.groups == [["a"]]

    def test_on_fatal_may_close_it(self, sink: Sink, start: Start) -> None:
        writer = start(on_fatal=lambda _: writer.close())
        sink.failure = RuntimeError("boom")
        with pytest.raises(OutcomeUnknownError):
            in_thread(lambda: writer.run(job("a")))
        assert not writer._thread.is_alive()

    def test_closing_waits_for_whoever_leads(self, sink: Sink, start: Start) -> None:
        writer = start()
        sink.may_write.clear()
        with ThreadPoolExecutor(1) as callers:
            leading = callers.submit(writer.run, job("a"))
            assert sink.begun.acquire(timeout=DEADLINE_S)
            closing = threading.Thread(target=writer.close)
            closing.start()
            wait_until(lambda: writer._closed is not None)
            assert closing.is_alive()
            sink.may_write.set()
            closing.join(DEADLINE_S)
            assert not closing.is_alive()
            assert leading.result(DEADLINE_S) == "a"
        with pytest.raises(EngineClosedError):
            writer.run(job("late"))

    def test_news_are_reported_on_the_writers_thread(self, start: Start) -> None:
        """The leading caller gets its answer first, because reporting may wake thousands of watchers."""
        reporting_threads: SimpleQueue[str] = SimpleQueue()
        news = threading.Event()
        writer = start(
            on_answered=lambda: reporting_threads.put(threading.current_thread().name) if news.is_set() else None,
            has_news=news.is_set,
        )
        news.set()
        in_thread(lambda: writer.run(job("a")))
        assert reporting_threads.get(timeout=DEADLINE_S) == WRITER

    def test_news_take_no_room_in_the_queue(self, sink: Sink, start: Start) -> None:
        """Waking thousands takes longer than many writes."""
        waking, may_wake = threading.Semaphore(0), threading.Event()
        news = threading.Event()

        def wake() -> None:
            if news.is_set():
                waking.release()
                assert may_wake.wait(DEADLINE_S)

        writer = start(queue_length=1, on_answered=wake, has_news=news.is_set)
        news.set()
        in_thread(lambda: writer.run(job("first")))
        assert waking.acquire(timeout=DEADLINE_S)
        in_thread(lambda: [writer.run(job(name)) for name in "abc"])
        assert writer._queue.qsize() == 1, "all of them are told once"
        queued = writer.submit(job("d"))
        refused = writer.submit(job("e"))
        news.clear()
        may_wake.set()
        assert queued.result(DEADLINE_S) == "d"
        assert isinstance(refused.exception(DEADLINE_S), QueueFullError)
        assert sink.written == ["first", "a", "b", "c", "d"]


class TestLoopWrites:
    """Coroutines of one event loop."""

    def run(self, writer: Writer, turns: Sequence[Sequence[str]], *, is_small: bool = True) -> list[Any]:
        """Submit jobs turn by turn of a loop on a thread called "loop"; what is awaited in the end, flat."""

        async def submit() -> list[Any]:
            mailbox = LoopMailbox(asyncio.get_running_loop())
            writes = LoopWrites(writer, mailbox)
            results: list[Any] = []
            for turn in turns:
                replies = [Reply[Any](mailbox) for _ in turn]
                for name, reply in zip(turn, replies, strict=True):
                    writes.add(job(name), reply, is_small=is_small)
                results += [await reply for reply in replies]
            return results

        return in_thread(lambda: asyncio.run(submit()), "loop")  # type: ignore[no-any-return]

    def test_one_that_comes_alone_is_written_on_the_loop(self, sink: Sink, start: Start) -> None:
        assert self.run(start(), [["a"], ["b"]]) == ["a", "b"]
        assert sink.write_threads == ["loop", "loop"]

    def test_those_of_one_turn_are_a_group_of_the_writers_thread(self, sink: Sink, start: Start) -> None:
        assert self.run(start(), [["a", "b", "c"]]) == ["a", "b", "c"]
        assert sink.groups == [["a", "b", "c"]]
        assert sink.write_threads == [WRITER]

    def test_large_jobs_are_not_written_on_the_loop(self, sink: Sink, start: Start) -> None:
        assert self.run(start(), [["a"]], is_small=False) == ["a"]
        assert sink.write_threads == [WRITER]

    def test_nothing_is_written_on_the_loop_while_commits_are_slow(
        self, sink: Sink, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer = start()
        writer._note_cost(1.0)
        assert self.run(writer, [["a"]]) == ["a"]
        assert sink.write_threads == [WRITER]
        for _ in range(200):
            writer._note_cost(0.0005)
        assert self.run(writer, [["b"]]) == ["b"]
        assert sink.write_threads == [WRITER, "loop"]

    def test_jobs_that_would_wait_for_another_program_are_queued(self, sink: Sink, start: Start) -> None:
        writer = start()
        sink.may_begin = False
        assert self.run(writer, [["a"]]) == ["a"]
        assert sink.write_threads == [WRITER]

    def test_one_that_is_cancelled_in_time_is_not_written(self, sink: Sink, start: Start) -> None:
        writer = start()

        async def submit() -> bool:
            mailbox = LoopMailbox(asyncio.get_running_loop())
            reply = Reply[Any](mailbox)
            LoopWrites(writer, mailbox).add(job("a"), reply, is_small=True)
            reply.cancel()
            await asyncio.sleep(0)
            return reply.cancelled()

        assert in_thread(lambda: asyncio.run(submit()))
        writer.submit(job("b")).result(DEADLINE_S)
        assert sink.written == ["b"]

    def test_errors_are_raised_where_it_is_awaited(self, start: Start) -> None:
        writer = start(write_group=lambda jobs, **_: [Outcome(error=VersionConflictError("x", 1, 2)) for _ in jobs])
        for turn in (["a"], ["a", "b"]):
            with pytest.raises(VersionConflictError):
                self.run(writer, [turn])

    def test_a_closed_writer_refuses(self, start: Start) -> None:
        writer = start()
        writer.close()
        with pytest.raises(EngineClosedError):
            self.run(writer, [["a"]])


class TestDeath:
    @pytest.mark.parametrize(
        "failure", [RuntimeError("boom"), OutcomeUnknownError("disk"), KeyboardInterrupt(), SystemExit(1)], ids=repr
    )
    def test_every_caller_gets_an_error_and_none_hangs(self, sink: Sink, start: Start, failure: BaseException) -> None:
        writer = start()
        first = hold(sink, writer)
        queued = [writer.submit(job(name)) for name in ("a", "b")]
        assert queued[1].cancel()
        sink.failure = failure
        sink.may_write.set()
        error = first.exception(DEADLINE_S)
        assert isinstance(error, OutcomeUnknownError), "begun: it may or may not have been written"
        assert isinstance(queued[0].exception(DEADLINE_S), EngineClosedError), "not begun: certainly not written"
        assert sink.ended.wait(DEADLINE_S)
        later = writer.submit(job("later")).exception(DEADLINE_S)
        assert later is error
        if isinstance(failure, OutcomeUnknownError):
            assert error is failure
        writer.close()
        assert sink.fatal == [failure]
        assert sink.groups == [["first"]]

    def test_it_is_reported_after_the_waiting_callers_got_their_errors(self, sink: Sink, start: Start) -> None:
        seen: list[bool] = []
        pending: list[Future[Any]] = []
        writer = start(on_fatal=lambda _: seen.extend(future.done() for future in pending))
        pending += [hold(sink, writer), writer.submit(job("second"))]
        sink.failure = RuntimeError("boom")
        sink.may_write.set()
        writer.close()
        assert seen == [True, True]

    def test_too_few_answers_are_a_fault_that_leaves_no_caller_waiting(self, sink: Sink, start: Start) -> None:
        writer = start(write_group=lambda _jobs, **_: [])
        assert isinstance(writer.submit(job("a")).exception(DEADLINE_S), OutcomeUnknownError)
        assert sink.ended.wait(DEADLINE_S)

    @pytest.mark.parametrize("failure", [RuntimeError("boom"), SystemExit(1)], ids=repr)
    def test_what_fails_between_groups_leaves_no_caller_waiting_either(
        self, sink: Sink, start: Start, failure: BaseException
    ) -> None:
        answered = threading.Event()

        def on_answered() -> None:
            if answered.is_set():
                raise failure

        writer = start(on_answered=on_answered)
        hold(sink, writer)
        answered.set()
        sink.may_write.set()
        assert sink.ended.wait(DEADLINE_S)
        assert isinstance(writer.submit(job("later")).exception(DEADLINE_S), OutcomeUnknownError)
        with pytest.raises(OutcomeUnknownError):
            in_thread(lambda: writer.run(job("later")))
        writer.close()
        assert sink.fatal == [failure]
        assert sink.groups == [["first"]]

    def test_a_callback_that_ends_the_thread_leaves_no_caller_of_its_group_waiting(
        self, sink: Sink, start: Start
    ) -> None:
        writer = start()
        hold(sink, writer)
        queued = [writer.submit(job(name)) for name in ("a", "b")]
        queued[0].add_done_callback(lambda _: sys.exit(1))
        sink.may_write.set()
        assert isinstance(queued[1].exception(DEADLINE_S), OutcomeUnknownError)
        assert sink.ended.wait(DEADLINE_S)
        assert isinstance(writer.submit(job("later")).exception(DEADLINE_S), OutcomeUnknownError)

    def test_a_future_that_its_caller_ended_harms_nobody(self, sink: Sink, start: Start) -> None:
        writer = start()
        first = hold(sink, writer)
        first.set_result("mine")
        sink.may_write.set()
        assert writer.submit(job("a")).result(DEADLINE_S) == "a"
        assert first.result() == "mine"
        assert not sink.fatal

    def test_an_error_that_only_fails_its_group_is_no_death(self, sink: Sink, start: Start) -> None:
        error = StorageError("disk full")
        writer = start(write_group=lambda jobs, **_: [Outcome(error=error) for _ in jobs])
        for _ in range(2):
            assert writer.submit(job("a")).exception(DEADLINE_S) is error
        assert not sink.fatal


class TestIdle:
    def test_housekeeping_runs_again_and_again_on_the_writer_s_own_thread(self, sink: Sink, start: Start) -> None:
        writer = start(idle_s=0.01)
        for _ in range(3):
            assert sink.idle.acquire(timeout=DEADLINE_S)
        assert writer.submit(job("a")).result(DEADLINE_S) == "a"
        assert sink.idle.acquire(timeout=DEADLINE_S)
        assert sink.idle_threads == {"dspex-persist-writer"}

    def test_work_does_not_keep_it_from_housekeeping(self, sink: Sink, start: Start) -> None:
        writer = start(idle_s=0.05)
        done = threading.Event()

        def keep_busy() -> None:
            while not done.is_set():
                writer.submit(job("x")).result(DEADLINE_S)

        busy = threading.Thread(target=keep_busy)
        busy.start()
        assert sink.idle.acquire(timeout=DEADLINE_S)
        assert sink.idle.acquire(timeout=DEADLINE_S)
        done.set()
        busy.join(DEADLINE_S)

    def test_housekeeping_that_fails_ends_it(self, sink: Sink, start: Start) -> None:
        sink.idle_failure = RuntimeError("boom")
        writer = start(idle_s=0.01)
        assert sink.ended.wait(DEADLINE_S)
        assert sink.fatal == [sink.idle_failure]
        assert isinstance(writer.submit(job("a")).exception(DEADLINE_S), OutcomeUnknownError)
