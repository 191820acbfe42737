"""Retention: prune old history as the store's settings say, on a background thread."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final, TypeAlias

from dspex_persist import clock
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import EngineClosedError, StateError
from dspex_persist.state.model import PrunePolicy, PruneReport
from dspex_persist.state.provider import Progress
from dspex_persist.state.store.session_store import StoreOptions

_logger: Final = get_logger(__name__)
_PAUSE: Final = 20
"""The pause after a round, as a multiple of its duration: retention uses at most a twentieth of a core."""
_DAY_S: Final = 86_400.0
Prune: TypeAlias = Callable[[PrunePolicy, Progress], PruneReport]


class Retention:
    """Prunes repeatedly by the settings of a store, and warns about its size. The writer calls it when it is idle."""

    def __init__(self, options: StoreOptions, prune: Prune, size_bytes: Callable[[], int]) -> None:
        self._options = options
        self._prune = prune
        self._size_bytes = size_bytes
        self._thread: threading.Thread | None = None
        self._next_round = self._next_warning = time.monotonic()
        self._closed = False

    def on_idle(self) -> None:
        """Start a round if one is due."""
        now = time.monotonic()
        if now >= self._next_warning:
            self._compare_size(now)
        policy = policy_of(self._options)
        if policy is None or now < self._next_round or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._round, args=(policy,), name="dspex-persist-retention", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            # The system has no room for another thread, which must not end the writer. A later call tries again.
            self._thread = None
            _logger.warning("history not pruned", reason=str(error))

    def _compare_size(self, now: float) -> None:
        limit = self._options.warn_size_bytes
        try:
            if limit is None or (size := self._size_bytes()) <= limit:
                return
        except StateError as error:
            # A database that is away is no reason to end the writer. A later call asks again.
            _logger.debug("size not known", reason=str(error))
            return
        self._next_warning = now + _DAY_S
        _logger.warning("database is large", size_bytes=size, warn_size_bytes=limit, hint="db prune, retention_*")

    def close(self) -> None:
        """Stop the running round, and wait for it."""
        self._closed = True
        if self._thread is not None:
            self._thread.join()

    def _round(self, policy: PrunePolicy) -> None:
        begun = time.monotonic()
        try:
            report = self._prune(policy, self._go_on)
            if report.markers or report.denials:
                counts = {name: getattr(report, name) for name in ("versions", "events", "sessions", "denials")}
                _logger.info("history pruned", **counts)
        except StateError as error:
            if not self._closed:
                _logger.warning("history not pruned", reason=str(error))
        except Exception as error:  # noqa: BLE001 - a thread's boundary
            # Closing the store also closes the connections that a round reads from.
            if not self._closed:
                _logger.error("history not pruned", reason=repr(error))
        self._next_round = time.monotonic() + _PAUSE * (time.monotonic() - begun)

    def _go_on(self, _what: str, _done: int, _in_all: int) -> None:
        if self._closed:
            raise EngineClosedError


def policy_of(options: StoreOptions) -> PrunePolicy | None:
    """Return what the settings allow to be pruned now; None if they keep everything."""
    keep, age_s, ended_s = (
        options.retention_keep_versions,
        options.retention_age_s,
        options.retention_ended_sessions_s,
    )
    if keep is None and age_s is None and ended_s is None:
        return None
    before, ended_before = (
        None if seconds is None else clock.now() - timedelta(seconds=seconds) for seconds in (age_s, ended_s)
    )
    return PrunePolicy(keep, before, ended_before)
