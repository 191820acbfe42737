"""Sends one command to a server, and repeats it while the connection fails and repeating it is safe."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grpc

from dspex_persist.state.bridge.client.line import FIRST_PAUSE_S, LEAST_S, LONGEST_PAUSE_S, Line
from dspex_persist.state.bridge.headers import Headers
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.bridge.status import error_of_call, error_of_write, is_lost, never_sent, no_answer, unreadable
from dspex_persist.state.commands import Command, ExecuteTool
from dspex_persist.state.errors import (
    CircuitOpenError,
    EngineClosedError,
    InvalidArgumentError,
    LimitExceededError,
    OutcomeUnknownError,
    RateLimitedError,
    ShuttingDownError,
    StateError,
)


class Attempt:
    """One command on its way to a server.

    A read is repeated if the connection broke, or was lost since the server last answered, until the breaker opens; a
    write only with an idempotency key, even while the breaker is open. Both are repeated when the server says that the
    caller makes too many calls. All of it happens within the timeout.

    Args:
        stub: The callable of the rpc.
        rpc: How the command is sent.
        command: The command.
        headers: Returns the headers of a command.
        timeout_s: How long a request may take, repetitions included. A list in several answers has it for each.
        lost_s: How long to repeat the command after the connection was lost.
        line: The connection to the server.
        has_key: Whether the command has an idempotency key.
        before: Called with the result, or with None after a failure, before the future has it.
    """

    def __init__(
        self,
        stub: Any,
        rpc: Rpc[Any, Any],
        command: Command[Any],
        headers: Callable[[Command[Any]], Headers],
        timeout_s: float,
        lost_s: float,
        line: Line,
        *,
        has_key: bool,
        before: Callable[[Any], None] | None = None,
    ) -> None:
        self._stub = stub
        self._rpc = rpc
        self._command = command
        self._has_key = has_key
        self._headers_of = headers
        self._timeout_s = timeout_s
        self._line = line
        self._deadline = line.now() + timeout_s
        self._rows: list[Any] = []
        # Separate from the timeout, because a tool may take much longer than it makes sense to wait for a lost server.
        self._lost_s = lost_s
        self._give_up_at: float | None = None
        self._unknown: OutcomeUnknownError | None = None
        self._pause_s = FIRST_PAUSE_S
        self._before = before
        self._future: Future[Any] = Future()

    def start(self) -> Future[Any]:
        """Send the command; returns a future of its result."""
        return self._begin(self._send)

    def run(self) -> Any:
        """Send the command, and wait for its result on this thread, which takes gRPC less time than a future does."""
        return self._begin(self._send_and_wait).result()

    def _begin(self, send: Callable[[], None]) -> Future[Any]:
        self._future.set_running_or_notify_cancel()
        try:
            self._write()
            self._line.admit()
            send()
        except (CircuitOpenError, InvalidArgumentError, LimitExceededError) as error:
            self._fail(error)
        except (ValueError, TypeError) as error:
            # A message cannot carry it: a lone surrogate, or a number too large for its field.
            self._fail(InvalidArgumentError("request", str(error)))
        return self._future

    def _resolve(self, result: Any) -> None:
        if self._before is not None:
            self._before(result)
        self._future.set_result(result)

    def _fail(self, error: StateError) -> None:
        if self._before is not None:
            self._before(None)
        self._future.set_exception(error)

    def _write(self) -> None:
        self._headers = self._headers_of(self._command)
        self._request = self._rpc.request_of(self._command)

    def _send_again(self) -> None:
        try:
            self._send()
        except ValueError:
            # The channel was closed meanwhile.
            self._fail(EngineClosedError())

    def _send(self) -> None:
        call = self._stub.future(self._request, timeout=self._left_s(), metadata=self._headers)
        call.add_done_callback(self._done)

    def _send_and_wait(self) -> None:
        try:
            response, call = self._stub.with_call(self._request, timeout=self._left_s(), metadata=self._headers)
        except grpc.RpcError as error:
            # The error is the call, too.
            self._ended(error)
        except BaseException as error:
            if not isinstance(error, Exception) and self._before is not None:
                # Ctrl-C, for example.
                self._before(None)
            raise
        else:
            self._took(response, call)

    def _left_s(self) -> float:
        self._sent_at = self._line.now()
        return max(LEAST_S, self._deadline - self._sent_at)

    def _done(self, call: Any) -> None:
        try:
            response = call.result()
        except grpc.RpcError:
            self._ended(call)
        except grpc.FutureCancelledError:
            self._fail(EngineClosedError())
        else:
            self._took(response, call)

    def _took(self, response: Any, call: Any) -> None:
        self._line.answered()
        try:
            self._answered(response, call)
        except Exception as error:  # noqa: BLE001 -- gRPC's thread would swallow it, and the caller wait forever
            self._fail(unreadable(self._line.target, error))

    def _ended(self, call: Any) -> None:
        # A tool may take as long as its caller waits.
        self._line.ended(call, self._sent_at, told=not isinstance(self._command, ExecuteTool))
        self._failed(call)

    def _answered(self, response: Any, call: Any) -> None:
        def trailer(name: str) -> str | None:
            return next((text for key, text in call.trailing_metadata() or () if key == name), None)

        result = self._rpc.result_of(self._command, response, trailer)
        if self._rpc.rest_of is None:
            self._resolve(result)
            return
        self._rows += result
        rest = self._rpc.rest_of(self._command, result, trailer)
        if rest is None:
            self._resolve(self._rows)
            return
        self._command = rest
        self._deadline = self._line.now() + self._timeout_s
        self._write()
        self._send_again()

    def _failed(self, call: Any) -> None:
        lost, writes = is_lost(call), self._command.writes
        error = self._error_of(call)
        unsettled = lost or isinstance(error, OutcomeUnknownError | EngineClosedError | ShuttingDownError)
        if isinstance(error, OutcomeUnknownError):
            self._unknown = error
        # A server that can no longer be reached may still have done it before: the outcome stays unknown.
        final = self._unknown if self._unknown is not None and lost else error
        if isinstance(error, RateLimitedError):
            # Nothing was done, so that a write can be repeated, too.
            pause_s, self._pause_s = max(error.retry_in_s, self._pause_s), min(self._pause_s * 2, LONGEST_PAUSE_S)
            self._send_later(pause_s * (2 - self._line.jitter()), final, self._deadline)
        elif unsettled and (self._has_key if writes else self._may_read_again(lost, call)):
            pause_s, self._pause_s = self._pause_s * self._line.jitter(), min(self._pause_s * 2, LONGEST_PAUSE_S)
            self._send_later(pause_s, final, self._until())
        else:
            self._fail(final)

    def _may_read_again(self, lost: bool, call: Any) -> bool:
        """Whether a read is worth another attempt. A server that has never answered is most likely not there."""
        is_there = self._line.has_answered or not (lost and never_sent(call.details() or ""))
        return is_there and self._line.state == "closed"

    def _error_of(self, call: Any) -> StateError:
        writes, target = self._command.writes, self._line.target
        if is_lost(call) and call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return no_answer(target, self._timeout_s, writes=writes)
        return (error_of_write if writes else error_of_call)(call, target)

    def _until(self) -> float:
        """The end of the repetitions, counted from the first failure."""
        if self._give_up_at is None:
            self._give_up_at = min(self._deadline, self._line.now() + self._lost_s)
        return self._give_up_at

    def _send_later(self, pause_s: float, error: StateError, until: float) -> None:
        """Send it again after a pause; it fails with `error` if it would come after `until`."""
        if self._line.now() + pause_s >= until:
            self._fail(error)
            return

        def send() -> None:
            wait_s = self._line.wait_s()
            if not wait_s:
                self._send_again()
            elif self._command.writes:
                self._send_later(wait_s, error, until)
            else:
                self._fail(error)

        self._line.later(pause_s, send)
