"""What TLS and tokens cost: calls to servers with one of them, in turn with calls to a server without.

Client and server share the machine, so the ratios have the cost of both ends.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks.files import NAMES, begin_session, make_file
from benchmarks.plan import CALLERS, Plan
from benchmarks.rpc import Calls, check_versions, rpcs, run_rounds, start_server
from benchmarks.table import Row
from dspex_persist.infra.access import tokens
from tests.certificates import Authority

WAYS: Final = {"plain": "", "tls": "with TLS", "token": "with a token"}
RPCS: Final = ("Ping", "SetVariable")
IN_FLIGHT: Final = (1, CALLERS)


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure three servers, whose slices take turns."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows, newest = runner.run(_measure(plan, folder))
    for way, versions in newest.items():
        check_versions(_path(folder, way), versions)
    return rows


def _path(folder: Path, way: str) -> Path:
    return folder / f"secured-{way}.db"


async def _measure(plan: Plan, folder: Path) -> tuple[list[Row], dict[str, dict[int, int]]]:
    rows: list[Row] = []
    newest: dict[str, dict[int, int]] = {way: {} for way in WAYS}
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(_served(folder, way)) for way in WAYS]
        for name in RPCS:
            for in_flight in IN_FLIGHT:
                print(f"pool: {name} with TLS and tokens, {in_flight} in flight", file=sys.stderr, flush=True)
                all_calls = [
                    Calls(channel, next(rpc for rpc in rpcs(plan, newest[way]) if rpc.name == name), in_flight)
                    for way, channel in zip(WAYS, channels, strict=True)
                ]
                await run_rounds(plan, all_calls)
                rows += _rows(name, in_flight, all_calls)
    return rows, newest


def _rows(rpc: str, in_flight: int, all_calls: Sequence[Calls]) -> list[Row]:
    return [
        Row.of_rounds(
            f"pool.{way}.{rpc}.{in_flight}",
            " ".join(filter(None, (rpc, what))) + f", {in_flight} in flight",
            "calls/s",
            calls.series.rates,
            calls.ratios,
            p50_ms=calls.series.percentile_ms(50),
            p99_ms=calls.series.percentile_ms(99),
            ratio_to=f"pool.plain.{rpc}.{in_flight}" if calls.ratios else "",
        )
        for (way, what), calls in zip(WAYS.items(), all_calls, strict=True)
    ]


@asynccontextmanager
async def _served(folder: Path, way: str) -> AsyncIterator[Any]:
    """Start a server; yields a channel to it, as clients open it."""
    path, options = _path(folder, way), list[str]()
    make_file(path, chain.from_iterable(begin_session(number, NAMES) for number in range(CALLERS)))
    authority, token = None, ""
    if way == "tls":
        authority = Authority(folder / "certificates")
        pair = authority.issue("server")
        options = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
    elif way == "token":
        token = tokens.add(folder / "tokens", "benchmark", tokens.SCOPES)
        options = ["--token-file", str(folder / "tokens")]
    with start_server(path, *options) as server:
        target = f"127.0.0.1:{server.port}"
        if authority is None:
            channel = grpc.aio.insecure_channel(target)
        else:
            channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(authority.cert.read_bytes()))
        async with channel:
            yield _WithToken(channel, token) if token else channel
        server.terminate(30)


class _WithToken:
    """A channel whose calls show a token."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.unary_unary(*args, **kwargs), metadata=self._metadata)
