"""What ends a server: a signal, or a failure of its storage."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dspex_persist.addresses import database_url
from dspex_persist.errors import DspexError
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.stopping import End
from dspex_persist.state.errors import FileChangedError, LostCommitsError, OpenError, OutcomeUnknownError

EXIT_STORAGE_FAILED: Final = 70
EXIT_REFUSED: Final = 5
"""The exit code for what is refused at a start, too: supervisors do not start the server again."""
# How long the server keeps running after its storage failed, so that waiting calls get their answers.
_ANSWER_FAILED_S: Final = 1.0

_log: Final = get_logger(__name__)


@dataclass(eq=False)
class StorageFailedError(DspexError):
    """The storage failed while the server was running; writes in progress may or may not have been committed."""

    path: str
    failure: BaseException

    def __str__(self) -> str:
        return self.in_words(str)

    @property
    def exit_code(self) -> int:
        """The exit code of the server. One that was started again after a loss might go on with what is left."""
        return EXIT_REFUSED if isinstance(self.failure, LostCommitsError) else EXIT_STORAGE_FAILED

    def in_words(self, text_of: Callable[[BaseException], str]) -> str:
        """Return the message; `text_of` returns that of the failure."""
        # The advice of OutcomeUnknownError is meant for clients.
        reason = self.failure.sentence if isinstance(self.failure, OutcomeUnknownError) else text_of(self.failure)
        # Errors about a changed file, or lost commits, have their own advice, and the disk is not to blame.
        has_advice = isinstance(self.failure, FileChangedError | OpenError)
        advice = "Check the disk, then start the server again; acknowledged writes are safe"
        if database_url(self.path) is not None:
            # Who knows what has become of it.
            advice = "Check the database, then start the server again"
        advice = "" if has_advice else f". {advice}"
        return f"the storage of {self.path} failed, so the server ended: {reason}{advice}"


class ServerEnd(End):
    """Stops the server: on a signal, or when its storage fails."""

    def __init__(self, loop: asyncio.AbstractEventLoop, path: str) -> None:
        super().__init__(loop)
        self.failure: StorageFailedError | None = None
        self._path = path

    def on_storage_failed(self, error: BaseException) -> None:
        """Stop the server, and end the process if that takes too long.

        Called on the thread whose group failed, once all callers have the error, so that there is time to send their
        answers.
        """
        self.failure = StorageFailedError(self._path, error)
        _log.critical("storage failed", db=self._path, reason=str(error))
        deadline = threading.Timer(_ANSWER_FAILED_S, os._exit, (self.failure.exit_code,))
        deadline.daemon = True
        deadline.start()
        # The loop may have ended in the meantime.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.stop.set)
