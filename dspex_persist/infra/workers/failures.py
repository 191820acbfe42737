"""Workers of a pool that fail at once: when another one may be started."""

import asyncio
import contextlib
from typing import Final

from dspex_persist.infra.circuit import Circuit, OpenCircuitError
from dspex_persist.infra.logs import EventLogger
from dspex_persist.infra.workers.options import PoolOptions

_TRIAL_POLL_S: Final = 0.2


class FailuresInARow:
    """Counts workers that failed at once, and has the pool pause after them. Used on one event loop.

    Each pause is twice as long as the one before. After `crash_limit` failures no worker is started for
    `crash_pause_s`, and then one as a trial.

    Args:
        options: The limits of the pool.
        trial_s: How long a trial keeps others from being started, in seconds.
        logger: Where it is logged that there is a pause, and that it is over.
    """

    def __init__(self, options: PoolOptions, trial_s: float, logger: EventLogger) -> None:
        self._options = options
        self._logger = logger
        self._circuit = Circuit(options.crash_limit, options.crash_pause_s, options.crash_pause_s, trial_s=trial_s)
        self._count = 0
        self._failed_at = float("-inf")
        self._recovery = asyncio.Event()

    def __str__(self) -> str:
        return f"{self._count} workers in a row failed at once; no other is started for a while"

    @property
    def is_pausing(self) -> bool:
        """Whether no worker is started for a while; from any thread."""
        return self._circuit.state == "open"

    def add(self, reason: str, began: float) -> None:
        """Note that a worker failed at once.

        Those that were started together with one that has failed are no more failures in a row: what made them fail may
        have been a moment without memory, processes or descriptors.

        Args:
            reason: How it failed.
            began: The event loop's time at which its start began.
        """
        if began < self._failed_at:
            return
        self._count += 1
        self._failed_at = asyncio.get_running_loop().time()
        pause_s = self._circuit.failed(reason)
        if pause_s is not None:
            self._logger.error(
                "workers fail at once; no other is started for a while",
                failures=self._count,
                pause_s=pause_s,
                reason=reason,
            )

    def end(self) -> None:
        """Note that a worker has not failed at once."""
        if self._count:
            self._count = 0
            self._recovery.set()
            self._recovery = asyncio.Event()
        if self._circuit.succeeded():
            self._logger.info("workers start again")

    async def pause(self) -> None:
        """Wait until another worker may be started."""
        if self._count:
            pause_s = self._options.backoff_s * 2 ** min(self._count - 1, 20)
            await self._sleep(min(pause_s, self._options.longest_backoff_s))
        while True:
            try:
                self._circuit.admit()
                return
            except OpenCircuitError as error:
                await self._sleep(max(error.retry_in_s, _TRIAL_POLL_S))

    async def _sleep(self, most_s: float) -> None:
        """Sleep, at most until workers start again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._recovery.wait()
