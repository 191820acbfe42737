"""What a tool yields: kept, as its list is the result, and handed out."""

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
"""Hands one chunk to whoever asked; returns when it has been taken."""
_Taken: TypeAlias = "asyncio.Future[None]"


class Chunks:
    """What a tool has yielded, whose list is its result. It is measured while it comes: a tool may never stop."""

    def __init__(self, tool: str, limits: Limits) -> None:
        self._tool = tool
        self._limits = limits
        # One text: of very small chunks the objects would take a hundred times as much.
        self._text = io.StringIO()
        self._size_bytes = len("[]")

    def add(self, chunk: Value) -> Value:
        """Keep a chunk; `LimitExceededError` if it makes the result too large or too deep."""
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
        """The list of them."""
        return Value(f"[{self._text.getvalue()[1:]}]")


class Outlet:
    """Where the chunks of a request go, whichever of its attempts yields them. `broken`: what kept one from that."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.used = False
        self.broken: Exception | None = None

    async def hand_out(self, chunk: Value) -> None:
        """Give a chunk to whoever asked; returns when it has been taken."""
        self.used = True
        try:
            await self._emit(chunk)
        except Exception as error:
            self.broken = error
            raise


class ChunkQueue:
    """From the loop of an execution to the thread that takes its chunks, one at a time: whoever stops holds it back."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Value, _Taken] | None] = SimpleQueue()
        forks.tell(self)

    def forked(self, *, quiet: bool) -> None:
        """In a child there are no more chunks: what yields them runs in the parent. See `forks.Heir`."""
        self._queue = SimpleQueue()
        self._queue.put(None)

    async def emit(self, chunk: Value) -> None:
        """Hand a chunk over; returns when it has been taken."""
        taken = asyncio.get_running_loop().create_future()
        self._queue.put((chunk, taken))
        await taken

    def take_until(self, done: "Future[ToolOutcome]") -> Iterator[Value]:
        """The chunks, as they come, until `done` is; in a child of the process that made this, none."""
        done.add_done_callback(lambda _: self._queue.put(None))
        while (handed := self._queue.get()) is not None:
            chunk, taken = handed
            # The loop may have ended by now, with whoever waits on it; `done` says so.
            with contextlib.suppress(RuntimeError):
                taken.get_loop().call_soon_threadsafe(_let_go_on, taken)
            yield chunk


def _let_go_on(taken: _Taken) -> None:
    if not taken.done():
        taken.set_result(None)
