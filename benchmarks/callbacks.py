"""A thousand callbacks of one variable: how long until the last of them has the change."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.load import Series, Slice, percentile_row
from benchmarks.plan import Plan
from benchmarks.rpc import start_server
from benchmarks.table import Row
from dspex_persist import Context

_NAME: Final = "temperature"
_PATIENCE_S: Final = 60


class _Crowd:
    """The callbacks of a context, and their times.

    Args:
        ctx: The context.
        count: How many callbacks there are.
    """

    def __init__(self, ctx: Context, count: int) -> None:
        self._ctx = ctx
        self._count = count
        self._called = 0
        self._newest: dict[int, int] = {}
        self._all_called = threading.Event()
        self._ended_at = 0.0
        self.series = Series()
        for number in range(count):
            ctx.watch(_NAME, on_change=self._callback(number))

    def _callback(self, number: int) -> Any:
        def call(change: Any) -> None:
            if change.version != self._newest.get(number, 0) + 1:
                raise AssertionError(f"version {change.version} came after {self._newest.get(number)}")
            self._newest[number] = change.version
            self._called += 1
            if self._called == self._count:
                self._ended_at = time.perf_counter()
                self._all_called.set()

        return call

    def run(self, writes: int) -> None:
        """Write this many times, each time until all callbacks were called."""
        latencies: list[float] = []
        for number in range(writes):
            self._called = 0
            self._all_called.clear()
            began = time.perf_counter()
            self._ctx.set(_NAME, float(number))
            if not self._all_called.wait(_PATIENCE_S):
                raise RuntimeError(f"{self._called} of {self._count} callbacks were called")
            latencies.append(self._ended_at - began)
        self.series.slices.append(Slice(latencies, sum(latencies)))


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure the backends in turn."""
    with ExitStack() as stack:
        server = stack.enter_context(start_server(folder / "called_served.db"))
        places: dict[str, str | Path] = {
            "local": "local",
            "embedded": folder / "called.db",
            "bridged": f"grpc://127.0.0.1:{server.port}",
        }
        crowds = {}
        for key, place in places.items():
            ctx = stack.enter_context(Context("bench-callbacks", place))
            ctx.define(_NAME, 0.0)
            crowds[key] = _Crowd(ctx, plan.callbacks)
        for crowd in crowds.values():
            crowd.run(2)
            crowd.series.slices.clear()
        for _ in range(plan.rounds):
            for crowd in crowds.values():
                crowd.run(plan.called_writes)
        stack.callback(server.terminate, _PATIENCE_S)
    titles = {"local": "in memory", "embedded": "a file", "bridged": "a server"}
    what = f"set to last of {plan.callbacks:,} callbacks"
    return [
        percentile_row(f"cognitive.callbacks.{key}", 99, f"{what}, {titles[key]}", crowd.series)
        for key, crowd in crowds.items()
    ]
