"""Tells the service manager (systemd, by the protocol of sd_notify) that this process is ready, alive, or ending.

Without a manager that asks for it (`NOTIFY_SOCKET`), nothing is sent. A message that cannot be delivered at once is
dropped: a manager that does not read must not stop the server.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

from dspex_persist.infra.logs import get_logger

_SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG: Final = "WATCHDOG_USEC"
_WATCHED: Final = "WATCHDOG_PID"
_PASSED, _PASSED_TO = "LISTEN_FDS", "LISTEN_PID"
_MICROS: Final = 1_000_000
# How much more time is asked for at once while something takes long, and how often.
_EXTENSION_S: Final = 30.0
_EXTEND_EVERY_S: Final = 5.0
# How often the status is sent anew without a watchdog.
_STATUS_EVERY_S: Final = 10.0
_STATUS_MAX: Final = 500
# What is idle may show only every second or two that it makes progress.
_LEAST_PATIENCE_S: Final = 2.5

_log: Final = get_logger(__name__)


def passed_sockets() -> int:
    """Return how many listening sockets the service manager has opened for this process (socket activation)."""
    if os.environ.get(_PASSED_TO) != str(os.getpid()):
        return 0
    text = os.environ.get(_PASSED, "")
    return int(text) if text.isdecimal() else 0


class Notifier:
    """Sends messages to the service manager. Usable from any thread.

    Args:
        address: The manager's socket: a path, or a name in the abstract namespace after `@`; None to send nothing.
        watchdog_s: After so many seconds without a sign of life the manager ends this process; None if it does not.
    """

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self._address = None
        self.watchdog_s = None
        if address and address[0] in "/@":
            self._address = "\0" + address[1:] if address[0] == "@" else address
            self.watchdog_s = watchdog_s
        self._status = ""
        self._failed = False

    @classmethod
    def of_process(cls) -> "Notifier":
        """Return the notifier for this process, and take it out of the environment, which child processes inherit."""
        taken = {name: os.environ.pop(name, "") for name in (_SOCKET, _WATCHDOG, _WATCHED)}
        micros, pid = taken[_WATCHDOG], taken[_WATCHED]
        is_watched = micros.isdecimal() and int(micros) > 0 and pid in ("", str(os.getpid()))
        return cls(taken[_SOCKET] or None, int(micros) / _MICROS if is_watched else None)

    @property
    def is_on(self) -> bool:
        """Whether a manager wants to be told."""
        return self._address is not None

    def ready(self, status: str) -> None:
        """Say that the process serves."""
        self._send("READY=1", self._status_line(status))

    def stopping(self, status: str) -> None:
        """Say that the process is ending."""
        self._send("STOPPING=1", self._status_line(status))

    def status(self, text: str) -> None:
        """Say in a few words, for people, what the process is doing."""
        if text != self._status:
            self._send(self._status_line(text))

    def alive(self) -> None:
        """Give a sign of life."""
        self._send("WATCHDOG=1")

    @contextlib.contextmanager
    def taking_long(self, most_s: float) -> Iterator[None]:
        """Have the manager wait for as long as the block takes, also if that blocks this thread.

        Args:
            most_s: After so many seconds, the manager's own time limit holds again.
        """
        if not self.is_on:
            yield
            return
        over = threading.Event()
        times = round(most_s / _EXTEND_EVERY_S)
        # The first time before the block, which may keep the thread from starting for a while.
        if times:
            self._extend()
        arguments = (over, times - 1)
        thread = threading.Thread(target=self._go_on, args=arguments, name="dspex-persist-notify", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _go_on(self, over: threading.Event, times: int) -> None:
        for _ in range(times):
            if over.wait(_EXTEND_EVERY_S):
                return
            self._extend()

    def _extend(self) -> None:
        self.extend(_EXTENSION_S)
        # A process that starts or stops is ended by the time limit, not by the watchdog.
        self.alive()

    def extend(self, seconds: float) -> None:
        """Ask for so much time from now on, if starting or stopping takes longer than the manager would wait."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * _MICROS)}")

    async def watch(self, silent_s: Callable[[], float], status: Callable[[], str]) -> None:
        """Give signs of life, at twice the rate that is needed, while the event loop runs and the rest makes progress.

        Args:
            silent_s: Returns for how many seconds the rest of the process has made no progress. After half the time of
                the watchdog there are no more signs, and the manager ends the process.
            status: Returns the status, which is sent along.
        """
        if not self.is_on:
            return
        every_s = _STATUS_EVERY_S if self.watchdog_s is None else self.watchdog_s / 2
        patience_s, was_alive = max(every_s, _LEAST_PATIENCE_S), True
        while True:
            quiet_s = silent_s()
            is_alive = quiet_s < patience_s
            if is_alive:
                self.status(status())
            if is_alive and self.watchdog_s is not None:
                self.alive()
            if was_alive and not is_alive:
                _log.error("no progress: the service manager gets no sign of life", silent_s=round(quiet_s, 1))
            was_alive = is_alive
            await asyncio.sleep(every_s)

    def _status_line(self, text: str) -> str:
        self._status = text
        # A line break would begin another message.
        return f"STATUS={' '.join(text.split())[:_STATUS_MAX]}"

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        message = "\n".join(lines).encode(errors="replace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                # A socket whose queue is full must not block.
                manager.setblocking(False)
                manager.sendto(message, self._address)
        except OSError as error:
            if not self._failed:
                self._failed = True
                _log.warning("the service manager cannot be told", reason=error.strerror or str(error))
