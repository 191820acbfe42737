"""BridgedWatch: a watch on a server, which goes on by itself after the connection or the server was lost."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, TypeAlias

import grpc

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.client.line import Line
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import BEGAN, INITIAL_VALUES, POSITION
from dspex_persist.state.bridge.inherited import OneProcess
from dspex_persist.state.bridge.status import is_broken, no_answer, unreadable
from dspex_persist.state.errors import EngineClosedError, OutcomeUnknownError, StateError, UnavailableError
from dspex_persist.state.model import Update, Value, Variable
from dspex_persist.state.watch import Watch

_BUFFERED_UPDATES: Final = 256
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# A stream that has lasted this long counts as restored, even if nothing has arrived on it.
_SETTLED_S: Final = 5.0
# How long closing waits for the thread.
_END_S: Final = 2.0

Resumption: TypeAlias = tuple[int, int]
"""The commit after which a watch resumes, and the one that began its session (0 if the server does not tell)."""

_logger: Final = get_logger(__name__)


class BridgedWatch(Watch):
    """A watch on a server. A thread reads the stream into a buffer, and stops reading while the buffer is full.

    If the stream breaks, the thread opens another one after the last commit that has arrived completely.

    Args:
        open_stream: Opens a stream: a new watch for None, or one that resumes.
        error_of: Returns the error that ended a stream.
        line: The connection to the server.
        session_id: The session, for the log.
        timeout_s: How long to wait until the server has begun a stream, in seconds.
        patience_s: How long to try to resume, in seconds; with 0 the first interruption ends the watch.
        on_update: Called with each update before the watcher gets it.

    Raises:
        StateError: The server refuses the watch, or cannot be reached.
    """

    def __init__(
        self,
        open_stream: Callable[[Resumption | None], Any],
        error_of: Callable[[Any], StateError],
        line: Line,
        *,
        session_id: str,
        timeout_s: float,
        patience_s: float,
        on_update: Callable[[Update], None] = lambda _: None,
    ) -> None:
        self._on_update = on_update
        self._open_stream = open_stream
        self._error_of = error_of
        self._line = line
        self._target = line.target
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._log = _logger.bind(session_id=session_id, address=line.target)
        self._lock = threading.Condition()
        self._buffer: deque[Update] = deque()
        self._whole = 0
        # The last values that are too large for the server to send them again with the next update.
        self._large: dict[str, Value] = {}
        self._error: StateError | None = None
        self._closed = False
        # Whether nothing has arrived on the stream that the watch resumed with last.
        self._is_fresh = False
        self._lost_at = 0.0
        self._wake: Callable[[], None] = lambda: None
        sent_at = line.now()
        self._use(open_stream(None))
        try:
            with self._limited(timeout_s):
                headers = self._begin()
                self.initial = tuple(self._take_initial() for _ in range(int(headers[INITIAL_VALUES])))
        except StateError:
            line.ended(self._call, sent_at)
            raise
        line.answered()
        self.position = self._received = int(headers[POSITION])
        self.first_sequence = int(headers.get(BEGAN, "0"))
        self._is_fresh = False
        self._thread = threading.Thread(target=self._run, name="dspex-persist-watch", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            # The system has no thread for it: nobody would ever end the stream.
            self._call.cancel()
            raise

    def _use(self, call: Any) -> None:
        """Read this stream from now on."""
        with self._lock:
            self._call = call
            self._here = OneProcess(self._target, call)
            self._is_fresh = True
            closed = self._closed
        if closed:
            call.cancel()

    @contextmanager
    def _limited(self, timeout_s: float) -> Iterator[None]:
        """Raise the error of the stream as a `StateError`, and cancel it if the block takes longer than this."""
        given_up = threading.Event()

        def give_up() -> None:
            given_up.set()
            self._call.cancel()

        timer = threading.Timer(timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except grpc.RpcError:
            is_late = given_up.is_set() and not self._closed
            raise no_answer(self._target, timeout_s, writes=False) if is_late else self._error_of(self._call) from None
        finally:
            timer.cancel()

    def _begin(self) -> dict[str, str]:
        """Wait until the server confirms the stream, and return its headers."""
        headers = dict(self._call.initial_metadata() or ())
        if POSITION not in headers:
            next(self._call)
        self._begun_at = self._line.now()
        return headers

    def _take_initial(self) -> Variable:
        variable = codec.update_of(next(self._call)).variable
        self._keep(variable.id, variable.value)
        return variable

    # The thread

    def _run(self) -> None:
        error = self._read()
        while error is None and (error := self._resume()) is None:
            error = self._read()
        with self._lock:
            self._error = EngineClosedError() if self._closed else error
        self._wake()

    def _read(self) -> StateError | None:
        """Read the stream to its end. Returns the error that ended it for good; None if it is worth resuming."""
        try:
            for message in self._call:
                self._take(message)
        except grpc.RpcError:
            return self._failure(self._error_of(self._call))
        except Exception as fault:  # noqa: BLE001 -- the thread would end, and the watcher wait forever
            self._call.cancel()
            return unreadable(self._target, fault)
        self.interrupted = UnavailableError(f"{self._target} ended the watch")
        return None

    def _failure(self, error: StateError) -> StateError | None:
        """The error of the stream if it is final. Otherwise None, and `interrupted` has it."""
        if self._closed or self._patience_s == 0 or not (_is_passing(error) or is_broken(self._call)):
            return error
        self.interrupted = error
        return None

    def _resume(self) -> StateError | None:
        """Open another stream after the last whole commit that has arrived. Returns why that is impossible."""
        with self._lock:
            # The rest of this commit will not come, but all of it again.
            while len(self._buffer) > self._whole:
                self._buffer.pop()
        now = self._line.now()
        if not self._is_fresh or now > self._begun_at + _SETTLED_S:
            self._lost_at = now
        log = self._log.bind(after_sequence=self._received)
        log.warning("watch interrupted", reason=str(self.interrupted))
        pause_s, attempts = _FIRST_PAUSE_S, 0
        while (left_s := self._lost_at + self._patience_s - self._line.now()) > 0:
            if self._is_closed_within(min(pause_s * self._line.jitter(), left_s)):
                return EngineClosedError()
            attempts, pause_s = attempts + 1, min(pause_s * 2, _LONGEST_PAUSE_S)
            try:
                self._use(self._open_stream((self._received, self.first_sequence)))
                with self._limited(min(self._timeout_s, left_s)):
                    self._begin()
            except ValueError:
                # The channel was closed meanwhile.
                return EngineClosedError()
            except StateError as failure:
                if (error := self._failure(failure)) is not None:
                    log.error("watch ended", reason=str(error))
                    return error
            else:
                self._line.answered()
                self.interrupted = None
                self.resumptions += 1
                log.info("watch resumed", attempts=attempts)
                return None
        log.error("watch given up", patience_s=self._patience_s, reason=str(self.interrupted))
        reason = (
            f"the watch did not get back within {self._patience_s:g} s; resume with after_sequence={self._received}"
        )
        return UnavailableError(f"{str(self.interrupted).removeprefix('unavailable: ')}; {reason}")

    def _is_closed_within(self, pause_s: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: self._closed, pause_s)

    def _take(self, message: pb.VariableUpdate) -> None:
        sequence = int(message.update_metadata[codec.COMMIT_SEQUENCE])
        self._is_fresh = False
        with self._lock:
            if message.update_type == "heartbeat":
                self._received = max(self._received, sequence)
                if not self._buffer:
                    self.position = max(self.position, sequence)
                return
            update = self._completed(codec.update_of(message))
            self._on_update(update)
            self._buffer.append(update)
            if update.part[0] < update.part[1]:
                return
            # Only whole commits are delivered and count as buffered: one commit may be larger than the buffer.
            self._whole = len(self._buffer)
            self._received = update.sequence
        self._wake()
        with self._lock:
            self._lock.wait_for(lambda: self._whole < _BUFFERED_UPDATES or self._closed)

    def _completed(self, update: Update) -> Update:
        """The update, with the previous value if that is too large for the message but was in an earlier one."""
        version = update.version
        if version is None:
            return update
        if update.previous is None:
            update = replace(update, previous=self._large.get(version.variable_id))
        self._keep(version.variable_id, version.value)
        return update

    def _keep(self, variable_id: str, value: Value | None) -> None:
        if value is not None and codec.is_left_out(value):
            self._large[variable_id] = value
        else:
            self._large.pop(variable_id, None)

    # The watcher

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

    def end(self) -> None:
        """Stop watching, without waiting for the thread. Updates that have arrived can still be pulled."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            call = self._call
        call.cancel()

    def close(self) -> None:
        """Stop watching."""
        if self._here.refusal is not None:
            return
        self.end()
        if threading.current_thread() is not self._thread:
            # Ctrl-C may have come while the lock was being taken: nobody releases it then, and the thread waits for it.
            self._thread.join(_END_S)


def _is_passing(error: StateError) -> bool:
    """Whether a later attempt may succeed: the server may be restarting, with its store closed already."""
    return error.retryable or isinstance(error, EngineClosedError | OutcomeUnknownError)
