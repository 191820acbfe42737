"""The garbage collector, which stops all threads while it looks at all objects: a tenth of a second for a million."""

import gc
import threading
from typing import Final

from dspex_persist.infra import forks


class _Spared:
    """Blocks in which the collector does not run. There is one object for all of them, on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._was_enabled = False
        forks.register(self)

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count and self._was_enabled:
                gc.enable()

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`: the threads of the blocks are not in the child."""
        self._lock = threading.Lock()
        if self._count and self._was_enabled:
            gc.enable()
        self._count = 0


uncollected: Final = _Spared()
"""`with uncollected:` keeps the collector from running for a short block for which others wait."""
