"""How a server that is a process of its own ends: a signal lets it finish what it does, and a second one ends it."""

import asyncio
import gc
import signal
from collections.abc import Callable
from typing import Final

from dspex_persist.infra import forks
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.logs import get_logger

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# After how many new objects the garbage collector looks for cycles.
_COLLECT_AFTER: Final = 20_000

_logger: Final = get_logger(__name__)


class End:
    """Notes that a server is to stop, on a signal. Made on the main thread, for its event loop.

    Attributes:
        stop: Set when the server is to stop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stop = asyncio.Event()
        self._loop = loop
        forks.register(self)
        forks.guard_signals(*SIGNALS)

    def on_signals(self) -> None:
        """Handle SIGTERM and SIGINT from now on."""
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)
        interrupts.give_to_loop()

    def _on_signal(self, number: signal.Signals) -> None:
        for each in SIGNALS:
            self._loop.remove_signal_handler(each)
            # The next signal ends the process at once, which loses no acknowledged write.
            signal.signal(each, signal.SIG_DFL)
        # Logged only now, because a reader of the log may send the second signal as soon as the line appears.
        _logger.info("draining", signal=number.name)
        self.stop.set()

    def forked(self, *, quiet: bool) -> None:
        """Keep a process that a tool forks from running on as a second server."""
        forks.end_on(self._loop)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return uvloop, which handles some 15 % more calls per second, if it is installed."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return new_event_loop


def spare_the_collector(*, had_tools: bool) -> None:
    """Have the garbage collector examine only new objects, and less often.

    The existing objects, mostly modules, live until the end of the process. A group of writes allocates thousands of
    objects that reference counting frees right afterwards; with the default threshold of 700, the collector would
    examine them several times before that.

    Importing this package leaves about a thousand garbage objects, which take less memory than finding them takes time.
    Importing the tools may have left any number of them.
    """
    if had_tools:
        gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)
    # The command line disables it during the start.
    gc.enable()
