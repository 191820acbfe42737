"""What a pool of workers does now, and what it has counted."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """One worker, as it is now.

    Attributes:
        id: Its id.
        pid: Its process.
        address: Where it serves.
        state: idle, busy, or settling: its call was given up, but has not ended.
        spare: Whether it is beyond the size of the pool.
        requests: The calls that it has done.
        age_s: How long it has been ready, in seconds.
        rss_bytes: The memory that it has in use; 0 if the system does not say.
        busy_s: How long it has had its call, in seconds; 0 if it has none.
        key: The affinity key of that call; "" without one.
    """

    id: str
    pid: int
    address: str
    state: str
    spare: bool
    requests: int
    age_s: float
    rss_bytes: int
    busy_s: float
    key: str


@dataclass(slots=True)
class Counts:
    """What a pool has counted since its start; `PoolStatistics` says what."""

    requests: int = 0
    errors: int = 0
    saturated: int = 0
    queue_timeouts: int = 0
    call_timeouts: int = 0
    exits: int = 0
    started: int = 0
    start_failures: int = 0
    crashed: int = 0
    recycled: int = 0
    replaced: int = 0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A pool, as it is now, and what it has counted since its start.

    Attributes:
        pool: Its name.
        state: starting, running, failing (no worker is started for a while, after failures), draining or closed.
        size: How many workers it is to have.
        idle: Workers that are free.
        busy: Workers that are lent.
        starting: Workers that are being started.
        spares: Workers beyond the size.
        queued: Calls that wait.
        requests: Calls that got a worker.
        errors: Of these, those that ended with an error, without those counted below.
        saturated: Calls that were refused because too many waited.
        queue_timeouts: Calls that waited in vain.
        call_timeouts: Calls that did not end in time.
        exits: Calls during which the worker ended, or was lost.
        started: Workers that got ready.
        start_failures: Workers that did not.
        crashed: Workers that ended by themselves.
        recycled: Workers that were replaced because of their calls, memory or age.
        replaced: Workers that were replaced because they did not answer, or did not end a call.
        last_failure: The last failure to start or to live, as text; "" without any.
        workers: The workers that are ready.
    """

    pool: str
    state: str
    size: int
    idle: int
    busy: int
    starting: int
    spares: int
    queued: int
    requests: int
    errors: int
    saturated: int
    queue_timeouts: int
    call_timeouts: int
    exits: int
    started: int
    start_failures: int
    crashed: int
    recycled: int
    replaced: int
    last_failure: str
    workers: tuple[WorkerStatistics, ...]
