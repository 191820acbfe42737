"""The locks of a study on its variables."""

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Final

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.steps import Terms, ask, run
from dspex_persist.errors import DspexError
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.threads import on_new_thread
from dspex_persist.state import commands
from dspex_persist.state.errors import (
    NotOptimizingError,
    OutcomeUnknownError,
    SessionNotFoundError,
    VariableLockedError,
    VariableNotFoundError,
)

_RENEWED: Final = 3
"""How often a lock is renewed in the time of its lease."""
_logger: Final = get_logger(__name__)


class Locks:
    """Optimization locks on several variables, which are renewed until they are released or the object is forgotten.

    All processes that run the same study share them.

    Args:
        ctx: A context of the session.
        names: The names of the variables.
        terms: Who takes them; with the id of the optimizer.
        config: What the history says about them.
    """

    def __init__(self, ctx: Context, names: Sequence[str], terms: Terms, config: Mapping[str, str]) -> None:
        self._ctx = ctx
        self._names = tuple(names)
        self._terms = terms
        self._config = dict(config)
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None
        self._every_s = 0.0
        self._renewed_at = 0.0
        self._lost: VariableLockedError | None = None

    @property
    def are_held(self) -> bool:
        """Whether they were taken, and not released."""
        return self._stop is not None

    def hold(self) -> None:
        """Take them, unless they are held.

        Raises:
            VariableLockedError: Another optimizer has locked a variable; then none is locked.
            VariableNotFoundError: There is no such variable any more.
        """
        with self._lock:
            if self._lost is not None:
                lost, self._lost = self._lost, None
                self._end()
                raise lost
            if self._stop is None or time.monotonic() > self._renewed_at + self._every_s:
                self._take()
            if self._stop is None:
                self._stop = threading.Event()
                stop, every_s, locks = self._stop, self._every_s, weakref.ref(self)
                on_new_thread(lambda: _renew(locks, stop, every_s), "dspex-persist-study")

    def release(self) -> None:
        """Release them."""
        with self._lock:
            if self._stop is not None:
                self._end()
                self._give_back(self._names)

    def forget(self) -> None:
        """Stop renewing them, because others still need them."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _take(self) -> None:
        taken: list[str] = []
        lease_s = 300.0
        for name in self._names:
            optimizer_id = self._terms.optimizer_id or ""
            command = commands.StartOptimization(self._ctx.session_id, name, optimizer_id, self._config)
            try:
                run(self._ctx, ask(command, self._terms))
            except (VariableLockedError, VariableNotFoundError):
                if self._stop is None:
                    self._give_back(taken)
                raise
            taken.append(name)
        lock = self._ctx.info(self._names[0]).lock
        self._every_s = (lease_s if lock is None else lock.lease_s) / _RENEWED
        self._renewed_at = time.monotonic()

    def _give_back(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                run(self._ctx, ask(commands.StopOptimization(self._ctx.session_id, name), self._terms))
            except (NotOptimizingError, VariableLockedError, VariableNotFoundError, SessionNotFoundError):
                # Its lease is over, others have broken the lock, or there is nothing to lock any more.
                continue

    def _renew_all(self, stop: threading.Event) -> bool:
        """Renew them; returns whether to go on."""
        with self._lock:
            if stop.is_set():
                return False
            try:
                self._take()
            except VariableLockedError as error:
                # The next trial says so.
                self._lost = error
                return False
            except DspexError as error:
                if error.retryable or isinstance(error, OutcomeUnknownError):
                    # It may succeed the next time, before the leases are over.
                    return True
                # The context, the engine or the session has ended.
                _logger.info("locks of a study not renewed", session_id=self._ctx.session_id, reason=str(error))
                return False
            return True


def _renew(locks: "weakref.ref[Locks]", stop: threading.Event, every_s: float) -> None:
    while not stop.wait(every_s):
        found = locks()
        if found is None or not found._renew_all(stop):
            return
        del found
