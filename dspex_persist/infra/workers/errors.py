"""The errors of a pool of workers: which pool, what happened, and the setting to change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dspex_persist.errors import DspexError

_OUTPUT: Final = "; its output ends with:\n"


@dataclass(eq=False)
class PoolError(DspexError):
    """A call got no worker of the pool `pool`, or lost it.

    Attributes:
        pool: The name of the pool.
        settings: What its settings are called that are not called `pools.NAME.SETTING`.
    """

    pool: str
    settings: Mapping[str, str] = field(default_factory=dict, kw_only=True, repr=False)

    def _setting(self, name: str) -> str:
        return setting_of(self.pool, name, self.settings)


@dataclass(eq=False)
class PoolSaturatedError(PoolError):
    """All workers are busy, and as many calls wait as may."""

    retryable = True

    size: int
    queued: int

    def __str__(self) -> str:
        return (
            f"pool {self.pool} is saturated: its {_count(self.size, 'worker')} are busy, and {self.queued} calls wait, "
            f"which is the most; call less at a time, or raise {self._setting('size')} or "
            f"{self._setting('queue_size')}"
        )


@dataclass(eq=False)
class QueueTimeoutError(PoolError):
    """No worker became free in time. `state` says what the workers did."""

    retryable = True

    waited_s: float
    state: str

    def __str__(self) -> str:
        return (
            f"no worker of pool {self.pool} became free within {self.waited_s:g} s ({self.state}); call less at a "
            f"time, or raise {self._setting('size')} or {self._setting('queue_timeout_s')}"
        )


@dataclass(eq=False)
class WorkerBusyError(PoolError):
    """The worker that has the affinity key of the call is busy, and the call may neither wait nor take another."""

    retryable = True

    worker: str

    def __str__(self) -> str:
        return (
            f"worker {self.worker} of pool {self.pool}, which had the last call of this session, is busy; repeat the "
            f"call later, or set {self._setting('affinity')} to strict_queue (calls wait) or hint (another takes them)"
        )


@dataclass(eq=False)
class PoolUnavailableError(PoolError):
    """The pool has no workers, for the given `reason`."""

    retryable = True

    reason: str

    def __str__(self) -> str:
        return f"pool {self.pool} takes no calls: {self.reason}"


@dataclass(eq=False)
class NestedTooDeepError(PoolError):
    """Calls that wait for each other, each in a worker, are nested too deep."""

    most: int

    def __str__(self) -> str:
        return (
            f"calls in pool {self.pool} are nested more than {self.most} deep; look for calls that go round in "
            f"circles, or raise {self._setting('nesting')}"
        )


@dataclass(eq=False)
class WorkerTimeoutError(PoolError):
    """A worker did not finish a call in time; it is replaced. `state` says what it did, if that is known."""

    worker: str
    timeout_s: float
    state: str

    def __str__(self) -> str:
        return (
            f"worker {self.worker} of pool {self.pool} did not finish within {self.timeout_s:g} s (it {self.state}) "
            f"and is replaced; give the call more time, or raise {self._setting('call_timeout_s')} if that is the limit"
        )


@dataclass(eq=False)
class WorkerExitedError(PoolError):
    """A worker's process ended during a call; `ending` says how, and `output` is the end of what it wrote."""

    worker: str
    ending: str
    output: str = ""

    def __str__(self) -> str:
        wrote = output_or_nothing(self.output)
        return f"worker {self.worker} of pool {self.pool} {self.ending} during the call{wrote}"


@dataclass(eq=False)
class WorkerLostError(PoolError):
    """A worker could not be talked to during a call, although its process runs; it is replaced."""

    worker: str
    reason: str

    def __str__(self) -> str:
        return f"worker {self.worker} of pool {self.pool} was lost during the call and is replaced: {self.reason}"


@dataclass(eq=False)
class PoolStartError(PoolError):
    """No worker of the pool started, for the given `reason`."""

    reason: str

    def __str__(self) -> str:
        return f"pool {self.pool} has no workers: {self.reason}; correct {self._setting('command')}"


def with_output(output: str) -> str:
    """Return what follows in the text of a worker's failure if it wrote something; "" if it did not."""
    return f"{_OUTPUT}{output}" if output else ""


def output_or_nothing(output: str) -> str:
    """Return the same, and that it wrote nothing if it did not."""
    return with_output(output) or "; it wrote nothing"


def without_output(failure: str) -> str:
    """Return the text of a worker's failure without what the worker wrote."""
    return failure.partition(_OUTPUT)[0]


def setting_of(pool: str, name: str, settings: Mapping[str, str]) -> str:
    """Return what a setting of a pool is called."""
    return settings.get(name) or f"pools.{pool}.{name}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
