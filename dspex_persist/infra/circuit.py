"""Circuit: stops calls to an address that does not answer, and tries now and then whether it does again.

Usable from several threads. It knows no calls: its user asks before each one, and tells how it ended.
"""

import threading
import time
from collections.abc import Callable
from math import inf


class OpenCircuitError(Exception):
    """A call was not admitted.

    Attributes:
        failures: How many failures in a row there were.
        open_s: How long ago the first of them was, in seconds.
        retry_in_s: When the address is tried again, in seconds; 0 if another call is trying it now.
        reason: The last failure.
    """

    def __init__(self, failures: int, open_s: float, retry_in_s: float, reason: str) -> None:
        again = f"it is tried again in {retry_in_s:.1f} s" if retry_in_s > 0 else "it is being tried again now"
        super().__init__(f"{failures} failures in a row; {again} (the last: {reason})")
        self.failures = failures
        self.open_s = open_s
        self.retry_in_s = retry_in_s
        self.reason = reason


class Circuit:
    """A circuit breaker for one address.

    After `failures` failures in a row it opens, and refuses calls for `pause_s` seconds. Then it admits one trial. Each
    failed trial doubles the pause, up to `longest_pause_s`; a success closes the circuit.

    Args:
        failures: After this many failures in a row it opens.
        pause_s: The length of the first pause.
        longest_pause_s: The longest pause.
        trial_s: How long a trial keeps others from being admitted; after that, the next call is a trial, too.
        clock: Returns a time in seconds that never goes back.
    """

    def __init__(
        self,
        failures: int,
        pause_s: float,
        longest_pause_s: float,
        *,
        trial_s: float = inf,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._limit = failures
        self._first_pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._trial_s = trial_s
        self._clock = clock or (lambda: time.monotonic())
        self._pause_s = pause_s
        self._failures = 0
        self._since = 0.0
        self._reason = ""
        self._retry_at: float | None = None
        # When the trial began that has not ended.
        self._trial_at: float | None = None
        self._lock = threading.Lock()

    @property
    def state(self) -> str:
        """The state: closed, open or half_open."""
        with self._lock:
            if self._retry_at is None:
                return "closed"
            return "half_open" if self._trial_at is not None or self._clock() >= self._retry_at else "open"

    def admit(self) -> bool:
        """Return whether the caller has to test the address first.

        Raises:
            OpenCircuitError: The circuit is open, or another caller is testing the address.
        """
        with self._lock:
            if self._retry_at is None:
                return False
            now = self._clock()
            trying = self._trial_at is not None and now - self._trial_at < self._trial_s
            if trying or now < self._retry_at:
                retry_in_s = 0.0 if trying else self._retry_at - now
                raise OpenCircuitError(self._failures, now - self._since, retry_in_s, self._reason)
            self._trial_at = now
            return True

    def give_up(self) -> None:
        """Note that the trial ended without a result; the next call is a trial again."""
        with self._lock:
            self._trial_at = None

    def succeeded(self) -> bool:
        """Note that the address answered; returns whether that closed the circuit."""
        if not self._failures:
            return False
        with self._lock:
            closed = self._retry_at is not None
            self._failures, self._retry_at, self._trial_at = 0, None, None
            self._pause_s = self._first_pause_s
            return closed

    def failed(self, reason: str) -> float | None:
        """Note that the address could not be reached; returns the pause in seconds if that opened the circuit."""
        with self._lock:
            if self._retry_at is not None and self._trial_at is None:
                return None  # a call from before the circuit opened: it adds nothing
            now = self._clock()
            if not self._failures:
                self._since = now
            self._failures += 1
            self._reason = reason
            if self._retry_at is None and self._failures < self._limit:
                return None
            pause_s = self._pause_s
            self._retry_at, self._trial_at = now + pause_s, None
            self._pause_s = min(2 * pause_s, self._longest_pause_s)
            return pause_s
