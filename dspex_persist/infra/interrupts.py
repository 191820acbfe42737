"""Exceptions that come between any two instructions.

Python runs signal handlers on the main thread, and they may raise, as Ctrl-C does. In other threads, programs that
limit how long a job takes raise exceptions with `PyThreadState_SetAsyncExc`.
"""

import _signal  # type: ignore[import-not-found]  # the functions of `signal` make enumerations, and take thrice as long
import _thread
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Final, TypeAlias

_Handler: TypeAlias = Callable[[int, FrameType | None], Any]

_NUMBERS: Final = tuple(int(each) for each in signal.valid_signals() if each not in (signal.SIGKILL, signal.SIGSTOP))


class _Held:
    """Holds Python's signal handlers back: those of signals that come in the block run when it ends.

    For the main thread, where Python runs them. There is one object for all blocks, and they are not nested.
    """

    def __init__(self) -> None:
        self._holding = False
        self._came: dict[int, None] = {}
        self._found: tuple[Any, ...] = ()
        self._handlers: dict[int, _Handler] = {}
        self._notes: list[_Handler] = []

    def __enter__(self) -> None:
        found = tuple(map(_signal.getsignal, _NUMBERS))
        if found != self._found:
            self._look_at(found)
        self._holding = True
        try:
            # One call, so that Python runs no handler in between; but the first may still run, and raise.
            deque(map(_signal.signal, self._handlers, self._notes), 0)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._holding = False
        try:
            deque(map(_signal.signal, self._handlers, self._handlers.values()), 0)
        finally:
            came: dict[Any, None] = self._came
            self._came = {}
            # As if they came now: their handlers run after this call.
            deque(map(_thread.interrupt_main, came), 0)

    def _look_at(self, found: tuple[Any, ...]) -> None:
        handlers = {number: each for number, each in zip(_NUMBERS, found, strict=True) if callable(each)}
        # A note that is still there has been kept from being replaced by an exception: it belongs to its handler.
        self._handlers = {
            number: self._handlers[number] if each == self._note else each for number, each in handlers.items()
        }
        self._notes = [self._note] * len(handlers)
        self._found = tuple(self._handlers.get(number, each) for number, each in zip(_NUMBERS, found, strict=True))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._came[number] = None
        else:
            self._handlers[number](number, frame)


class _Interrupts:
    """The state of this process."""

    def __init__(self) -> None:
        self._taken_by_loop = False
        self._threads = threading.local()
        self._held = _Held()

    def give_to_loop(self) -> None:
        """Declare that an event loop handles the signals of this process, so that no handler raises."""
        self._taken_by_loop = True

    def take_from_loop(self) -> None:
        """Undo `give_to_loop`."""
        self._taken_by_loop = False

    def can_come(self) -> bool:
        """Whether a signal handler may raise in the calling thread."""
        return not self._taken_by_loop and threading.get_ident() == threading.main_thread().ident

    def held(self) -> AbstractContextManager[None]:
        """Return a context manager for the main thread, in whose block no signal handler runs.

        Keep the block short: the handlers of signals that come meanwhile run when it ends, and Ctrl-C is one of them.
        """
        return self._held

    def keep_in(self, kept: list[BaseException] | None) -> None:
        """Have `keep` add exceptions of the calling thread to a list. With None, it keeps none any more."""
        self._threads.kept = kept

    def keep(self, error: BaseException) -> bool:
        """Keep an exception that would interrupt the calling thread, to be raised later; return whether it is kept."""
        kept = getattr(self._threads, "kept", None)
        if kept is None:
            return False
        kept.append(error)
        return True


interrupts: Final = _Interrupts()
"""The one of this process."""
