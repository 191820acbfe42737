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
from dspex_persist.state.errors import FileChangedError, OpenError, OutcomeUnknownError

EXIT_STORAGE_FAILED: Final = 70
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

    def in_words(self, text_of: Callable[[BaseException], str]) -> str:
        """Return the message; `text_of` returns that of the failure."""
        # The advice of OutcomeUnknownError is meant for clients.
        reason = self.failure.sentence if isinstance(self.failure, OutcomeUnknownError) else text_of(self.failure)
        # Errors about a changed file, or lost commits, have their own advice, and the disk is not to blame.
        has_advice = isinstance(self.failure, FileChangedError | OpenError)
        check = "database" if database_url(self.path) is not None else "disk"
        advice = "" if has_advice else f". Check the {check}, then start the server again; acknowledged writes are safe"
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
        deadline = threading.Timer(_ANSWER_FAILED_S, os._exit, (EXIT_STORAGE_FAILED,))
        deadline.daemon = True
        deadline.start()
        # The loop may have ended in the meantime.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.stop.set)
