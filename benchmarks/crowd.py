"""Many clients of one server, in a separate process: idle connections, and watchers.

`python -m benchmarks.crowd TARGET` reads commands line by line, and answers each with "done":

    connect COUNT               open COUNT more connections; each of them calls Ping once
    watch COUNT SESSION NAME    open COUNT more watches of a variable, a hundred per connection
    wait VERSION                wait until every watcher has received this version
"""

import asyncio
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

_ROOT = Path(__file__).resolve().parents[1]
_WATCHERS_A_CONNECTION = 100
_AT_ONCE = 50
"""How many connections are opened concurrently: more would have to wait in the server's backlog."""
_OWN_FILES = 200
"""How many files a process needs in addition to its connections, at most."""


def allow_connections(count: int) -> None:
    """Allow this process and its children this many open connections; raise RuntimeError if that is impossible."""
    needed = count + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(
            f"{count:,} connections need {needed:,} open files, but this shell allows {hard:,} (ulimit -n)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Crowd:
    """The crowd, as seen by the benchmark: a context manager that starts and ends its process."""

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.crowd", f"127.0.0.1:{port}"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def connect(self, count: int) -> None:
        """Open this many more connections."""
        self._run(f"connect {count}")

    def watch(self, count: int, session: str, name: str) -> None:
        """Open this many more watches of a variable."""
        self._run(f"watch {count} {session} {name}")

    def wait_received(self, version: int) -> None:
        """Wait until every watcher has received this version of the variable, and all before it."""
        self._run(f"wait {version}")

    def _run(self, command: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(command, file=self._process.stdin, flush=True)
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError(f"the crowd failed to {command}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its members have nothing to finish.
        self._process.kill()
        self._process.communicate()


class _Members:
    """The members of the crowd, in its process. An error of one of them ends `tasks`."""

    def __init__(self, target: str, tasks: asyncio.TaskGroup) -> None:
        self._target = target
        self._tasks = tasks
        self._channels: list[grpc.aio.Channel] = []
        self._watching = 0
        self._received: Counter[int] = Counter()
        """By version, how many watchers have received it."""
        self._all_received = asyncio.Event()

    async def connect(self, count: int) -> None:
        ready = asyncio.Semaphore(_AT_ONCE)

        async def one() -> None:
            async with ready:
                await _method(self._new_channel(), "Ping")(pb.PingRequest())

        await asyncio.gather(*(one() for _ in range(count)))

    def _new_channel(self) -> grpc.aio.Channel:
        # Otherwise channels to one address share a connection.
        channel = grpc.aio.insecure_channel(self._target, options=[("grpc.use_local_subchannel_pool", 1)])
        self._channels.append(channel)
        return channel

    async def watch(self, count: int, session: str, name: str) -> None:
        started = asyncio.Semaphore(0)
        for channel in self._channels_for(count):
            self._tasks.create_task(self._watch(channel, session, name, started))
        for _ in range(count):
            await started.acquire()
        self._watching += count

    def _channels_for(self, watchers: int) -> Iterator[grpc.aio.Channel]:
        for begun in range(0, watchers, _WATCHERS_A_CONNECTION):
            yield from repeat(self._new_channel(), min(_WATCHERS_A_CONNECTION, watchers - begun))

    async def _watch(self, channel: grpc.aio.Channel, session: str, name: str, started: asyncio.Semaphore) -> None:
        call = _method(channel, "WatchVariables")(
            pb.WatchVariablesRequest(session_id=session, variable_identifiers=[name])
        )
        await call.initial_metadata()
        started.release()
        last = 0
        async for update in call:
            if update.update_type != "value_change":
                continue
            version = update.variable.version
            if last and version != last + 1:
                raise AssertionError(f"version {version} came after {last}")
            last = version
            self._received[version] += 1
            if self._received[version] == self._watching:
                self._all_received.set()

    async def wait_received(self, version: int) -> None:
        while self._received[version] < self._watching:
            self._all_received.clear()
            await self._all_received.wait()


def _method(channel: grpc.aio.Channel, rpc: str) -> Any:
    described = BRIDGE_SERVICE.methods_by_name[rpc]
    stub: Any = channel.unary_stream if described.server_streaming else channel.unary_unary
    return stub(
        f"/{BRIDGE_SERVICE.full_name}/{rpc}",
        request_serializer=getattr(pb, described.input_type.name).SerializeToString,
        response_deserializer=getattr(pb, described.output_type.name).FromString,
    )


async def _run_commands(target: str) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with asyncio.TaskGroup() as tasks:
        members = _Members(target, tasks)
        while line := (await lines.readline()).decode().split():
            match line:
                case ["connect", count]:
                    await members.connect(int(count))
                case ["watch", count, session, name]:
                    await members.watch(int(count), session, name)
                case ["wait", version]:
                    await members.wait_received(int(version))
            print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(_run_commands(sys.argv[1]))
