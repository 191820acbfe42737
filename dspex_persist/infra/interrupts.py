"""Exceptions that come between any two instructions.

Python runs signal handlers on the main thread, and they may raise, as Ctrl-C does. In other threads, programs that
limit how long a job takes raise exceptions with `PyThreadState_SetAsyncExc`.
"""

import threading
from typing import Final


class _Interrupts:
    """The state of this process."""

    def __init__(self) -> None:
        self._taken_by_loop = False
        self._threads = threading.local()

    def give_to_loop(self) -> None:
        """Declare that an event loop handles the signals of this process, so that no handler raises."""
        self._taken_by_loop = True

    def take_from_loop(self) -> None:
        """Undo `give_to_loop`."""
        self._taken_by_loop = False

    def can_come(self) -> bool:
        """Whether a signal handler may raise in the calling thread."""
        return not self._taken_by_loop and threading.get_ident() == threading.main_thread().ident

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
