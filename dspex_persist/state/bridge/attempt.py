"""Sends one command to a server, and repeats it while the outcome is unknown and an idempotency key makes that safe."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grpc

from dspex_persist.state.bridge.headers import Headers
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.bridge.status import error_of_call, error_of_write, is_lost, unreadable
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    LimitExceededError,
    OutcomeUnknownError,
    ShuttingDownError,
)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class Attempt:
    """One command on its way to a server.

    Args:
        stub: The callable of the rpc.
        rpc: How the command is sent.
        command: The command.
        headers: Returns the headers of a command.
        timeout_s: How long a request may take, repetitions included. A list in several answers has it for each.
        lost_s: How long to repeat the command after the connection was lost.
        target: The server, for errors.
        repeatable: Whether the command has an idempotency key.
    """

    def __init__(
        self,
        stub: Any,
        rpc: Rpc[Any, Any],
        command: Command[Any],
        headers: Callable[[Command[Any]], Headers],
        timeout_s: float,
        lost_s: float,
        target: str,
        *,
        repeatable: bool,
    ) -> None:
        self._stub = stub
        self._rpc = rpc
        self._command = command
        self._repeatable = repeatable
        self._headers_of = headers
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._rows: list[Any] = []
        # Separate from the timeout, because a tool may take much longer than it makes sense to wait for a lost server.
        self._lost_s = lost_s
        self._give_up_at: float | None = None
        self._unknown: OutcomeUnknownError | None = None
        self._target = target
        self._pause_s = _FIRST_PAUSE_S
        self._future: Future[Any] = Future()

    def start(self) -> Future[Any]:
        """Send the command; returns a future of its result."""
        self._future.set_running_or_notify_cancel()
        try:
            self._write()
            self._send()
        except (InvalidArgumentError, LimitExceededError) as error:
            self._future.set_exception(error)
        except (ValueError, TypeError) as error:
            # A message cannot carry it: a lone surrogate, or a number too large for its field.
            self._future.set_exception(InvalidArgumentError("request", str(error)))
        return self._future

    def _write(self) -> None:
        self._headers = self._headers_of(self._command)
        self._request = self._rpc.request_of(self._command)

    def _send_again(self) -> None:
        try:
            self._send()
        except ValueError:
            # The channel was closed meanwhile.
            self._future.set_exception(EngineClosedError())

    def _send(self) -> None:
        left_s = max(0.001, self._deadline - time.monotonic())
        call = self._stub.future(self._request, timeout=left_s, metadata=self._headers)
        call.add_done_callback(self._done)

    def _done(self, call: Any) -> None:
        try:
            response = call.result()
        except grpc.RpcError:
            self._failed(call)
        except grpc.FutureCancelledError:
            self._future.set_exception(EngineClosedError())
        else:
            try:
                self._answered(response, call)
            except Exception as error:  # noqa: BLE001 -- gRPC's thread would swallow it, and the caller wait forever
                self._future.set_exception(unreadable(self._target, error))

    def _answered(self, response: Any, call: Any) -> None:
        def trailer(name: str) -> str | None:
            return next((text for key, text in call.trailing_metadata() or () if key == name), None)

        result = self._rpc.result_of(self._command, response, trailer)
        if self._rpc.rest_of is None:
            self._future.set_result(result)
            return
        self._rows += result
        rest = self._rpc.rest_of(self._command, result, trailer)
        if rest is None:
            self._future.set_result(self._rows)
            return
        self._command = rest
        self._deadline = time.monotonic() + self._timeout_s
        self._write()
        self._send_again()

    def _failed(self, call: Any) -> None:
        lost = is_lost(call)
        error = (error_of_write if self._command.writes else error_of_call)(call, self._target)
        unsettled = lost or isinstance(error, OutcomeUnknownError | EngineClosedError | ShuttingDownError)
        if isinstance(error, OutcomeUnknownError):
            self._unknown = error
        if unsettled and self._repeatable and time.monotonic() + self._pause_s < self._until():
            self._send_later()
        else:
            # A server that can no longer be reached may still have done it before: the outcome stays unknown.
            self._future.set_exception(self._unknown if self._unknown is not None and lost else error)

    def _until(self) -> float:
        """The end of the repetitions, counted from the first failure."""
        if self._give_up_at is None:
            self._give_up_at = min(self._deadline, time.monotonic() + self._lost_s)
        return self._give_up_at

    def _send_later(self) -> None:
        timer = threading.Timer(self._pause_s, self._send_again)
        timer.daemon = True
        timer.start()
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
