"""The size of a pool of workers, and its limits."""

from dataclasses import dataclass
from typing import Literal

Affinity = Literal["hint", "strict_queue", "strict_fail_fast"]


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """The size of a pool, and its limits. Times are in seconds.

    Attributes:
        size: How many workers the pool keeps.
        batch: How many are started at the same time.
        queue_size: How many calls may wait for a worker, and as many nested ones.
        queue_timeout_s: How long each of them may wait. A nested one may also wait until a worker has started.
        call_timeout_s: How long a call may keep a worker, unless it has a limit of its own; None: without a limit.
        affinity: What happens when a call's key was last with a worker that is busy. hint: another one takes the call;
            strict_queue: the call waits for that one; strict_fail_fast: it is refused.
        nesting: How deep calls may be nested, and how many spare workers there may be for them.
        spare_keep_s: How long a spare worker is kept that nobody needs.
        health_interval_s: How often idle workers are pinged.
        health_timeout_s: How long the answer to a ping may take.
        health_failures: After this many pings without an answer, a worker is replaced.
        max_requests: A worker is replaced after this many calls.
        max_rss_bytes: A worker is replaced when it has more memory than this in use after a call, or while it is idle.
        kill_rss_bytes: A worker that gets more than this in use during a call is killed; looked at every second.
        max_age_s: An idle worker is replaced when it is older; never two at the same time.
        backoff_s: The pause after a worker that failed at once; it doubles with each further one.
        longest_backoff_s: The longest such pause.
        crash_limit: After this many such failures in a row no worker is started for a while, and then one as a trial.
        crash_pause_s: How long that is.
        stable_s: A worker that has lived this long, or has done a call, has not failed at once.
    """

    size: int = 2
    batch: int = 4
    queue_size: int = 1000
    queue_timeout_s: float = 5.0
    call_timeout_s: float | None = None
    affinity: Affinity = "hint"
    nesting: int = 8
    spare_keep_s: float = 60.0
    health_interval_s: float = 30.0
    health_timeout_s: float = 5.0
    health_failures: int = 2
    max_requests: int | None = None
    max_rss_bytes: int | None = None
    kill_rss_bytes: int | None = None
    max_age_s: float | None = None
    backoff_s: float = 0.2
    longest_backoff_s: float = 30.0
    crash_limit: int = 5
    crash_pause_s: float = 60.0
    stable_s: float = 10.0
