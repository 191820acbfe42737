"""Writes from threads that lead their own groups, and dies in the middle of one.

    python -m tests.faults.leading_child DATABASE PHASE NUMBER THREADS

Each thread sets its pair of variables to the same number, counting up, and prints a line once the call returns. The
process kills itself when a group gets to PHASE: the first one that a caller leads, from group number NUMBER on. Of
several threads, a caller leads one in hundreds.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import dspex_persist
from dspex_persist.state.anchor import Anchor
from dspex_persist.state.groups import Groups
from dspex_persist.state.store.guard import FileGuard
from dspex_persist.state.store.session_store import SessionStore

SESSION: Final = "s"
PHASES: Final[dict[str, tuple[type, str, bool]]] = {
    "before anything is written": (SessionStore, "append", False),
    "written, not committed": (SessionStore, "append", True),
    "committed": (FileGuard, "note_written", False),
    "before the anchor": (Anchor, "write", False),
    "after the anchor": (Anchor, "write", True),
    "published, not answered": (Groups, "_publish", True),
}
"""The method in which the process dies, and whether at its end."""
_CALLER: Final = "caller"


def pair(thread: int) -> tuple[str, str]:
    """The names of a thread's two variables."""
    return f"left{thread}", f"right{thread}"


def main(database: Path, phase: str, number: int, threads: int) -> None:
    """Write until the process dies."""
    with dspex_persist.connect(database) as state:
        state.initialize_session(SESSION)
        for thread in range(threads):
            for name in pair(thread):
                state.register_variable(SESSION, name, "integer", 0)
        _die_in(phase, number)
        callers = [
            threading.Thread(target=_write, args=(state, thread), name=f"{_CALLER}-{thread}")
            for thread in range(threads)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()


def _write(state: Any, thread: int) -> None:
    for count in range(1, 1_000_000):
        state.set_variables(SESSION, dict.fromkeys(pair(thread), count), atomic=True)
        os.write(sys.stdout.fileno(), f"{thread} {count}\n".encode())


def _die_in(phase: str, number: int) -> None:
    owner, name, at_end = PHASES[phase]
    original: Callable[..., Any] = getattr(owner, name)
    groups = 0

    def patched(*arguments: Any, **options: Any) -> Any:
        nonlocal groups
        # Only one thread leads at a time.
        groups += 1
        dies = groups >= number and threading.current_thread().name.startswith(_CALLER)
        if dies and not at_end:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, patched)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
