"""Signal handlers that wait until the main thread has written its group."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from dspex_persist import connect
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.state.errors import StateError
from tests.deadline import within

DEADLINE_S = within(20)


class TimeIsUp(BaseException):
    """Raised by a handler, as programs do that limit how long something takes."""


@pytest.fixture
def set_handler() -> Iterator[Callable[[int, Any], None]]:
    before: dict[int, Any] = {}

    def change(number: int, handler: Any) -> None:
        before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)

    yield change
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


class TestHeld:
    def test_a_handler_runs_when_the_block_has_ended(self, set_handler: Callable[[int, Any], None]) -> None:
        ran: list[int] = []
        set_handler(signal.SIGUSR1, lambda number, _: ran.append(number))
        with interrupts.held():
            send(signal.SIGUSR1)
            assert ran == []
        assert ran == [signal.SIGUSR1]
        send(signal.SIGUSR1)
        assert ran == [signal.SIGUSR1] * 2

    def test_ctrl_c_raises_when_the_block_has_ended(self, set_handler: Callable[[int, Any], None]) -> None:
        set_handler(signal.SIGINT, signal.default_int_handler)
        steps: list[str] = []

        def hold() -> None:
            with interrupts.held():
                send(signal.SIGINT)
                steps.append("in the block")
            steps.append("after it")

        with pytest.raises(KeyboardInterrupt):
            hold()
        assert steps == ["in the block"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_all_handlers_run_even_if_one_raises(self, set_handler: Callable[[int, Any], None]) -> None:
        ran: list[int] = []

        def handle(number: int, _: FrameType | None) -> None:
            ran.append(number)
            if number == signal.SIGALRM:
                raise TimeIsUp

        numbers = (signal.SIGUSR1, signal.SIGALRM, signal.SIGUSR2)
        for number in numbers:
            set_handler(number, handle)

        def hold() -> None:
            with interrupts.held():
                send(*numbers)
                assert ran == []

        with pytest.raises(TimeIsUp):
            hold()
        assert sorted(ran) == sorted(numbers)
        assert [signal.getsignal(number) for number in numbers] == [handle] * 3

    def test_what_is_ignored_or_has_the_default_action_stays_so(self, set_handler: Callable[[int, Any], None]) -> None:
        set_handler(signal.SIGUSR1, signal.SIG_IGN)
        set_handler(signal.SIGUSR2, signal.SIG_DFL)
        with interrupts.held():
            send(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN

    def test_a_new_handler_is_found(self, set_handler: Callable[[int, Any], None]) -> None:
        for _ in range(3):
            ran: list[int] = []
            set_handler(signal.SIGUSR1, lambda number, _, ran=ran: ran.append(number))
            with interrupts.held():
                send(signal.SIGUSR1)
                assert not ran
            assert ran


def test_the_main_thread_writes_in_memory_itself_and_ctrl_c_waits(set_handler: Callable[[int, Any], None]) -> None:
    set_handler(signal.SIGINT, signal.default_int_handler)
    threads: list[str] = []
    with connect("memory:") as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        with state.watch("s") as watch:
            write_group = state.engine._writer._write_group

            def write(jobs: Any, **options: Any) -> Any:
                threads.append(threading.current_thread().name)
                send(signal.SIGINT)
                return write_group(jobs, **options)

            state.engine._writer._write_group = write
            with pytest.raises(KeyboardInterrupt):
                state.set_variable("s", "x", 1)
            state.engine._writer._write_group = write_group
            assert threads == [threading.main_thread().name]
            assert [update.version.version for update in watch.next(DEADLINE_S) if update.version] == [1]
            assert state.set_variable("s", "x", 2) == 2


def test_a_storm_of_signals_that_raise_neither_loses_nor_invents_a_write(
    set_handler: Callable[[int, Any], None],
) -> None:
    interrupted = 0

    def time_is_up(_number: int, _frame: FrameType | None) -> None:
        raise TimeIsUp

    set_handler(signal.SIGALRM, time_is_up)
    with connect("memory:") as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        written, delay_s = 0, 0.0
        while interrupted < 300:
            delay_s = delay_s + 1e-6 if delay_s < 3e-4 else 1e-5
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay_s)
                    for _ in range(20):
                        state.set_variable("s", "x", written + 1)
                        written += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeIsUp:
                interrupted += 1
            except StateError as error:
                pytest.fail(f"the state has ended: {error}")
            now = state.get_variable("s", "x")
            assert now.version in (written, written + 1)
            written = now.version
        assert [each.version for each in state.get_variable_history("s", "x", 10)] == [
            written - back for back in range(10)
        ]
