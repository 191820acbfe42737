"""ServedEngine: what an engine has that serves others: the calls that it refuses, and how much others may store."""

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from dspex_persist.infra.access.tokens import Allowance
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.metrics import Family
from dspex_persist.state.denials import DenialLog
from dspex_persist.state.errors import (
    FileChangedError,
    LostCommitsError,
    OutcomeUnknownError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.groups import Groups
from dspex_persist.state.log_state import LogEngine
from dspex_persist.state.log_store import LogStore
from dspex_persist.state.meter import FileFigures
from dspex_persist.state.quotas import Quotas

DENIALS_KEPT: Final = 10_000
_DENIALS_EVERY_S: Final = 5.0
"""How often refused calls are written at most, in seconds, so that they take no time from commits."""
_BESIDE_S: Final = 5.0
_log: Final = get_logger(__name__)


class ServedEngine(LogEngine):
    """An engine whose log also counts refused calls.

    Args:
        groups: See `LogEngine`.
        denials_kept: How many entries about refused calls to keep, the newest.
        **others: See `LogEngine`.
    """

    def __init__(self, groups: Groups[LogStore], *, denials_kept: int = DENIALS_KEPT, **others: Any) -> None:
        self.denials = DenialLog()
        """Counts the calls that whoever serves this state refuses. They are in the log some seconds later."""
        self._denials_kept = denials_kept
        self._denials_at = 0.0
        self._denials_fail = False
        # What the writer is to do between two groups, and whom it tells.
        self._beside: deque[tuple[Callable[[], None], threading.Event]] = deque()
        super().__init__(groups, **others)

    def announce(self, address: str) -> None:
        """Tell other processes at which address this one serves the log."""

    def trouble(self) -> str:
        """Return why this engine can carry out nothing for the moment, or ""; from any thread."""
        return ""

    def file_figures(self) -> FileFigures | None:
        """Return the size of the database, and how many live sessions it has; from any thread. None: unknown."""
        return None

    def count_with_access(self) -> int:
        """Return how many live sessions have rules of access; from any thread. It looks at each live session."""
        return 0

    def families(self) -> list[Family]:
        """Return what this engine has counted beyond its meter; from any thread."""
        return []

    def limit_storage(self, allowance_of: Callable[[str], Allowance]) -> None:
        """Limit how many live sessions, and stored bytes in them, identities may have; see `quotas`.

        Args:
            allowance_of: Returns how much an identity may have. Called on the thread that writes.
        """
        log = self._groups.log
        self._groups.quotas = Quotas(allowance_of, log.actor_of, log.stored_by)

    def _count_denials(self) -> None:
        if self.denials.has_news:
            self._on_writer(self._keep_denials)

    def _on_writer(self, action: Callable[[], None]) -> None:
        """Have the writer do something between two groups, and wait for that."""
        # It may have ended.
        self._do_beside(action).wait(_BESIDE_S)

    def _do_beside(self, action: Callable[[], None]) -> threading.Event:
        """Have the writer do something between two groups; returns what says when it is done."""
        done = threading.Event()
        self._beside.append((action, done))
        self._writer.check_soon()
        return done

    def _check(self) -> None:
        super()._check()
        while self._beside:
            action, done = self._beside.popleft()
            action()
            done.set()
        if self.denials.has_news and time.monotonic() >= self._denials_at:
            self._keep_denials()

    def _on_close(self) -> None:
        super()._on_close()
        if self._failed is not None:
            return
        try:
            self._keep_denials()
        except (FileChangedError, LostCommitsError, OutcomeUnknownError) as error:
            # All that callers wait for is written: no reason to leave the log, and its lock, open.
            _log.warning("the last refused calls are not stored", reason=str(error))

    def _keep_denials(self) -> None:
        """Count the refused calls in the log. While that cannot be written, memory keeps them."""
        self._denials_at = time.monotonic() + _DENIALS_EVERY_S
        denials = self.denials.take()
        if not denials:
            return
        try:
            self._groups.log.keep_denials(denials, self._denials_kept)
            self._denials_fail = False
        except (StorageError, UnavailableError) as error:
            self.denials.give_back(denials)
            if not self._denials_fail:
                _log.warning("refused calls are not stored yet", reason=str(error))
            self._denials_fail = True

    def _forget_denials(self, before: datetime, forgotten: list[int]) -> None:
        try:
            forgotten.append(self._groups.log.forget_denials(before))
        except (StorageError, UnavailableError) as error:
            _log.warning("old refused calls were not deleted", reason=str(error))
