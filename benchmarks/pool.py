"""Tools in worker processes beside tools in the server: throughput, the cost of a lent call, starts and refilling."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.plan import Plan
from benchmarks.rpc import start_server
from benchmarks.table import Row
from dspex_persist.infra.workers.statistics import PoolStatistics
from dspex_persist.state.bridged import BridgedState

WORKERS: Final = (0, 1, 2)
TOOLS: Final = {"compute": "compute for 5 ms", "pause": "wait for 5 ms"}
_IN_FLIGHT: Final = 4
_SERVED: Final = ("--tools", "benchmarks.tools", "--workers")
_DEADLINE_S: Final = 60.0


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure servers with different numbers of workers, one after the other."""
    rates: dict[str, dict[int, list[float]]] = {tool: {} for tool in TOOLS}
    costs: dict[int, list[float]] = {}
    refills: list[float] = []
    for count in WORKERS:
        with start_server(folder / f"pool{count}.db", *_SERVED, str(count)) as server:
            with BridgedState(f"127.0.0.1:{server.port}") as state:
                for number in range(_IN_FLIGHT):
                    state.initialize_session(f"s{number}")
                for tool in TOOLS:
                    rates[tool][count] = [_rate(state, tool, plan.slice_s) for _ in range(plan.rounds)]
                costs[count] = [_cost_ms(state, plan.slice_s) for _ in range(plan.rounds)]
                if count == 1:
                    refills = [_refill_s(state) for _ in range(plan.start_rounds)]
            server.terminate(30)
    rows: list[Row] = []
    for tool, what in TOOLS.items():
        for count in WORKERS:
            ratios = [mine / base for mine, base in zip(rates[tool][count], rates[tool][0], strict=True)]
            to = "" if count == 0 else f"pool.{tool}.0"
            rows.append(
                Row.of_rounds(
                    f"pool.{tool}.{count}",
                    f"tools that {what}, {_where(count)}",
                    "call/s",
                    rates[tool][count],
                    ratios if count else (),
                    ratio_to=to,
                )
            )
    rows.append(Row.of_rounds("pool.call.0", "one call after the other, in the server", "ms", costs[0]))
    ratios = [mine / base for mine, base in zip(costs[1], costs[0], strict=True)]
    rows.append(
        Row.of_rounds(
            "pool.call.1", "one call after the other, in a worker", "ms", costs[1], ratios, ratio_to="pool.call.0"
        )
    )
    count = plan.started_workers
    rows.append(
        Row.of_rounds(f"pool.start.{count}", f"start of a server with {count} workers", "s", _starts(plan, folder))
    )
    rows.append(Row.of_rounds("pool.refill", "a killed worker's place is filled", "s", refills))
    return rows


def _where(count: int) -> str:
    return "in the server" if count == 0 else "1 worker" if count == 1 else f"{count} workers"


def _rate(state: BridgedState, tool: str, slice_s: float) -> float:
    """Return the calls per second of several callers."""
    began = time.perf_counter()

    def call(number: int) -> int:
        count = 0
        while time.perf_counter() - began < slice_s:
            assert state.execute_tool(f"s{number}", tool).success
            count += 1
        return count

    with ThreadPoolExecutor(_IN_FLIGHT) as threads:
        total = sum(threads.map(call, range(_IN_FLIGHT)))
    return total / (time.perf_counter() - began)


def _cost_ms(state: BridgedState, slice_s: float) -> float:
    """Return the median time of a call that does nothing."""
    times: list[float] = []
    until = time.perf_counter() + slice_s
    while time.perf_counter() < until or not times:
        began = time.perf_counter()
        assert state.execute_tool("s0", "noop").success
        times.append(time.perf_counter() - began)
    return median(times) * 1e3


def _refill_s(state: BridgedState) -> float:
    """Return how long it takes until there is another worker in the place of one that is killed."""
    (worker,) = _pool(state, lambda pool: pool.idle == 1).workers
    began = time.perf_counter()
    os.kill(worker.pid, signal.SIGKILL)
    _pool(state, lambda pool: any(each.pid != worker.pid for each in pool.workers))
    return time.perf_counter() - began


def _pool(state: BridgedState, condition: Callable[[PoolStatistics], bool]) -> PoolStatistics:
    deadline = time.perf_counter() + _DEADLINE_S
    while time.perf_counter() < deadline:
        (pool,) = state.list_workers()
        if condition(pool):
            return pool
        time.sleep(0.005)
    raise TimeoutError("the pool does not get there")


def _starts(plan: Plan, folder: Path) -> list[float]:
    times = []
    for _ in range(plan.start_rounds):
        began = time.perf_counter()
        with start_server(folder / "pool.db", *_SERVED, str(plan.started_workers)) as server:
            times.append(time.perf_counter() - began)
            server.terminate(30)
    return times
