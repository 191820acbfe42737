"""Servers on a database that several share, PostgreSQL and Valkey, beside one server on a SQLite file.

The databases are real ones that this run starts, with what they need to keep each commit (`fsync`, `appendfsync
always`), on the disk of the other files. Client, servers and database share the machine.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from benchmarks import flat
from benchmarks.engines import KINDS, database_urls, running
from benchmarks.executing import SERVED, result_of, tool_request
from benchmarks.files import NAMES, begin_session, carry_out, session_id
from benchmarks.plan import Plan
from benchmarks.rpc import Calls, Rpc, check_versions, packed, start_server
from benchmarks.table import Row
from dspex_persist import connect
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

TITLES: Final = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "valkey": "Valkey"}
WAYS: Final = {"one": "one server", "two": "two servers", "both": "two servers, sessions at both"}
RPCS: Final = ("GetVariable", "SetVariable", "ExecuteTool")
_ENDING_S: Final = 30
# The first of the sessions that are used at two servers.
_BOTH: Final = 1_000


def ways_of(store: str, in_flight: int) -> list[str]:
    """Return how the calls are spread over servers. One call in flight cannot keep two servers busy."""
    return [way for way in WAYS if store != "sqlite" or way == "one" if in_flight > 1 or way != "two"]


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure calls of servers on each store, and then what they cost with a long history, and with many sessions."""
    import uvloop

    with ExitStack() as stack:
        print("distributed: starting PostgreSQL and Valkey", file=sys.stderr, flush=True)
        # Beside the folder of this run, which is closed to the users of the engines.
        engines = {name: stack.enter_context(running(kind, folder.parent)) for name, kind in KINDS.items()}
        urls = {name: database_urls(engine, 4) for name, engine in engines.items()}
        one = {"sqlite": str(folder / "distributed.db"), **{name: own[0] for name, own in urls.items()}}
        two = {name: own[1] for name, own in urls.items()}
        places = [Place(store, ("one",), url) for store, url in one.items()]
        places += [Place(store, ("two", "both"), url) for store, url in two.items()]
        for place in places:
            with connect(place.url) as provider:
                carry_out(provider, chain.from_iterable(map(begin_session, _all_sessions(plan, place.ways))))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows = runner.run(_measure(plan, folder, places))
        for place in places:
            check_versions(place.url, place.newest)
        return rows + flat.measure(plan, {name: own[2:] for name, own in urls.items()})


class Place:
    """A database with its servers.

    Attributes:
        store: What it is: a key of `TITLES`.
        ways: The ways in which its servers are called: two for all but "one".
        url: Its address.
        newest: The version of each caller's first variable that was acknowledged last, by the number of its session.
    """

    def __init__(self, store: str, ways: Sequence[str], url: str) -> None:
        self.store, self.ways, self.url = store, ways, url
        self.newest: dict[int, int] = {}
        self._servers: list[ServerProcess] = []
        self._channels: list[grpc.aio.Channel] = []

    async def serve(self, stack: AsyncExitStack, folder: Path) -> None:
        """Start its servers, and connect to them."""
        for _ in range(1 if self.ways == ("one",) else 2):
            server = stack.enter_context(start_server(self.url, *SERVED, folder=folder))
            self._servers.append(server)
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
            self._channels.append(await stack.enter_async_context(channel))

    def end(self) -> None:
        """End its servers."""
        for server in self._servers:
            server.terminate(_ENDING_S)

    def calls(self, rpc: str, way: str, in_flight: int) -> Calls:
        """Return the callers of an rpc."""
        return Calls(self._channels, _rpc(rpc, self.newest, _sessions_of(way, in_flight)), in_flight)


