"""Calls to the real server in a separate process, each kind compared with Ping. Client and server share the machine.

One client process, one channel, n calls in flight. Every kind of call uses the same few lines of code, with requests
serialised in advance and answers that are parsed, so that the ratio to Ping shows the cost of the server.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

import dspex_persist
from benchmarks.files import NAMES, begin_session, make_file, session_id, set_times
from benchmarks.load import Series, Slice, joined, run_tasks
from benchmarks.plan import BATCH, Plan
from benchmarks.table import Row, Target
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

_ROOT = Path(__file__).resolve().parents[1]
_HISTORIES = 16
"""How many sessions have a long history; callers share them."""
_LONG = "long_history"
UNLIKE_REQUESTS = 8
"""How many different requests each caller sends in turn."""

_TARGETS = {
    "GetVariable": {1: 0.9, 16: 0.9, 64: 0.9, 256: 0.9},
    "SetVariable": {1: 0.6, 64: 0.75, 256: 0.75},
}


def prepare(plan: Plan, path: Path) -> None:
    """Create the database, with a session for each caller, some of them with a history."""
    sessions = (begin_session(number, (*NAMES, _LONG)) for number in range(max(plan.in_flight)))
    histories = (set_times(number, _LONG, plan.history_entries) for number in range(_HISTORIES))
    make_file(path, chain(*sessions, *histories))


def start_server(
    db: Path | str, *options: str, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> ServerProcess:
    """Start the server as users do, with default settings.

    Args:
        db: The file, or the URL of a database.
        options: Other options.
        folder: Where it runs; by default in the folder of the file.
        variables: Its environment, in addition to this process's.
    """
    folder = folder or Path(db).parent
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--db", str(db), "--listen", "127.0.0.1:0", *options]
    env = {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")}
    # For the tools of this package, as the server runs in the folder of the file.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), env.get("PYTHONPATH"))))
    # An installed package has bytecode; for this source tree, the environment may forbid it.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.setdefault("PYTHONPYCACHEPREFIX", str(folder / "bytecode"))
    # Not in the current folder, whose settings file would change the results.
    return ServerProcess.start(argv, env={**env, **(variables or {})}, cwd=folder)


def measure(plan: Plan, path: Path) -> list[Row]:
    """Measure all rpcs at all concurrencies, then check that the file has all acknowledged writes."""
    import uvloop

    with start_server(path) as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows, newest = runner.run(_measure(plan, f"127.0.0.1:{server.port}"))
        server.terminate(30)
    check_versions(path, newest)
    return rows


def check_versions(path: Path | str, newest: Mapping[int, int]) -> None:
    """Raise RuntimeError if the file or database lacks the last acknowledged version of a caller's first variable."""
    with dspex_persist.connect(path) as provider:
        for caller, version in newest.items():
            stored = provider.get_variable(session_id(caller), NAMES[0]).version
            if stored != version:
                raise RuntimeError(f"{session_id(caller)}: version {stored} stored, acknowledged was {version}")


async def _measure(plan: Plan, target: str) -> tuple[list[Row], dict[int, int]]:
    rows: list[Row] = []
    newest: dict[int, int] = {}
    async with grpc.aio.insecure_channel(target) as channel:
        for in_flight in plan.in_flight:
            print(f"rpc: {in_flight} in flight", file=sys.stderr, flush=True)
            all_calls = [Calls(channel, rpc, in_flight) for rpc in rpcs(plan, newest)]
            await run_rounds(plan, all_calls)
            rows += (row_of("rpc", calls, _TARGETS) for calls in all_calls)
    return rows, newest


async def run_rounds(plan: Plan, all_calls: Sequence["Calls"]) -> None:
    """Measure Ping, which comes first, and the others in turn."""
    for calls in all_calls if plan.warm_s else ():
        await calls.run(plan.warm_s)
    for _ in range(plan.rounds):
        await _run_round(plan, all_calls)


async def _run_round(plan: Plan, all_calls: Sequence["Calls"]) -> None:
    """Measure Ping, an rpc, Ping, another rpc, ..., Ping, so that disturbances of the machine affect both."""
    ping, *others = all_calls
    before = await ping.run(plan.ping_slice_s)
    pings = [before]
    for calls in others:
        part = await calls.run(plan.slice_s)
        after = await ping.run(plan.ping_slice_s)
        calls.series.slices.append(part)
        pings.append(after)
        calls.ratios.append(part.calls_per_s / ((before.calls_per_s + after.calls_per_s) / 2))
        before = after
    ping.series.slices.append(joined(pings))


@dataclass(frozen=True, slots=True)
class Rpc:
    """One kind of call.

    Attributes:
        request: Returns the request of a caller, by its number.
        accept: Returns whether an answer is correct.
        key: Distinguishes it in the keys of rows from other calls of the same rpc.
    """

    name: str
    title: str
    request: Callable[[int, int], Message]
    accept: Callable[[int, Any], bool]
    key: str = ""


