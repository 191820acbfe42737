"""ServerLease: renews the lease of a server, on a thread of its own."""

import threading
import time
from collections.abc import Callable
from typing import Final

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import StateError
from dspex_persist.state.log_store import FencedError
from dspex_persist.state.shared.server_meter import ServerMeter
from dspex_persist.state.shared_log import SharedLog

_logger: Final = get_logger(__name__)
_RENEWALS: Final = 4
"""How often a lease is renewed within its time."""
_AGAIN_S: Final = 1.0
"""After how many seconds it is tried again, at most, when that failed."""


class ServerLease:
    """Renews a lease until it is closed. It goes on while the log cannot be reached.

    Args:
        log: The log of the server.
        on_fenced: Called on this object's thread when other servers have taken this one for dead.
        meter: Counts renewals; None not to count.
    """

    def __init__(self, log: SharedLog, on_fenced: Callable[[], object], meter: ServerMeter | None = None) -> None:
        self._log = log
        self._on_fenced = on_fenced
        self._meter = meter
        # Why renewals fail, as the log has said; "" while they do not.
        self._reason = ""
        self._renewed_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dspex-persist-lease", daemon=True)
        self._thread.start()

    def trouble(self) -> str:
        """Return why the lease is about to end, or has ended; "" if all is well. From any thread."""
        silent_s = time.monotonic() - self._renewed_at
        # One renewal that fails, as while the log restarts, is no trouble yet.
        if silent_s <= self._log.lease_s * (_RENEWALS - 1) / _RENEWALS:
            return ""
        reason = self._reason or "it does not answer"
        return f"the database could not be used for {silent_s:.0f} s: {reason}"

    def close(self) -> None:
        """Renew it no more."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        each_s = self._log.lease_s / _RENEWALS
        succeeded = True
        while not self._ended.wait(each_s if succeeded else min(each_s, _AGAIN_S)):
            succeeded = self._renew()
            if succeeded:
                if self._reason:
                    _logger.warning("the lease can be renewed again")
                self._renewed_at, self._reason = time.monotonic(), ""
            if self._meter is not None:
                self._meter.renewed(succeeded=succeeded)

    def _renew(self) -> bool:
        try:
            self._log.renew()
        except FencedError:
            self._on_fenced()
        except StateError as error:
            # Said once: while the log is away, it fails again and again. A log that can be reached otherwise may refuse
            # the connection for this alone, and nothing else would say why others take this server for dead.
            if not self._reason:
                _logger.warning("the lease cannot be renewed", reason=str(error))
            self._reason = str(error)
        except Exception as error:  # noqa: BLE001 - a thread's boundary
            if not self._ended.is_set():
                _logger.error("the lease was not renewed", traceback=trace_of(error))
        else:
            return True
        return False
