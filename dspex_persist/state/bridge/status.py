"""Errors to gRPC statuses and back, from one table that knows every leaf of `state.errors`."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from dspex_persist.infra.server import DrainingError, RpcStatus
from dspex_persist.state import errors
from dspex_persist.state.bridge.headers import AFTER_SEQUENCE, ARGUMENTS, HINT
from dspex_persist.state.bridge.hints import IN_RPCS
from dspex_persist.state.errors import Hint, StateError

DOMAIN = "dspex-persist"
DETAILS_KEY = "grpc-status-details-bin"
# There is room for some kilobytes of metadata (base64 adds a third), and what does not fit is left out whole.
_DETAILS_BYTES = 2_900
_FIELD_LENGTHS = (None, 300, 60)
_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)")

CODES: dict[type[StateError], StatusCode] = {
    errors.InvalidArgumentError: StatusCode.INVALID_ARGUMENT,
    errors.SessionNotFoundError: StatusCode.NOT_FOUND,
    errors.SessionExistsError: StatusCode.ALREADY_EXISTS,
    errors.SessionPrunedError: StatusCode.FAILED_PRECONDITION,
    errors.DamagedSessionError: StatusCode.DATA_LOSS,
    errors.VariableNotFoundError: StatusCode.NOT_FOUND,
    errors.VersionNotFoundError: StatusCode.NOT_FOUND,
    errors.VersionPrunedError: StatusCode.NOT_FOUND,
    errors.VariableExistsError: StatusCode.ALREADY_EXISTS,
    errors.UnknownTypeError: StatusCode.INVALID_ARGUMENT,
    errors.InvalidValueError: StatusCode.INVALID_ARGUMENT,
    errors.InvalidConstraintsError: StatusCode.INVALID_ARGUMENT,
    errors.LimitExceededError: StatusCode.RESOURCE_EXHAUSTED,
    errors.VersionConflictError: StatusCode.ABORTED,
    errors.VariableReplacedError: StatusCode.ABORTED,
    errors.VariableLockedError: StatusCode.FAILED_PRECONDITION,
    errors.NotOptimizingError: StatusCode.FAILED_PRECONDITION,
    errors.DependencyCycleError: StatusCode.FAILED_PRECONDITION,
    errors.IdempotencyConflictError: StatusCode.INVALID_ARGUMENT,
    errors.ToolNotFoundError: StatusCode.NOT_FOUND,
    errors.ToolExistsError: StatusCode.ALREADY_EXISTS,
    errors.ToolArgumentError: StatusCode.INVALID_ARGUMENT,
    errors.MissingVariablesError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionNotFoundError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionEndedError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionConflictError: StatusCode.ABORTED,
    errors.ToolFailedError: StatusCode.ABORTED,
    errors.ToolInterruptedError: StatusCode.ABORTED,
    errors.ToolTimedOutError: StatusCode.DEADLINE_EXCEEDED,
    errors.RemoteToolError: StatusCode.UNAVAILABLE,
    errors.NotInHistoryError: StatusCode.NOT_FOUND,
    errors.RecordingError: StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedError: StatusCode.UNIMPLEMENTED,
    errors.QueueFullError: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyWatchersError: StatusCode.RESOURCE_EXHAUSTED,
    errors.WatchStalledError: StatusCode.ABORTED,
    errors.StorageError: StatusCode.UNAVAILABLE,
    errors.ReadFailedError: StatusCode.UNAVAILABLE,
    errors.FileChangedError: StatusCode.DATA_LOSS,
    errors.OutcomeUnknownError: StatusCode.UNKNOWN,
    errors.UnavailableError: StatusCode.UNAVAILABLE,
    errors.EngineClosedError: StatusCode.UNAVAILABLE,
    errors.ForkedProcessError: StatusCode.FAILED_PRECONDITION,
    errors.ShuttingDownError: StatusCode.UNAVAILABLE,
    errors.InternalError: StatusCode.INTERNAL,
    errors.CheckpointError: StatusCode.INTERNAL,
    errors.DatabaseInUseError: StatusCode.FAILED_PRECONDITION,
    errors.NotADatabaseError: StatusCode.FAILED_PRECONDITION,
    errors.NewerSchemaError: StatusCode.FAILED_PRECONDITION,
    errors.UpgradeError: StatusCode.FAILED_PRECONDITION,
    errors.LostCommitsError: StatusCode.DATA_LOSS,
}

# The field of a request that an error speaks of, for google.rpc.BadRequest.
_FIELDS: dict[type[StateError], str] = {
    errors.UnknownTypeError: "type",
    errors.InvalidValueError: "value",
    errors.InvalidConstraintsError: "constraints_json",
    errors.IdempotencyConflictError: "x-dspex-idempotency-key",
    errors.ToolArgumentError: "parameters",
    errors.RecordingError: "recording",
}


# What a server that is newer than this release advises may be none of them.
_HINTS: Final[Mapping[object, Hint]] = {hint.value: hint for hint in Hint}

# By code and the names of the fields: two kinds of error may have one code.
_KINDS = {(kind.error_code, frozenset(field.name for field in fields(kind))): kind for kind in CODES}  # type: ignore[arg-type]


def status_of(error: BaseException) -> RpcStatus | None:
    """What a client is told of a `StateError`, or of a call that came too late; None for anything else."""
    if isinstance(error, DrainingError):
        error = errors.ShuttingDownError()
    if not isinstance(error, StateError):
        return None
    kind = next((kind for kind in type(error).__mro__ if kind in CODES), None)
    if kind is None:
        return None
    code = CODES[kind]
    details = text_of(error)
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, _rich(error, kind, code, details))]
    if isinstance(error, errors.WatchStalledError):
        trailers.append((AFTER_SEQUENCE, str(error.after_sequence)))
    if error.advice is not None and error.advice is not kind.advice:
        trailers.append((HINT, error.advice.value))
    return RpcStatus(code, details, tuple(trailers))


def text_of(error: BaseException) -> str:
    """What clients over gRPC read of an error: where Python has methods and arguments, they have rpcs and headers."""
    return error.in_words(IN_RPCS) if isinstance(error, StateError) else str(error)


def _rich(error: StateError, kind: type[StateError], code: StatusCode, details: str) -> bytes:
    """google.rpc.Status: the error's code and fields, whole if there is room for them."""
    field = error.field if isinstance(error, errors.InvalidArgumentError) else _FIELDS.get(kind, "")
    # A lone surrogate is no character: no message can carry it.
    field, details = (text.encode(errors="backslashreplace").decode() for text in (field, details))
    for length in _FIELD_LENGTHS:
        info, violation = AnyMessage(), AnyMessage()
        info.Pack(ErrorInfo(reason=kind.error_code, domain=DOMAIN, metadata=_fields_of(error, length)))
        status = Status(code=code.value[0], message=_cut(details, length), details=[info])
        if code is StatusCode.INVALID_ARGUMENT:
            described = BadRequest.FieldViolation(field=_cut(field, length), description=_cut(details, length))
            violation.Pack(BadRequest(field_violations=[described]))
            status.details.append(violation)
        if status.ByteSize() <= _DETAILS_BYTES:
            break
    serialized: bytes = status.SerializeToString()
    return serialized


