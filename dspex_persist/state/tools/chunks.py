"""The chunks that a streaming tool yields: collected into its result, and delivered to the client as they come."""

import asyncio
import contextlib
import io
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeAlias

from dspex_persist.infra import forks
from dspex_persist.state.errors import LimitExceededError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ToolOutcome, Value
from dspex_persist.state.tools.results import checked

Emit: TypeAlias = Callable[[Value], Awaitable[None]]
"""Delivers one chunk to the client; returns once the client has accepted it."""
_Receipt: TypeAlias = "asyncio.Future[None]"


class Chunks:
    """Collects the chunks of a tool; their list is its result.

    The limits apply to each chunk as it comes, because a tool may never stop yielding.
    """

    def __init__(self, tool: str, limits: Limits) -> None:
        self._tool = tool
        self._limits = limits
        # One text instead of a list: as objects, very small chunks would take a hundred times the memory.
        self._text = io.StringIO()
        self._size_bytes = len("[]")

    def add(self, chunk: Value) -> Value:
        """Append a chunk and return it.

        Raises:
            LimitExceededError: The chunk makes the result too large or nests too deeply.
        """
        checked(self._tool, Value(f"[{chunk.json}]"), self._limits)
        self._size_bytes += chunk.size_bytes + len(",")
        most = self._limits.stream_size_bytes
        if self._size_bytes > most:
            raise LimitExceededError(
                f"size of the result of {quote(self._tool)}", self._size_bytes, most, "stream_size_bytes"
            )
        self._text.write(f",{chunk.json}")
        return chunk

    def result(self) -> Value:
        """Return the list of all chunks, as JSON."""
        return Value(f"[{self._text.getvalue()[1:]}]")


class Outlet:
    """Delivers the chunks of one request, from all of its attempts.

    Attributes:
        used: Whether any chunk has been passed on, after which the request cannot be retried.
        broken: The error of a failed delivery.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.used = False
        self.broken: Exception | None = None

    async def hand_out(self, chunk: Value) -> None:
        """Deliver a chunk; returns once the client has accepted it."""
        self.used = True
        try:
            await self._emit(chunk)
        except Exception as error:
            self.broken = error
            raise


class ChunkQueue:
    """Passes chunks one at a time from the loop of an execution to a thread, so a slow reader slows the tool down."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Value, _Receipt] | None] = SimpleQueue()
        forks.register(self)

    def forked(self, *, quiet: bool) -> None:
        """End the queue in a child process: the tool runs in the parent. See `forks.ForkListener`."""
        self._queue = SimpleQueue()
        self._queue.put(None)

    async def emit(self, chunk: Value) -> None:
        """Pass a chunk on; returns once the reader has accepted it."""
        receipt = asyncio.get_running_loop().create_future()
        self._queue.put((chunk, receipt))
        await receipt

    def take_until(self, done: "Future[ToolOutcome]") -> Iterator[Value]:
        """Yield the chunks as they come, until `done` is resolved. In a forked child there are none."""
        done.add_done_callback(lambda _: self._queue.put(None))
        while (entry := self._queue.get()) is not None:
            chunk, receipt = entry
            # The loop may have ended by now, together with the tool that waits there; `done` reports that.
            with contextlib.suppress(RuntimeError):
                receipt.get_loop().call_soon_threadsafe(_acknowledge, receipt)
            yield chunk


def _acknowledge(receipt: _Receipt) -> None:
    if not receipt.done():
        receipt.set_result(None)
