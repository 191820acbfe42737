"""What counting costs: SetVariable with metrics, compared with the same without, in this process and over gRPC."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final

import grpc

from benchmarks.files import NAMES, begin_session, carry_out, make_file, session_id
from benchmarks.load import Series, Slice, joined, ratios_of, run_threads
from benchmarks.plan import CALLERS, Plan
from benchmarks.rpc import Calls, rpcs, start_server
from benchmarks.table import Row
from dspex_persist.state.embedded import SqliteState
from dspex_persist.state.meter import Meter

_TURNS: Final = 4
"""How often the two take turns in a round: the difference is smaller than what else happens on a machine."""


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure without and with metrics in turn, round by round."""
    over_grpc = f"SetVariable over gRPC, {CALLERS} in flight"
    return [
        *_rows("metered.1", "SetVariable, 1 caller", *_in_process(plan, folder)),
        *_rows("metered.rpc", over_grpc, *_over_grpc(plan, folder)),
    ]


def _rows(key: str, what: str, without: Series, metered: Series) -> list[Row]:
    ratios = ratios_of(metered.rates, without.rates)
    base = Row.of_rounds(f"engine.un{key}", what, "updates/s", without.rates)
    rates = metered.rates
    return [base, Row.of_rounds(f"engine.{key}", "... with metrics", "updates/s", rates, ratios, ratio_to=base.key)]


def turns(plan: Plan) -> Iterator[tuple[int, float]]:
    """Yield whose turn it is in a round, 0 or 1, and for how many seconds."""
    for turn in range(_TURNS):
        # The second of two may find the disk busy with what the first has written.
        for which in (0, 1) if turn % 2 else (1, 0):
            yield which, plan.slice_s / _TURNS


def take(series: tuple[Series, Series], parts: list[tuple[int, Slice]]) -> None:
    """Add to two series what each has done in its turns of a round."""
    for which, each in enumerate(series):
        each.slices.append(joined([part for number, part in parts if number == which]))


def _in_process(plan: Plan, folder: Path) -> tuple[Series, Series]:
    numbers = itertools.count()

    def setter(state: SqliteState) -> Callable[[int], object]:
        return lambda caller: state.set_variable(session_id(caller), NAMES[0], next(numbers) / 4)

    series = Series(), Series()
    with ExitStack() as stack:
        setters = []
        for name, meter in (("unmetered", None), ("metered", Meter())):
            state = stack.enter_context(SqliteState(folder / f"{name}.db", meter=meter))
            carry_out(state, begin_session(0))
            setters.append(setter(state))
        for _ in range(plan.rounds):
            take(series, [(which, run_threads(setters[which], 1, seconds)) for which, seconds in turns(plan)])
    return series


def _over_grpc(plan: Plan, folder: Path) -> tuple[Series, Series]:
    import uvloop

    series = Series(), Series()
    with ExitStack() as stack:
        ports = []
        for name, options in (("unmetered", ()), ("metered", ("--metrics-listen", "127.0.0.1:0"))):
            path = folder / f"{name}_served.db"
            make_file(path, itertools.chain(*(begin_session(number) for number in range(CALLERS))))
            ports.append(stack.enter_context(start_server(path, *options)).port)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_call(plan, ports, series))
    return series


async def _call(plan: Plan, ports: list[int], series: tuple[Series, Series]) -> None:
    async with AsyncExitStack() as stack:
        calls = []
        for port in ports:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            (setting,) = (rpc for rpc in rpcs(plan, {}) if rpc.name == "SetVariable")
            calls.append(Calls(channel, setting, CALLERS))
            if plan.warm_s:
                await calls[-1].run(plan.warm_s)
        for _ in range(plan.rounds):
            take(series, [(which, await calls[which].run(seconds)) for which, seconds in turns(plan)])
