"""The guard that every call passes: it counts calls, refuses late ones, and answers those that fail.

A request that does not parse is answered with INVALID_ARGUMENT, and an error that the caller's table knows with the
status from there. Any other error is answered with INTERNAL and a reference, under which the log has its text and
traceback.
"""

import asyncio
import secrets
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import grpc

from dspex_persist.errors import DspexError
from dspex_persist.infra.access.admission import Admission
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traffic import traffic_of

# A drain refuses late calls until none has come for _QUIET_S, but not longer than _LONGEST_QUIET_S in all.
_QUIET_S: Final = 0.05
_LONGEST_QUIET_S: Final = 1.0
# Clients may refuse trailing metadata above 8 KiB, and then report RESOURCE_EXHAUSTED instead of the status.
_DETAILS_MAX_BYTES: Final = 3_500
_TRAILERS_MAX_BYTES: Final = 4_000

_log: Final = get_logger(__name__)

# Quoted: generic in their stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Metadatum: TypeAlias = tuple[str, str | bytes]


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """The status that reports an error to a client. Details and metadata are shortened to fit into 8 KiB."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[Metadatum, ...] = ()


StatusOf: TypeAlias = Callable[[Exception], RpcStatus | None]
"""The table of known errors: returns the status of an error, or None for an unknown one."""
Admit: TypeAlias = Callable[[str, Context, "asyncio.Task[Any] | None"], Admission | None]
"""Admits a call of an rpc, or raises. For a stream, it gets the task, and may end the stream later: see `Admission`."""


def admit_all(_rpc: str, _context: Context, _task: "asyncio.Task[Any] | None") -> None:
    """Admit everybody."""
    return


@dataclass(eq=False)
class UnreadableRequestError(DspexError):
    """The bytes of a request are not a message of the type that its rpc takes."""

    message_type: str

    def __str__(self) -> str:
        return f"the request is not a valid {self.message_type} message"


@dataclass(eq=False)
class NoRequestError(DspexError):
    """A call came without a request, or the request took too long."""

    def __str__(self) -> str:
        return "the call has no request, or did not send it in time"


@dataclass(eq=False)
class DrainingError(DspexError):
    """The call came after the drain had begun; nothing was done. `status_of` may have another status for it."""

    retryable = True

    def __str__(self) -> str:
        return "the server is shutting down; repeat the call later"


class Calls:
    """The calls in progress: counts them, refuses new ones during a drain, and answers those that fail."""

    def __init__(
        self,
        status_of: StatusOf,
        closing: asyncio.Event | None = None,
        belongs: Callable[[Context], bool] = lambda _: False,
        admit: Admit = admit_all,
    ) -> None:
        self.active = 0
        self._admit = admit
        self._traffic = traffic_of(asyncio.get_running_loop())
        self._status_of = status_of
        self._closing = closing or asyncio.Event()
        self._belongs = belongs
        self._idle: asyncio.Event | None = None
        self._refused = 0

    def enter(self, rpc: str, context: Context, task: "asyncio.Task[Any] | None" = None) -> Admission | None:
        """Count a call, until `leave`. Raises what `admit` does.

        Raises:
            DrainingError: The server is draining, and the call does not belong to one in progress.
        """
        self.active += 1
        self._traffic.calls += 1
        admission = self._admit(rpc, context, task)
        if self._closing.is_set() and not self._belongs(context):
            self._refused += 1
            if admission is not None:
                admission.end()
            raise DrainingError()
        return admission

    def leave(self, admission: Admission | None) -> None:
        """Note that a call has ended."""
        if admission is not None:
            admission.end()
        self.active -= 1
        self._traffic.calls -= 1
        if self._idle is not None and not self.active:
            self._idle.set()

    async def finished(self, timeout_s: float) -> bool:
        """Wait until no call is left, or `timeout_s` is over; returns whether none is left.

        It includes cancelled calls. gRPC does not wait for their clean-up, which uses resources that are closed next.
        """
        if not self.active:
            return True
        self._idle = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def quiet(self) -> None:
        """Wait until no more calls arrive that have to be refused.

        When gRPC stops, it answers calls that it has accepted but not yet passed on with a bare CANCELLED, which looks
        to clients as if they had cancelled the call themselves.
        """
        for _ in range(round(_LONGEST_QUIET_S / _QUIET_S)):
            before = self._refused
            await asyncio.sleep(_QUIET_S)
            if self._refused == before:
                return

    async def fail(self, rpc: str, context: Context, error: BaseException) -> NoReturn:
        """Answer a call that raised `error`; always raises the exception that gRPC expects."""
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if isinstance(error, grpc.aio.AbortError) or (is_cancelled and _is_being_cancelled()):
            _release_frames(error)
            raise error
        if is_cancelled:
            # Something that the call waited for was cancelled, not the call. gRPC would never answer the client.
            status = _internal_error(rpc, error)
        elif isinstance(error, Exception):
            status = self._status(rpc, error)
        else:
            raise error
        _release_frames(error)
        trailers = _fitting_trailers(status.trailing_metadata)
        try:
            await context.abort(status.code, _fitting_details(status.details), trailers)
        except grpc.aio.AbortError as aborted:
            # gRPC's context and this exception form a cycle; without this, it would also keep the call's error alive.
            aborted.__context__ = None
            raise
        raise AssertionError("abort always raises")

    def _status(self, rpc: str, error: Exception) -> RpcStatus:
        if isinstance(error, UnreadableRequestError | NoRequestError):
            return RpcStatus(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            known = self._status_of(error)
        except Exception as table_error:  # noqa: BLE001 -- the last boundary: logs every error
            return _internal_error(rpc, table_error)
        if known is None and isinstance(error, DrainingError):
            return RpcStatus(grpc.StatusCode.UNAVAILABLE, str(error))
        return known or _internal_error(rpc, error)


def _release_frames(error: BaseException) -> None:
    """Drop the tracebacks and causes of a reported error, because their frames keep the whole request in memory."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        waiting += (each.__cause__, each.__context__)
        each.__traceback__ = each.__cause__ = each.__context__ = None


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _internal_error(rpc: str, error: BaseException) -> RpcStatus:
    reference = secrets.token_hex(4)
    _log.error("call failed", rpc=rpc, reference=reference, exc_info=error)
    return RpcStatus(grpc.StatusCode.INTERNAL, f"internal error, reference {reference}")


def _fitting_details(details: str) -> str:
    """Shorten `details` to the size limit, and replace lone surrogates, with which gRPC would not answer at all."""
    text = details[:_DETAILS_MAX_BYTES].encode(errors="replace").decode()
    left_bytes = _DETAILS_MAX_BYTES
    for index, character in enumerate(text):
        # gRPC percent-encodes each byte that is not printable ASCII.
        left_bytes -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if left_bytes < 0:
            return text[:index] + "..."
    return text if len(details) <= _DETAILS_MAX_BYTES else text + "..."


def _fitting_trailers(metadata: tuple[Metadatum, ...]) -> tuple[Metadatum, ...]:
    """The entries that gRPC can send and that fit; one that is too large is skipped, and later ones may still fit."""
    kept: list[Metadatum] = []
    left_bytes = _TRAILERS_MAX_BYTES
    for key, value in metadata:
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            continue  # gRPC would refuse it, and not answer at all
        # HTTP/2 counts 32 bytes for each entry; binary values are sent as base64.
        size_bytes = 32 + len(key) + (len(value) * 4 // 3 if isinstance(value, bytes) else len(value))
        if size_bytes <= left_bytes:
            left_bytes -= size_bytes
            kept.append((key, value))
    return tuple(kept)
