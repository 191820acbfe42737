"""The exit of a process whose work is done, whatever its threads still do."""

import gc
import os
import threading
from typing import Final

_PATIENCE_S: Final = 2.0


def end_in_time(code: int) -> None:
    """Have the process end soon when it is over, with this exit code, whatever threads of pools still do."""
    # At the exit of the interpreter, because a program that calls this may continue. Thread pools register there, too,
    # and the callback registered last is called first.
    threading._register_atexit(_end_in_time, code)  # type: ignore[attr-defined]


def _end_in_time(code: int) -> None:
    """End the process after a while. The interpreter would wait for thread pools that tools used, without limit."""
    # The interpreter would look for cycles several times among all modules: a quarter of the time of a short command.
    gc.freeze()
    deadline = threading.Timer(_PATIENCE_S, os._exit, (code,))
    deadline.daemon = True
    deadline.start()
