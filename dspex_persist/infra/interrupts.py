"""Whether signal handlers can interrupt code. Python runs them on the main thread, between any two instructions, and
they may raise, as Ctrl-C does."""

import threading
from typing import Final


class _Interrupts:
    """The state of this process."""

    def __init__(self) -> None:
        self._taken_by_loop = False

    def give_to_loop(self) -> None:
        """Declare that an event loop handles the signals of this process, so that no handler raises."""
        self._taken_by_loop = True

    def can_come(self) -> bool:
        """Whether a signal handler may raise in the calling thread."""
        return not self._taken_by_loop and threading.get_ident() == threading.main_thread().ident


interrupts: Final = _Interrupts()
"""The one of this process."""
