"""Callers that send the next call as soon as the last one is answered, and their measurements."""

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.table import Row, Target


@dataclass(frozen=True, slots=True)
class Slice:
    """A short period of load: the latency of each call, and the time until the last answer, in seconds."""

    latencies_s: list[float]
    elapsed_s: float

    @property
    def calls_per_s(self) -> float:
        """Answered calls per second."""
        return len(self.latencies_s) / self.elapsed_s


def joined(parts: Sequence[Slice]) -> Slice:
    """Return consecutive slices as one."""
    return Slice([latency for part in parts for latency in part.latencies_s], sum(part.elapsed_s for part in parts))


@dataclass(slots=True)
class Series:
    """The slices of one kind of call, one or more per round."""

    slices: list[Slice] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Answered calls per second, slice by slice."""
        return [part.calls_per_s for part in self.slices]

    def percentile_ms(self, percent: int) -> float:
        """Return the time, in milliseconds, within which `percent` of all calls were answered."""
        return percentile_ms([latency for part in self.slices for latency in part.latencies_s], percent)

    def percentiles_ms(self, percent: int) -> list[float]:
        """Return the same, slice by slice."""
        return [percentile_ms(part.latencies_s, percent) for part in self.slices]


def percentile_ms(latencies_s: Sequence[float], percent: int) -> float:
    """Return the time, in milliseconds, within which `percent` of the calls were answered."""
    latencies = sorted(latencies_s)
    return 1000 * latencies[min(len(latencies) - 1, len(latencies) * percent // 100)]


def ratios_of(rates: Sequence[float], references: Sequence[float]) -> list[float]:
    """Return the ratios round by round. Their median counts, as a ratio of medians would mix different rounds."""
    return [rate / reference for rate, reference in zip(rates, references, strict=True)]


def percentile_row(
    key: str,
    percent: int,
    what: str,
    series: Series,
    *,
    beside: Series | None = None,
    ratio_to: str = "",
    target: Target | None = None,
) -> Row:
    """Return the row of a percentile. Its ratio is the median of the rounds' ratios to those of `beside`."""
    rounds = series.percentiles_ms(percent)
    ratios = ratios_of(rounds, beside.percentiles_ms(percent)) if beside is not None else []
    return Row(
        key,
        f"p{percent} of {what}",
        series.percentile_ms(percent),
        "ms",
        series.percentile_ms(50),
        series.percentile_ms(99),
        ratio=statistics.median(ratios) if ratios else None,
        ratio_to=ratio_to,
        target=target,
        rounds=tuple(rounds),
        ratio_rounds=tuple(ratios),
    )


async def run_tasks(call: Callable[[int], Awaitable[object]], callers: int, seconds: float) -> Slice:
    """Have each of `callers` tasks call with its number, one call at a time, for `seconds` but at least once."""
    latencies: list[float] = []
    clock = time.perf_counter

    async def run(caller: int) -> None:
        answered = clock()
        while True:
            called = answered
            await call(caller)
            answered = clock()
            latencies.append(answered - called)
            if answered >= deadline:
                return

    began = clock()
    deadline = began + seconds
    await asyncio.gather(*map(run, range(callers)))
    return Slice(latencies, clock() - began)


def run_threads(call: Callable[[int], object], callers: int, seconds: float) -> Slice:
    """Do the same with threads. Raises the first error of a thread."""
    latencies: list[list[float]] = [[] for _ in range(callers)]
    failures: list[BaseException] = []
    clock = time.perf_counter
    all_there = threading.Barrier(callers + 1)

    def run(caller: int) -> None:
        own_latencies = latencies[caller]
        all_there.wait()
        answered = clock()
        deadline = answered + seconds
        while answered < deadline:
            called = answered
            call(caller)
            answered = clock()
            own_latencies.append(answered - called)

    def run_and_report(caller: int) -> None:
        try:
            run(caller)
        except BaseException as error:  # noqa: BLE001 - the boundary of a thread: raised again below
            failures.append(error)

    threads = [threading.Thread(target=run_and_report, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    all_there.wait()
    began = clock()
    for thread in threads:
        thread.join()
    elapsed_s = clock() - began
    if failures:
        raise failures[0]
    return Slice([latency for own_latencies in latencies for latency in own_latencies], elapsed_s)


def run_alone(call: Callable[[], object], times: int) -> Slice:
    """Call this many times, one after the other, on this thread."""
    latencies: list[float] = []
    clock = time.perf_counter
    began = called = clock()
    for _ in range(times):
        call()
        answered = clock()
        latencies.append(answered - called)
        called = answered
    return Slice(latencies, called - began)
