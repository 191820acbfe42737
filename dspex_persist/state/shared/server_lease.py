"""ServerLease: renews the lease of a server, on a thread of its own."""

import threading
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
        self._is_failing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dspex-persist-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Renew it no more."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._log.lease_s / _RENEWALS):
            succeeded = self._renew()
            if succeeded and self._is_failing:
                self._is_failing = False
                _logger.warning("the lease can be renewed again")
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
            if not self._is_failing:
                self._is_failing = True
                _logger.warning("the lease cannot be renewed", reason=str(error))
        except Exception as error:  # noqa: BLE001 - a thread's boundary
            if not self._ended.is_set():
                _logger.error("the lease was not renewed", traceback=trace_of(error))
        else:
            return True
        return False
