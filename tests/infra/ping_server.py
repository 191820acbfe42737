"""A real server of the ping service, run as a process: `python -m tests.infra.ping_server`."""

import argparse
import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from dspex_persist.errors import DspexError
from dspex_persist.infra.listen import ListenError
from dspex_persist.infra.log_output import configure_logs
from dspex_persist.infra.server import RpcStatus, ServerOptions, Service, serve
from tests.infra import ping

REFUSED = 3
SECRET = "secret-of-/var/lib"


class KnownError(DspexError):
    """An error in the table. Its text is its argument."""


class SlowClientError(DspexError):
    """The client does not read its messages."""


def status_of(error: Exception) -> RpcStatus | None:
    if isinstance(error, KnownError):
        trailers = (("x-line", "a\nb"), ("x-long", "x" * 10_000), ("x-kind", "known"), ("x-kind-bin", b"\0"))
        return RpcStatus(grpc.StatusCode.FAILED_PRECONDITION, str(error), trailers)
    if isinstance(error, SlowClientError):
        return RpcStatus(grpc.StatusCode.ABORTED, "too slow")
    if isinstance(error, LookupError):
        raise ValueError(f"the table itself fails: {error}")
    return None


class Pinger:
    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self._streams = 0
        self._changed = asyncio.Condition()

    async def drain(self) -> None:
        self.draining.set()

    async def Ping(self, request: StringValue, _context: object) -> StringValue:
        return request

    async def Fail(self, request: StringValue, context: Any) -> None:
        """Fail in the way that the request names; any other text becomes the text of a known error."""
        match request.value:
            case "unknown":
                raise RuntimeError(SECRET)
            case "table":
                raise LookupError(SECRET)
            case "abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "its own words")
            case "cancelled":
                # Cancels a future that the call waits for, not the call.
                future = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
            case "long":
                raise KnownError("é" * 100_000)
            case "surrogate":
                raise KnownError("a\ud800z")
            case text if text != "no message":
                raise KnownError(text)

    async def FinishInDrain(self, request: StringValue, _context: object) -> StringValue:
        async with self._stream():
            await self.draining.wait()
            return request

    async def Stuck(self, _request: StringValue, _context: object) -> StringValue:
        async with self._stream():
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                # Slow, like a transaction that is rolled back.
                await asyncio.sleep(0.3)
                structlog.get_logger().info("cleaned up")
        raise AssertionError("unreachable")

    async def StreamsOpen(self, request: Int32Value, _context: object) -> Int32Value:
        async with self._changed:
            await self._changed.wait_for(lambda: self._streams == request.value)
        return request

    async def CountTo(self, request: Int32Value, _context: object) -> AsyncIterator[Int32Value]:
        if request.value < 0:
            raise KnownError("cannot count down")
        for number in range(request.value):
            yield Int32Value(value=number)

    async def Idle(self, request: StringValue, _context: object) -> AsyncIterator[StringValue]:
        async with self._stream():
            yield request
            await self.draining.wait()

    async def Flood(self, request: Int32Value, context: Any) -> None:
        async with self._stream():
            message = StringValue(value="x" * request.value)
            try:
                while True:
                    async with asyncio.timeout(0.5):
                        await context.write(message)
            except TimeoutError:
                raise SlowClientError from None

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[None]:
        await self._count(1)
        try:
            yield
        finally:
            await self._count(-1)

    async def _count(self, change: int) -> None:
        async with self._changed:
            self._streams += change
            self._changed.notify_all()


async def run(options: ServerOptions, *, admit_first: bool, read_within_s: float | None) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    pinger = Pinger()
    await serve(
        options,
        [Service(ping.DESCRIPTOR, pinger, read_within_s)],
        status_of=status_of,
        reads_first=lambda *_: not admit_first,
        on_ready=lambda port: print(f"GRPC_READY:{port}", flush=True),
        stop=stop,
        on_drain=pinger.drain,
    )
    structlog.get_logger().info("served")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--grace-s", type=float, default=10.0)
    parser.add_argument("--keepalive-s", type=float, default=30.0)
    parser.add_argument("--max-message-bytes", type=int, default=100 * ping.MIB)
    parser.add_argument("--client-ping-interval-s", type=float, default=5.0)
    parser.add_argument("--streams-per-connection", type=int, default=1000)
    parser.add_argument("--handshake-timeout-s", type=float, default=20.0)
    parser.add_argument("--admit-first", action="store_true")
    parser.add_argument("--read-within-s", type=float)
    arguments = parser.parse_args()
    configure_logs("info", "json")
    options = ServerOptions(
        arguments.listen,
        max_message_bytes=arguments.max_message_bytes,
        grace_s=arguments.grace_s,
        keepalive_time_s=arguments.keepalive_s,
        keepalive_timeout_s=arguments.keepalive_s,
        client_ping_interval_s=arguments.client_ping_interval_s,
        streams_per_connection=arguments.streams_per_connection,
        handshake_timeout_s=arguments.handshake_timeout_s,
    )
    try:
        asyncio.run(run(options, admit_first=arguments.admit_first, read_within_s=arguments.read_within_s))
    except ListenError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
