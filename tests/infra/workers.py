"""Workers of the ping service, and a pool of them, for tests."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from dspex_persist.infra.workers.leases import Contact, Lease
from dspex_persist.infra.workers.options import PoolOptions
from dspex_persist.infra.workers.orphans import Run
from dspex_persist.infra.workers.pool import WorkerPool
from dspex_persist.infra.workers.worker import WorkerCommand
from tests.deadline import within

P = ParamSpec("P")

SCRIPT = Path(__file__).with_name("ping_worker.py")


def argv(*flags: str) -> list[str]:
    # Without what a user's site has to say: it starts in half the time.
    return [sys.executable, "-I", "-S", str(SCRIPT), *flags]


def command(*flags: str, **options: Any) -> WorkerCommand:
    """A ping worker on a Unix socket."""
    options = {"ready_timeout_s": within(10), "stop_timeout_s": within(5), **options}
    return WorkerCommand(argv("--socket", "{socket}", *flags), "unix:{socket}", **options)


class PingContact(Contact):
    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.address = ""
        self.is_closed = False

    async def connect(self, address: str) -> None:
        self.address = address

    async def ping(self) -> None:
        answer = await self.ask("ping")
        if not answer.isdecimal():
            raise ValueError(f"it answered {answer}")

    async def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True

    async def ask(self, *words: object) -> str:
        if self.address.startswith("unix:"):
            reader, writer = await asyncio.open_unix_connection(self.address.removeprefix("unix:"))
        else:
            reader, writer = await asyncio.open_connection(*self.address.split(":"))
        try:
            writer.write(" ".join(map(str, words)).encode() + b"\n")
            answer = await reader.readline()
        finally:
            writer.close()
        if not answer:
            raise ConnectionError("the connection was closed")
        return answer.decode().strip()


Pool = WorkerPool[PingContact]
PingLease = Lease[PingContact]


@asynccontextmanager
async def running(
    options: PoolOptions | None = None, *flags: str, name: str = "ping", **of: Any
) -> AsyncIterator[Pool]:
    """A pool of ping workers, in a run of its own."""
    run = Run(f"tests {os.getpid()} {time.monotonic_ns()}")
    pool = WorkerPool(name, of.pop("command", None) or command(*flags, **of), PingContact, run=run, options=options)
    try:
        async with pool:
            yield pool
    finally:
        run.close()


def on_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on an event loop, and fail it when it takes too long."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_limited(test(*args, **kwargs), within(20))

    return run


def run_limited(work: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """Run a coroutine on an event loop of its own."""

    async def limited() -> None:
        async with asyncio.timeout(timeout_s):
            await work

    asyncio.run(limited())


async def until(condition: Callable[[], bool], what: str = "") -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + within(15)
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what or condition}"
        await asyncio.sleep(0.01)


async def hold(pool: Pool, release: asyncio.Event, held: asyncio.Event | None = None, **how: Any) -> str:
    """Keep a worker until `release` is set; returns its id."""
    async with pool.lend(**how) as lease:
        if held is not None:
            held.set()
        await release.wait()
        return lease.worker


async def background(work: Awaitable[Any], ready: Callable[[], bool]) -> "asyncio.Task[Any]":
    """Start work, and wait until something holds."""
    task = asyncio.ensure_future(work)
    await until(lambda: ready() or task.done())
    return task  # type: ignore[return-value]
