"""Listener: hears that others may have written. Notices are hints, any of which may be lost: servers also poll."""

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Final

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import StateError

POLL_S: Final = 1.0
"""How long to wait for a notice, and between two attempts to connect, in seconds."""
_logger: Final = get_logger(__name__)


class Listener:
    """Listens on a thread of its own, until it is closed. After an error it connects again.

    Args:
        hear: Connects, and yields at once, as notices may have been missed before; then after each notice, and at least
            every `POLL_S`. It yields whether others may have written.
        on_news: Called on the thread of this object when they may have.
        driver_errors: What `hear` raises if the database cannot be reached, beside `StateError`.
        reason_of: Says what such an error means.
    """

    def __init__(
        self,
        hear: Callable[[], Generator[bool]],
        on_news: Callable[[], None],
        driver_errors: tuple[type[Exception], ...],
        reason_of: Callable[[Exception], str],
    ) -> None:
        self._hear, self._on_news, self._reason_of = hear, on_news, reason_of
        self._errors: tuple[type[Exception], ...] = (*driver_errors, StateError)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="dspex-persist-listen")
        self._thread.start()

    def end(self) -> None:
        """Have the thread end with the next notice, whoever sends it."""
        self._closed.set()

    def close(self) -> None:
        """End the thread, and wait for it, unless this is it."""
        self.end()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * POLL_S)

    def _run(self) -> None:
        is_away = False
        while not self._closed.is_set():
            try:
                with contextlib.closing(self._hear()) as heard:
                    for is_news in heard:
                        is_away = False
                        if self._closed.is_set():
                            return
                        if is_news:
                            self._on_news()
            except self._errors as error:
                # A connection may be closed under this thread at the end.
                if not is_away and not self._closed.is_set():
                    _logger.warning("not listening to other servers", reason=self._reason_of(error))
                is_away = True
                self._closed.wait(POLL_S)