def _ping(caller: int, number: int) -> Message:
    return pb.PingRequest(message=f"ping {number} of {caller}")


PING = Rpc("Ping", "Ping", _ping, lambda _, answer: "ping" in answer.message)


class Calls:
    """The callers of one rpc, and their measurements.

    Args:
        channels: A channel, or one for each server: callers have them in turn; a single caller uses them in turn.
        rpc: What they call.
        in_flight: How many there are.
    """

    def __init__(self, channels: grpc.aio.Channel | Sequence[grpc.aio.Channel], rpc: Rpc, in_flight: int) -> None:
        self.rpc = rpc
        self.in_flight = in_flight
        self.series = Series()
        self.ratios: list[float] = []
        invokes = [caller_of(each, rpc.name) for each in (channels if isinstance(channels, Sequence) else [channels])]
        step = 1 if in_flight == 1 else 0
        calls = [
            cycle(
                [
                    (invokes[(caller + step * number) % len(invokes)], rpc.request(caller, number).SerializeToString())
                    for number in range(UNLIKE_REQUESTS)
                ]
            )
            for caller in range(in_flight)
        ]
        self._answers = answers = [None] * in_flight
        self.answered = answered = [0] * in_flight

        async def call(caller: int) -> None:
            invoke, request = next(calls[caller])
            answers[caller] = await invoke(request)
            answered[caller] += 1

        self._call = call

    async def run(self, seconds: float) -> Slice:
        """Run a slice of load; raise RuntimeError if the last answer of a caller is wrong."""
        part = await run_tasks(self._call, self.in_flight, seconds)
        for caller, answer in enumerate(self._answers):
            if not self.rpc.accept(caller, answer):
                raise RuntimeError(f"{self.rpc.name} answered {answer}")
        return part


def caller_of(channel: grpc.Channel | grpc.aio.Channel, rpc: str) -> Any:
    """Return a callable for this rpc that takes serialised requests and parses the answers."""
    parse = getattr(pb, BRIDGE_SERVICE.methods_by_name[rpc].output_type.name).FromString
    return channel.unary_unary(f"/{BRIDGE_SERVICE.full_name}/{rpc}", response_deserializer=parse)


def row_of(section: str, calls: Calls, targets: Mapping[str, Mapping[int, float]]) -> Row:
    """Return the row of one kind of call. `targets`: the least ratios, by key and number of calls in flight."""
    rpc, series, in_flight = calls.rpc, calls.series, calls.in_flight
    key = rpc.key or rpc.name
    bound = targets.get(key, {}).get(in_flight)
    return Row.of_rounds(
        f"{section}.{key}.{in_flight}",
        f"{rpc.title}, {in_flight} in flight",
        "calls/s",
        series.rates,
        calls.ratios,
        p50_ms=series.percentile_ms(50),
        p99_ms=series.percentile_ms(99),
        ratio_to=f"{section}.Ping.{in_flight}" if calls.ratios else "",
        target=Target("ratio", "at least", bound) if bound is not None else None,
    )


def rpcs(plan: Plan, newest: dict[int, int]) -> list[Rpc]:
    """Return the measured calls, Ping first. They put the acknowledged versions into `newest`."""

    def get(caller: int, number: int) -> Message:
        return pb.GetVariableRequest(session_id=session_id(caller), variable_identifier=NAMES[number])

    def set_one(caller: int, number: int) -> Message:
        session, value = session_id(caller), packed(number)
        return pb.SetVariableRequest(session_id=session, variable_identifier=NAMES[0], value=value)

    def set_all(caller: int, number: int) -> Message:
        updates = {name: packed(number + index) for index, name in enumerate(NAMES)}
        return pb.BatchSetVariablesRequest(session_id=session_id(caller), updates=updates, atomic=True)

    def get_history(caller: int, _number: int) -> Message:
        session, limit = session_id(caller % _HISTORIES), plan.history_entries
        return pb.GetVariableHistoryRequest(session_id=session, variable_identifier=_LONG, limit=limit)

    def is_newer(caller: int, version: int) -> bool:
        before, newest[caller] = newest.get(caller, 0), version
        return version > before

    return [
        PING,
        Rpc("GetVariable", "GetVariable", get, lambda _, answer: answer.variable.name in NAMES),
        Rpc("SetVariable", "SetVariable", set_one, lambda caller, answer: is_newer(caller, answer.new_version)),
        Rpc(
            "SetVariables",
            f"SetVariables of {BATCH}",
            set_all,
            lambda caller, answer: is_newer(caller, answer.new_versions[NAMES[0]]),
        ),
        Rpc(
            "GetVariableHistory",
            f"GetVariableHistory of {plan.history_entries}",
            get_history,
            lambda _, answer: len(answer.entries) == plan.history_entries,
        ),
    ]


def packed(number: int) -> AnyMessage:
    """Return a small float that depends on `number`, encoded for a request."""
    return AnyMessage(type_url="type.googleapis.com/snakepit.float", value=json.dumps(number / 8).encode())