def _fields_of(error: StateError, length: int | None = None) -> dict[str, str]:
    found: dict[str, Any] = asdict(error)  # type: ignore[call-overload]
    return {name: json.dumps(_cut(field, length)) for name, field in found.items()}


def _cut(field: Any, length: int | None) -> Any:
    return f"{field[:length]}..." if isinstance(field, str) and length is not None and len(field) > length else field


def facts_of(error: BaseException | None) -> str:
    """The fields of an error that travels in an answer, as JSON; "" if it has none of ours."""
    return json.dumps(_fields_of(error)) if isinstance(error, StateError) and type(error) in CODES else ""


def error_in(error_code: str, facts: str) -> StateError | None:
    """The error of such a code and such fields; None if this release knows none."""
    found = json.loads(facts) if facts else {}
    return _made(error_code, found) if isinstance(found, dict) else None


def _made(error_code: str, found: Mapping[str, str]) -> StateError | None:
    kind = _KINDS.get((error_code, frozenset(found)))
    return None if kind is None else kind(**{name: json.loads(text) for name, text in found.items()})


def error_of(
    code: StatusCode, details: str, trailers: Iterable[tuple[str, str | bytes]], target: str = ""
) -> StateError:
    """The error that a server meant; where it does not say, the one that the status code comes closest to."""
    found = dict(trailers)
    content = found.get(DETAILS_KEY)
    known = _parse(content) if isinstance(content, bytes) else None
    if known is not None:
        hint = _HINTS.get(found.get(HINT))
        return _in_python(known if hint is None else known.advising(hint))
    too_large = _TOO_LARGE.search(details)
    if too_large is not None:
        actual, most = map(int, too_large.groups())
        return errors.LimitExceededError("size of the message in bytes", actual, most, "max_message_bytes")
    if code is StatusCode.CANCELLED and "channel closed" in details.lower():
        return errors.EngineClosedError()
    meant = _MEANT.get(code)
    return errors.InternalError(f"{code.name}: {details}") if meant is None else meant(target, details or code.name)


