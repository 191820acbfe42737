"""What a worker writes to stdout and stderr: its lines go to the log, within limits, and one says that it is ready.

Lines that are events of a log of ours are logged as what they are, with their level and fields.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any, Final

from dspex_persist.infra import forks
from dspex_persist.infra.logs import EventLogger

_CHUNK_BYTES: Final = 64 * 1024
_LINE_BYTES: Final = 2_000
_TAIL_BYTES: Final = 4_000
# A worker that writes more than this at once has to wait: reading it would keep the event loop from its work.
_SLICE_BYTES: Final = 1024 * 1024
_SLICE_S: Final = 0.05
# Lines that the log takes at once, and how many more each second.
_BURST: Final = 500
_LINES_PER_S: Final = 50.0
_REPORT_S: Final = 1.0
_LEVELS: Final = {name.lower(): number for name, number in logging.getLevelNamesMapping().items()}

_MARK: Final = b"GRPC_READY:"
_PORT: Final = rb"GRPC_READY:([0-9]{1,5})"
# On stdout it is a line of its own. On stderr it may be the text of a line of a log.
READY_LINE: Final = re.compile(rb"^[ \t]*" + _PORT + rb"\s*$", re.MULTILINE)
READY_IN_LINE: Final = re.compile(rb"(?<!\w)" + _PORT + rb"(?!\w)")


class Output:
    """One stream of a worker, read on the event loop.

    Attributes:
        writer: The descriptor to give to the child; close it with `started` once the child has it.
    """

    def __init__(
        self, stream: str, ready: re.Pattern[bytes], on_ready: Callable[[int], None], logger: EventLogger
    ) -> None:
        """Open the pipe.

        Args:
            stream: Its name in the log.
            ready: Finds the port in the line that says that the worker is ready.
            on_ready: Called with the port, once.
            logger: Where lines go.
        """
        self._logger = logger.bind(stream=stream)
        self._ready: re.Pattern[bytes] | None = ready
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        # A forked child that kept it open would keep the worker from noticing that nobody reads.
        forks.own(self._reader)
        self._open = True
        self._resume: asyncio.TimerHandle | None = None
        self._slice_ends = self._slice_bytes = 0.0
        self._line = bytearray()
        self._is_cut = False
        self._tail = bytearray()
        self._allowed, self._refilled = float(_BURST), self._loop.time()
        self._dropped, self._reported = 0, self._loop.time()
        self._loop.add_reader(self._reader, self._read)

    def started(self) -> None:
        """Close this process's copy of the writing end."""
        os.close(self.writer)

    def tail(self) -> str:
        """Return the last lines, up to 4 KB; after `forget`, only what came since."""
        return (bytes(self._tail) + bytes(self._line))[-_TAIL_BYTES:].decode(errors="replace").strip()

    def forget(self) -> None:
        """Leave what the worker has written so far out of `tail`."""
        if self._open:
            # What it wrote before may still be in the pipe.
            self._read_rest()
            if self._line:
                self._end_line(b"")
        self._tail.clear()

    def close(self) -> None:
        """Read what the pipe still has, and close it. May be called again."""
        if not self._open:
            return
        self._read_rest()
        self._end()

    def _read_rest(self) -> None:
        for _ in range(_SLICE_BYTES // _CHUNK_BYTES):
            if not self._read_chunk():
                break

    def _read(self) -> None:
        read = self._read_chunk()
        if read is None:
            return
        if not read:
            self._end()
            return
        now = self._loop.time()
        if now >= self._slice_ends:
            self._slice_ends, self._slice_bytes = now + _SLICE_S, 0
        self._slice_bytes += read
        if self._slice_bytes > _SLICE_BYTES:
            self._loop.remove_reader(self._reader)
            self._resume = self._loop.call_at(self._slice_ends, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        self._loop.add_reader(self._reader, self._read)

    def _read_chunk(self) -> int | None:
        """Return the number of bytes read; None if there are none now."""
        try:
            chunk = os.read(self._reader, _CHUNK_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return 0
        self._take(chunk)
        return len(chunk)

    def _end(self) -> None:
        self._open = False
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._reader)
        forks.close(self._reader)
        if self._line:
            self._end_line(b"")
        self._report_dropped()

    def _take(self, chunk: bytes) -> None:
        # Without the mark there is nothing to look for line by line.
        is_looking = self._ready is not None and _MARK in bytes(self._line) + chunk
        at = 0
        while (end := chunk.find(b"\n", at)) >= 0:
            if not is_looking and not self._may_log():
                # Only counted: a flood of lines would take long.
                last = chunk.rfind(b"\n")
                self._dropped += chunk.count(b"\n", at)
                self._keep_tail(chunk[max(at, last - _TAIL_BYTES) : last + 1])
                self._line.clear()
                self._is_cut = False
                at = last + 1
                break
            self._end_line(chunk[at:end])
            at = end + 1
        rest = chunk[at:]
        room = _LINE_BYTES - len(self._line)
        self._line += rest[:room]
        self._is_cut = self._is_cut or len(rest) > room

    def _end_line(self, last: bytes) -> None:
        room = _LINE_BYTES - len(self._line)
        line = bytes(self._line) + last[:room]
        is_cut = self._is_cut or len(last) > room
        self._line.clear()
        self._is_cut = False
        if (not is_cut and self._looks_ready(line)) or not line.strip():
            return
        self._keep_tail(line + b"\n")
        if not self._may_log():
            self._dropped += 1
            return
        if self._refilled - self._reported >= _REPORT_S:
            self._report_dropped()
        self._allowed -= 1
        text = line.decode(errors="replace").rstrip()
        if is_cut:
            self._logger.info("a worker wrote", text=text, cut=True)
        elif (event := _event_in(text)) is not None:
            self._logger.log(*event)
        else:
            self._logger.info("a worker wrote", text=text)

    def _looks_ready(self, line: bytes) -> bool:
        if self._ready is None or _MARK not in line or not (match := self._ready.search(line)):
            return False
        self._ready = None
        self._on_ready(int(match[1]))
        return True

    def _keep_tail(self, text: bytes) -> None:
        self._tail += text
        del self._tail[:-_TAIL_BYTES]

    def _may_log(self) -> bool:
        now = self._loop.time()
        self._allowed = min(_BURST, self._allowed + (now - self._refilled) * _LINES_PER_S)
        self._refilled = now
        return self._allowed >= 1

    def _report_dropped(self) -> None:
        if self._dropped:
            self._logger.warning("a worker writes more than is logged; lines were left out", lines=self._dropped)
            self._dropped, self._reported = 0, self._refilled


def _event_in(text: str) -> tuple[int, str, dict[str, Any]] | None:
    """Return the level, the event and the fields of a line that `JsonLines` has written, or something like it."""
    if not text.startswith("{"):
        return None
    try:
        fields = json.loads(text)
        level = _LEVELS[fields.pop("level")]
        event = fields.pop("event")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    # The server logs it at once, and its line has a time of its own.
    fields.pop("timestamp", None)
    return (level, event, fields) if isinstance(event, str) else None
