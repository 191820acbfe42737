"""What a tool yields, handed from the loop of its execution to a thread that takes it."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeAlias

from dspex_persist.state.model import ToolOutcome, Value

_Taken: TypeAlias = "asyncio.Future[None]"


class ChunkQueue:
    """One chunk at a time: whoever stops taking them holds the tool back."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Value, _Taken] | None] = SimpleQueue()

    async def emit(self, chunk: Value) -> None:
        """Hand a chunk over; returns when it has been taken."""
        taken = asyncio.get_running_loop().create_future()
        self._queue.put((chunk, taken))
        await taken

    def take_until(self, done: "Future[ToolOutcome]") -> Iterator[Value]:
        """The chunks, as they come, until `done` is."""
        done.add_done_callback(lambda _: self._queue.put(None))
        while (handed := self._queue.get()) is not None:
            chunk, taken = handed
            taken.get_loop().call_soon_threadsafe(_let_go_on, taken)
            yield chunk


def _let_go_on(taken: _Taken) -> None:
    if not taken.done():
        taken.set_result(None)
