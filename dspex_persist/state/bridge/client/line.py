"""Line: a client's connection to its server. It says whether a call may be sent, and when a lost one is repeated.

gRPC reconnects the channel by itself. Its own retries (a service config) are not used: they are chosen for each rpc,
while here it depends on the call whether repeating it is safe, and they are limited to five attempts.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from typing import Any, Final, TypeAlias

import grpc

from dspex_persist import clock
from dspex_persist.infra.circuit import Circuit, OpenCircuitError
from dspex_persist.infra.logs import get_logger
from dspex_persist.state import arguments
from dspex_persist.state.bridge.status import is_lost, lost_reason
from dspex_persist.state.errors import CircuitOpenError
from dspex_persist.state.options import check_count

Later: TypeAlias = Callable[[float, Callable[[], None]], None]
"""Calls a function after some seconds, on any thread."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
"""The pauses between repetitions: the first, which each further one doubles, and the longest."""
LEAST_S: Final = 0.001
"""The least time that a call gets."""
_BEING_TRIED_S: Final = 0.1
_logger: Final = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a client fails calls at once because its server does not answer.

    Attributes:
        failures: After this many failures in a row to reach the server, calls fail at once, for `pause_s`.
        pause_s: The length of the first pause, in seconds. After it, one call tries whether the server answers again.
            Each further pause is twice as long.
        longest_pause_s: The longest pause.

    Raises:
        InvalidArgumentError: One of them is not a positive number.
    """

    failures: int = 5
    pause_s: float = 0.5
    longest_pause_s: float = 5.0

    def __post_init__(self) -> None:
        check_count("failures", self.failures)
        arguments.timeout("pause_s", self.pause_s)
        arguments.timeout("longest_pause_s", self.longest_pause_s)


def after(delay_s: float, call: Callable[[], None]) -> None:
    """Call a function after `delay_s` seconds, on a separate thread."""
    timer = threading.Timer(delay_s, call)
    timer.daemon = True
    timer.start()


class Line:
    """A client's connection to its server. Usable from any thread.

    Args:
        target: The server, for errors.
        breaker: When calls fail at once; None for never.
        now: Returns a time in seconds that never goes back.
        later: Calls a function after some seconds.
        rest: Lets some seconds pass on the calling thread.
        jitter: Returns the factor, from 0.5 to 1, by which a pause is shortened: clients that lost their server at the
            same time should not all come back at the same time.
    """

    def __init__(
        self,
        target: str,
        breaker: Breaker | None,
        *,
        now: Callable[[], float] = time.monotonic,
        later: Later = after,
        rest: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1),
    ) -> None:
        self.target = target
        self.now = now
        self.later = later
        self.rest = rest
        self.jitter = jitter
        self.has_answered = False
        """Whether the server has ever answered."""
        self._failed_at = -inf
        self._circuit = None
        if breaker is not None:
            pauses_s = (breaker.pause_s, max(breaker.pause_s, breaker.longest_pause_s))
            self._circuit = Circuit(breaker.failures, *pauses_s, trial_s=pauses_s[1], clock=now)

    @property
    def state(self) -> str:
        """Whether calls are sent: closed (they are), open (they fail at once), half_open (the next one decides)."""
        return "closed" if self._circuit is None else self._circuit.state

    def admit(self) -> None:
        """Admit a call that is about to be sent, or raise `CircuitOpenError`."""
        if self._circuit is None:
            return
        try:
            self._circuit.admit()
        except OpenCircuitError as error:
            since = (clock.now() - timedelta(seconds=error.open_s)).isoformat(timespec="seconds")
            raise CircuitOpenError(error.reason, self.target, since, error.retry_in_s) from None

    def wait_s(self) -> float:
        """Admit a call that is repeated, or return for how many seconds it has to wait."""
        try:
            self.admit()
        except CircuitOpenError as error:
            return error.retry_in_s or _BEING_TRIED_S
        return 0.0

    def answered(self) -> None:
        """Note that the server answered, whatever it said."""
        self.has_answered = True
        if self._circuit is not None and self._circuit.succeeded():
            _logger.info("the server answers again", address=self.target)

    def ended(self, call: Any, sent_at: float, *, told: bool = True) -> None:
        """Note that a call ended with an error.

        Args:
            call: The call.
            sent_at: When it was sent, in the time of `now`.
            told: Whether a call that got no answer in time tells something about the server. It does not if what it
                asked for may take as long as it likes.
        """
        code = call.code()
        if not is_lost(call):
            self.answered()
        elif code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.DEADLINE_EXCEEDED and told):
            self._lost(lost_reason(call), sent_at)

    def _lost(self, reason: str, sent_at: float) -> None:
        # All calls that a broken connection carried are one failure.
        if self._circuit is None or sent_at < self._failed_at:
            return
        self._failed_at = self.now()
        pause_s = self._circuit.failed(reason)
        if pause_s is not None:
            _logger.warning("the server does not answer", address=self.target, reason=reason, retry_in_s=pause_s)
