"""What thousands of watchers cost everybody else: a write's answer, and a Ping right behind it.

    python -m benchmarks.watchers [--watchers 2000] [--writes 50]

The watchers are in a process of their own. Times are medians, as multiples of a Ping without watchers in the same run.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.testing.server import ServedDatabase

_PACKAGE = "/snakepit.bridge.BridgeService/"
_PER_CONNECTION = 100


async def watch(target: str, count: int, writes: int) -> None:
    """Open `count` watches, say so on stdout, and again when each has been told of every write."""
    channels = [
        grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-count // _PER_CONNECTION))
    ]
    started = asyncio.Semaphore(0)

    async def one(number: int) -> None:
        rpc = channels[number % len(channels)].unary_stream(
            f"{_PACKAGE}WatchVariables",
            request_serializer=pb.WatchVariablesRequest.SerializeToString,
            response_deserializer=pb.VariableUpdate.FromString,
        )
        call = rpc(pb.WatchVariablesRequest(session_id="s", variable_identifiers=["x"]))
        await call.initial_metadata()
        started.release()
        told = 0
        async for update in call:
            if update.update_type == "value_change":
                told += 1
                if update.variable.version != told:
                    raise AssertionError(f"version {update.variable.version} came as number {told}")
            if told == writes:
                return

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    for _ in range(count):
        await started.acquire()
    print("watching", flush=True)
    await asyncio.gather(*tasks)
    print("told", flush=True)


def measure(folder: Path, watchers: int, writes: int) -> tuple[float, float, float]:
    """Medians of a write, of a Ping right behind it, and of a Ping when nothing else goes on, in seconds."""
    with ServedDatabase(folder / f"{watchers}.db") as server, grpc.insecure_channel(server.target) as channel:
        call = _caller(channel)
        call("InitializeSession", pb.InitializeSessionRequest(session_id="s"), pb.InitializeSessionResponse)
        register = pb.RegisterVariableRequest(session_id="s", name="x", type="integer")
        register.initial_value.CopyFrom(AnyMessage(type_url="dspex.variables/integer", value=b"0"))
        call("RegisterVariable", register, pb.RegisterVariableResponse)
        argv = [sys.executable, "-m", "benchmarks.watchers", "--watch", server.target]
        argv += ["--watchers", str(watchers), "--writes", str(writes)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            assert watching.stdout.readline() == "watching\n"
            idle = [call("Ping", pb.PingRequest(), pb.PingResponse) for _ in range(writes)]
            times: list[tuple[float, float]] = []
            for number in range(1, writes + 1):
                request = pb.SetVariableRequest(session_id="s", variable_identifier="x")
                request.value.CopyFrom(AnyMessage(type_url="dspex.variables/integer", value=str(number).encode()))
                write_s = call("SetVariable", request, pb.SetVariableResponse)
                times.append((write_s, call("Ping", pb.PingRequest(), pb.PingResponse)))
                # Each write meets a server that is done with the last one.
                time.sleep(0.02 + watchers / 5000)
            assert watching.stdout.readline() == "told\n"
        writing, pinging = zip(*times, strict=True)
        return statistics.median(writing), statistics.median(pinging), statistics.median(idle)


def _caller(channel: grpc.Channel) -> Callable[..., float]:
    def call(name: str, request: object, answer: type) -> float:
        rpc = channel.unary_unary(
            f"{_PACKAGE}{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,  # type: ignore[attr-defined]
        )
        begun = time.perf_counter()
        rpc(request, timeout=60)
        return time.perf_counter() - begun

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watchers", type=int, default=2000)
    parser.add_argument("--writes", type=int, default=50)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.watch:
        asyncio.run(watch(asked.watch, asked.watchers, asked.writes))
        return
    with tempfile.TemporaryDirectory() as folder:
        unit = 0.0
        print("watchers   write   Ping behind it   (in Pings without watchers)")
        for count in (1, asked.watchers):
            write_s, ping_s, idle_s = measure(Path(folder), count, asked.writes)
            unit = unit or idle_s
            print(f"{count:8}   {write_s / unit:5.1f}   {ping_s / unit:14.1f}")


if __name__ == "__main__":
    main()