def _in_python(error: StateError) -> StateError:
    """The error, with the argument's name where the server knows a header."""
    if isinstance(error, errors.InvalidArgumentError) and error.field in ARGUMENTS:
        return replace(error, field=ARGUMENTS[error.field])
    if isinstance(error, errors.UnavailableError) and AFTER_SEQUENCE in error.reason:
        return replace(error, reason=error.reason.replace(f"{AFTER_SEQUENCE}: ", f"{ARGUMENTS[AFTER_SEQUENCE]}="))
    return error


def never_sent(details: str) -> bool:
    """Whether gRPC says that there was no connection over which a call could have gone."""
    return any(words in details.lower() for words in ("failed to connect", "connection refused", "resolution failed"))


def unreachable(target: str, details: str) -> errors.UnavailableError:
    """That a server does not answer, in fewer words than gRPC's, and what to do."""
    if not target:
        return errors.UnavailableError(details)
    if not never_sent(details):
        return errors.UnavailableError(f"{target}: {details}")
    cause = details.rpartition(": ")[2].strip(" .") or "no connection"
    reason = f"cannot connect to {target} ({cause}); is the server running? Start it with `dspex-persist serve`"
    return errors.UnavailableError(reason)


def unreadable(target: str, fault: Exception) -> errors.InternalError:
    """That an answer says what this release does not know; `fault`: what came of reading it."""
    reason = f"{target} answered what this release cannot read ({type(fault).__name__}: {fault}); is it newer?"
    return errors.InternalError(reason)


def _parse(content: bytes) -> StateError | None:
    info = ErrorInfo()
    for detail in Status.FromString(content).details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            return _made(info.reason, info.metadata)
    return None


_MEANT: Final[Mapping[StatusCode, Callable[[str, str], StateError]]] = {
    StatusCode.UNAVAILABLE: unreachable,
    StatusCode.DEADLINE_EXCEEDED: unreachable,
    StatusCode.RESOURCE_EXHAUSTED: lambda _, details: errors.UnavailableError(details),
    StatusCode.UNIMPLEMENTED: lambda _, details: errors.UnsupportedError(details),
}
"""What a status means that gRPC gives by itself, or a server that is not ours. Any other is a fault."""


_CONNECTION_LOST: Final = frozenset({StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED})


def is_told(call: Any) -> bool:
    """Whether the server itself says what went wrong, and not gRPC."""
    return any(key == DETAILS_KEY for key, _ in call.trailing_metadata() or ())


def is_lost(call: Any) -> bool:
    """Whether a call ended with its connection, so that nobody knows what the server made of it."""
    return call.code() in _CONNECTION_LOST and not is_told(call)


def error_of_call(call: Any, target: str = "") -> StateError:
    """The error in a failed call of the synchronous client (grpc.RpcError, which also is a grpc.Call)."""
    return error_of(call.code(), call.details() or "", tuple(call.trailing_metadata() or ()), target)


def error_of_write(call: Any, target: str) -> StateError:
    """The error in a failed call that writes: an `OutcomeUnknownError` where the server may have written anyway."""
    details = call.details() or call.code().name
    if is_lost(call) and not never_sent(details):
        return errors.OutcomeUnknownError(f"the connection to {target} broke: {details}")
    return error_of_call(call, target)
