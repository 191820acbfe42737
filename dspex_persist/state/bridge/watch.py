"""BridgedWatch: a watch on a server."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import grpc

from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import INITIAL_VALUES, POSITION
from dspex_persist.state.bridge.inherited import OneProcess
from dspex_persist.state.bridge.status import no_answer, unreadable
from dspex_persist.state.errors import EngineClosedError, StateError
from dspex_persist.state.model import Update, Variable
from dspex_persist.state.watch import Watch

_BUFFERED_UPDATES: Final = 256


class BridgedWatch(Watch):
    """A watch on a server. A thread reads the stream into a buffer, and stops reading while the buffer is full."""

    def __init__(self, call: Any, timeout_s: float, target: str, error_of: Callable[[Any], StateError]) -> None:
        self._call = call
        self._target = target
        self._error_of = error_of
        self._here = OneProcess(target, call)
        self._lock = threading.Condition()
        self._buffer: deque[Update] = deque()
        self._whole = 0
        self._error: StateError | None = None
        self._closed = self._given_up = False
        self._wake: Callable[[], None] = lambda: None
        give_up = threading.Timer(timeout_s, self._give_up)
        give_up.daemon = True
        give_up.start()
        try:
            headers = self._begin()
            self.position = int(headers[POSITION])
            self.initial = self._take_initial(int(headers[INITIAL_VALUES]))
        except grpc.RpcError:
            error = no_answer(target, timeout_s, writes=False) if self._given_up else error_of(call)
            raise error from None
        finally:
            give_up.cancel()
        self._thread = threading.Thread(target=self._read, name="dspex-persist-watch", daemon=True)
        self._thread.start()

    def _give_up(self) -> None:
        self._given_up = True
        self._call.cancel()

    def _begin(self) -> dict[str, str]:
        """Wait until the server confirms the watch."""
        headers = dict(self._call.initial_metadata() or ())
        if POSITION not in headers:
            next(self._call)
        return headers

    def _take_initial(self, count: int) -> tuple[Variable, ...]:
        return tuple(codec.update_of(next(self._call)).variable for _ in range(count))

    def _read(self) -> None:
        error: StateError = EngineClosedError()
        try:
            for message in self._call:
                self._take(message)
        except grpc.RpcError:
            if not self._closed:
                error = self._error_of(self._call)
        except Exception as fault:  # noqa: BLE001 -- the thread would end, and the watcher wait forever
            self._call.cancel()
            error = unreadable(self._target, fault)
        with self._lock:
            self._error = error
        self._wake()

    def _take(self, message: pb.VariableUpdate) -> None:
        sequence = int(message.update_metadata[codec.COMMIT_SEQUENCE])
        with self._lock:
            if message.update_type == "heartbeat":
                if not self._buffer:
                    self.position = max(self.position, sequence)
                return
            update = codec.update_of(message)
            self._buffer.append(update)
            if update.part[0] < update.part[1]:
                return
            # Only whole commits are delivered and count as buffered: one commit may be larger than the buffer.
            self._whole = len(self._buffer)
        self._wake()
        with self._lock:
            self._lock.wait_for(lambda: self._whole < _BUFFERED_UPDATES or self._closed)

    def pull(self) -> list[Update]:
        """See `Watch.pull`."""
        self._here.check()
        with self._lock:
            updates = [self._buffer.popleft() for _ in range(self._whole)]
            self._whole = 0
            if updates:
                self.position = updates[-1].sequence
                self._lock.notify_all()
            elif self._error is not None:
                raise self._error
        return updates

    def pull_ready(self) -> list[Update]:
        """See `Watch.pull_ready`."""
        return self.pull()

    def notify(self, wake: Callable[[], None]) -> None:
        """See `Watch.notify`."""
        self._here.check()
        with self._lock:
            self._wake = wake
            ended = self._error is not None
        if ended:
            wake()

    def close(self) -> None:
        """Stop watching."""
        if self._here.refusal is not None:
            return
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()