def _sessions_of(way: str, in_flight: int) -> list[int]:
    """Return the session of each caller. Callers reach the servers in turn: neighbours are at different ones.

    No server has sessions in memory that others change, but for "both".
    """
    return [_BOTH + caller // 2 if way == "both" else caller for caller in range(in_flight)]


def _all_sessions(plan: Plan, ways: Sequence[str]) -> list[int]:
    return sorted({session for way in ways for session in _sessions_of(way, max(plan.store_in_flight))})


async def _measure(plan: Plan, folder: Path, places: Sequence[Place]) -> list[Row]:
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        for place in places:
            await place.serve(stack, folder)
        for rpc in RPCS:
            for in_flight in plan.store_in_flight:
                print(f"distributed: {rpc}, {in_flight} in flight", file=sys.stderr, flush=True)
                measured = [
                    _Measured(place.store, way, place.calls(rpc, way, in_flight))
                    for store in TITLES
                    for place in places
                    for way in place.ways
                    if place.store == store and way in ways_of(store, in_flight)
                ]
                await _run_rounds(plan, measured)
                rows += map(_row_of, measured)
        for place in places:
            await asyncio.to_thread(place.end)
    return rows


@dataclass(frozen=True, slots=True)
class _Measured:
    store: str
    way: str
    calls: Calls


async def _run_rounds(plan: Plan, measured: Sequence[_Measured]) -> None:
    """Measure SQLite, which comes first, then the ways of one store, SQLite, those of the other, and SQLite again."""
    for each in measured if plan.warm_s else ():
        await each.calls.run(plan.warm_s / 2)
    sqlite, *others = measured
    stores = [[each.calls for each in others if each.store == store] for store in TITLES if store != sqlite.store]
    for _ in range(plan.store_rounds):
        before = await sqlite.calls.run(plan.ping_slice_s)
        sqlite.calls.series.slices.append(before)
        for all_calls in stores:
            parts = [await calls.run(plan.store_slice_s) for calls in all_calls]
            after = await sqlite.calls.run(plan.ping_slice_s)
            sqlite.calls.series.slices.append(after)
            for calls, part in zip(all_calls, parts, strict=True):
                calls.series.slices.append(part)
                calls.ratios.append(part.calls_per_s / ((before.calls_per_s + after.calls_per_s) / 2))
            before = after


def _key(store: str, way: str, calls: Calls) -> str:
    return f"distributed.{store}.{way}.{calls.rpc.key}.{calls.in_flight}"


def _row_of(measured: _Measured) -> Row:
    store, way, calls = measured.store, measured.way, measured.calls
    return Row.of_rounds(
        _key(store, way, calls),
        f"{calls.rpc.title}, {calls.in_flight} in flight, {TITLES[store]}, {WAYS[way]}",
        "calls/s",
        calls.series.rates,
        calls.ratios,
        p50_ms=calls.series.percentile_ms(50),
        p99_ms=calls.series.percentile_ms(99),
        ratio_to=_key("sqlite", "one", calls) if calls.ratios else "",
    )


def _rpc(name: str, newest: dict[int, int], sessions: Sequence[int]) -> Rpc:
    """Return a measured call. SetVariable puts the versions that were acknowledged last into `newest`, by session."""
    last: dict[int, int] = {}

    def get(caller: int, number: int) -> Message:
        session = session_id(sessions[caller])
        return pb.GetVariableRequest(session_id=session, variable_identifier=NAMES[number])

    def set_one(caller: int, number: int) -> Message:
        session, value = session_id(sessions[caller]), packed(number)
        return pb.SetVariableRequest(session_id=session, variable_identifier=NAMES[0], value=value)

    def noop(caller: int, _number: int) -> Message:
        return tool_request(sessions[caller], "noop")

    def is_newer(caller: int, answer: Any) -> bool:
        before, last[caller] = last.get(caller, 0), answer.new_version
        newest[sessions[caller]] = max(newest.get(sessions[caller], 0), answer.new_version)
        return bool(answer.new_version > before)

    return {
        "GetVariable": Rpc(name, name, get, lambda _, answer: answer.variable.name in NAMES, name),
        "SetVariable": Rpc(name, name, set_one, is_newer, name),
        "ExecuteTool": Rpc(name, f"{name}, no-op", noop, lambda _, answer: result_of(answer) is None, name),
    }[name]
