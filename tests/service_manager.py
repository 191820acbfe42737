"""A service manager as far as servers notice: a socket that takes the messages of sd_notify."""

import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.deadline import within

READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"


class ServiceManager:
    """Receives messages at `address`, a path or (with `@`) a name without a file. Use it as a context manager."""

    def __init__(self, address: Path | str) -> None:
        self.address = str(address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)

    def environment(self, watchdog_s: float | None = None) -> dict[str, str]:
        """What the environment of the service has in addition."""
        watchdog = {} if watchdog_s is None else {"WATCHDOG_USEC": str(round(watchdog_s * 1_000_000))}
        return {"NOTIFY_SOCKET": self.address, **watchdog}

    def next(self) -> list[str]:
        """Return the lines of the next message."""
        self._socket.settimeout(within(30))
        return self._socket.recv(65536).decode().splitlines()

    def until(self, start: str) -> list[str]:
        """Return all lines up to the one that starts like this, and those of its message."""
        lines: list[str] = []
        while True:
            message = self.next()
            lines += message
            if any(line.startswith(start) for line in message):
                return lines

    def waiting(self) -> list[str]:
        """Return the lines of all messages that are there already."""
        lines: list[str] = []
        self._socket.setblocking(False)
        try:
            while True:
                lines += self._socket.recv(65536).decode().splitlines()
        except BlockingIOError:
            return lines

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
        if not self.address.startswith("@"):
            os.unlink(self.address)  # noqa: PTH108 -- its own socket
