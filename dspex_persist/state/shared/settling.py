"""What has become of a group whose answer was lost: the database is asked until it says so."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

from dspex_persist.state.errors import OutcomeUnknownError

T = TypeVar("T")

SETTLE_S: Final = 10.0
"""For how long to ask, in seconds."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


def settled(
    ask: Callable[[], T],
    lost: tuple[type[Exception], ...],
    reason_of: Callable[[Exception], str],
    *,
    settle_s: float = SETTLE_S,
    wait: Callable[[float], object] = time.sleep,
) -> T:
    """Return the answer of a database, which is asked once more while its answers are lost, too.

    Args:
        ask: Asks, on a new connection.
        lost: What it raises if the database does not answer.
        reason_of: Says what is unknown after such an error.
        settle_s: For how long to ask, in seconds; it is asked once in any case.
        wait: Waits for some seconds.

    Raises:
        OutcomeUnknownError: The database has not answered.
    """
    deadline, pause_s = time.monotonic() + settle_s, _FIRST_PAUSE_S
    while True:
        try:
            return ask()
        except lost as error:
            if time.monotonic() >= deadline:
                raise OutcomeUnknownError(reason_of(error)) from error
        wait(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
