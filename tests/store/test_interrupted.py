"""Exceptions that another thread raises in one that writes its own job, as programs do that limit how long a job takes.

A profile function stands for the other thread: it raises at any event of the write that the test chooses.
"""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dspex_persist.state.embedded import SqliteState
from dspex_persist.state.errors import OutcomeUnknownError, StateError
from tests.deadline import within

DEADLINE_S = within(20)

_WAITING = frozenset({"commit", "execute", "executemany", "stat", "pread", "pwrite"})
"""C functions that other threads may run during, so that their exceptions come as these return."""


class TimeIsUpError(Exception):
    """Raised by programs whose timeouts are errors."""


class TimeIsUp(BaseException):
    """Raised by programs whose timeouts no `except Exception` may catch."""


class Interrupter:
    """Raises at one event of a write, or at none, and counts the events."""

    def __init__(self, error: type[BaseException], at: int, *, everywhere: bool) -> None:
        self.count = 0
        self._error = error
        self._at = at
        self._everywhere = everywhere

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        name = getattr(arg, "__name__", "")
        # Python raises exceptions of other threads where a function begins and after a call, but not in `with`.
        checks = event == "call" or (event == "c_return" and name not in ("__enter__", "__exit__"))
        waits = event == "c_return" and name in _WAITING
        if (checks if self._everywhere else waits) and "dspex_persist" in frame.f_code.co_filename:
            self.count += 1
            if self.count == self._at:
                sys.setprofile(None)
                raise self._error


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns, or raises, on a thread that is not the main one."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(DEADLINE_S)


@pytest.fixture
def open_state(tmp_path: Path) -> Iterator[Callable[[], SqliteState]]:
    states: list[SqliteState] = []

    def open_again() -> SqliteState:
        while states:
            states.pop().close()
        states.append(SqliteState(tmp_path / "s.db"))
        return states[-1]

    yield open_again
    states.pop().close()


def written(state: SqliteState, number: int, interrupter: Interrupter) -> BaseException | None:
    """Write a number on a thread that is interrupted; return what the caller caught."""

    def write() -> None:
        # Nobody would catch what comes as something else is collected.
        gc.disable()
        sys.setprofile(interrupter)
        try:
            state.set_variable("s", "x", number)
        finally:
            sys.setprofile(None)
            gc.enable()

    try:
        in_thread(write)
    except BaseException as error:  # noqa: BLE001 - judged by the test
        return error
    return None


def sweep(
    open_state: Callable[[], SqliteState], error: type[BaseException], *, everywhere: bool, step: int
) -> Iterator[BaseException | None]:
    """Write again and again, each time interrupted a bit later, and check what is stored; yield what callers caught."""
    state = open_state()
    state.initialize_session("s")
    state.register_variable("s", "x", "integer", 0)
    value, at = 0, 1
    while True:
        interrupter = Interrupter(error, at, everywhere=everywhere)
        caught = written(state, value + 1, interrupter)
        if interrupter.count < at:
            assert caught is None
            return
        try:
            in_thread(partial(state.heartbeat, "s"))
            now = state.get_value("s", "x")
        except OutcomeUnknownError:
            state = open_state()
            now = state.get_value("s", "x")
            caught = OutcomeUnknownError("it ended")
        assert now in (value, value + 1)
        if caught is None or (isinstance(caught, StateError) and not isinstance(caught, OutcomeUnknownError)):
            assert now == value + (caught is None), f"event {at}: the caller was told otherwise: {caught!r}"
        value, at = now, at + step
        yield caught


@pytest.mark.parametrize("error", [TimeIsUpError, TimeIsUp])
def test_wherever_the_writing_thread_waits_the_state_lives_on(
    open_state: Callable[[], SqliteState], error: type[BaseException]
) -> None:
    caught = list(sweep(open_state, error, everywhere=False, step=1))
    assert len(caught) > 5
    assert not [each for each in caught if isinstance(each, OutcomeUnknownError)]


@pytest.mark.parametrize("error", [TimeIsUpError, TimeIsUp])
def test_wherever_it_comes_nobody_hangs_and_nobody_is_told_a_lie(
    open_state: Callable[[], SqliteState], error: type[BaseException]
) -> None:
    assert len(list(sweep(open_state, error, everywhere=True, step=5))) > 20
