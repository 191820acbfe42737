"""What counting costs: SetVariable with metrics, compared with the same without, in this process and over gRPC."""

import asyncio
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.files import NAMES, begin_session, carry_out, make_file, session_id
from benchmarks.load import Series, run_threads
from benchmarks.plan import CALLERS, Plan
from benchmarks.rpc import Rpc, rpcs, start_server
from benchmarks.table import Row
from benchmarks.turns import Both, call_in_turn, rows, take, turns
from dspex_persist.state.embedded import SqliteState
from dspex_persist.state.meter import Meter


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure without and with metrics in turn, round by round."""
    over_grpc = f"SetVariable over gRPC, {CALLERS} in flight"
    return [
        *rows("engine", "metered.1", "SetVariable, 1 caller", "updates/s", "metrics", _in_process(plan, folder)),
        *rows("engine", "metered.rpc", over_grpc, "updates/s", "metrics", _over_grpc(plan, folder)),
    ]


def _in_process(plan: Plan, folder: Path) -> Both:
    numbers = itertools.count()

    def setter(state: SqliteState) -> Callable[[int], object]:
        return lambda caller: state.set_variable(session_id(caller), NAMES[0], next(numbers) / 4)

    both = Series(), Series()
    with ExitStack() as stack:
        setters = []
        for name, meter in (("unmetered", None), ("metered", Meter())):
            state = stack.enter_context(SqliteState(folder / f"{name}.db", meter=meter))
            carry_out(state, begin_session(0))
            setters.append(setter(state))
        for _ in range(plan.rounds):
            take(both, [(which, run_threads(setters[which], 1, seconds)) for which, seconds in turns(plan)])
    return both


def _over_grpc(plan: Plan, folder: Path) -> Both:
    import uvloop

    def setting() -> Rpc:
        (found,) = (rpc for rpc in rpcs(plan, {}) if rpc.name == "SetVariable")
        return found

    with ExitStack() as stack:
        ports = []
        for name, options in (("unmetered", ()), ("metered", ("--metrics-listen", "127.0.0.1:0"))):
            path = folder / f"{name}_served.db"
            make_file(path, itertools.chain(*(begin_session(number) for number in range(CALLERS))))
            ports.append(stack.enter_context(start_server(path, *options)).port)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(call_in_turn(plan, ports, setting, CALLERS))
